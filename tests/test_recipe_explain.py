"""What `explain` and `schema` say is what the schema does."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from posttrain.recipe import tree
from posttrain.recipe.blocks import Optim
from posttrain.recipe.explain import explain, json_schema, keys, lookup
from posttrain.recipe.rl import Grpo
from posttrain.recipe.schema import Recipe
from posttrain.records import UserError


def test_every_key_is_described_and_found_by_its_own_path() -> None:
    assert len({k.path for k in keys()}) == len(keys())
    for key in keys():
        assert key.description, key.path
        assert lookup(key.path) == [key]
        assert explain(key.path).startswith(key.path)


def test_every_named_inner_key_has_an_entry() -> None:
    paths = {k.path for k in keys()}
    assert {f"{k.path}.{name}" for k in keys() for name in k.keys} <= paths


def test_defaults_shown_are_those_a_recipe_gets() -> None:
    stage = {"id": "a", "kind": "grpo", "steps": 1, "data": {"sources": [{"source": "x.jsonl"}]}}
    recipe = Recipe.model_validate({"schema": 1, "name": "n", "model": {"source": "m"}, "stages": [stage]})
    got = recipe.stages[0].model_dump(mode="json", by_alias=True)
    got["rewards"] = [{"kind": "verifier"}]  # the other keys of an entry have defaults of their own
    for key in keys():
        head, _, name = key.path.removeprefix("stages.grpo.").partition(".")
        if not key.path.startswith("stages.grpo.") or key.default.startswith(("none;", "its keys'")):
            continue
        if head in ("optim", "sampling", "data") and name and "." not in name:
            assert json.loads(key.default) == got[head][name], key.path
        elif not name:
            assert json.loads(key.default) == got[head], key.path


def test_text_has_type_range_default_and_meaning() -> None:
    assert explain("stages.grpo.kl_weight").splitlines() == [
        "stages.grpo.kl_weight",
        "  Weight of the KL penalty towards the stage's starting model.",
        "  takes:    a number, at least 0",
        "  default:  0.0",
    ]
    assert "a whole number, at least 1" in explain("model.adapter.r")
    assert "none; it must be given" in explain("stages.sft.steps")


KINDS = (
    "continued_pretraining",
    "sft",
    "distill",
    "constitutional",
    "preference",
    "reward_model",
    "process_reward_model",
    "rejection_sampling",
    "online_preference",
    "self_rewarding",
    "grpo",
    "ppo",
)


def test_blocks_list_their_keys_and_kinds_their_paper() -> None:
    assert "2305.18290" in explain("stages.preference")
    assert "2106.09685" in explain("model.adapter")
    assert all(f"    {name} " in explain("stages") for name in KINDS)


def test_an_ending_names_one_key_of_several_kinds_with_each_default() -> None:
    assert [k.path for k in lookup("optim.lr")] == [f"stages.{kind}.optim.lr" for kind in KINDS]
    text = explain("optim.lr")
    for lr, those in {"0.0002": KINDS[:4], "5e-05": (KINDS[4], *KINDS[7:]), "0.0001": KINDS[5:7]}.items():
        assert f"{lr} ({', '.join(f'stages.{kind}.optim.lr' for kind in those)})" in text


def test_ambiguous_and_unknown_keys() -> None:
    with pytest.raises(UserError, match=r"`rows` may be .*evals\.retention\.rows.*say which"):
        explain("rows")
    with pytest.raises(UserError, match=r"did you mean `clip_high`"):
        explain("clip_hihg")
    with pytest.raises(UserError, match=r"did you mean `stages.grpo.clip_high`"):
        explain("stages.grpo.clip_higt")
    for nothing in ("", ".", "stages.", "..."):
        with pytest.raises(UserError, match="no key"):
            explain(nothing)


@pytest.mark.parametrize("block", [Optim, Grpo])
def test_limits_in_words_are_the_limits_that_hold(block: type[tree.Block]) -> None:
    """One step past each limit is refused, and the limit is named in the words."""
    base = {"kind": "grpo", "id": "a", "steps": 1, "data": {"sources": [{"source": "x"}]}} if block is Grpo else {}
    for name, field in tree.fields(block).items():
        for limit in field.metadata:
            for attribute, word, past in (("ge", "at least", -1), ("gt", "above", 0), ("lt", "below", 0)):
                if (value := getattr(limit, attribute, None)) is None:
                    continue
                assert f"{word} {value}" in tree.takes(field)
                with pytest.raises(ValidationError, match=name):
                    block.model_validate({**base, name: value + past})


def test_json_schema_is_plain_json_with_the_written_names() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert schema["$schema"].endswith("2020-12/schema")
    assert {"schema", "name", "model", "stages"} == set(schema["required"])
    assert schema["additionalProperties"] is False
    definitions = schema["$defs"]
    assert "from" in definitions["Grpo"]["properties"]
    assert "from_" not in json.dumps(schema)
    for name, block in definitions.items():
        assert all("description" in p for p in block["properties"].values()), name
    refs = set(_refs(schema))
    assert refs == {f"#/$defs/{name}" for name in definitions}


def _refs(node: object) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own + [r for value in node.values() for r in _refs(value)]
    return [r for value in node for r in _refs(value)] if isinstance(node, list) else []
