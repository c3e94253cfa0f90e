"""The command line. Thin: each command is a few lines of Python around a public function, imported when called.

Exit codes: 0 done, 1 failed (a gate not met, training that broke down, a crash), 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.exceptions import TyperException

from posttrain.records import Failure, UserError

T = TypeVar("T")
Row = dict[str, Any]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key; may be repeated.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A directory, hub id, .gguf file or pip:PACKAGE/FILE.")]
System = Annotated[str | None, typer.Option(help="System prompt.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random choice.")]

app = typer.Typer(
    name="posttrain",
    help="From a pre-trained language model to one that can be trusted with a job: one recipe, one record.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command()
def run(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, in YAML.")],
    set_: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and what it costs.")] = False,
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/NAME.")] = None,
    cluster: Annotated[
        str | None, typer.Option(metavar="local|ADDRESS", help="Train on a Ray cluster: one of this machine, or there.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="On a cluster: workers that train together.")] = 1,
    worker_cpus: Annotated[int, typer.Option(min=1, help="... and the processors of each.")] = 1,
    rollout_actors: Annotated[int, typer.Option(min=1, help="On a cluster: samplers beside the workers.")] = 1,
    rollout_cpus: Annotated[float, typer.Option(min=0, help="... and the share of a processor of each.")] = 0.5,
    rollout_gpus: Annotated[float, typer.Option(min=0, help="... and of a GPU, where workers have them.")] = 0.5,
    shard_always: Annotated[
        bool,
        typer.Option("--shard-always", help="On a cluster: cut all weights within a step too."),
    ] = False,
    as_json: Json = False,
) -> int:
    """Do what a recipe says, and report it. The same command continues a run that was stopped."""
    from posttrain.recipe.load import load, resolved

    if cluster is None:
        for option in ("workers", "worker_cpus", "rollout_actors", "rollout_cpus", "rollout_gpus", "shard_always"):
            source = context.get_parameter_source(option)
            if source is not None and source.name == "COMMANDLINE":
                raise UserError(
                    f"--{option.replace('_', '-')}: needs --cluster (local, or an ADDRESS); nothing was run"
                )
    loaded = resolved(load(recipe, set_ or ()), recipe.parent)  # a mistake in it is told before torch is imported
    if dry_run:
        from posttrain.pipeline.plan import plan

        planned = _quietly(as_json, lambda: plan(loaded))
        return _answer(as_json, planned.to_json(), planned.text)

    from posttrain.pipeline.run import run as run_recipe
    from posttrain.pipeline.stages import train_here

    def work() -> Any:
        if cluster is None:
            return run_recipe(recipe, set_ or [], out, train_here)
        room = _cluster_room()
        layout = room.Layout(workers, worker_cpus, rollout_actors, rollout_cpus, rollout_gpus, shard_always)
        room.check(loaded.stages, layout)
        with room.cluster(cluster, layout) as trainer:
            return run_recipe(recipe, set_ or [], out, trainer)

    result = _quietly(as_json, work)
    answer = {"folder": str(result.folder), "report": str(result.report), "ok": result.ok, "gates": result.gates}
    _answer(as_json, answer | {"summary": result.summary}, lambda: _run_text(result))
    return 0 if result.ok else 1


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")], as_json: Json = False) -> int:
    """Render a run's report again."""
    from posttrain.report.render import render

    page = _quietly(as_json, lambda: render(folder))
    return _answer(as_json, {"report": str(page)}, lambda: f"report: {page}")


@app.command()
def sample(
    model: Model,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What the user says.")],
    n: Annotated[int, typer.Option(min=1, help="Completions per prompt.")] = 1,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest completion, in tokens.")] = 128,
    seed: Seed = 0,
    system: System = None,
    as_json: Json = False,
) -> int:
    """Ask a model."""
    from posttrain.pipeline.ask import sample as ask

    rows = _quietly(as_json, lambda: ask(model, prompts, n, temperature, max_new_tokens, seed, system))
    return _answer(as_json, {"model": model, "samples": rows}, lambda: "\n\n".join(row["text"] for row in rows))


