"""Exit codes, streams and `--json` of the command line; what the commands do is tested where it is done."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from posttrain import cli, losses, rewards, training
from posttrain.records import UserError

RECIPE = """\
schema: 1
name: demo
model: {source: pip:pkg/m.gguf}
stages: [{id: a, kind: sft, steps: 1, data: {sources: [{source: x.jsonl}]}}]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return path


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, **functions: object) -> None:
    """Put functions in the place of a room that loads models."""
    made = types.ModuleType(module)
    vars(made).update(functions)
    monkeypatch.setitem(sys.modules, module, made)


def raising(error: BaseException):
    def function(*_: object) -> None:
        raise error

    return function


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    for name in (
        "run",
        "report",
        "sample",
        "eval",
        "models",
        "schema",
        "explain",
        "losses",
        "rewards",
        "methods",
        "tasks",
    ):
        assert f"\n  {name} " in out


def test_schema_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "posttrain recipe"


@pytest.mark.parametrize("argv", [["models"], ["explain", "optim.lr"], ["losses"]])
def test_text_or_one_json_object(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    text = capsys.readouterr().out
    assert cli.main([*argv, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert isinstance(answer, dict)
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)


@pytest.mark.parametrize(
    ("command", "table"), [("losses", losses.TABLE), ("rewards", rewards.TABLE), ("methods", training.METHODS)]
)
def test_all_that_there_is_is_listed_with_its_source(
    command: str, table: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, entry in table.items():
        [line] = [line for line in lines if line.split()[0] == name]
        assert entry.summary in line
        assert entry.paper
        assert line.endswith(entry.paper)
    assert len(lines) == len(table)


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["bogus"], "No such command"),
        (["run"], "RECIPE"),
        (["run", "r.yaml", "--sett", "a=1"], "No such option"),
        (["run", "no/such.yaml"], "no/such.yaml: cannot read the recipe"),
        (["sample", "m"], "PROMPT"),
        (["sample", "m", "p", "--n", "0"], "'--n'"),
        (["eval", "m"], "'--task'"),
        (["explain", "nosuchkey"], "no key `nosuchkey`"),
    ],
)
def test_wrong_input_is_exit_2_with_a_plain_word(
    argv: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert word in err
    assert "Traceback" not in err
    assert cli.main([*argv, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["exit"] == 2


def test_wrong_recipe_is_told_by_line_before_anything_heavy(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("steps: 1", "stepz: 1"))
    code = f"""
import sys
from posttrain.cli import main
code = main(["run", {str(recipe)!r}])
assert "torch" not in sys.modules
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{recipe}:4: stages.0.stepz: unknown key (did you mean `steps`?)" in done.stderr


def test_dry_run_hands_over_the_resolved_recipe(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def plan(given: object) -> object:
        seen.append(given)
        print("progress")
        return types.SimpleNamespace(to_json=lambda: {"stages": 1}, text=lambda: "one stage")

    stand_in(monkeypatch, "posttrain.pipeline.plan", plan=plan)
    argv = ["run", str(recipe), "--dry-run", "--set", "stages.a.steps=5", "--set", "seed=2"]
    assert cli.main([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"stages": 1}
    assert err == "progress\n"
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == "progress\none stage\n"
    first, second = seen
    assert first == second
    assert (first.seed, first.stages[0].steps) == (2, 5)
    assert first.stages[0].data.sources[0].source == str(recipe.parent / "x.jsonl")


@pytest.mark.parametrize("met", [True, False])
def test_run_exits_1_where_a_gate_is_not_met(
    met: bool, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gates = [{"suite": "sums", "measure": "gain", "met": met}]

    def run(path: Path, overrides: list[str], out: Path | None, _: object) -> object:
        assert (path, overrides, out) == (recipe, ["seed=2"], Path("there"))
        folder = Path("there")
        return types.SimpleNamespace(
            folder=folder, report=folder / "report.html", gates=gates, ok=met, summary={"a": 1}
        )

    stand_in(monkeypatch, "posttrain.pipeline.run", run=run)
    argv = ["run", str(recipe), "--set", "seed=2", "--out", "there"]
    assert cli.main(argv) == (0 if met else 1)
    assert "report: there/report.html" in capsys.readouterr().out
    assert cli.main([*argv, "--json"]) == (0 if met else 1)
    answer = json.loads(capsys.readouterr().out)
    assert answer == {
        "folder": "there",
        "report": "there/report.html",
        "ok": met,
        "gates": gates,
        "summary": {"a": 1},
    }


def test_crash_is_exit_1_with_the_traceback_in_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for error in (ZeroDivisionError("by zero"), EOFError("cut short"), OSError(28, "No space left on device")):
        stand_in(monkeypatch, "posttrain.pipeline.ask", sample=raising(error))
        assert cli.main(["sample", "m", "p", "--json"]) == 1
        out, err = capsys.readouterr()
        assert f"error: {type(error).__name__}: {error}" in err
        assert "Traceback (most recent" not in err
        assert json.loads(out)["exit"] == 1
        log = Path(err.rsplit("The traceback: ", 1)[1].strip())
        assert log.parent == tmp_path
        assert "Traceback (most recent" in log.read_text()
    monkeypatch.setenv("POSTTRAIN_DEBUG", "1")
    stand_in(monkeypatch, "posttrain.pipeline.ask", sample=raising(ZeroDivisionError("by zero")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["sample", "m", "p"])


def test_user_error_is_never_raised_even_when_debugging(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POSTTRAIN_DEBUG", "1")
    stand_in(monkeypatch, "posttrain.pipeline.ask", sample=raising(UserError("m: no such model")))
    assert cli.main(["sample", "m", "p"]) == 2
    assert capsys.readouterr().err == "error: m: no such model\n"


def test_interrupt_is_exit_130_and_says_how_to_go_on(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, "posttrain.pipeline.run", run=raising(KeyboardInterrupt()))
    stand_in(monkeypatch, "posttrain.pipeline.ask", sample=raising(KeyboardInterrupt()))
    assert cli.main(["run", str(recipe)]) == 130
    assert "the same command continues the run" in capsys.readouterr().err
    assert cli.main(["sample", "m", "p"]) == 130
    assert "continues" not in capsys.readouterr().err


def test_real_ctrl_c_ends_a_process_with_130(recipe: Path) -> None:
    code = f"""
import signal, sys, types, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
room = types.ModuleType("posttrain.pipeline.run")
def run(*_):
    print("ready", flush=True)
    time.sleep(60)
room.run = run
sys.modules["posttrain.pipeline.run"] = room
from posttrain.cli import main
sys.exit(main(["run", {str(recipe)!r}]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert err == "error: interrupted; the same command continues the run\n"


def test_closed_pipe_is_no_crash() -> None:
    command = (
        f"{sys.executable} -c 'import sys; from posttrain.cli import main; sys.exit(main([\"schema\"]))' | head -n 1"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout == "{\n"
    assert done.stderr == ""
