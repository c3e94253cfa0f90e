"""Chat templates: the built-in one, another in place of the model's own, and that a saved model keeps it."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_data_chat import CHATML as PLAIN
from test_data_chat import END, TOKENIZERS, example, make_tokenizer, raw, talk
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoTokenizer

from posttrain.data.chat import Renderer
from posttrain.models.policy import load
from posttrain.models.template import CHATML, end_of_turn, with_template
from posttrain.recipe.blocks import Lora
from posttrain.records import Example, UserError

OWN = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model on disk whose tokenizer has a template."""
    folder = tmp_path / "base"
    tiny_model("llama", seed=3).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "own.jinja"
    file.write_text(OWN)
    return file


# The built-in template


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_without_tools_chatml_is_plain_chatml(system: str | None) -> None:
    for turns in (talk("q", "a", "b", "c", system=system), talk("q", system=system)):
        texts = [
            make_tokenizer(template).apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=len(turns) < 3
            )
            for template in (CHATML, PLAIN)
        ]
        assert texts[0] == texts[1]


def test_tools_stand_in_the_one_system_turn() -> None:
    tools = ({"type": "function", "function": {"name": "add", "description": "Adds", "parameters": {}}},)
    renderer = Renderer(make_tokenizer(CHATML))
    for system in (None, "Be brief."):
        row = Example(id="t", prompt=talk("sum?", system=system), tools=tools)
        text = raw(renderer.tokenizer, renderer.prompt_ids(row))
        assert text.count("<|im_start|>system") == 1
        assert text.count("<|im_end|>") == 2
        assert ("system\nBe brief.\n\nYou can call" in text) == (system is not None)


def test_chatml_ends_turns_with_eos_where_there_is_no_im_end_and_says_so() -> None:
    tokenizer = make_tokenizer(None, special=["<s>", "</s>"])
    with pytest.warns(UserWarning, match=r"no <\|im_end\|>; chatml ends turns with </s>"):
        with_template(tokenizer, "chatml")
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
    (row,) = Renderer(tokenizer).render(example("q", "a"))
    assert raw(tokenizer, row.completion_ids) == "a</s>"
    tokenizer = make_tokenizer(None, special=["<s>", "</s>"])
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"neither <\|im_end\|> nor"):
        with_template(tokenizer, "chatml")


# Another template


def test_a_file_and_chatml_take_the_place_of_the_template(tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text(PLAIN)
    rows = []
    for template in (str(file), "chatml"):
        tokenizer = make_tokenizer(OWN)
        with_template(tokenizer, template)
        rows.append(Renderer(tokenizer).render(example("q", "a", "b", "c")))
    assert rows[0] == rows[1]


def test_what_cannot_be_a_template_is_refused(tmp_path: Path) -> None:
    tokenizer, file = tiny_tokenizer(), tmp_path / "t.jinja"
    with pytest.raises(UserError, match="'chatlm': neither `chatml` nor a file"):
        with_template(tokenizer, "chatlm")
    with pytest.raises(UserError, match="neither `chatml` nor a file"):
        with_template(tokenizer, str(tmp_path))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"t\.jinja.*utf-8"):
        with_template(tokenizer, str(file))
    file.write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    with pytest.raises(UserError, match=r"t\.jinja.*never learn to stop.*<\|im_end\|>"):
        with_template(tokenizer, str(file))
    file.write_text("{% for m in messages %}\n{{ m[")
    with pytest.raises(UserError, match=r"t\.jinja.*line 2"):
        with_template(tokenizer, str(file))
    file.write_text("{{ raise_exception('only with tools') }}")
    with pytest.raises(UserError, match=r"t\.jinja.*only with tools"):
        with_template(tokenizer, str(file))


@pytest.mark.parametrize("adapter", [None, Lora(r=4, alpha=8.0)])
@pytest.mark.parametrize("template", ["chatml", "own"])
def test_what_is_saved_keeps_the_given_template(
    base: Path, own: Path, tmp_path: Path, template: str, adapter: Lora | None
) -> None:
    """A stage's model is loaded from its folder alone, and so is the next stage's."""
    policy = load(str(base), chat_template=template if template == "chatml" else str(own), adapter=adapter)
    assert policy.tokenizer.chat_template == (CHATML if template == "chatml" else OWN) != tiny_tokenizer().chat_template
    policy.save(tmp_path / "one")
    own.unlink()
    again = load(str(tmp_path / "one"), adapter=adapter)
    again.save(tmp_path / "two")
    last = load(str(tmp_path / "two"), adapter=adapter)
    plain = AutoTokenizer.from_pretrained(tmp_path / "two")
    assert {t.chat_template for t in (again.tokenizer, last.tokenizer, plain)} == {policy.tokenizer.chat_template}
    assert last.eos_ids == policy.eos_ids == {2} | ({0} if template == "own" else set())
    asked = example("What is 1 + 2?", "3")
    assert Renderer(last.tokenizer).render(asked) == Renderer(policy.tokenizer).render(asked)


# End of turn


@pytest.mark.parametrize("name", END)
def test_end_of_turn_is_read_from_the_template(name: str) -> None:
    assert end_of_turn(TOKENIZERS[name]) == TOKENIZERS[name].convert_tokens_to_ids(END[name])


@pytest.mark.parametrize(
    "template", [None, "{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "{{ raise_exception('no') }}"]
)
def test_no_end_of_turn(template: str | None) -> None:
    assert end_of_turn(make_tokenizer(template)) is None
