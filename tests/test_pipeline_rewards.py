"""Stages with rewards of the recipe's own, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_bad_input import here, home, jsonl, refused, source, write

from posttrain.cli import main
from posttrain.records import Score
from posttrain.rewards import sources

__all__ = ["here", "home"]
ROWS = [{"question": f"What is {i}?", "answer": f"It is.\n#### {i}"} for i in range(12)]
LAYOUT = {"kind": "regex", "id": "short", "pattern": "[0-9]{1,3}", "example": "12", "weight": 0.5}
LENGTH = {"kind": "length", "max_tokens": 8, "buffer": 4}


def recipe(rewards: list[Any], **changes: Any) -> dict[str, Any]:
    Path("asked.jsonl").write_text(jsonl(ROWS))
    stage = {
        "id": "rl",
        "kind": "grpo",
        "steps": 2,
        "batch_size": 2,
        "n": 4,
        "data": source("asked.jsonl"),
        "sampling": {"max_new_tokens": 6},
        "rewards": rewards,
        **changes,
    }
    return {"schema": 1, "name": "t", "model": {"source": "model"}, "stages": [stage]}


def test_each_reward_is_kept_in_the_metrics(here: Path) -> None:
    assert main(write(recipe([{"kind": "exact"}, LAYOUT, LENGTH]))) == 0
    rows = [json.loads(line) for line in (here / "out/stages/rl/metrics.jsonl").read_text().splitlines()]
    for row in rows:
        parts = {name: row[f"reward/{name}"] for name in ("exact", "short", "length")}
        assert row["reward"] == pytest.approx(parts["exact"] + 0.5 * parts["short"] + parts["length"])
        assert -1 <= parts["length"] < 0


def test_pairs_are_ranked_by_the_recipe_s_rewards(here: Path) -> None:
    on_policy = {"n": 4, "prompts": 4, "max_new_tokens": 6, "rewards": [{**LAYOUT, "pattern": "[^ ?]+"}]}
    given = recipe([])
    stage = {key: given["stages"][0][key] for key in ("id", "steps", "batch_size", "data")}
    given["stages"] = [{**stage, "kind": "preference", "on_policy": on_policy}]
    (here / "asked.jsonl").write_text(jsonl([{"prompt": row["question"]} for row in ROWS]))
    assert main(write(given)) == 0
    kept = [json.loads(line) for line in (here / "out/stages/rl/judged.jsonl").read_text().splitlines()]
    assert {(line["sample"]["score"], line["sample"]["outcome"]) for line in kept} == {(0.5, "correct")}


def test_a_reward_that_can_be_fooled_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(write(recipe([{**LAYOUT, "pattern": ".*"}])), capsys)
    assert "reward 'short' can be fooled on" in message
    assert "garbage earned 1.0" in message
    assert not (here / "out/stages").exists()


def test_rows_without_what_a_reward_needs_are_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(write(recipe([{"kind": "python"}])), capsys)
    assert "asked.jsonl:1: it has no unit tests" in message


@pytest.mark.parametrize(
    ("given", "why"), [(float("nan"), "the reward gave nan"), (None, "no idea"), ("x", "TypeError: no length")]
)
def test_a_reward_that_breaks_stops_the_run(
    given: Any, why: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(rollouts: Any) -> list[Score]:
        if given == "x":
            raise TypeError("no length")
        return [Score(given, "correct", why="no idea" if given is None else "")] * len(rollouts)

    monkeypatch.setattr(sources, "length", lambda reward: broken)
    message = refused(write(recipe([{"kind": "exact"}, LENGTH])), capsys, code=1)
    assert "8 of 8 answers could not be scored, so there is nothing to learn from" in message
    assert f"length: {why}" in message