@app.command("eval")
def evaluate(
    model: Model,
    task: Annotated[str, typer.Option(metavar="reasoning_gym/TASK", help="See `posttrain tasks`.")],
    rows: Annotated[int, typer.Option(min=1, help="How many items.")] = 200,
    seed: Seed = 0,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Compare with this one, on the same items.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Score a model on a verifiable task, with intervals."""
    from posttrain.pipeline.ask import evaluate as ask

    scores = _quietly(as_json, lambda: ask(model, task, rows, seed, against))
    return _answer(as_json, scores, lambda: _columns((key, _cell(value)) for key, value in scores.items()))


@app.command()
def models(as_json: Json = False) -> int:
    """The default model, and what else a recipe can start from."""
    from posttrain.models.source import PACKAGES

    pinned = [f"pip:{package}/{file}" for package, files in PACKAGES.items() for file in files]
    forms = {
        "path/to/folder": "config.json, safetensors and a tokenizer, or a saved adapter",
        "owner/name": "from the Hugging Face hub; `revision` names a branch, tag or commit",
        "path/to/file.gguf": "converted to safetensors once, and cached",
        **{source: "from the package index: pinned, checked, converted once" for source in pinned},
    }
    answer = {"default": pinned[0], "forms": [{"source": s, "meaning": m} for s, m in forms.items()]}
    return _answer(as_json, answer, lambda: f"default: {pinned[0]}\n\n{_columns(forms.items())}")


@app.command()
def schema() -> int:
    """Print the JSON Schema of a recipe, for editors."""
    from posttrain.recipe.explain import json_schema

    return _answer(True, json_schema(), str)


@app.command()
def explain(
    key: Annotated[str, typer.Argument(metavar="KEY", help="As in stages.grpo.optim.lr; an ending will do.")],
    as_json: Json = False,
) -> int:
    """What a key of the recipe means."""
    from dataclasses import asdict

    from posttrain.recipe import explain as recipe

    return _answer(as_json, {"keys": [asdict(k) for k in recipe.lookup(key)]}, lambda: recipe.explain(key))


@app.command()
def losses(as_json: Json = False) -> int:
    """The losses there are, with their papers."""
    from posttrain.losses import TABLE

    return _table(as_json, "losses", TABLE)


@app.command()
def rewards(as_json: Json = False) -> int:
    """The rewards there are, with their papers."""
    from posttrain.rewards import TABLE

    return _table(as_json, "rewards", TABLE)


@app.command()
def methods(as_json: Json = False) -> int:
    """The kinds of stage there are, with their papers."""
    from posttrain.training import METHODS

    return _table(as_json, "methods", METHODS)


@app.command()
def tasks(as_json: Json = False) -> int:
    """The verifiable tasks there are."""
    from posttrain.data.tasks import PREFIX, names

    paper = "Stojanovski et al., 2505.24760"
    rows = [{"name": PREFIX + name, "paper": paper} for name in names()]
    return _answer(as_json, {"tasks": rows}, lambda: "\n".join([*(row["name"] for row in rows), f"\nPaper: {paper}"]))


def _cluster_room() -> Any:
    try:
        from posttrain.cluster import train
    except ModuleNotFoundError as error:
        raise UserError(f"--cluster needs Ray ({error}): pip install 'posttrain[cluster]'") from error
    return train


def _quietly(as_json: bool, work: Callable[[], T]) -> T:
    """Keep stdout for the answer: what anything prints there meanwhile goes to stderr."""
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        return work()


def _answer(as_json: bool, value: Row, text: Callable[[], str]) -> int:
    print(json.dumps(value, indent=2) if as_json else text())
    return 0


def _table(as_json: bool, name: str, table: dict[str, Any]) -> int:
    rows = [{"name": key, "summary": entry.summary, "paper": entry.paper} for key, entry in table.items()]
    return _answer(as_json, {name: rows}, lambda: _columns(tuple(row.values()) for row in rows))


def _columns(rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _run_text(result: Any) -> str:
    lines = [f"gate {'met' if g['met'] else 'NOT MET'}: {g['suite']} {g['measure']}" for g in result.gates]
    return "\n".join([*lines, f"report: {result.report}"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. Everything that goes wrong is told here, on stderr."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        code = app(args=argv or ["--help"], prog_name="posttrain", standalone_mode=False) or 0
    except UserError as error:
        return _fail(argv, 2, str(error))
    except Failure as error:
        return _fail(argv, 1, str(error))
    except TyperException as error:
        return _fail(argv, error.exit_code, f"{error.format_message()} (see `posttrain --help`)")
    except Exception as error:
        if os.environ.get("POSTTRAIN_DEBUG") == "1":
            raise
        cause = error.__cause__ if isinstance(error, typer.Abort) else error  # typer turns EOFError into Abort
        return _fail(argv, 1, f"{type(cause).__name__}: {cause}\n{_log(error)}")
    if code == 130:  # typer's answer to Ctrl-C
        again = "; the same command continues the run" if argv[0] == "run" else ""
        return _fail(argv, code, f"interrupted{again}")
    return code


def _fail(argv: Sequence[str], code: int, message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    options = argv[: argv.index("--")] if "--" in argv else argv
    if "--json" in options:
        print(json.dumps({"error": message, "exit": code}))
    return code


def _log(error: Exception) -> str:
    """Write the traceback to a file; say what it is and where."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="posttrain-", suffix=".log", delete=False) as file:
            file.write(text)
    except OSError:
        return f"This was not foreseen. The traceback could not be written to a file:\n{text}"
    return f"This was not foreseen; it may be a fault of posttrain or of the machine. The traceback: {file.name}"
