"""Group-relative policy optimisation: a completion is worth what it scored above its group."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from posttrain.credit.advantages import group_advantages
from posttrain.credit.batch import Credited, by_rollout, by_token, credited
from posttrain.records import Rollout, Score


def grpo(
    rollouts: Sequence[Rollout],
    scores: Sequence[Score],
    *,
    std: Literal["group", "batch", "none"] = "group",
    eps: float = 1e-4,
) -> Credited:
    """The batch of GRPO (Shao et al., 2402.03300): each token of a completion carries its advantage.

    A completion whose advantage is 0 is counted and not computed; where none has any, the forest is empty. One
    without a score is left out altogether. Groups may differ in size.
    """
    compare = partial(group_advantages, std=std, eps=eps)
    return credited(rollouts, by_token(rollouts, by_rollout(rollouts, scores, compare)))
