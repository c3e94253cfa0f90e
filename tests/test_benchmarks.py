"""The benchmarks' own arithmetic, and that they run: on a tiny model, once, where no peer is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_readme import by_path
from tiny import tiny_policy

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))
NAMES = ("run", "train", "sampling", "peak", "breakdown", "checkpoint", "growth", "cluster")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_policy("llama").save(folder)
    return folder


def script(name: str) -> ModuleType:
    return by_path(f"benchmarks/{name}.py")


def run(name: str, out: Path, *arguments: str) -> Any:
    command = [sys.executable, str(ROOT / f"benchmarks/{name}.py"), "--quick", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_each_says_how_it_is_used(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "cluster":
        pytest.importorskip("ray")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        script(name).main()
    assert "--quick" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["peak", "breakdown", "checkpoint"])
def test_rows_of_a_quick_run(name: str, model: Path, tmp_path: Path) -> None:
    rows = run(name, tmp_path / "engine.json", "--model", str(model))
    assert len({row["what"] for row in rows}) == len(rows)
    for row in rows:
        assert row["spread"][0] <= row["value"] <= row["spread"][1]
        assert ("met" in row) == ("at_least" in row or "at_most" in row)


def test_the_command_of_a_row_is_what_to_type_to_measure_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    argv = [str(ROOT / "benchmarks/train.py"), "--only", "sft", "--out", "/some/where.json", "--runs", "5"]
    assert script("measured").command(argv) == "python benchmarks/train.py --only sft --runs 5"


def test_growth_and_plots(tmp_path: Path) -> None:
    growth = run("growth", tmp_path / "growth.json", "--only", "group")
    assert [point["x"] for point in growth["group"]["points"]] == [1, 2]
    measured = script("measured")
    rows = [measured.row(f"work: speed against {peer}", "times", [2.0, 3.0], at_least=1) for peer in ("TRL's", "me")]
    plots = script("plots")
    once = {path.name: path.read_bytes() for path in plots.draw(rows, growth, tmp_path / "a")}
    assert once.keys() == {"engine.svg", "growth-group.svg"}
    assert once == {path.name: path.read_bytes() for path in plots.draw(rows, growth, tmp_path / "b")}
    assert b"work, against TRL" in once["engine.svg"]


def test_packed_and_padded_are_the_same_gradient() -> None:
    growth = script("growth")
    model, rows = growth.made("1M"), list(growth.batch(growth.Point(2, 3, 24, 12)))
    found = []
    for step in (growth.packed, growth.padded):
        model.zero_grad()
        found.append((step(model, rows), [p.grad.clone() for p in model.parameters()]))
    (a, ours), (b, theirs) = found
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_sides_take_turns_and_a_failing_one_is_told(tmp_path: Path) -> None:
    turns = script("turns")
    side = tmp_path / "side.py"
    side.write_text(
        "import sys\nsys.path.append(sys.argv[1])\nfrom workload import Turn\n"
        "turn = Turn()\nprint('a library talks')\n"
        "for i in range(9):\n    assert i < int(sys.argv[2]), 'broken'\n    turn(step=i)\n"
    )
    command = [sys.executable, str(side), str(ROOT / "benchmarks")]
    with pytest.raises(SystemExit, match=r"(?s)a ended with code.*broken"):
        turns.take_turns({"a": [*command, "1"]}, 3, tmp_path)
    steps = turns.take_turns({"a": [*command, "9"], "b": [*command, "9"]}, 3, tmp_path)
    assert [{name: found["step"] for name, found in step.items()} for step in steps] == [
        {"a": i, "b": i} for i in range(3)
    ]
    assert all(found["memory"] > 2**20 and found["seconds"] >= 0 for step in steps for found in step.values())


def test_what_differs_is_not_compared() -> None:
    train = script("train")
    [sft, *_] = train.WORKLOADS
    found = {"tokens": 10, "loss": 2.0, "norm": 1.0, "signal": 1.0}
    train.check(sft, [{"posttrain": found, "trl": {**found, "loss": 2.0001}}])
    for other in ({"loss": 2.1}, {"norm": 1.1}, {"tokens": 11}):
        with pytest.raises(SystemExit, match="sft: the sides"):
            train.check(sft, [{"posttrain": found, "trl": {**found, **other}}])
    with pytest.raises(SystemExit, match="flatter"):
        train.check(sft, [{"posttrain": {**found, "signal": 0.5}, "trl": found}])


def test_speed_is_tokens_over_time_with_the_reference_s_share() -> None:
    train = script("train")
    [sft, *_] = train.WORKLOADS
    ours = {"seconds": 1.5, "before": 0.5, "cpu_seconds": 3.0, "memory": 1e9, "tokens": 100}
    theirs = {"seconds": 6.0, "cpu_seconds": 12.0, "memory": 4e9, "tokens": 100}
    step = {"posttrain": ours, "trl": theirs}
    rows = {row["what"]: row for row in train.compared(sft, train.Goal(3.0, 0.5, "tokens/s"), [step, step])}
    speed = rows["SFT, LoRA: speed against TRL's"]
    assert (speed["value"], speed["met"]) == (3.0, True)
    assert rows["SFT, LoRA: posttrain, speed"]["value"] == 50
    assert rows["SFT, LoRA: peak memory against TRL's"]["value"] == 0.25
    assert rows["SFT, LoRA: processor time against TRL's"]["value"] == 0.25


def test_workloads_are_what_they_say() -> None:
    train, workload = script("train"), script("workload")
    assert {work.name for work in train.WORKLOADS} == train.TITLES.keys()
    for work in train.WORKLOADS:
        rows = workload.rows(work)
        assert len(rows) == work.steps * work.batch
        assert rows == workload.rows(work)
    [long] = [work for work in train.WORKLOADS if work.name == "dpo-long"]
    words = [{key: len(text.split()) for key, text in row.items()} for row in workload.rows(long._replace(steps=40))]
    prompts, answers = (sum(row[key] for row in words) for key in ("prompt", "chosen"))
    assert prompts / answers == pytest.approx(4, rel=0.1)
