"""The border between text and tokens, for templates that differ in what breaks renderers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from posttrain.data.chat import Renderer
from posttrain.data.shapes import Malformed
from posttrain.models.template import CHATML as BUILT_IN
from posttrain.records import Example, UserError

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL += ["[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>"]

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{{ eos_token }}"
    "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
THINKING = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif
%}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
NO_END = """{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
KEEPING = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA}
END = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>"}


def make_tokenizer(template: str | None, *, bos: bool = False, special: list[str] = SPECIAL) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    words = ["hello there, what is the sum of one and two? it is three.", "user assistant model system <|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(words * 3, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", special.index("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", additional_special_tokens=special[2:]
    )
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {name: make_tokenizer(template, bos=name == "llama3") for name, template in KEEPING.items()}


def talk(*contents: str, system: str | None = None) -> tuple[dict[str, str], ...]:
    roles = ("user", "assistant")
    turns = tuple({"role": roles[i % 2], "content": c} for i, c in enumerate(contents))
    return ({"role": "system", "content": system}, *turns) if system else turns


def example(*contents: str, prompt: int = 1, **more: object) -> Example:
    turns = talk(*contents)
    return Example(id="t:1", prompt=turns[:prompt], completion=turns[prompt:], **more)  # type: ignore[arg-type]


def raw(tokenizer: PreTrainedTokenizerFast, ids: tuple[int, ...]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def targets(row: object) -> list[tuple[int, ...]]:
    """Runs of target tokens."""
    runs: list[list[int]] = []
    before = False
    for token, target in zip(row.completion_ids, row.completion_target, strict=True):  # type: ignore[attr-defined]
        if target and not before:
            runs.append([])
        if target:
            runs[-1].append(token)
        before = target
    return [tuple(run) for run in runs]


plain = st.text(st.characters(exclude_categories=("Cs", "Co")), min_size=1, max_size=25).filter(lambda s: s.strip())
content = st.lists(plain | st.sampled_from([*SPECIAL, "<|im_", "end|>", "\n", " "]), min_size=1, max_size=4).map(
    "".join
)


@pytest.mark.parametrize("name", KEEPING)
@settings(max_examples=60, deadline=None)
@given(turns=st.lists(content.filter(lambda s: s.strip()), min_size=2, max_size=6).filter(lambda t: len(t) % 2 == 0))
def test_tokens_spell_the_template_text_and_targets_the_answers(name: str, turns: list[str]) -> None:
    if name == "llama3":
        turns = [t.strip() for t in turns]
    tokenizer = TOKENIZERS[name]
    (row,) = Renderer(tokenizer).render(example(*turns))
    text = tokenizer.apply_chat_template(list(talk(*turns)), tokenize=False)
    spelled = raw(tokenizer, row.prompt_ids + row.completion_ids)
    assert text == spelled + ("\n" if text.endswith("\n") else "")
    assert [raw(tokenizer, run) for run in targets(row)] == [t + END[name] for t in turns[1::2]]


@pytest.mark.parametrize("name", KEEPING)
@settings(max_examples=60, deadline=None)
@given(turns=st.lists(content.filter(lambda s: s.strip()), min_size=2, max_size=4).filter(lambda t: len(t) % 2 == 0))
def test_special_tokens_come_from_the_template_alone(name: str, turns: list[str]) -> None:
    tokenizer = TOKENIZERS[name]
    special = set(tokenizer.all_special_ids)
    (row,) = Renderer(tokenizer).render(example(*turns))
    (plainly,) = Renderer(tokenizer).render(example(*["x"] * len(turns)))
    count = [sum(t in special for t in r.prompt_ids + r.completion_ids) for r in (row, plainly)]
    assert count[0] == count[1]


@pytest.mark.parametrize("name", KEEPING)
def test_training_sees_exactly_what_sampling_is_given(name: str) -> None:
    """The prompt of each later turn is the earlier tokens of the same row, id for id."""
    renderer = Renderer(TOKENIZERS[name])
    turns = ["hello", "there, what", " is the sum", "three.\n\n", "one", "two"]
    (row,) = renderer.render(example(*turns))
    ids = row.prompt_ids + row.completion_ids
    for n in (1, 3, 5):
        prompt = renderer.prompt_ids(Example(id="t", prompt=talk(*turns[:n])))
        assert ids[: len(prompt)] == prompt
    (tail,) = renderer.render(example(*turns, prompt=5))
    assert tail.prompt_ids + tail.completion_ids == ids
    assert len(targets(tail)) == 1


def test_a_template_that_drops_thinking_gives_one_true_row_per_turn() -> None:
    tokenizer = make_tokenizer(THINKING)
    renderer = Renderer(tokenizer)
    turns = ["one?", "<think>a</think>1", "two?", "<think>b</think>2"]
    first, second = renderer.render(example(*turns))
    assert raw(tokenizer, first.completion_ids) == "<think>a</think>1<|im_end|>"
    assert raw(tokenizer, second.completion_ids) == "<think>b</think>2<|im_end|>"
    assert "think" not in raw(tokenizer, second.prompt_ids)
    assert second.prompt_ids == renderer.prompt_ids(Example(id="t", prompt=talk(*turns[:3])))
    assert len(renderer.notes) == 1
    assert "rewrites earlier turns" in renderer.notes[0]
    with pytest.raises(Malformed, match="pair"):
        renderer.render(example(*turns, rejected=talk(*turns)[1:3] + talk("x", "y")[1:]))


def test_without_an_end_token_eos_is_appended_everywhere_and_said() -> None:
    tokenizer = make_tokenizer(NO_END)
    renderer = Renderer(tokenizer)
    (row,) = renderer.render(example("one", "1", "two", "2"))
    assert [run[-1] for run in targets(row)] == [tokenizer.eos_token_id] * 2
    prompt = renderer.prompt_ids(Example(id="t", prompt=talk("one", "1", "two")))
    assert (row.prompt_ids + row.completion_ids)[: len(prompt)] == prompt
    assert any("</s> is appended" in note for note in renderer.notes)


@pytest.mark.parametrize("name", KEEPING)
def test_single_bos(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = Renderer(tokenizer).prompt_ids(example("hello", "there"))
    assert ids.count(tokenizer.bos_token_id) == (name != "chatml")


def test_pairs_share_the_prompt() -> None:
    tokenizer = TOKENIZERS["chatml"]
    (row,) = Renderer(tokenizer).render(example("q", "good", rejected=({"role": "assistant", "content": "bad one"},)))
    assert raw(tokenizer, row.completion_ids) == "good<|im_end|>"
    assert raw(tokenizer, row.rejected_ids) == "bad one<|im_end|>"
    assert all(row.completion_target)
    assert all(row.rejected_target)


def test_system_prompt_is_added_only_where_there_is_none() -> None:
    renderer = Renderer(TOKENIZERS["chatml"], system="Be brief.")
    text = raw(renderer.tokenizer, renderer.prompt_ids(example("q", "a")))
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    own = Example(id="t", prompt=talk("q", system="Be long."))
    assert "brief" not in raw(renderer.tokenizer, renderer.prompt_ids(own))


def test_a_template_without_system_role_names_the_way_out() -> None:
    with pytest.raises(UserError, match=r"no system role.*leave `system` out"):
        Renderer(TOKENIZERS["gemma"], system="Be brief.").render(example("q", "a"))
    own = Example(id="t", prompt=talk("q", system="Be long."), completion=talk("q", "a")[1:])
    with pytest.raises(Malformed, match="no system role"):
        Renderer(TOKENIZERS["gemma"]).render(own)
    silent = make_tokenizer(
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    renderer = Renderer(silent, system="Be brief.")
    renderer.render(example("q", "a"))
    assert renderer.notes == ["the chat template leaves the system prompt out"]


def test_a_generation_prompt_that_is_no_prefix_is_refused() -> None:
    forced = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    with pytest.raises(Malformed, match="generation prompt"):
        Renderer(make_tokenizer(forced)).render(example("q", "a"))


def test_missing_and_broken_templates() -> None:
    with pytest.raises(UserError, match=r"model\.chat_template"):
        Renderer(make_tokenizer(None)).render(example("q", "a"))
    with pytest.raises(UserError, match="not valid Jinja"):
        Renderer(make_tokenizer("{% for m in %}")).render(example("q", "a"))


def test_tools_and_calls_are_written_or_refused() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    tool = {"type": "function", "function": {"name": "add", "description": "Adds", "parameters": {}}}
    row = Example(
        id="t", prompt=talk("sum?"), tools=(tool,),
        completion=(
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "two"},
        ),
    )  # fmt: skip
    with pytest.raises(Malformed, match="tool calls"):
        Renderer(make_tokenizer(CHATML)).render(row)
    renderer = Renderer(make_tokenizer(BUILT_IN))
    (done,) = renderer.render(row)
    assert json.dumps(tool) in raw(renderer.tokenizer, done.prompt_ids)
    first, second = (raw(renderer.tokenizer, run) for run in targets(done))
    assert first == f"<tool_call>{json.dumps(call['function'])}</tool_call><|im_end|>"
    assert second == "two<|im_end|>"


@settings(max_examples=60, deadline=None)
@given(text=content)
def test_plain_text_starts_with_bos_ends_with_eos_and_spells_itself(text: str) -> None:
    tokenizer = TOKENIZERS["llama3"]
    (row,) = Renderer(tokenizer).render(Example(id="t", text=text))
    assert row.prompt_ids == (tokenizer.bos_token_id,)
    assert raw(tokenizer, row.completion_ids) == f"{text}</s>"
    assert row.completion_ids.count(tokenizer.bos_token_id) == 0
    assert all(row.completion_target)


def test_reserved_private_use_characters_are_refused() -> None:
    with pytest.raises(Malformed, match="private-use"):
        Renderer(TOKENIZERS["chatml"]).render(example("\U00100001", "a"))
    with pytest.raises(Malformed, match="private-use"):
        Renderer(TOKENIZERS["chatml"]).render(Example(id="t", text="\U00100001"))


def test_decode_leaves_special_tokens_out() -> None:
    renderer = Renderer(TOKENIZERS["chatml"])
    (row,) = renderer.render(example("q", " it is three. "))
    assert renderer.decode(row.completion_ids) == " it is three. "
