"""A policy cut over workers is the policy in one piece: values, gradients, runs, and what is saved of it."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded import Here
from test_readme import by_path
from tiny import tiny_policy
from tiny_runs import (
    RENDERER,
    SEED,
    STAGES,
    SelfJudge,
    answered,
    grpo,
    method_of,
    online,
    paired,
    ppo,
    preference,
    prepared,
    rejection,
    rows_of,
    run,
    self_rewarding,
    stage_of,
)
from torch.distributed.tensor import DTensor
from workers import together

from posttrain.cluster.sharded import shard
from posttrain.models.reward import reward_model
from posttrain.recipe.blocks import Lora
from posttrain.recipe.preference import OnlinePreference, Preference, SelfRewarding
from posttrain.recipe.rl import RejectionSampling
from posttrain.recipe.scoring import ScoringStage
from posttrain.training.batch import chosen, frozen_logprobs
from posttrain.training.loop import train
from posttrain.training.reward import ends
from posttrain.training.world import Distributed

LORA = Lora(r=3, alpha=6)  # an odd rank: cut over two workers, one has less
TOLERANCE = 1e-5
"""Largest difference of a loss on one and on two workers in float32, relative to the loss or to 1 if that is more."""


@pytest.mark.parametrize("adapter", [LORA, None], ids=["lora", "full"])
def test_whole_again(adapter):
    """What is gathered is what was cut, before and after passes, with the frozen weights cut too; 3 over 2 workers."""
    for digest, again, reference, frozen, forms in together(2, _cut, adapter):
        policy = tiny_policy(adapter=adapter)
        assert digest == again == policy.digest()
        rows = [chosen(row) for row in prepared(answered()).rows[0]]
        assert_close(reference, frozen_logprobs(policy, rows, 64))
        moved = {name: weight * 2 for name, weight in policy.snapshot().items()}
        with policy.swapped(moved):
            assert_close(frozen, frozen_logprobs(policy, rows, 64))
        assert forms == {name: tuple(p.shape) for name, p in policy.parameters().items()}


def assert_close(ours: list[list[float]], theirs: list[list[float]]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, abs=TOLERANCE, rel=TOLERANCE)


def _cut(adapter: Lora | None) -> Any:
    world = Distributed()
    policy = shard(tiny_policy(adapter=adapter), world, always=True)
    digest = policy.digest()
    rows = [chosen(row) for row in prepared(answered()).rows[0]]
    reference = frozen_logprobs(policy, rows, 64, world=world)
    with policy.swapped({name: weight * 2 for name, weight in policy.snapshot().items()}):
        frozen = frozen_logprobs(policy, rows, 64, world=world)
    assert all(isinstance(p, DTensor) for p in policy.model.parameters())
    return digest, policy.digest(), reference, frozen, {n: tuple(w.shape) for n, w in policy.weights().items()}


def test_the_same_losses(tmp_path):
    together(2, _runs, tmp_path)
    for name, adapter in CASES:
        alone, ledger = run(name, tmp_path / "alone" / _folder(name, adapter), adapter, **SETTINGS)
        rows = rows_of(tmp_path / "alone" / _folder(name, adapter) / "metrics.jsonl")
        others = rows_of(tmp_path / "two" / _folder(name, adapter) / "metrics.jsonl")
        assert [row["step"] for row in others] == list(range(8))
        for a, b in zip(rows, others, strict=True):
            assert a.keys() == b.keys()
            assert b["loss"] == pytest.approx(a["loss"], rel=TOLERANCE, abs=TOLERANCE), (name, adapter, a["step"])
            # At the reference all margins are 0, and rounding decides their signs.
            stage = stage_of(name)
            refers = (isinstance(stage, Preference | OnlinePreference) and a["step"] == 0) or (
                isinstance(stage, SelfRewarding) and a["step"] % stage.round_steps == 0
            )
            sign = {"accuracy"} if refers else set()
            for key in (
                a.keys() - {"tokens"} - sign
            ):  # what is near zero, or the least of many, shows more of the rounding
                near = None if a[key] is None else pytest.approx(a[key], rel=1e-3, abs=1e-4)
                assert b[key] == near, (name, adapter, a["step"], key)
        weights, spent = torch.load(tmp_path / "two" / _folder(name, adapter) / "weights.pt", weights_only=False)
        assert {**spent, "seconds": 0, "shared_tokens": 0, "trained_tokens": 0, "flops": 0} == {
            **dataclasses.asdict(ledger),
            "seconds": 0,
            "shared_tokens": 0,
            "trained_tokens": 0,
            "flops": 0,
        }  # a context that two workers need is computed by both
        for n, weight in alone.weights().items():
            assert torch.allclose(weights[n], weight, atol=2e-5), (name, n)


@pytest.mark.parametrize("adapter", [LORA, None], ids=["lora", "full"])
def test_a_step_in_several_passes(tmp_path, adapter):
    """Its weights and gradient travel once; cut always, they travel in every pass. The losses are those of one."""
    together(2, _passes, tmp_path, adapter)
    alone, _ = run("sft", tmp_path / "alone", adapter, **SETTINGS, batch_size=6)
    losses = [row["loss"] for row in rows_of(tmp_path / "alone" / "metrics.jsonl")]
    sent = {}
    for always, budget in PASSES:
        folder = tmp_path / f"{always}-{budget}"
        found = [row["loss"] for row in rows_of(folder / "metrics.jsonl")]
        assert found == pytest.approx(losses, rel=TOLERANCE, abs=TOLERANCE)
        sent[always, budget] = json.loads((folder / "sent.json").read_text())
    assert sent[False, 16] == sent[False, 1000]
    weights = sum(p.nbytes for p in alone.parameters().values())
    for bytes_of_a_step in sent[False, 16].values():
        assert weights <= bytes_of_a_step <= weights * 4 / 3  # a rank of 3 is padded for two workers
    assert all(sent[True, 16][kind] > 2.9 * sent[True, 1000][kind] for kind in ("all-gather", "reduce-scatter"))


PASSES = [(always, budget) for always in (False, True) for budget in (16, 1000)]
"""Cut always or not, and the tokens of a pass: of 16, each row is a pass of its own."""


def _passes(out: Path, adapter: Lora | None) -> None:
    sent = by_path("benchmarks/collectives.py").counted()
    for always, budget in PASSES:
        folder = out / f"{always}-{budget}"
        counts: list[Counter[str]] = []
        settings = {**SETTINGS, "batch_size": 6, "tokens_per_forward": budget, "check_first_step": False}
        _run("sft", folder, adapter, always, on_step=lambda row, counts=counts: counts.append(sent.copy()), **settings)
        if Distributed().rank == 0:
            (folder / "sent.json").write_text(json.dumps(counts[1] - counts[0]))


SETTINGS = {"optim": {"lr": 1e-3}}
"""AdamW divides by the gradient's own size, so that a large step makes rounding large."""
CASES = [(name, adapter) for name in STAGES if "on-policy" not in name for adapter in (None, LORA)]


