"""Exact match and patterns."""

from __future__ import annotations

import pytest
from rewarded import failures, outcome, question

from posttrain.recipe.rewards import ExactReward, RegexReward
from posttrain.records import UserError
from posttrain.rewards.match import exact, no_reference, regex

CITIES = [question(f"Capital {i}?", city) for i, city in enumerate(("Paris", "New York", "São Paulo", "Bern", "Oslo"))]


@pytest.mark.parametrize(
    ("text", "value", "how"),
    [
        ("New York", 1.0, "correct"),
        (" New\n York ", 1.0, "correct"),
        ("It is big. <answer>New York</answer>", 1.0, "correct"),
        ("new york", 0.0, "wrong"),
        ("New York or Bern", 0.0, "wrong"),
        ("<answer>New York</answer><answer>Bern</answer>", 0.0, "wrong"),
        ("", 0.0, "unparsed"),
    ],
)
def test_exact(text: str, value: float, how: str) -> None:
    assert outcome(exact(ExactReward(kind="exact")), text, CITIES[1]) == (value, how)


def test_exact_may_ignore_case_and_is_proven() -> None:
    loose = exact(ExactReward(kind="exact", ignore_case=True))
    assert outcome(loose, "NEW york", CITIES[1]) == (1.0, "correct")
    assert failures(loose, *CITIES) == []
    assert no_reference(question(answer=" ")) == "it has no reference answer"
    assert no_reference(CITIES[0]) == ""


def dates(pattern: str = r"\d{4}-\d\d-\d\d", example: str = "2026-01-31") -> RegexReward:
    return RegexReward(kind="regex", pattern=pattern, example=example)


@pytest.mark.parametrize(
    ("text", "value"),
    [("2026-01-31", 1.0), ("So: <answer> 2026-01-31 </answer>", 1.0), ("It is 2026-01-31", 0.0), ("", 0.0)],
)
def test_a_pattern_matches_the_whole_answer(text: str, value: float) -> None:
    assert outcome(regex(dates()), text)[0] == value


def test_patterns_prove_themselves_on_their_example() -> None:
    assert failures(regex(dates()), *CITIES) == []
    assert any("the pattern's example earned 0.0" in f for f in failures(regex(dates(example="31.1.2026")), *CITIES))
    loose = failures(regex(dates(pattern=".+")), *CITIES)
    assert any("garbage earned 1.0" in failure for failure in loose)
    assert any("the question earned 1.0" in failure for failure in loose)


def test_a_broken_pattern_is_told() -> None:
    with pytest.raises(UserError, match=r"reward 'regex': pattern '\(': missing \)"):
        regex(dates(pattern="("))
    with pytest.raises(UserError, match="the repetition number is too large"):
        regex(dates(pattern="a{99999999999}"))
