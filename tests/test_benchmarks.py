"""The benchmarks' own arithmetic, and that they run: on a tiny model, once, where no peer is needed."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_readme import by_path
from tiny import tiny_policy

from posttrain.records import Example

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))
NAMES = ("run", "train", "sampling", "peak", "breakdown", "checkpoint", "growth", "cluster", "results")


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


# Results


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the results are measured on, in small."""
    folder = tmp_path_factory.mktemp("public")
    results = script("results")
    for name in (results.PAIRS, results.DIALOGUES):
        (folder / name).parent.mkdir()
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(60)]
    (folder / results.ANSWERS).write_text(json.dumps(rows))
    pairs = [{**row, "chosen": row["output"], "rejected": f"{i}. Now go."} for i, row in enumerate(rows)]
    (folder / results.PAIRS).write_text(json.dumps(pairs))
    asked = "\n\nHuman: May I take {}?\n\nAssistant: {}."
    said = [{"chosen": asked.format(i, "No"), "rejected": asked.format(i, "Yes")} for i in range(20)]
    with gzip.open(folder / results.DIALOGUES, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in said)
    return folder


def test_results_of_a_quick_run(
    model: Path, public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, folder, out = script("results"), tmp_path / "runs", tmp_path / "rewards.json"
    given = {"--model": model, "--data": public, "--folder": folder, "--out": out}
    where = [str(word) for pair in given.items() for word in pair]
    names = ["politeness", "harmlessness", "rlvr-0", "distill"]
    monkeypatch.setattr(sys, "argv", ["results.py", "--quick", *where, "--only", *names])
    results.main()  # here and not as a program of its own, whose imports take as long
    rows = json.loads(out.read_text())
    learned = results.rlvr_rows(folder / "rlvr-0", folder / "rlvr-0")
    assert not any(row["what"].startswith("sums") for row in rows)  # a seed is no three seeds
    for row in [*rows, *learned]:
        low, high = row.get("interval") or row.get("spread") or [row["value"]] * 2
        assert low <= row["value"] <= high, row["what"]
        assert ("met" in row) == ("at_least" in row or "at_most" in row)
    assert len({row["what"] for row in [*rows, *learned]}) == len([*rows, *learned])
    assert {row["command"] for row in rows} == {
        f"python benchmarks/results.py --data DATA --only {name}" for name in ("politeness", "harmlessness", "distill")
    }
    _, curves = results.rlvr_curves([folder / "rlvr-0"])
    assert {len(seed) for seeds in curves.values() for seed in seeds} == {results.POINTS + 1}
    assert len({seeds[0][0] for seeds in curves.values()}) == 1  # one start
    asked = {row["prompt"] for row in results.read_rows(folder / "politeness/answers-dpo.jsonl")}
    taught = {row["prompt"][0]["content"] for row in results.read_rows(folder / "politeness/pairs.jsonl")}
    assert asked
    assert not asked & taught
    results.do("distill", results.Work(folder / "distill", public, str(model), True))
    assert "done already" in capsys.readouterr().out


def test_win_rate_at_equal_length() -> None:
    """Who always wins when longer, and loses when shorter, is no better; who wins whatever the length, is."""
    rate = script("results").at_equal_length
    longer = [float(x) for x in range(-50, 51)]
    by_length, interval = rate([(1.0 if x > 0 else 0.0 if x < 0 else 0.5) for x in longer], longer)
    assert by_length == pytest.approx(0.5, abs=1e-6)
    assert interval.low < 0.5 < interval.high
    won = [float(i % 4 > 0) for i in range(200)]
    same, interval = rate(won, [0.0] * 200)
    assert same == pytest.approx(0.75, abs=0.01)
    assert interval.low == pytest.approx(0.685, abs=0.01)  # Wilson's is 0.686 to 0.805
    rng = random.Random(0)
    lengths = [rng.uniform(-9, 3) for _ in won]
    there, back = rate(won, lengths)[0], rate([1 - w for w in won], [-x for x in lengths])[0]
    assert there + back == pytest.approx(1)
    assert 0.9 < rate([1.0] * 50, lengths[:50])[0] < 1


def test_no_prompt_is_on_both_sides() -> None:
    results = script("results")
    made = [Example(str(i), ({"role": "user", "content": f"What is {i % 20}?"},)) for i in range(60)]
    first, second = results.parted(made, 0.7)
    prompts = [{e.prompt[0]["content"] for e in side} for side in (first, second)]
    assert [len(side) for side in prompts] == [14, 6]
    assert not prompts[0] & prompts[1]
    assert {e.id for e in results.parted(made[::-1], 0.7)[0]} == {e.id for e in first}


def test_values_at_equal_tokens() -> None:
    between = script("results").interpolated
    assert between(150, [0, 100, 200], [0.0, 0.4, 0.6]) == pytest.approx(0.5)
    assert between(150, [0, 100, 200], [[0, 1], [4, 2], [6, 4]]) == pytest.approx([5, 3])


def test_curves_of_learning(tmp_path: Path) -> None:
    plots = script("plots")
    found = {"tokens": 300.0, "curves": {name: [[0.3, 0.4], [0.3, 0.6]] for name in "abcde"}}
    once, again = (plots.draw_learning(found, tmp_path / name)[0].read_bytes() for name in ("one", "two"))
    assert once == again
    assert b"sampled tokens" in once
