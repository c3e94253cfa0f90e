"""REINFORCE with the other completions of the prompt as the baseline."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from posttrain.credit.advantages import group_advantages
from posttrain.credit.batch import Credited, by_rollout, by_token, credited
from posttrain.records import Rollout, Score


def leave_one_out(rewards_PG: Tensor) -> Tensor:
    """`advantages_PG` of RLOO (Ahmadian et al., 2402.14740): reward minus the mean reward of the group's others, which
    is reward minus the group's mean, times n / (n - 1).

    NaN is unscored: it is nobody's other and gets 0, as do groups without signal (`group_advantages`).
    """
    scored_P = (~rewards_PG.isnan()).sum(1, keepdim=True)
    return group_advantages(rewards_PG, std="none") * scored_P / (scored_P - 1).clamp(min=1)


def rloo(rollouts: Sequence[Rollout], scores: Sequence[Score]) -> Credited:
    """The batch of RLOO: each token of a completion carries its advantage, as in `grpo`."""
    return credited(rollouts, by_token(rollouts, by_rollout(rollouts, scores, leave_one_out)))
