"""Verifiers: strict, apart from unparsed, never run what a model writes, and refused where they can be fooled."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path

import pytest
from rewarded import said

from posttrain.data import tasks
from posttrain.records import Example, UserError
from posttrain.rewards.prove import prove
from posttrain.rewards.verifier import RULE, score, verify

SUM = tasks.load("chain_sum", 1, 0, {})[0]


@pytest.mark.parametrize(
    ("text", "value", "outcome"),
    [
        ("{}", 1.0, "correct"),
        (" {}\n", 1.0, "correct"),
        ("It is 3 + 4, so <answer> {} </answer>", 1.0, "correct"),
        ("<answer>{}</answer><answer>{}</answer>", 0.0, "unparsed"),
        ("98765432", 0.0, "wrong"),
        ("", 0.0, "unparsed"),
        ("<answer></answer>", 0.0, "unparsed"),
        ("The answer is {}.", 0.0, "unparsed"),
        ("5 or {}", 0.0, "unparsed"),
        ("{} {}", 0.0, "unparsed"),
        ("1e99999", 0.0, "unparsed"),
        ("9" * 20_000, 0.0, "unparsed"),
    ],
)
def test_one_number_or_nothing(text: str, value: float, outcome: str) -> None:
    got = score(SUM, text.replace("{}", SUM.answer or ""))
    assert (got.value, got.outcome) == (value, outcome)


def test_what_cannot_be_scored_has_no_value() -> None:
    assert score(dataclasses.replace(SUM, answer=None), "3").value is None
    assert score(Example(id="x"), "3").outcome == "error"
    raising = tasks.load("prime_factorization", 1, 0, {})[0]
    got = score(raising, "two threes")
    assert (got.value, got.outcome) == (None, "error")
    assert "ValueError" in got.why


def test_a_scorer_uses_the_items_own_configuration() -> None:
    (example,) = tasks.load("countdown", 1, 0, {"min_numbers": 3, "max_numbers": 3})
    assert score(example, example.answer or "").value == 1.0
    assert score(example, "1+1").value == 0.0


@pytest.mark.parametrize(
    "name", ["string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "countdown", "puzzle24"]
)
def test_answers_are_never_run_as_code(name: str, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    (example,) = tasks.load(name, 1, 0, {})
    for text in (f"[open({str(flag)!r}, 'w')]", f"__import__('pathlib').Path({str(flag)!r}).touch()"):
        assert score(example, text).value == 0.0
    assert not flag.exists()
    assert score(example, "9**9**9**9").value == 0.0  # and not an endless computation


SOUND = (
    "chain_sum",
    "basic_arithmetic",
    "products",
    "gcd",
    "leg_counting",
    "countdown",
    "spell_backward",
    "simple_equations",
)


@pytest.mark.parametrize("name", SOUND)
def test_sound_tasks_are_proven(name: str) -> None:
    assert prove(RULE, tasks.load(name, 16, 5, {}), score) == []


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("game_of_life_halting", "garbage earned 1.0"),
        ("coin_flip", "the answer's beginning earned 1.0"),
        ("knights_knaves", "the answer in prose earned 1.0"),
        ("time_intervals", "the answer twice earned 1.0"),
        ("puzzle24", "one constant is right for"),
        ("prime_factorization", "garbage earned None"),
        ("rush_hour", "no answer known to be right"),
        ("simple_integration", "would run the answer as code"),
    ],
)
def test_tasks_that_can_be_fooled_are_not(name: str, why: str) -> None:
    assert any(why in failure for failure in prove(RULE, tasks.load(name, 16, 5, {}), score))


def test_a_proof_needs_examples() -> None:
    with pytest.raises(UserError, match="no example"):
        prove(RULE, [], score)


def test_a_batch_is_scored_in_its_order() -> None:
    texts = [SUM.answer or "", "98765432", "?"]
    assert [s.value for s in verify([said(text, SUM) for text in texts])] == [1.0, 0.0, 0.0]


def test_scorers_that_print_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    prove(RULE, tasks.load("tower_of_hanoi", 8, 1, {}), score)
    assert capsys.readouterr().out == ""


def test_the_kept_audit_speaks_of_every_task(repo_root: Path) -> None:
    kept = json.loads((repo_root / "docs/measured/tasks.json").read_text(encoding="utf-8"))
    holds = {row["task"]: row["holds"] for row in kept["rows"]}
    assert list(holds) == tasks.names()
    assert all(row["holds"] == (not row["why"]) for row in kept["rows"])
    assert all(holds[name] for name in SOUND)
    assert not any(holds[name] for name in ("coin_flip", "knights_knaves", "puzzle24", "rush_hour"))
    assert kept["reasoning_gym"] == version("reasoning_gym"), "run `python benchmarks/audit.py` again"
