"""What one optimiser step learns from, packed: a forest with what its losses need."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.forest import Forest, Row, pack
from posttrain.losses import Counts
from posttrain.records import Rollout, Score


@dataclass(frozen=True, kw_only=True)
class Counted(Forest):
    """A forest that knows what its loss is divided by."""

    counts: Counts
    """Of the whole step: what was left out of the forest because it could not teach anything counts too."""


@dataclass(frozen=True, kw_only=True)
class Credited(Counted):
    """A forest of sampled completions with what each token is worth."""

    weights_T: Tensor
    """float32, the advantage of each completion token; 0 at the prompts."""
    behaviour_logps_T: Tensor
    """float32, nats: each token's log-probability when it was sampled; 0 at the prompts."""


def as_row(rollout: Rollout) -> Row:
    """A sampled completion, every token that the model sampled a target, the end of a turn too."""
    return Row(rollout.prompt_ids, rollout.ids, rollout.target)


def groups(rollouts: Sequence[Rollout]) -> list[list[int]]:
    """Indices of the rollouts of each prompt; those of one prompt stand side by side, as samplers return them.

    The rollouts of several calls may follow one another: their groups stay apart.
    """

    def key(i: int) -> tuple[int, tuple[int, ...]]:
        return rollouts[i].group, rollouts[i].prompt_ids

    return [list(group) for _, group in itertools.groupby(range(len(rollouts)), key)]


def by_rollout(
    rollouts: Sequence[Rollout], scores: Sequence[Score], compare: Callable[[Tensor], Tensor]
) -> list[float | None]:
    """The advantage of each rollout by `compare`, rewards_PG to advantages_PG with NaN for what there is no reward of.

    None where it has no score. Groups may differ in size.
    """
    if not rollouts:
        return []
    members = groups(rollouts)
    rewards_PG = torch.full((len(members), max(map(len, members))), math.nan, dtype=torch.float64)
    for p, group in enumerate(members):
        values = [scores[i].value for i in group]
        rewards_PG[p, : len(group)] = torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64)
    advantages_PG = compare(rewards_PG)
    return [
        None if math.isnan(reward) else advantage
        for p, group in enumerate(members)
        for reward, advantage in zip(rewards_PG[p].tolist(), advantages_PG[p, : len(group)].tolist(), strict=False)
    ]


def by_token(rollouts: Sequence[Rollout], advantages: Sequence[float | None]) -> list[list[float] | None]:
    """Each completion's advantage at all tokens that were sampled; 0 at others."""
    return [None if a is None else [a * t for t in r.target] for r, a in zip(rollouts, advantages, strict=True)]


def at_sampled(rollout: Rollout, values: Sequence[float]) -> list[float]:
    """Of values at all tokens of a completion, those at the tokens that were sampled."""
    return [value for value, sampled in zip(values, rollout.target, strict=True) if sampled]


def at_all(rollout: Rollout, values: Sequence[float]) -> list[float]:
    """Values at the tokens that were sampled, with 0 at the others."""
    each = iter(values)
    return [next(each) if sampled else 0.0 for sampled in rollout.target]


def credited(rollouts: Sequence[Rollout], advantages: Sequence[Sequence[float] | None]) -> Credited:
    """The batch of rollouts whose tokens are worth `advantages`.

    A completion worth 0 is counted and not computed; where none is worth anything, the forest is empty. One without
    advantages has no score, and is left out altogether.
    """
    scored = [(rollout, worth) for rollout, worth in zip(rollouts, advantages, strict=True) if worth is not None]
    live = [(rollout, worth) for rollout, worth in scored if any(worth)]
    forest = pack([as_row(rollout) for rollout, _ in live])
    return Credited(
        **vars(forest),
        counts=Counts(tokens=sum(rollout.sampled for rollout, _ in scored), sequences=len(scored)),
        weights_T=forest.spread([worth for _, worth in live]),
        behaviour_logps_T=forest.spread([rollout.logps for rollout, _ in live]),
    )
