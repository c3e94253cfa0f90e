"""Stages that learn from their own answers beside RL: rejection sampling and online preferences, by command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_bad_input import here, home, jsonl, refused, source, write

from posttrain.cli import main

__all__ = ["here", "home"]
WORD = {"kind": "regex", "id": "word", "pattern": "[^ ?]+", "example": "yes"}
STAGES: dict[str, dict[str, Any]] = {
    "rejection_sampling": {"prompts": 6, "n": 4, "rounds": 2, "sampling": {"max_new_tokens": 6, "stop": list("aeiou")}},
    "online_preference": {"n": 4, "sampling": {"max_new_tokens": 6}},
    "grpo": {"n": 4, "sampling": {"max_new_tokens": 6}},
}
GENERATED = {"rejection_sampling": 2 * 6 * 4 * 6, "online_preference": 4 * 2 * 4 * 6}


def recipe(kind: str, **changes: Any) -> dict[str, Any]:
    Path("asked.jsonl").write_text(jsonl([{"prompt": f"What is {i}?"} for i in range(12)]))
    common = {"id": "s", "kind": kind, "steps": 4, "batch_size": 2, "data": source("asked.jsonl"), "rewards": [WORD]}
    stage = {**common, **STAGES[kind], **changes}
    return {"schema": 1, "name": "t", "model": {"source": "model"}, "stages": [stage]}


@pytest.mark.parametrize("kind", GENERATED)
def test_a_run(kind: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Planned, taken, told, and finished when asked again."""
    command = write(recipe(kind))
    assert main([*command, "--dry-run", "--json"]) == 0
    (planned,) = json.loads(capsys.readouterr().out)["stages"]
    assert planned["generated_tokens"] == GENERATED[kind]
    assert planned["trained_tokens"] > 0
    assert main(command) == 0
    folder = here / "out/stages/s"
    record = json.loads((folder / "stage.json").read_text())
    assert 0 < record["ledger"]["generated_tokens"] <= GENERATED[kind]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any(row["grad_norm"] > 0 for row in rows)
    assert 0 < rows[0]["reward"] <= 1
    assert sorted(path.name for path in folder.glob("kept-*.jsonl")) == (
        ["kept-0.jsonl", "kept-1.jsonl"] if kind == "rejection_sampling" else []
    )
    capsys.readouterr()
    assert main(command) == 0
    assert "s: finished already" in "".join(capsys.readouterr())


def test_a_run_that_keeps_nothing_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(write(recipe("rejection_sampling", at_least=2.0)), capsys)
    assert "none of 24 answers to 6 prompts came to its end and earned 2 or more" in message


def test_the_majority_needs_no_answers(here: Path) -> None:
    """Rows without a task or a reference answer; a model that seldom agrees with itself is told to have no score."""
    sampling = {"max_new_tokens": 1, "temperature": 0.3}
    given = recipe("grpo", n=8, rewards=[{"kind": "majority"}], max_unscored=1.0, sampling=sampling)
    assert main(write(given)) == 0
    rows = [json.loads(line) for line in (here / "out/stages/s/metrics.jsonl").read_text().splitlines()]
    assert any(row["reward"] is not None and 0 < row["reward"] <= 1 for row in rows)


def test_a_majority_that_is_seldom_had_stops_the_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(write(recipe("grpo", rewards=[{"kind": "majority"}], n=2)), capsys, code=1)
    assert "no answer has most of the 2 votes of its group" in message
