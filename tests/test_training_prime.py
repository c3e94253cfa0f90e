"""Process rewards that are learned on the way: the model against its formulas, and what it points at."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from test_pipeline_memory import terms_of
from test_training_methods import (
    ADAPTERS,
    LOOSE,
    Recorded,
    built,
    gradient,
    moved,
    plain_logps,
    policy64,
    same_gradient,
    some_unscored,
)
from tiny_runs import grpo, same, stage_of
from torch.nn.functional import binary_cross_entropy_with_logits
from toy import Table, ToySampler, learn, toy, toy_data

from posttrain.credit.advantages import group_advantages
from posttrain.recipe.blocks import Lora
from posttrain.recipe.rl import Grpo
from posttrain.records import Failure, Rollout, Score
from posttrain.training.grpo import GrpoMethod

PRIME = {"advantage": "leave_one_out", "kl_weight": 0.0}
BETA = 0.3
EPS = 1e-4
"""With the usual one AdamW turns the rounding of a gradient near 0 into whole steps."""


def steady(method: GrpoMethod) -> None:
    assert method.process is not None
    for group in method.process.optimizer.param_groups:
        group["eps"] = EPS


def outcome(rollouts: list[Rollout], scores: list[Score]) -> list[float | None]:
    """Reward less the mean of the others of the group, which is less the group's mean times n / (n - 1)."""
    found: list[float | None] = []
    for rollout, score in zip(rollouts, scores, strict=True):
        if score.value is None:
            found.append(None)
            continue
        group = [
            s.value for r, s in zip(rollouts, scores, strict=True) if r.group == rollout.group and s.value is not None
        ]
        centred = group_advantages(torch.tensor([group]), std="none")[0, group.index(score.value)].item()
        found.append(centred * len(group) / max(len(group) - 1, 1))
    return found


@pytest.mark.parametrize("adapter", ADAPTERS, ids=["full", "lora"])
def test_it_is_its_formulas(adapter: Lora | None) -> None:
    """Two batches. The model takes a step of AdamW on the mean of -log s(+-beta sum log(model / reference)), + where
    right; then a token earns beta log(model / reference), against the others' mean, summed to the end."""
    prime = {"beta": BETA, "gamma": 0.9, "lr": 2e-3}
    stage = stage_of("grpo", batch_size=6, check_first_step=False, **PRIME, prime=prime)
    policy, model, reference = policy64(adapter), policy64(adapter), policy64(adapter)
    sampler = Recorded(policy)
    method = grpo(policy, stage, some_unscored, sampler)
    moved(policy, 0.03)  # what samples is neither the model nor the reference
    adamw = torch.optim.AdamW(list(model.parameters().values()), lr=2e-3, eps=EPS, weight_decay=0.0)
    steady(method)
    for step in range(2):
        before = policy.snapshot()
        batch = method.batch(step)
        assert same(policy.snapshot(), before)
        assert all(p.grad is None for p in policy.parameters().values())

        rollouts = sampler.rollouts
        scores = [some_unscored(r.example, r.text) for r in rollouts]
        scored = [i for i, s in enumerate(scores) if s.value is not None]
        right = torch.tensor([float(scores[i].outcome == "correct") for i in scored], dtype=torch.float64)
        with torch.no_grad():
            origin = [plain_logps(reference, r.prompt_ids, r.ids) for r in rollouts]
        odds = [BETA * (plain_logps(model, rollouts[i].prompt_ids, rollouts[i].ids) - origin[i]).sum() for i in scored]
        loss = binary_cross_entropy_with_logits(torch.stack(odds), right)
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(model.parameters().values()), 1.0)
        adamw.step()
        assert batch.metrics["process_loss"] == pytest.approx(loss.item(), rel=1e-6)
        if step == 0:  # at the reference, where rounding decides what is above 0
            assert loss.item() == pytest.approx(math.log(2))
        else:
            agree = sum((odd.item() > 0) == bool(r) for odd, r in zip(odds, right, strict=True))
            assert batch.metrics["process_accuracy"] == pytest.approx(agree / len(scored))
        for name, weight in method.process.weights.items():
            torch.testing.assert_close(weight.detach(), model.parameters()[name].detach(), **LOOSE)

        with torch.no_grad():
            rewards = [
                BETA * (plain_logps(model, r.prompt_ids, r.ids) - o) for r, o in zip(rollouts, origin, strict=True)
            ]
        for i, whole in enumerate(outcome(rollouts, scores)):
            if whole is None:
                assert method.advantages[i] is None
                continue
            others = [rewards[j].mean() for j in scored if rollouts[j].group == rollouts[i].group and j != i]
            baseline = sum(others) / len(others) if others else rewards[i]
            own = (rewards[i] - baseline).tolist()
            wanted = [whole + sum(0.9 ** (s - t) * own[s] for s in range(t, len(own))) for t in range(len(own))]
            assert method.advantages[i] == pytest.approx(wanted, abs=1e-6)


def test_neither_cutting_nor_order_changes_what_is_learned() -> None:
    results = []
    for budget, order in ((100_000, range(6)), (16, range(6)), (70, (3, 5, 0, 4, 1, 2))):
        policy = policy64()
        settings = {**PRIME, "prime": {"beta": BETA, "lr": 2e-3}, "tokens_per_forward": budget}
        method, stage = built("grpo", policy, settings, order)
        steady(method)
        moved(policy, 0.03)
        batch = method.batch(0)
        told, gradients = gradient(policy, method, batch, stage)
        weights = {name: weight.detach() for name, weight in method.process.weights.items()}
        results.append(({**batch.metrics, **told}, gradients, weights))
    (found, gradients, weights), *others = results
    for other_found, other_gradients, other_weights in others:
        same_gradient(gradients, other_gradients, **LOOSE)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, other_weights[name], **LOOSE)
        for name in ("loss", "process_loss", "ratio_max"):
            assert other_found[name] == pytest.approx(found[name], rel=1e-6, abs=1e-9)


