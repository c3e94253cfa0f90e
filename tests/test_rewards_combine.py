"""Weighted sums, gates and ensembles, with each reward's value kept."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
from rewarded import said

from posttrain.recipe.rewards import EnsembleReward
from posttrain.records import Score
from posttrain.rewards.combine import Part, combined, ensemble


def part(name: str, *values: float | None, **how: Any) -> Part:
    scores = [Score(v, "error" if v is None else "correct" if v == 1 else "wrong", f"read by {name}") for v in values]
    return Part(name, lambda rollouts: scores, **how)


def values(parts: list[Part], ensembles: list[EnsembleReward] | None = None) -> list[float | None]:
    n = len(parts[0].score([]))
    return [score.value for score in combined(parts, ensembles or [])([said("x")] * n)]


def test_a_weighted_sum_keeps_its_parts() -> None:
    """2 x 1 + 0.5 x 0.4 = 2.2; a reward of weight 0 is watched alone."""
    parts = [part("right", 1.0, 0.0, weight=2.0), part("short", 0.4, 0.4, weight=0.5), part("seen", 9.0, 9.0, weight=0)]
    scores = combined(parts)([said("x")] * 2)
    assert [s.value for s in scores] == pytest.approx([2.2, 0.2])
    assert [dict(s.parts) for s in scores] == [{"right": r, "short": 0.4, "seen": 9.0} for r in (1.0, 0.0)]
    assert [(s.outcome, s.extracted) for s in scores] == [("correct", "read by right"), ("wrong", "read by right")]


def test_one_reward_alone_is_itself() -> None:
    score = Score(0.5, "wrong", "x", "half")
    assert combined([Part("half", lambda rollouts: [score])])([said("x")]) == [score]


def test_a_gate_earns_at_most_nothing() -> None:
    """Below the gate a sum of 1.5 is 0 and one of -1 stays; at the gate it counts as ever."""
    gated = part("format", 0.0, 0.0, 1.0, 0.5, gate=0.5)
    scores = combined([part("right", 1.5, -1.0, 1.5, 1.0), gated])([said("x")] * 4)
    assert [s.value for s in scores] == [0.0, -1.0, 2.5, 1.5]
    assert [s.outcome for s in scores] == ["wrong", "wrong", "wrong", "correct"]
    assert scores[0].parts["right"] == 1.5


def test_a_part_without_a_value_leaves_none() -> None:
    known = part("right", 1.0)
    assert values([known, part("other", None)]) == [None]
    assert values([known, part("other", None, weight=0)]) == [1.0]
    assert values([known, part("other", None, weight=0, gate=0.5)]) == [None]
    (score,) = combined([known, part("other", math.nan)])([said("x")])
    assert (score.value, score.outcome, dict(score.parts)) == (None, "error", {"right": 1.0})
    assert "other: the reward gave nan" in score.why


def test_a_part_that_raises_is_named() -> None:
    def broken(rollouts: Any) -> list[Score]:
        raise OSError("gone")

    scores = combined([part("right", 1.0, 1.0), Part("judge", broken)])([said("x")] * 2)
    assert [(s.value, s.why) for s in scores] == [(None, "judge: OSError: gone")] * 2


def test_ensembles() -> None:
    """Of 1, 2 and 6: mean 3, variance ((-2)^2 + (-1)^2 + 3^2) / 3 = 14 / 3."""
    members = [1.0, 2.0, 6.0]
    assert ensemble(members, "mean") == 3.0
    assert ensemble(members, "worst") == 1.0
    assert ensemble(members, "penalised", 0.5) == pytest.approx(3 - 0.5 * math.sqrt(14 / 3))
    assert ensemble(members, "penalised", 0.0) == 3.0
    assert all(ensemble([2.0, 2.0], how) == 2.0 for how in ("mean", "worst", "penalised"))


BOTH = partial(EnsembleReward, kind="ensemble", id="both", of=("a", "b"))


def test_members_count_through_their_ensemble() -> None:
    """0.5 x min(1, 3) + 1; the members' own weights are not added."""
    parts = [part("a", 1.0), part("b", 3.0), part("c", 1.0)]
    group = BOTH(how="worst", weight=0.5)
    (score,) = combined(parts, [group])([said("x")])
    assert score.value == 1.5
    assert score.parts == {"a": 1.0, "b": 3.0, "c": 1.0, "both": 1.0}
    assert values([part("a", 1.0), part("b", None)], [BOTH(how="mean")]) == [None]
    gate = BOTH(how="mean", gate=2.5)
    assert values([part("a", 1.0), part("b", 3.0)], [gate]) == [0.0]
