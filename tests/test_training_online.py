"""Preferences learned online: each loss against its paper written out, whose answers are compared, that it learns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from test_training_methods import ADAPTERS, gradient, moved, plain_logps, policy64, same_gradient
from tiny import tiny_policy
from tiny_runs import RENDERER, SEED, asked, lengths, online, prepared, rows_of, run, same, stage_of
from torch import Tensor

from posttrain.models.policy import Policy
from posttrain.recipe.blocks import Lora
from posttrain.records import Example, Ledger, Rollout, Score
from posttrain.sampling.local import LocalSampler
from posttrain.training.loop import train
from posttrain.training.online import win_chance

NAME = "online_preference"
CASES: list[dict[str, Any]] = [
    {"loss": "dpo", "n": 4, "beta": 0.3},
    {"loss": "ipo", "n": 4},
    {"loss": "nash_md", "n": 2, "mixture": 0.25},
    {"loss": "xpo", "n": 2, "alpha": 0.1},
]


class Watched:
    """A sampler that keeps what it gave, and with which weights."""

    def __init__(self, policy: Policy) -> None:
        self.inner = LocalSampler(policy, RENDERER)
        self.policy = policy
        self.given: list[list[Rollout]] = []
        self.weights: list[dict[str, Tensor]] = []

    def __call__(self, prompts: Sequence[Example], n: int, sampling: Any, seed: int) -> tuple[list[Rollout], Ledger]:
        rollouts, ledger = self.inner(prompts, n, sampling, seed)
        self.given.append(rollouts)
        self.weights.append(self.policy.snapshot())
        return rollouts, ledger


def some_unscored(example: Example, text: str) -> Score:
    return Score(None, "error", why="no") if len(text) % 5 == 0 else lengths(example, text)


def written_out(policy: Policy, reference: Policy, stage: Any, given: list[list[Rollout]]) -> tuple[Tensor, int]:
    """The step's loss, one sequence at a time, by the formulas of shared practice: for pairs with d the difference of
    the summed log-ratios, dpo -log s(beta d), ipo (d - 1/(2 beta))^2, xpo dpo's + alpha log pi(reference's own);
    nash_md beta sum sg(log pi - log ref) log pi - (P - 1/2) sum log pi, P = s(R - R')."""

    def logps(model: Policy, rollout: Rollout) -> Tensor:
        return plain_logps(model, rollout.prompt_ids, rollout.ids, stage.sampling.temperature)

    def ratio(rollout: Rollout) -> Tensor:
        return logps(policy, rollout).sum() - logps(reference, rollout).sum().detach()

    def value(rollout: Rollout) -> float | None:
        return some_unscored(rollout.example, rollout.text).value

    losses = []
    if len(given) == 2:
        for own, other in zip(*given, strict=True):
            R, R_other = value(own), value(other)
            if R is None or R_other is None:
                continue
            if stage.loss == "nash_md":
                pi = logps(policy, own)
                apart = (pi - logps(reference, own)).detach()
                chance = 1 / (1 + torch.tensor(R_other - R, dtype=torch.float64).exp())
                losses.append(stage.beta * (apart * pi).sum() - (chance - 0.5) * pi.sum())
            elif R_other != R:
                won, lost = (own, other) if R_other < R else (other, own)
                dpo = -torch.nn.functional.logsigmoid(stage.beta * (ratio(won) - ratio(lost)))
                losses.append(dpo + stage.alpha * logps(policy, other).sum())
        return torch.stack(losses).mean(), len(losses)
    groups: dict[int, list[Rollout]] = {}
    for rollout in given[0]:
        groups.setdefault(rollout.group, []).append(rollout)
    for group in groups.values():
        scored = [r for r in group if value(r) is not None]
        values = [value(r) for r in scored]
        if len(set(values)) < 2:
            continue
        # What the rewards tie, chance decides: the mean over all ties is not what one step has, so there are none here.
        d = ratio(max(scored, key=value)) - ratio(min(scored, key=value))
        losses.append(
            -torch.nn.functional.logsigmoid(stage.beta * d)
            if stage.loss == "dpo"
            else (d - 1 / (2 * stage.beta)).square()
        )
    return torch.stack(losses).mean(), len(losses)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=["full", "lora"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["loss"])
def test_a_step_written_out(case: dict[str, Any], adapter: Lora | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Away from the reference, at another temperature, with unscored answers, however the step is cut."""
    monkeypatch.setattr("random.Random.choice", lambda self, found: found[0])  # of equal ones the first, as max has it
    policy, reference = policy64(adapter), policy64(adapter)
    settings = {**case, "batch_size": 12, "sampling": {"max_new_tokens": 6, "temperature": 0.8}}
    stage = stage_of(NAME, **settings)
    sampler = Watched(policy)
    method = online(policy, stage, some_unscored, sampler)
    moved(policy, 0.02, seed=5)
    batch = method.batch(0)
    expected, n = written_out(policy, reference, stage, sampler.given)
    assert n >= 2
    assert n == (batch.counts.sequences if case["loss"] == "nash_md" else batch.counts.pairs)
    live = policy.parameters()
    wanted = dict(zip(live, torch.autograd.grad(expected, list(live.values())), strict=True))
    for budget in (16, 1024):
        told, found = gradient(policy, method, batch, stage_of(NAME, **settings, tokens_per_forward=budget))
        assert told["loss"] == pytest.approx(expected.item(), rel=1e-6)
        same_gradient(found, wanted, rtol=1e-4, atol=1e-5)  # its norms compute in float32


@pytest.mark.parametrize(("loss", "share"), [("xpo", 1.0), ("nash_md", 0.25)])
def test_whose_answers_are_compared(loss: str, share: float) -> None:
    """The policy's own, and those of (1 - share) of its weights and share of the reference's; then it is itself."""
    policy, reference = tiny_policy(), tiny_policy().snapshot()
    sampler = Watched(policy)
    settings = {"mixture": share} if loss == "nash_md" else {}
    method = online(policy, stage_of(NAME, loss=loss, n=2, **settings), sampler=sampler)
    moved(policy, 0.1)
    before = policy.snapshot()
    method.batch(0)
    assert same(policy.snapshot(), before)
    own, other = sampler.weights
    assert same(own, before)
    for name, p in other.items():
        torch.testing.assert_close(p, (1 - share) * before[name] + share * reference[name], rtol=0, atol=1e-6)


def test_the_chance_of_being_preferred() -> None:
    """s(0) = 1/2, s(log 3) = 3/4, and the two sides add up to 1."""
    assert win_chance(2.0, 2.0) == 0.5
    assert win_chance(torch.tensor(3.0, dtype=torch.float64).log().item(), 0.0) == pytest.approx(0.75)
    assert win_chance(0.3, 1.7) + win_chance(1.7, 0.3) == pytest.approx(1.0)


@pytest.mark.parametrize("loss", ["dpo", "xpo"])
def test_equal_rewards_teach_nothing(loss: str, tmp_path: Path) -> None:
    """No pair, no step: the weights stay, and the loss is 0."""
    policy = tiny_policy()
    method = online(policy, stage_of(NAME, loss=loss, n=2), lambda example, text: Score(1.0, "correct"))
    batch = method.batch(0)
    assert (batch.rows, batch.counts.pairs) == ((), 0)
    told, found = gradient(policy, method, batch, stage_of(NAME, loss=loss, n=2))
    assert (told["loss"], found) == (0, {})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["loss"])
def test_what_is_watched(case: dict[str, Any]) -> None:
    """On what is learned of the policy's own answers: the mean log-ratio to the reference, trainer against sampler; the
    share of prompts, and by how much likelier than the reference the chosen answers are."""
    policy, reference = policy64(), policy64()
    stage = stage_of(NAME, **case, batch_size=12, tokens_per_forward=16)
    sampler = Watched(policy)
    method = online(policy, stage, some_unscored, sampler)
    moved(policy, 0.02, seed=5)
    batch = method.batch(0)
    told, _ = gradient(policy, method, batch, stage)
    assert batch.metrics["learned"] == len(batch.units) / 12
    assert told["mismatch_min"] == pytest.approx(1, abs=1e-4)
    assert told["mismatch_max"] == pytest.approx(1, abs=1e-4)

    def ratios(row: Any) -> Tensor:
        with torch.no_grad():
            ours, theirs = (plain_logps(m, row.context, row.completion) for m in (policy, reference))
        return ours - theirs

    own = [ratios(row) for row, other in zip(batch.rows, method.others, strict=True) if not other]
    assert told["kl"] == pytest.approx(torch.cat(own).mean().item(), rel=1e-5, abs=1e-6)
    assert told["mismatch_counts 0.999 to 1.001"] == sum(map(len, own))
    given = {r.ids for r in sampler.given[0]}
    assert all(row.completion in given for row, other in zip(batch.rows, method.others, strict=True) if not other)
    if case["loss"] != "nash_md":
        chosen = [ratios(row).sum().item() for row in batch.rows[::2]]
        assert told["chosen_ratio"] == pytest.approx(sum(chosen) / len(chosen), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("case", CASES[1:], ids=lambda case: case["loss"])
def test_a_killed_run_goes_on_as_if_it_never_was(case: dict[str, Any], tmp_path: Path) -> None:
    """The reference is what the stage started from, not what a checkpoint holds."""

    class Killed(BaseException):
        pass

    def kill(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise Killed

    whole, _ = run(NAME, tmp_path / "whole", steps=5, **case)
    with pytest.raises(Killed):
        run(NAME, tmp_path / "killed", on_step=kill, steps=5, checkpoint_every=2, **case)
    policy, _ = run(NAME, tmp_path / "killed", steps=5, checkpoint_every=2, **case)
    assert same(policy.snapshot(), whole.snapshot())
    assert rows_of(tmp_path / "killed" / "metrics.jsonl") == rows_of(tmp_path / "whole" / "metrics.jsonl")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["loss"])
def test_the_reward_rises(case: dict[str, Any], tmp_path: Path) -> None:
    """An answer of one token is good if that stands in the later half of the vocabulary, as few do at first."""
    policy = tiny_policy()
    own = {"xpo": {"alpha": 1e-3}, "nash_md": {"beta": 0.02, "batch_size": 24}}.get(case["loss"], {})
    settings = {"steps": 16, "batch_size": 12, "sampling": {"max_new_tokens": 1}, **case, **own}
    stage = stage_of(NAME, **settings, optim={"lr": 1e-2, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0})
    half = {RENDERER.decode([token]) for token in range(160)}
    method = online(policy, stage, lambda example, text: Score(4.0 * (text not in half), "correct"))
    train(policy, method, stage, tmp_path, SEED)
    rewards = [row["reward"] / 4 for row in rows_of(tmp_path / "metrics.jsonl")]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"loss": "xpo"}, "loss xpo does not read it; dpo and ipo alone do"),
        ({"mixture": 0.1}, "loss dpo does not read it; nash_md alone do"),
        ({"alpha": 0.1}, "loss dpo does not read it; xpo alone do"),
        ({"sampling": {"temperature": 0}}, "must be above 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        stage_of(NAME, **settings)
    assert told in repr(caught.value)


def test_every_prompt_is_asked_in_turn() -> None:
    method = online(tiny_policy(), stage_of(NAME), data=prepared(asked()))
    assert sorted(method.order[:6]) == [(0, i) for i in range(6)]