def test_what_tools_said_earns_nothing() -> None:
    """Neither does it count in the sum by which the model learns."""

    class Told(Recorded):
        def __call__(self, *question: Any) -> Any:
            rollouts, ledger = super().__call__(*question)
            self.rollouts = [
                dataclasses.replace(
                    r, target=tuple(t != 1 for t in range(len(r.ids))), logps=(r.logps[0], 0.0, *r.logps[2:])
                )
                if len(r.ids) > 2
                else r
                for r in rollouts
            ]
            return self.rollouts, ledger

    policy = policy64()
    stage = stage_of("grpo", batch_size=2, **PRIME, prime={"lr": 1e-2}, check_first_step=False)
    sampler = Told(policy)
    method = grpo(policy, stage, sampler=sampler)
    method.batch(0)
    told = [i for i, r in enumerate(sampler.rollouts) if not all(r.target)]
    assert told
    assert all(method.advantages[i][1] == 0 != method.advantages[i][0] for i in told)
    assert all(method.process.origin[i][1] == 0 for i in told)


def test_its_cost_is_the_batchs() -> None:
    policy = policy64()
    sampler = Recorded(policy)
    stage = stage_of("grpo", batch_size=2, **PRIME)
    plain = grpo(policy, stage, sampler=sampler).batch(0).ledger
    batch = grpo(policy, stage_of("grpo", batch_size=2, **PRIME, prime={}), sampler=sampler).batch(0)
    whole = sum(len(r.prompt_ids) + len(r.ids) for r in sampler.rollouts)
    spent = batch.ledger - plain
    assert spent.reward_tokens == 2 * whole  # by the model and by the reference
    assert 0 < spent.trained_tokens <= whole
    assert spent.flops > 0
    assert spent.generated_tokens == 0


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    method = grpo(policy64(), stage_of("grpo", **PRIME, prime={}))
    with torch.no_grad():
        next(iter(method.process.weights.values())).fill_(math.nan)
    with pytest.raises(Failure, match=r"stage 'toy': the process reward model's loss is nan.*lower prime\.lr"):
        method.batch(0)


def test_another_advantage_is_refused() -> None:
    with pytest.raises(ValidationError, match="must be leave_one_out, to which prime adds its process rewards"):
        stage_of("grpo", prime={})


@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_its_weights_and_moments_are_counted(kl_weight: float) -> None:
    """Weights, two moments, and the reference where the KL penalty has none already; in a checkpoint all but that."""
    settings = {"advantage": "leave_one_out", "kl_weight": kl_weight}
    plain, terms = (terms_of("grpo", checkpoint_every=2, **settings, **more) for more in ({}, {"prime": {}}))
    weights = terms["base"]
    assert terms["process rewards"] == (3 if kl_weight else 4) * weights
    assert terms["checkpoint"] - plain["checkpoint"] == 3 * weights


# On a table


def told(right: Any) -> Any:
    return lambda rollouts: [Score(1.0, "correct") if right(r.ids) else Score(0.0, "wrong") for r in rollouts]


def toy_method(policy: Any, right: Any, steps: int, **settings: Any) -> GrpoMethod:
    common = {"id": "toy", "data": {"sources": [{"source": "unused.jsonl"}]}, "steps": steps, "batch_size": 1}
    common |= {"kind": "grpo", "sampling": {"max_new_tokens": policy.model.longest}, "advantage": "leave_one_out"}
    stage = Grpo.model_validate({**common, **settings})
    return GrpoMethod(stage, toy_data(), policy, ToySampler(policy), told(right), 0)


def test_rewards_point_at_the_token_that_matters() -> None:
    """Answers of three tokens of three, each twice in a batch; right is what begins with 1. Ten batches on, the model
    holds the first token for or against an answer, and no other one; and so do the advantages."""
    policy = toy(3, 3, end=None)
    model: Table = policy.model  # type: ignore[assignment]
    method = toy_method(policy, lambda ids: ids[0] == 1, 10, n=54, prime={"beta": 1.0, "lr": 0.3})
    steady(method)
    for step in range(10):
        batch = method.batch(step)
    assert batch.metrics["process_accuracy"] == 1
    before = {ids: model.logps(ids) for ids in model.completions}
    with policy.swapped({name: weight.detach() for name, weight in method.process.weights.items()}):
        after = {ids: model.logps(ids) for ids in model.completions}
    for ids in model.completions:
        first, *later = (q - p for p, q in zip(before[ids], after[ids], strict=True))
        assert (first > 0.5) if ids[0] == 1 else (first < -0.5)
        assert later == pytest.approx([0, 0], abs=0.05)
    for row, worth in zip(batch.rows, (w for w in method.advantages if w and any(w)), strict=True):
        assert (worth[0] > worth[1] + 0.5) if row.completion[0] == 1 else (worth[0] < worth[1] - 0.5)


def test_the_right_answer_is_found() -> None:
    """One of seven, of two tokens."""
    policy = toy(3, 2)
    model: Table = policy.model  # type: ignore[assignment]
    method = toy_method(policy, lambda ids: ids == (2, 1), 60, n=64, prime={"beta": 0.5, "lr": 0.1})
    place = model.completions.index((2, 1))
    assert model.probabilities()[place] < 0.2
    learn(method, policy, 60, 0.2)
    assert model.probabilities()[place] > 0.95
