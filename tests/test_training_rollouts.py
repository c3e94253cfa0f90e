"""What several workers score together, and what scoring costs, wherever answers are scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from scoring import Scripted
from tiny import tiny_policy
from tiny_runs import RENDERER, SEED, asked, grpo, lengths, online, prepared, rejection, stage_of
from workers import together

from posttrain.recipe.blocks import Sampling
from posttrain.records import Example, Failure, Ledger, Rollout, Score, UserError
from posttrain.rewards.process import label_steps
from posttrain.rewards.protocol import charged
from posttrain.sampling.local import LocalSampler
from posttrain.training.preference import judged_on_policy
from posttrain.training.rollouts import shared
from posttrain.training.world import ALONE, Distributed

GROUPS = (3, 1, 4, 2, 2)
"""Answers to each of five prompts."""


def answers() -> list[Rollout]:
    return [
        Rollout(Example(f"e:{p}"), p, (p,), (p, k), (-1.0, -1.0), f"{p}.{k}", "stop", "w")
        for p, size in enumerate(GROUPS)
        for k in range(size)
    ]


def scored() -> tuple[list[float | None], list[str], int]:
    """The scores as this worker has them, whose answers it scored, and what all of it cost."""
    asked: list[str] = []

    def score(rollouts: Sequence[Rollout]) -> list[Score]:
        asked.extend(r.text for r in rollouts)
        return charged([Score(float(r.text), "correct") for r in rollouts], Ledger(reward_tokens=len(rollouts)))

    found = shared(score, Distributed())(answers())
    return [s.value for s in found], asked, sum(s.cost.reward_tokens for s in found)


@pytest.mark.parametrize("workers", [2, 3])
def test_each_worker_scores_its_share_and_has_all_scores(workers: int) -> None:
    everyone = together(workers, scored)
    texts = [r.text for r in answers()]
    for values, _, cost in everyone:
        assert values == [float(text) for text in texts]
        assert cost == len(texts)
    shares = [asked for _, asked, _ in everyone]
    assert sorted(text for share in shares for text in share) == sorted(texts)  # none twice
    prompts = [{text[0] for text in share} for share in shares]
    assert all(not a & b for i, a in enumerate(prompts) for b in prompts[i + 1 :])  # a prompt's answers together


def failing(kind: type[Exception]) -> str:
    """What this worker is told when the last one's share cannot be scored."""

    def score(rollouts: Sequence[Rollout]) -> list[Score]:
        if dist.get_rank() == dist.get_world_size() - 1:
            raise kind("no judge is there")
        return [Score(1.0, "correct")] * len(rollouts)

    with pytest.raises(kind) as caught:
        shared(score, Distributed())(answers())
    return str(caught.value)


@pytest.mark.parametrize("kind", [UserError, Failure])
def test_what_one_worker_cannot_score_all_are_told(kind: type[Exception]) -> None:
    assert together(2, failing, kind) == ["no judge is there"] * 2


def more_than_prompts() -> list[float | None]:
    asked: list[int] = []

    def score(rollouts: Sequence[Rollout]) -> list[Score]:
        asked.append(len(rollouts))
        return [Score(2.0, "correct")] * len(rollouts)

    found = [s.value for s in shared(score, Distributed())(answers()[:3])]
    assert asked == ([3] if dist.get_rank() == 0 else [])  # what has no answers is not asked
    return found


def test_there_may_be_fewer_prompts_than_workers() -> None:
    assert together(2, more_than_prompts) == [[2.0] * 3] * 2


def test_alone_it_is_the_scorer_itself() -> None:
    def score(rollouts: Sequence[Rollout]) -> list[Score]:
        return []

    assert shared(score, ALONE) is score


# What it costs

COST = Ledger(reward_tokens=7, flops=3.0, seconds=0.5)


def dear(rollouts: Sequence[Rollout]) -> list[Score]:
    """The toy's scores, each call of which costs `COST`."""
    return charged([lengths(r.example, r.text) for r in rollouts], COST)


def of_a_batch(kind: str, folder: Path) -> Ledger:
    policy = tiny_policy()
    if kind == "grpo":
        method: Any = grpo(policy, stage_of("grpo"))
    elif kind == "online_preference":
        method = online(policy, stage_of(kind))
    else:
        method = rejection(policy, stage_of(kind), folder)
    method.score = dear
    return method.batch(0).ledger


@pytest.mark.parametrize("kind", ["grpo", "online_preference", "rejection_sampling"])
def test_a_batch_bears_what_its_scores_cost(kind: str, tmp_path: Path) -> None:
    ledger = of_a_batch(kind, tmp_path)
    assert ledger.reward_tokens == 7
    assert ledger.generated_tokens > 0


def test_so_do_pairs_made_beforehand() -> None:
    policy = tiny_policy()
    stage = stage_of("dpo on-policy")
    _, ledger, _ = judged_on_policy(policy, stage, prepared(asked()), LocalSampler(policy, RENDERER), dear, SEED)
    assert ledger.reward_tokens == 7


def test_and_labels_of_steps() -> None:
    sampler = Scripted(lambda example, k: "42")
    solutions, _ = sampler(asked()[:2], 1, Sampling(), 0)
    _, ledger = label_steps(solutions, sampler, dear, RENDERER, n=2, sampling=Sampling(), seed=0)
    assert ledger.reward_tokens == 7
