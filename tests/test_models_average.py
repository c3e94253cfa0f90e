"""Averages of weights: of whole models the mean of each, of adapters the mean of what they add."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scoring import saved, shaken
from tiny import tiny_policy

from posttrain.models.average import average
from posttrain.models.policy import load
from posttrain.models.reward import load_reward_model
from posttrain.recipe.blocks import Lora
from posttrain.records import UserError


def test_whole_reward_models(tmp_path: Path) -> None:
    for i in (1, 2, 3):
        saved(tmp_path, name=f"r{i}", seed=i)
    made = average([str(tmp_path / f"r{i}") for i in (1, 2, 3)], tmp_path / "mean")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("r1", "r2", "r3", "mean")]
    for key, tensor in weights[-1].items():
        torch.testing.assert_close(tensor, (weights[0][key] + weights[1][key] + weights[2][key]) / 3)
    again = load_reward_model(str(tmp_path / "mean"))
    assert made.digest == again.digest() == json.loads((tmp_path / "mean/posttrain.json").read_text())["digest"]


def test_adapters_are_averaged_in_what_they_add(tmp_path: Path) -> None:
    """(s/2) (B1 A1 + B2 A2), which is not s ((B1 + B2)/2) ((A1 + A2)/2): the latter has cross terms."""
    policies = [saved(tmp_path, Lora(r=4, alpha=8), name=f"r{i}", seed=i) for i in (1, 2)]
    made = average([str(tmp_path / "r1"), str(tmp_path / "r2")], tmp_path / "mean")
    mean = load_reward_model(str(tmp_path / "mean"))
    assert (made.kind, mean.adapter.r, mean.adapter.lora_alpha) == ("adapter", 8, 16)
    assert made.digest == mean.digest()
    name = "base_model.model.model.layers.1.self_attn.q_proj"

    def delta(policy: object) -> torch.Tensor:
        return policy.model.get_submodule(name).get_delta_weight("default")

    torch.testing.assert_close(delta(mean), (delta(policies[0]) + delta(policies[1])) / 2)
    heads = [p.parameters()["base_model.model.score.modules_to_save.default.weight"] for p in (*policies, mean)]
    torch.testing.assert_close(heads[2], (heads[0] + heads[1]) / 2)


def test_language_models_too(tmp_path: Path) -> None:
    shaken(tiny_policy(), seed=1).save(tmp_path / "a")
    shaken(tiny_policy(), seed=2).save(tmp_path / "b")
    made = average([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "mean")
    assert made.digest == load(str(tmp_path / "mean")).digest()


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, name="whole")
    saved(tmp_path, Lora(r=4), name="a4")
    saved(tmp_path, Lora(r=8), name="a8")
    saved(tmp_path, Lora(r=4, alpha=1), name="other")
    shaken(tiny_policy(hidden_size=64)).save(tmp_path / "wide")
    tiny_policy().save(tmp_path / "narrow")

    def refused(*names: str) -> str:
        with pytest.raises(UserError) as error:
            average([str(tmp_path / name) for name in names], tmp_path / "mean")
        assert not (tmp_path / "mean").exists()
        return str(error.value)

    assert "give at least two" in refused("whole")
    assert "has no model.safetensors as" in refused("whole", "a4")
    assert "is of another architecture or precision" in refused("a4", "a8")
    assert "is of another architecture or precision" in refused("narrow", "wide")
    assert "has another alpha than" in refused("a4", "other")
