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
) -> list[float]:
    """The advantage of each rollout, by `group_advantages`. Groups need not be of one size; unscored gives 0."""
    members = groups(rollouts)
    rewards_PG = torch.full((len(members), max(map(len, members), default=0)), math.nan, dtype=torch.float64)
    for p, group in enumerate(members):
        for g, i in enumerate(group):
            value = scores[i].value
            rewards_PG[p, g] = math.nan if value is None else value
    advantages_PG = group_advantages(rewards_PG, std=std, eps=eps)
    return [a for p, group in enumerate(members) for a in advantages_PG[p, : len(group)].tolist()]


def grpo(
    rollouts: Sequence[Rollout],
    scores: Sequence[Score],
    *,
    std: Literal["group", "batch", "none"] = "group",
    eps: float = 1e-4,
) -> Credited:
    """The batch of GRPO (Shao et al., 2402.03300): each token of a completion carries its advantage.

    Completions without advantage are counted and not computed; where none has any, the forest is empty.
    """
    weights = advantages(rollouts, scores, std=std, eps=eps)
    live = [i for i, weight in enumerate(weights) if weight != 0]
    forest = pack([as_row(rollouts[i]) for i in live])
    return Credited(
        **vars(forest),
        counts=Counts(tokens=sum(len(r.ids) for r in rollouts), sequences=len(rollouts)),
        weights_T=forest.spread([weights[i] for i in live]),
        behaviour_logps_T=forest.spread([rollouts[i].logps for i in live]),
    )
