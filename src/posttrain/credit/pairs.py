"""Preference pairs out of scored completions."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from posttrain.credit.batch import groups
from posttrain.records import Rollout, Score


def best_and_worst(
    scores: Sequence[float | None], rng: random.Random, lengths: Sequence[int] = (), near: float = 0.0
) -> tuple[int, int] | None:
    """Indices of a best-scored and a worst-scored completion of one prompt, ties broken by `rng`.

    None or NaN is unscored and never chosen. The result is None where there is nothing to prefer: fewer than two
    scored completions, or all of them equal.

    With `near` above 0 it is length-controlled (Meta-Rewarding, Wu et al., 2407.19594): whatever scores within this
    share of the whole range from the best is as good, and the shortest of these is taken; likewise the longest of what
    is as bad as the worst. Below one half nothing is both.
    """
    scored = {i: score for i, score in enumerate(scores) if score is not None and not math.isnan(score)}
    low, high = min(scored.values(), default=0.0), max(scored.values(), default=0.0)
    if low == high:
        return None
    reach = near * (high - low) if near else 0.0
    best = [i for i, score in scored.items() if score >= high - reach]
    worst = [i for i, score in scored.items() if score <= low + reach]
    if near:
        shortest, longest = min(lengths[i] for i in best), max(lengths[i] for i in worst)
        best = [i for i in best if lengths[i] == shortest]
        worst = [i for i in worst if lengths[i] == longest]
    return rng.choice(best), rng.choice(worst)


def pairs(
    rollouts: Sequence[Rollout], scores: Sequence[Score], rng: random.Random, near: float = 0.0
) -> list[tuple[int, int]]:
    """For each prompt whose completions differ in score, the indices of a best and a worst of them, their length
    controlled by `near`."""
    found = []
    for group in groups(rollouts):
        lengths = [rollouts[i].sampled for i in group]
        pair = best_and_worst([scores[i].value for i in group], rng, lengths, near)
        if pair is not None:
            found.append((group[pair[0]], group[pair[1]]))
    return found


def rankings(rollouts: Sequence[Rollout], scores: Sequence[Score]) -> list[list[int]]:
    """For each prompt whose completions differ in score, their indices, the best first and the unscored last."""
    found = []
    for group in groups(rollouts):
        known = {i: value for i in group if (value := scores[i].value) is not None and not math.isnan(value)}
        if len(set(known.values())) > 1:
            found.append(sorted(group, key=lambda i: -known.get(i, -math.inf)))
    return found
