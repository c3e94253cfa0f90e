"""Saved reward models come back as what they were, and nothing else is taken for one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from scoring import answers, plain, saved, shaken
from tiny import tiny_model, tiny_policy, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

from posttrain.credit.batch import as_row
from posttrain.forest import Row, pack
from posttrain.models.policy import load
from posttrain.models.reward import headed, load_reward_model, marked, read
from posttrain.recipe.blocks import Lora
from posttrain.records import UserError

ADAPTERS = [None, Lora(r=4)]


def last(row: Row) -> Row:
    return Row(row.context, row.completion, (*[False] * (len(row.completion) - 1), True))


ROWS = [last(as_row(rollout)) for rollout in answers()]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=["full", "lora"])
def test_it_comes_back_the_same(tmp_path: Path, adapter: Lora | None) -> None:
    policy = saved(tmp_path, adapter)
    again = load_reward_model(str(tmp_path / "reward"))
    assert again.digest() == policy.digest() == json.loads((tmp_path / "reward/posttrain.json").read_text())["digest"]
    assert again.parameters().keys() == policy.parameters().keys()
    assert all(p.requires_grad for p in again.parameters().values())
    with torch.no_grad():
        torch.testing.assert_close(marked(again.model, pack(ROWS)), marked(policy.model, pack(ROWS)))
    again.save(tmp_path / "again")
    names = ["adapter_model.safetensors" if adapter else "model.safetensors"]
    for name in names:
        a, b = (load_file(tmp_path / folder / name) for folder in ("reward", "again"))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=["full", "lora"])
def test_it_says_what_plain_transformers_says(tmp_path: Path, adapter: Lora | None) -> None:
    saved(tmp_path, adapter)
    model, number = load_reward_model(str(tmp_path / "reward")).model, plain(tmp_path)
    wanted = [[number([*row.context, *row.completion])] for row in ROWS]
    for budget in (1, 40, 1000):  # one answer a pass, some, all together
        found = read(lambda forest: marked(model, forest), ROWS, budget)
        assert found == [pytest.approx(values, abs=1e-5) for values in wanted]
    assert len({round(value, 3) for [value] in wanted}) == len(ROWS)


def test_a_step_in_the_middle_has_the_number_of_the_sequence_that_ends_there(tmp_path: Path) -> None:
    saved(tmp_path)
    model, number = load_reward_model(str(tmp_path / "reward")).model, plain(tmp_path)
    row = ROWS[-1]
    every = Row(row.context, row.completion, (True,) * len(row.completion))
    [found] = read(lambda forest: marked(model, forest), [every], 100)
    prefixes = [[*row.context, *row.completion[: i + 1]] for i in range(len(row.completion))]
    assert found == pytest.approx([number(ids) for ids in prefixes], abs=1e-5)


def test_nothing_is_read_of_no_rows() -> None:
    assert read(lambda forest: forest.ids_T.float(), [], 10) == []


# What cannot be


def test_a_language_model_has_no_head(tmp_path: Path) -> None:
    tiny_policy().save(tmp_path / "base")
    shaken(load(str(tmp_path / "base"), adapter=Lora(r=4))).save(tmp_path / "adapter")
    for name in ("base", "adapter"):
        for how in (headed, load_reward_model):
            with pytest.raises(
                UserError, match=r"has no head that scores; train one with a stage of kind reward_model"
            ):
                how(str(tmp_path / name))


def test_its_base_must_be_the_one_it_was_trained_on(tmp_path: Path) -> None:
    saved(tmp_path, Lora(r=4))
    file = tmp_path / "base/model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"was trained on other weights than .*base now holds"):
        load_reward_model(str(tmp_path / "reward"))


@pytest.mark.parametrize(("lost", "why"), [("score", "cannot be loaded"), ("q_proj.lora_A", "adapter does not fit")])
def test_a_part_of_an_adapter_is_refused(tmp_path: Path, lost: str, why: str) -> None:
    saved(tmp_path, Lora(r=4))
    file = tmp_path / "reward/adapter_model.safetensors"
    weights = load_file(file)
    assert any(lost in name for name in weights)
    save_file({name: w for name, w in weights.items() if lost not in name}, file, {"format": "pt"})
    with pytest.raises(UserError, match=why):
        load_reward_model(str(tmp_path / "reward"))


def test_several_numbers_for_a_sequence_are_no_reward(tmp_path: Path) -> None:
    config = tiny_model().config
    config.num_labels = 3
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path / "classes")
    tiny_tokenizer().save_pretrained(tmp_path / "classes")
    with pytest.raises(UserError, match="gives one number for a sequence, and this one has 3 numbers"):
        load_reward_model(str(tmp_path / "classes"))


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "reward/model.safetensors"
    weights = load_file(file)
    save_file(weights | {"score.weight": weights["score.weight"] * float("nan")}, file, {"format": "pt"})
    with pytest.raises(UserError, match="hold NaN or infinity"):
        load_reward_model(str(tmp_path / "reward"))
