"""A punishment of overlong answers."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.recipe.rewards import LengthReward
from posttrain.records import Rollout, Score
from posttrain.rewards.protocol import Scorer


def overlong(length: int, max_tokens: int, buffer: int) -> float:
    """DAPO's soft punishment (2503.14476, eq. 13) of an answer of `length` tokens.

    0 up to `max_tokens - buffer`; from there it falls linearly to -1 at `max_tokens`, and is -1 beyond.
    """
    return max(-1.0, min(0.0, (max_tokens - buffer - length) / buffer))


def length(reward: LengthReward) -> Scorer:
    """An answer that was cut off is overlong whatever its length."""

    def score(rollouts: Sequence[Rollout]) -> list[Score]:
        tokens = [reward.max_tokens if r.finish == "length" else r.sampled for r in rollouts]
        values = [overlong(n, reward.max_tokens, reward.buffer) for n in tokens]
        return [
            Score(value, "correct" if value == 0 else "wrong", str(n)) for value, n in zip(values, tokens, strict=True)
        ]

    return score
