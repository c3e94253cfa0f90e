"""The first step's check: quiet on a sound model, loud on a broken one, absent where it is switched off."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_policy
from tiny_runs import method_of, preference, sft, stage_of

from posttrain.forest.attention import Tree
from posttrain.recipe.blocks import Lora
from posttrain.records import Failure
from posttrain.training import oracle
from posttrain.training.loop import train


@pytest.mark.parametrize("adapter", [None, Lora(r=4)], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_packed_and_plain_agree_and_the_record_says_what_it_cost(tmp_path, kind, adapter):
    policy = tiny_policy(adapter=adapter)
    stage = stage_of(kind, steps=1, batch_size=4)
    train(policy, method_of(kind, policy, stage, tmp_path), stage, tmp_path, 0)
    found = json.loads((tmp_path / "oracle.json").read_text())
    assert found["step"] == 0
    assert found["rows"] >= 1
    assert found["tokens"] > 0
    assert found["value"] < 1e-4
    assert found["gradient"] < 1e-4
    assert found["seconds"] > 0


def test_it_leaves_no_trace_in_the_training(tmp_path):
    losses = []
    for check in (True, False):
        policy = tiny_policy()
        stage = stage_of("sft", steps=2, check_first_step=check)
        train(policy, sft(stage), stage, tmp_path / str(check), 0)
        losses.append({name: p.detach().clone() for name, p in policy.parameters().items()})
        assert (tmp_path / str(check) / "oracle.json").exists() == check
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])


@pytest.mark.parametrize("fault", ["value", "gradient"])
def test_a_wrong_attention_stops_the_run_before_its_first_step(tmp_path, monkeypatch, fault):
    right = Tree.attend

    def wrong(self, layer, query, key, value, scoring):
        if fault == "value":
            return right(self, layer, query, key, value, scoring._replace(scale=scoring.scale * 1.5))
        value = value.detach() + 0.5 * (value - value.detach())  # the same number, half its gradient
        return right(self, layer, query, key, value, scoring)

    monkeypatch.setattr(Tree, "attend", wrong)
    policy = tiny_policy()
    before = policy.digest()
    stage = stage_of("sft", steps=1)
    with pytest.raises(Failure, match="disagrees with the plain one"):
        train(policy, sft(stage), stage, tmp_path, 0)
    assert policy.digest() == before


def test_rows_are_taken_up_to_a_bound_in_whole_units():
    policy = tiny_policy()
    stage = stage_of("dpo", steps=1, batch_size=4)
    batch = preference(policy, stage).batch(0)
    assert oracle.compare(policy, sft(stage_of("sft", steps=1)), batch, tokens=1)["rows"] == 2
