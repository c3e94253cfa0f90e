"""Chat templates: the built-in one, another one in place of a model's own, and where a template ends a turn."""

from __future__ import annotations

import warnings
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerBase

from posttrain.records import UserError

CHATML = """\
{%- if tools %}<|im_start|>system
{% if messages and messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}You can call these tools:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}A call is written <tool_call>{"name": ..., "arguments": {...}}</tool_call>.<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if not (tools and loop.first and message.role == 'system') %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>
{%- endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""The built-in template. `with_template` has it end turns with EOS where the tokenizer has no <|im_end|>."""


def with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Give `tokenizer` another chat template: `chatml`, or a Jinja file.

    Raises:
        UserError: the file cannot be read or rendered, or no special token of this vocabulary ends a turn.
    """
    text = _chatml(tokenizer) if template == "chatml" else _read(template)
    tokenizer.chat_template = text
    try:
        end = _end_of_turn(tokenizer)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"chat template {template!r}: not valid Jinja: line {error.lineno}: {error.message}") from None
    except Exception as error:  # whatever a template's expressions may raise
        raise UserError(f"chat template {template!r}: refuses a question and its answer ({error})") from None
    if end is None:
        raise UserError(
            f"chat template {template!r}: ends an assistant's turn with no special token of this model's "
            "vocabulary, so the model could never learn to stop; end the turn with one of "
            + ", ".join(repr(t) for t in tokenizer.all_special_tokens[:8])
        )


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes right after an assistant's answer, if there is one."""
    if not tokenizer.chat_template:
        return None
    try:
        return _end_of_turn(tokenizer)
    except Exception:  # a template may ask for anything: tools, a system turn, other content types
        return None


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    answer = "posttrain-answer"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    tail = tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
    special = _special(tokenizer)
    return next((i for i in tail if i in special), None)


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def _chatml(tokenizer: PreTrainedTokenizerBase) -> str:
    end = "<|im_end|>"
    if end in _special(tokenizer).values():
        return CHATML
    if tokenizer.eos_token is None:
        raise UserError(f"chat template 'chatml': this tokenizer has neither {end} nor a token for EOS; give a file")
    warnings.warn(f"the tokenizer has no {end}; chatml ends turns with {tokenizer.eos_token}", stacklevel=3)
    return CHATML.replace(end, tokenizer.eos_token)


def _read(template: str) -> str:
    try:
        return Path(template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat template {template!r}: neither `chatml` nor a file that can be read ({error})") from None
