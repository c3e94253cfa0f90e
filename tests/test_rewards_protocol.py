"""What cannot be scored is None with its cause, never 0, and too much of it stops the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from rewarded import question, said

from posttrain.records import Example, Failure, Rollout, Score, UserError
from posttrain.rewards.protocol import Cases, Rule, finite, guarded, judged, limited

BATCH = [said(str(i)) for i in range(10)]


def giving(*values: Any) -> Any:
    """A scorer of these values, one for each answer of the batch, 1 for the rest."""
    scores = [Score(value, "correct", why="" if value is not None else "no idea") for value in values]
    return lambda rollouts: (scores + [Score(1.0, "correct")] * len(rollouts))[: len(rollouts)]


@pytest.mark.parametrize(
    ("value", "why"),
    [(math.nan, "gave nan"), (math.inf, "gave inf"), (None, "gave no value"), ("1", "gave '1'")],
)
def test_no_number_is_no_score(value: Any, why: str) -> None:
    got = finite(Score(value, "correct", "x"))
    assert (got.value, got.outcome, got.extracted) == (None, "error", "x")
    assert why in got.why
    assert finite(Score(0, "wrong")) == Score(0, "wrong")


def test_a_rule_that_raises_leaves_one_answer_unscored() -> None:
    def score(example: Example, text: str) -> Score:
        return Score(1 / int(text), "correct")

    rule = Rule(score, lambda example: Cases())
    assert judged(rule, question(), "2").value == 0.5
    assert judged(rule, question(), "0") == Score(None, "error", why="ZeroDivisionError: division by zero")
    assert "ValueError" in judged(rule, question(), "none").why

    def missing(example: Example, text: str) -> Score:
        raise UserError("not installed")

    with pytest.raises(UserError, match="not installed"):
        judged(Rule(missing, lambda example: Cases()), question(), "2")


def test_a_scorer_that_raises_leaves_its_batch_unscored() -> None:
    def score(rollouts: Sequence[Rollout]) -> list[Score]:
        raise RuntimeError("no memory")

    scores = guarded(score)(BATCH)
    assert [(s.value, s.why) for s in scores] == [(None, "RuntimeError: no memory")] * 10
    assert [s.value for s in guarded(giving(math.nan, 0.5))(BATCH[:3])] == [None, 0.5, 1.0]
    with pytest.raises(Failure, match="1 scores for 10 answers"):
        guarded(lambda rollouts: [Score(1.0, "correct")])(BATCH)


def test_too_many_unscored_stop_the_run() -> None:
    """2 of 10 are the share 0.2, which is allowed; 3 are more."""
    two = limited(guarded(giving(None, math.nan)), 0.2)(BATCH)
    assert [s.value for s in two] == [None, None] + [1.0] * 8
    with pytest.raises(Failure) as told:
        limited(guarded(giving(None, math.nan, None)), 0.2)(BATCH)
    assert "3 of 10 answers could not be scored, more than max_unscored (20%)" in str(told.value)
    assert str(told.value).endswith("2 x no idea\n  1 x the reward gave nan")
    assert [s.value for s in limited(giving(None), 1.0)(BATCH[:2])] == [None, 1.0]
    with pytest.raises(Failure):
        limited(giving(None), 0.0)(BATCH)


def test_nothing_scored_stops_the_run_whatever_is_allowed() -> None:
    with pytest.raises(Failure) as told:
        limited(guarded(giving(None, math.nan, None)), 1.0)(BATCH[:3])
    assert "3 of 3 answers could not be scored, so there is nothing to learn from" in str(told.value)
    assert str(told.value).endswith("2 x no idea\n  1 x the reward gave nan")
    assert limited(giving(), 0.0)([]) == []
