"""Stages that learn from a teacher, or from raw text, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_bad_input import here, home, jsonl, refused, source, write
from tiny import tiny_policy

from posttrain.cli import main
from posttrain.pipeline import stages
from posttrain.pipeline.plan import plan
from posttrain.recipe.load import resolved
from posttrain.recipe.schema import Recipe
from posttrain.records import Failure

__all__ = ["here", "home"]
ROWS = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(6)]


def recipe(stage: dict[str, Any]) -> dict[str, Any]:
    Path("d.jsonl").write_text(jsonl(ROWS))
    common = {"id": "d", "steps": 2, "batch_size": 2, "data": source("d.jsonl")}
    return {"schema": 1, "name": "t", "model": {"source": "model"}, "stages": [{**common, **stage}]}


MODES: dict[str, dict[str, Any]] = {
    "off_policy": {},
    "on_policy": {"sampling": {"max_new_tokens": 5}, "student_share": 0.5},
    "sequence": {"sampling": {"max_new_tokens": 5}},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_student_learns_from_a_teacher_of_another_size(here: Path, mode: str, capsys: Any) -> None:
    tiny_policy(seed=5, hidden_size=48).save(here / "teacher")
    given = recipe({"kind": "distill", "teacher": {"source": "teacher"}, "mode": mode, **MODES[mode]})
    assert main([*write(given), "--dry-run", "--json"]) == 0
    (planned,) = json.loads(capsys.readouterr().out)["stages"]
    assert planned["memory"]["teacher"] > planned["memory"]["weights"]
    assert planned["generated_tokens"] == {"off_policy": 0, "on_policy": 10, "sequence": 20}[mode]
    assert main(write(given)) == 0
    record = json.loads((here / "out/stages/d/stage.json").read_text())
    assert record["facts"]["teacher"] == tiny_policy(seed=5, hidden_size=48).digest()
    rows = [json.loads(line) for line in (here / "out/stages/d/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all(row["loss"] > 0 for row in rows)
    assert ("nll" in rows[0]) == (mode != "sequence")
    assert (record["ledger"]["generated_tokens"] > 0) == (mode != "off_policy")
    assert (here / "out/stages/d/taught.jsonl").is_file() == (mode == "sequence")


def test_a_run_that_was_stopped_does_not_ask_the_teacher_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_policy(seed=5).save(here / "teacher")
    command = write(recipe({"kind": "distill", "teacher": {"source": "teacher"}, "mode": "sequence"}))

    def stop(*args: Any) -> Any:
        raise Failure("the machine went away")

    with monkeypatch.context() as patched:
        patched.setattr(stages, "train", stop)
        assert main(command) == 1
    said = (here / "out/stages/d/taught.jsonl").read_text()
    with monkeypatch.context() as patched:
        patched.setattr(stages, "teach", stop)
        assert main(command) == 0
    assert (here / "out/stages/d/taught.jsonl").read_text() == said
    assert main([*command[:-1], "whole"]) == 0
    digests = [
        json.loads((here / out / "stages/d/stage.json").read_text())["artifact"]["digest"] for out in ("out", "whole")
    ]
    assert digests[0] == digests[1]


def test_a_wide_teacher_takes_more_than_its_weights(here: Path) -> None:
    """Its layers' own work, 40 tokens times what its MLP widens them to, stands in `work`."""
    tiny_policy(seed=5).save(here / "teacher")
    tiny_policy(seed=5, intermediate_size=16384).save(here / "wide")
    work = []
    for name in ("teacher", "wide"):
        given = recipe({"kind": "distill", "teacher": {"source": name}})
        write(given)
        (stage,) = plan(resolved(Recipe.model_validate(given), here)).stages
        assert isinstance(stage.memory, dict)
        work.append(stage.memory["work"])
    assert work[1] > work[0] + 40 * 16384 * 4


def test_a_teacher_of_another_tokenizer_is_refused_before_anything_slow(here: Path, capsys: Any) -> None:
    other = tiny_policy()
    other.tokenizer.add_tokens(["zzz"])
    other.save(here / "teacher")
    given = recipe({"kind": "distill", "teacher": {"source": "teacher"}})
    assert "teacher has not the policy's vocabulary" in (said := refused(write(given), capsys))
    assert "'zzz'" in said
    given["stages"][0]["teacher"]["source"] = "nowhere"
    assert "nowhere" in refused(write(given), capsys)


def test_raw_text_is_learned_without_a_chat_template(here: Path, capsys: Any) -> None:
    Path("d.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4 + "\nA fox.\n")
    data = {**source("d.txt"), "max_length": 16}
    assert main(write(recipe({"kind": "continued_pretraining", "data": data}))) == 0
    record = json.loads((here / "out/stages/d/stage.json").read_text())
    (read,) = record["data"]["sources"]
    assert (read["read"], read["too_long"], read["shape"]) == (2, 0, "text")
    assert read["used"] > 4
    write(recipe({"kind": "sft", "data": source("d.txt")}))
    assert "kind continued_pretraining" in refused(["run", "r.yaml", "--out", "again"], capsys)
