"""Preference pairs out of scored completions."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence


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
