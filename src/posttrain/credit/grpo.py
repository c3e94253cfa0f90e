"""Group-relative policy optimisation: a completion is worth what it scored above its group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from posttrain.credit.advantages import group_advantages
from posttrain.credit.batch import Credited, as_row, groups
from posttrain.forest import pack
from posttrain.losses import Counts
from posttrain.records import Rollout, Score


def advantages(
    rollouts: Sequence[Rollout],
    scores: Sequence[Score],
    *,
    std: Literal["group", "batch", "none"] = "group",
    eps: float = 1e-4,
) -> list[float | None]:
    """The advantage of each rollout, by `group_advantages`; None where it has no score. Groups may differ in size."""
    members = groups(rollouts)
    rewards_PG = torch.full((len(members), max(map(len, members), default=0)), math.nan, dtype=torch.float64)
    for p, group in enumerate(members):
        values = [scores[i].value for i in group]
        rewards_PG[p, : len(group)] = torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64)
    advantages_PG = group_advantages(rewards_PG, std=std, eps=eps)
    return [
        None if math.isnan(reward) else advantage
        for p, group in enumerate(members)
        for reward, advantage in zip(rewards_PG[p].tolist(), advantages_PG[p, : len(group)].tolist(), strict=False)
    ]


def grpo(
    rollouts: Sequence[Rollout],
    scores: Sequence[Score],
    *,
    std: Literal["group", "batch", "none"] = "group",
    eps: float = 1e-4,
) -> Credited:
    """The batch of GRPO (Shao et al., 2402.03300): each token of a completion carries its advantage.

    A completion whose advantage is 0 is counted and not computed; where none has any, the forest is empty. One
    without a score is left out altogether.
    """
    weights = advantages(rollouts, scores, std=std, eps=eps)
    scored = [i for i, weight in enumerate(weights) if weight is not None]
    live = [i for i in scored if weights[i]]
    forest = pack([as_row(rollouts[i]) for i in live])
    return Credited(
        **vars(forest),
        counts=Counts(tokens=sum(len(rollouts[i].ids) for i in scored), sequences=len(scored)),
        weights_T=forest.spread([weights[i] or 0.0 for i in live]),
        behaviour_logps_T=forest.spread([rollouts[i].logps for i in live]),
    )
