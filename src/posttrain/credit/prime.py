"""PRIME: what a token is worth by process rewards, beside what the outcome says."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from posttrain.credit.batch import groups
from posttrain.records import Rollout


def process_returns(
    rollouts: Sequence[Rollout], rewards: Sequence[Sequence[float] | None], *, gamma: float = 1.0
) -> list[list[float] | None]:
    """What the sampled tokens of each completion are worth by their process rewards (Cui et al., 2502.01456, eq. 5).

    sum_s>=t gamma^(s - t) (r_s - b), where the baseline b is the mean, over the others of the group, of each one's mean
    reward a token. `rewards` are those of the sampled tokens; None is unscored: it is nobody's other and is worth None.
    What has no others is worth 0. The outcome's part of eq. 5 is `leave_one_out`, and the two are added.

    Departures of the paper's own code, not followed: it adds (r_s - own mean) / (G - 1), and whitens over the batch.
    """
    worth: list[list[float] | None] = [None] * len(rollouts)
    for group in groups(rollouts):
        known = {i: own for i in group if (own := rewards[i]) is not None}
        means = {i: fmean(own) for i, own in known.items()}
        for i, own in known.items():
            others = [mean for j, mean in means.items() if j != i]
            worth[i] = _discounted([r - fmean(others) for r in own], gamma) if others else [0.0] * len(own)
    return worth


def _discounted(rewards: Sequence[float], gamma: float) -> list[float]:
    found, later = [0.0] * len(rewards), 0.0
    for t in reversed(range(len(rewards))):
        found[t] = later = rewards[t] + gamma * later
    return found
