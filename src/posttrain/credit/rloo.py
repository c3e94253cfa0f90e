"""REINFORCE with the other completions of the prompt as the baseline."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from posttrain.credit.advantages import finite, signal
from posttrain.credit.batch import Credited, by_token, compared, credited
from posttrain.records import Rollout, Score


def leave_one_out(rewards_PG: Tensor) -> Tensor:
    """`advantages_PG` of RLOO (Ahmadian et al., 2402.14740): reward minus the mean reward of the group's others.

    NaN is unscored: it is nobody's other and gets 0, as does a group with fewer than two scored completions, or whose
    scores are all equal.
    """
    rewards_PG = finite(rewards_PG)
    others_P = (~rewards_PG.isnan()).sum(1, keepdim=True) - 1
    mean_PG = (rewards_PG.nansum(1, keepdim=True) - rewards_PG) / others_P.clamp(min=1)
    return (rewards_PG - mean_PG).masked_fill(~signal(rewards_PG), 0.0)


def rloo(rollouts: Sequence[Rollout], scores: Sequence[Score]) -> Credited:
    """The batch of RLOO: each token of a completion carries its advantage, as in `grpo`."""
    return credited(rollouts, by_token(rollouts, compared(rollouts, scores, leave_one_out)))
