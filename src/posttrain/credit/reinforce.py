"""REINFORCE++: rewards at tokens, and the whole batch as baseline and scale."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from posttrain.credit.advantages import finite_rewards
from posttrain.credit.batch import Credited, at_all, at_sampled, credited
from posttrain.records import Rollout, Score


def token_rewards(score: float, penalties: Sequence[float]) -> list[float]:
    """What each token of a completion earns: minus its penalty, and the last one the score as well."""
    return [*(-p for p in penalties[:-1]), score - penalties[-1]]


def whiten(values: Sequence[Sequence[float]], eps: float = 1e-8) -> list[list[float]]:
    """The values of all tokens of several completions with mean 0 and variance 1 (the unbiased one) over all of them.

    Of the whole step: the tokens of one micro-batch would make the loss depend on how the step is cut. Equal values
    are exactly 0.
    """
    values_T = torch.tensor(list(itertools.chain.from_iterable(values)), dtype=torch.float64)
    if not len(values_T) or values_T.min() == values_T.max():
        return [[0.0] * len(own) for own in values]
    white = ((values_T - values_T.mean()) * (values_T.var() + eps).rsqrt()).tolist()
    ends = list(itertools.accumulate(map(len, values), initial=0))
    return [white[start:stop] for start, stop in itertools.pairwise(ends)]


def returns(
    rollouts: Sequence[Rollout], scores: Sequence[Score], penalties: Sequence[Sequence[float]] | None = None
) -> list[list[float] | None]:
    """The advantages of the tokens of each rollout by REINFORCE++ (Hu, 2501.03262): what is still earned from a token
    on, whitened over all sampled tokens. None where there is no score.

    `penalties` are what the tokens cost, such as a weighted KL from a reference; by default nothing.
    """
    scored = [i for i, s in enumerate(scores) if s.value is not None and not math.isnan(s.value)]
    finite_rewards(torch.tensor([[scores[i].value or 0.0 for i in scored]]))
    earned = []
    for i in scored:
        costs = [0.0] * rollouts[i].sampled if penalties is None else at_sampled(rollouts[i], penalties[i])
        earned.append(list(itertools.accumulate(reversed(token_rewards(scores[i].value or 0.0, costs))))[::-1])
    found = {i: at_all(rollouts[i], worth) for i, worth in zip(scored, whiten(earned), strict=True)}
    return [found.get(i) for i in range(len(rollouts))]


def reinforce(rollouts: Sequence[Rollout], scores: Sequence[Score]) -> Credited:
    """The batch of REINFORCE++ without a penalty, as in `grpo`; one completion for each prompt is enough."""
    return credited(rollouts, returns(rollouts, scores))
