"""Preference pairs out of scored completions."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from posttrain.credit.batch import groups
from posttrain.records import Rollout, Score


def best_and_worst(scores: Sequence[float | None], rng: random.Random) -> tuple[int, int] | None:
    """Indices of a best-scored and a worst-scored completion of one prompt, ties broken by `rng`.

    None or NaN is unscored and never chosen. The result is None where there is nothing to prefer: fewer than two
    scored completions, or all of them equal.
    """
    scored = {i: score for i, score in enumerate(scores) if score is not None and not math.isnan(score)}
    if not scored or min(scored.values()) == max(scored.values()):
        return None
    best = [i for i, score in scored.items() if score == max(scored.values())]
    worst = [i for i, score in scored.items() if score == min(scored.values())]
    return rng.choice(best), rng.choice(worst)


def pairs(rollouts: Sequence[Rollout], scores: Sequence[Score], rng: random.Random) -> list[tuple[int, int]]:
    """For each prompt whose completions differ in score, the indices of a best and a worst of them."""
    found = []
    for group in groups(rollouts):
        pair = best_and_worst([scores[i].value for i in group], rng)
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
