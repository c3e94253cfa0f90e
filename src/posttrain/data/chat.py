"""Conversations to token ids with trainable spans: the one render path of training, evaluation and sampling.

A conversation is rendered once per assistant turn, up to it (with the generation prompt) and through it; the
difference of the two texts is what the model has to produce. The template's own assistant mask is never asked.
Context and spans are tokenised apart, so that a trained span follows exactly the tokens a sampler is given.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jinja2

from posttrain.data.shapes import Malformed
from posttrain.records import Example, Message, UserError

_STAND_IN = 0x100000
"""First of the private-use characters (plane 16) that stand for special tokens written in data."""

_TURN = "\U0010fffd"
"""The last of them: what an assistant said, where only what follows it is wanted."""
TOOLS_LEFT_OUT = "the chat template leaves the tools out; model.chat_template: chatml writes them"


@dataclass(frozen=True, slots=True)
class Rendered:
    """One training sequence (or pair of them) as tokens. `*_target` is True where a token carries loss."""

    example: Example
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...] = ()
    completion_target: tuple[bool, ...] = ()
    rejected_ids: tuple[int, ...] = ()
    rejected_target: tuple[bool, ...] = ()


class _Piece(NamedTuple):
    text: str
    target: bool


class Renderer:
    """Renders with `tokenizer` and its chat template.

    `system` is put before conversations that have no system message. Raises UserError for a template that is
    missing or broken, and Malformed for a single conversation that the template refuses. `notes` collects, once
    each, what a user should know of the rendering.
    """

    def __init__(self, tokenizer: Any, system: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.system = system
        self.notes: list[str] = []
        special = {str(t) for t in tokenizer.all_special_tokens}
        added = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        special |= set(added.values())
        self._special_ids = frozenset({*tokenizer.all_special_ids, *added})
        longest_first = sorted(special, key=lambda t: (-len(t), t))
        self._stand_in = {text: chr(_STAND_IN + i) for i, text in enumerate(longest_first)}
        self._typed = {mark: text for text, mark in self._stand_in.items()}
        self._find = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._marks = re.compile(f"([{chr(_STAND_IN)}-\U0010fffd])")
        bare, full = self._encode("a"), tuple(tokenizer("a")["input_ids"])
        starts = (i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        self._text_start = full[: next(starts, 0)]
        if self.decode((*bare, *bare)) != "aa":
            self._note("the tokenizer puts a space where separately tokenised pieces meet")

    # What the rest of the system calls

    def prompt_ids(self, example: Example) -> tuple[int, ...]:
        """The tokens a sampler continues: the prompt with the template's generation prompt, and what is begun."""
        conversation, tools = self._conversation(example, example.prompt)
        return (*self._ids(self._context(conversation, tools)), *example.begun)

    def following(
        self, last: int, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[int, ...]:
        """The tokens between a sampled turn, whose last token is `last`, and the next: `messages` and the generation
        prompt. The turn itself is not asked for, for its tokens stay those that were drawn.
        """
        turns = ({"role": "user", "content": "?"}, {"role": "assistant", "content": _TURN})
        text = self._text((*turns, *self._neutral(tuple(messages))), self._neutral(tuple(tools)), generate=True)
        _, found, rest = text.partition(_TURN)
        if not found:
            raise Malformed("the chat template leaves out what an assistant said; give another one")
        end = self._find.match(rest)
        if end and last in self._special_ids:
            rest = rest[end.end() :]  # the turn has its end token
        return self._encode(rest)

    def render(self, example: Example) -> tuple[Rendered, ...]:
        """`example` as one sequence or pair, or as one per assistant turn where the template rewrites history."""
        if example.text is not None:
            return (self._render_text(example, example.text),)
        sides = [s for s in (example.completion, example.rejected) if s]
        if not sides:
            raise Malformed("there is no completion")
        done = [self._side(example, side) for side in sides]
        if len(done) == 2:
            (first, *more), (second, *others) = done
            if more or others:
                raise Malformed(
                    "the chat template rewrites earlier turns, so a pair of several turns cannot be kept whole"
                )
            if first.prompt_ids != second.prompt_ids:
                raise Malformed("the chat template renders the prompt differently for chosen and rejected")
            pair = dataclasses.replace(
                first, rejected_ids=second.completion_ids, rejected_target=second.completion_target
            )
            return (pair,)
        return tuple(done[0])

    def decode(self, ids: Sequence[int]) -> str:
        """A completion as text, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    # Conversation to pieces of text

    def _side(self, example: Example, side: tuple[Message, ...]) -> list[Rendered]:
        messages, tools = self._conversation(example, (*example.prompt, *side))
        first = len(messages) - len(side)
        learned = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
        if not learned:
            raise Malformed("there is no assistant turn to learn")
        whole = self._whole(messages, tools, first)
        if whole is not None:
            return [self._rendered(example, *whole)]
        self._note("the chat template rewrites earlier turns: a conversation becomes one sequence per assistant turn")
        return [
            self._rendered(example, self._context(messages[:i], tools), [self._turn(messages[: i + 1], tools)])
            for i in learned
        ]

    def _whole(
        self, messages: tuple[Message, ...], tools: tuple[Any, ...], first: int
    ) -> tuple[list[_Piece], list[_Piece]] | None:
        """Prompt and completion pieces of the conversation as one sequence; None where turns change later."""
        pieces = self._pieces(messages, tools)
        if pieces is None:
            return None
        before = sum(m["role"] == "assistant" for m in messages[:first])
        cut = 2 * before + 1  # pieces go context, span, context, span, ..., what follows the last span
        return pieces[:cut], pieces[cut:-1]

    def _pieces(self, messages: tuple[Message, ...], tools: tuple[Any, ...]) -> list[_Piece] | None:
        """Contexts and spans in turn, ending with what follows the last span; None if text is not kept."""
        done, pieces = "", []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._text(messages[:i], tools, generate=True)
            if not before.startswith(done):
                return None
            span = self._turn(messages[: i + 1], tools)
            pieces += [_Piece(before[len(done) :], False), span]
            done = before + span.text
        full = self._text(messages, tools, generate=messages[-1]["role"] != "assistant")
        if not full.startswith(done):
            return None
        return [*pieces, _Piece(full[len(done) :], False)]

    def _context(self, messages: tuple[Message, ...], tools: tuple[Any, ...]) -> list[_Piece]:
        """What a sampler is given; assistant turns inside are tokenised apart, as they are in training."""
        if messages and messages[-1]["role"] == "assistant":
            raise Malformed("the prompt ends with an assistant turn; there is nothing to answer")
        pieces = self._pieces(messages, tools) if messages else None
        return pieces or [_Piece(self._text(messages, tools, generate=True), False)]

    def _turn(self, messages: tuple[Message, ...], tools: tuple[Any, ...]) -> _Piece:
        """The last message, an assistant's, as the model has to write it: through its end token."""
        before = self._text(messages[:-1], tools, generate=True)
        through = self._text(messages, tools, generate=False)
        if not through.startswith(before):
            raise Malformed(
                "the chat template's generation prompt is not how it begins an assistant turn, so nothing sampled "
                "from it can be trained on; give another one in model.chat_template"
            )
        written = through[len(before) :]
        for call in messages[-1].get("tool_calls", ()):
            if call["function"]["name"] not in written:
                raise Malformed("the chat template leaves tool calls out; model.chat_template: chatml writes them")
        ends = [m.end() for m in self._find.finditer(written)]
        if ends and not written[ends[-1] :].strip():
            written = written[: ends[-1]]  # the newline after the end token belongs to the next context
        return _Piece(written, True)

    def _conversation(
        self, example: Example, messages: tuple[Message, ...]
    ) -> tuple[tuple[Message, ...], tuple[Any, ...]]:
        if self.system and not any(m["role"] == "system" for m in messages):
            messages = ({"role": "system", "content": self.system}, *messages)
        return self._neutral(messages), self._neutral(example.tools)

    def _neutral(self, value: Any) -> Any:
        """`value` with every special token that data wrote replaced by its stand-in."""
        if isinstance(value, str):
            if self._marks.search(value):
                raise Malformed("it holds a private-use character above U+100000, one of the renderer's own stand-ins")
            return self._find.sub(lambda m: self._stand_in[m[0]], value)
        if isinstance(value, Mapping):
            return {k: v if k == "role" else self._neutral(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._neutral(v) for v in value)
        return value

    def _text(self, messages: Sequence[Message], tools: Sequence[Any], *, generate: bool) -> str:
        if not self.tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template; set model.chat_template to chatml or to a Jinja file")
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, add_generation_prompt=generate, tokenize=False
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from None
        except Exception as error:  # whatever a template's expressions may raise
            raise self._refusal(messages, error) from None
        for message in messages:
            if message["role"] == "system" and message["content"].strip() not in text:
                self._note("the chat template leaves the system prompt out")
        if tools and not any(tool["function"]["name"] in text for tool in tools):
            self._note(TOOLS_LEFT_OUT)
        return text

    def _refusal(self, messages: Sequence[Message], error: Exception) -> Exception:
        """Why the template refused: its system role, or what it says itself."""
        roles = "/".join(m["role"] for m in messages) or "nothing"
        way_out = "; change the conversation or give another one in model.chat_template"
        if messages and messages[0]["role"] == "system":
            try:
                self.tokenizer.apply_chat_template(list(messages[1:]), add_generation_prompt=True, tokenize=False)
            except Exception:  # then the system message was not the reason
                return Malformed(f"the chat template refuses {roles} ({error}){way_out}")
            why = f"the chat template has no system role ({error})"
            if messages[0]["content"] == self._neutral(self.system):
                return UserError(f"{why}; leave `system` out, or give another one in model.chat_template")
            return Malformed(f"{why}; remove the system message or give another template in model.chat_template")
        return Malformed(f"the chat template refuses {roles} ({error}){way_out}")

    # Text to tokens

    def _rendered(self, example: Example, prompt: list[_Piece], completion: list[_Piece]) -> Rendered:
        ids: list[int] = []
        target: list[bool] = []
        for piece in completion:
            new = self._ids([piece])
            ids += new
            target += [piece.target] * len(new)
        return Rendered(example, self._ids(prompt), tuple(ids), tuple(target))

    def _ids(self, pieces: Sequence[_Piece]) -> tuple[int, ...]:
        ids: list[int] = []
        for piece in pieces:
            ids += self._encode(piece.text)
            if piece.target and (not ids or ids[-1] not in self._special_ids):
                eos = self.tokenizer.eos_token_id
                if eos is None:
                    raise UserError(
                        "neither the chat template nor the tokenizer has an end token; give another model.chat_template"
                    )
                self._note(f"the chat template does not end an assistant turn; {self.tokenizer.eos_token} is appended")
                ids.append(eos)
        return tuple(ids)

    def _encode(self, text: str) -> tuple[int, ...]:
        """`text` without BOS or EOS; stand-ins become the special token's letters, never the token itself."""
        ids: list[int] = []
        for part in self._marks.split(text):
            typed = self._typed.get(part)
            # A special token's name cut in two is no longer one, in any tokenizer.
            for letters in (part,) if typed is None else (typed[:1], typed[1:]):
                if letters:
                    ids += self.tokenizer.encode(letters, add_special_tokens=False, verbose=False)
        return tuple(ids)

    def _render_text(self, example: Example, text: str) -> Rendered:
        """Raw text: what the tokenizer puts at the start, the text, EOS; the first token is what the others follow."""
        ids = (*self._text_start, *self._encode(self._neutral(text)))
        if self.tokenizer.eos_token_id is not None:
            ids += (self.tokenizer.eos_token_id,)
        return Rendered(example, ids[:1], ids[1:], (True,) * len(ids[1:]))

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)