def _folder(name: str, adapter: Any) -> str:
    return f"{name}-{'lora' if adapter else 'full'}".replace(" ", "-")


def _runs(out: Path) -> None:
    for name, adapter in CASES:
        folder = out / "two" / _folder(name, adapter)
        policy, ledger = _run(name, folder, adapter, **SETTINGS)
        weights = policy.weights()
        if Distributed().rank == 0:
            torch.save((weights, dataclasses.asdict(ledger)), folder / "weights.pt")


def _run(
    name: str,
    folder: Path,
    adapter: Any,
    always: bool = False,
    on_step: Callable[[dict[str, Any]], None] = lambda row: None,
    **settings: Any,
) -> Any:
    world = Distributed()
    whole, stage = tiny_policy(adapter=adapter), stage_of(name, **settings)
    if isinstance(stage, ScoringStage):
        whole = reward_model(whole, ends(prepared(paired())), SEED)
    policy = shard(whole, world, always)
    if isinstance(stage, Preference):
        method = preference(policy, stage, world=world)
    elif name == "ppo":
        method = ppo(policy, stage, sampler=Here(policy, tiny_policy(adapter=adapter), RENDERER))
        method.world = world
    elif name.startswith("grpo"):
        method = grpo(policy, stage, sampler=Here(policy, tiny_policy(adapter=adapter), RENDERER))
        method.world = world
    elif isinstance(stage, SelfRewarding):
        sampler = SelfJudge(policy, Here(policy, tiny_policy(adapter=adapter), RENDERER))
        method = self_rewarding(policy, stage, folder, sampler)
        method.world = world
    elif isinstance(stage, OnlinePreference | RejectionSampling):
        sampler = Here(policy, tiny_policy(adapter=adapter), RENDERER)
        if isinstance(stage, OnlinePreference):
            method = online(policy, stage, sampler=sampler)
        else:
            method = rejection(policy, stage, folder, sampler=sampler)
        method.world = world
    else:
        method = method_of(name, policy, stage)
    return policy, train(policy, method, stage, folder, SEED, on_step, world=world)
