"""What the demo achieved, from the records of its run folder to docs/measured/main.json and the tables in the docs.

    make demo && .venv/bin/python benchmarks/demo.py runs/quickstart

Nothing is measured again: every figure stands in evals.json, in a stage's stage.json, or is a sum over them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.models.disk import read_json, write_json
from posttrain.recipe.load import load, resolved
from posttrain.records import UserError

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "quickstart.yaml"
MEASURED = ROOT / "docs" / "measured" / "main.json"

GAIN, UNPARSED = 0.30, 0.02
WALL, MEMORY = 1200, 6.0
"""What the demo is held to: seconds, and GB of the process's memory."""

Row = dict[str, Any]


def measured(folder: Path) -> list[Row]:
    """The rows of main.json.

    Raises:
        UserError: the run is not finished.
    """
    evals, environment = _record(folder / "evals.json"), _record(folder / "environment.json")
    asked = _record(folder / "resolved.json")
    stages = [_record(folder / "stages" / stage["id"] / "stage.json") for stage in asked["stages"]]
    measurements = [_record(folder / "evals" / f"{name}.json") for name in ("base", stages[-1]["id"])]
    origin = {"command": _command(asked), "machine": _machine(environment)}
    rows = [*_tasks(evals, stages), *_drift(evals, stages), *_cost(stages, measurements)]
    return [{**row, **_met(row), **origin} for row in rows]


def _tasks(evals: Row, stages: list[Row]) -> Iterator[Row]:
    last = stages[-1]["id"]
    for suite in (row for row in evals["suites"] if row["role"] == "trained"):
        name, items = f"{suite['suite']}: accuracy, {suite['stage']}", f"{suite['n']} items"
        yield {"what": f"{name} ({items})", "value": suite["score"], "interval": suite["interval"], "unit": "share"}
        yield {"what": f"{name}, lenient reading", "value": suite["lenient"], "unit": "share"}
        if suite["stage"] == last:
            yield {
                "what": f"{suite['suite']}: unreadable answers, {last}",
                "value": suite["unparsed"],
                "unit": "share",
                "at_most": UNPARSED,
            }
    trained = {row["suite"] for row in evals["suites"] if row["role"] == "trained"}
    own, whole = [], []
    for row in evals["comparisons"]:
        what = f"{row['suite']}: {row['stage']} against {row['against']}"
        gain = {"what": what, "value": row["diff"], "interval": row["interval"], "unit": "difference"}
        if (row["stage"], row["against"]) == (last, "base"):
            whole.append(gain | ({"at_least": GAIN} if row["suite"] in trained else {}))
            lenient = {"value": row["lenient"]["diff"], "interval": row["lenient"]["interval"]}
            whole.append(gain | {"what": f"{what}, lenient reading"} | lenient)
        elif row["suite"] in trained and row["against"] == _before(row["stage"], stages):
            own.append(gain)
    yield from own
    yield from whole


def _before(stage: str, stages: list[Row]) -> str:
    ids = ["base", *(record["id"] for record in stages)]
    at = ids.index(stage)
    return str(stages[at - 1]["from"] or ids[at - 1])


def _drift(evals: Row, stages: list[Row]) -> Iterator[Row]:
    for row in evals["retention"]:
        if row["stage"] != "base":
            what = f"retention: KL from the base, {row['stage']} ({row['n']} general prompts)"
            yield {"what": what, "value": row["kl"], "interval": row["interval"], "unit": "nats/token"}


def _cost(stages: list[Row], measurements: list[Row]) -> Iterator[Row]:
    # Between the first stage's start and the last one's end lie all measurements but the first and the last.
    wall = stages[-1]["finished"] - stages[0]["started"] + sum(found["seconds"] for found in measurements)
    yield {"what": "wall time, first measurement to last", "value": wall, "unit": "s", "at_most": WALL}
    peak = max(stage["peak_rss_bytes"] for stage in stages) / 1e9
    yield {"what": "peak memory", "value": peak, "unit": "GB", "at_most": MEMORY}
    trained = sum(stage["ledger"]["trained_tokens"] for stage in stages)
    shared = sum(stage["ledger"]["shared_tokens"] for stage in stages)
    yield {"what": "training tokens not computed twice", "value": shared / (shared + trained), "unit": "share"}
    for stage in stages:
        ledger = stage["ledger"]
        speed = (ledger["trained_tokens"] + ledger["generated_tokens"]) / ledger["seconds"]
        yield {"what": f"speed, {stage['id']} (trained and sampled)", "value": speed, "unit": "tokens/s"}


def _met(row: Row) -> Row:
    if "at_least" in row:
        low = row["interval"][0] if row.get("interval") else row["value"]
        return {"met": row["value"] >= row["at_least"] and low > 0}
    return {"met": row["value"] <= row["at_most"]} if "at_most" in row else {}


def _record(path: Path) -> Row:
    found = read_json(path)
    if found is None or found.get("finished", True) is None:
        raise UserError(f"{path}: not there, or not finished; run `make demo` to its end first")
    return found


def _command(asked: Row) -> str:
    """`make demo`, unless the run was another one."""
    recipe = resolved(load(RECIPE), RECIPE.parent).model_dump(mode="json", by_alias=True)
    changed = _differences(recipe, asked)
    return "make demo" if not changed else f"make demo, with {changed} keys of its recipe changed"


def _differences(a: Any, b: Any) -> int:
    if isinstance(a, dict) and isinstance(b, dict):
        return sum(_differences(a.get(key), b.get(key)) for key in a.keys() | b.keys())
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return sum(map(_differences, a, b))
    return int(a != b)


def _machine(environment: Row) -> str:
    memory = environment["memory_bytes"] / 1e9
    torch = environment["packages"]["torch"]
    return f"{environment['cpu']}, threads: {environment['threads']}, {memory:.0f} GB, torch {torch}"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/demo.py RUN")
    try:
        write_json(MEASURED, measured(Path(sys.argv[1])))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"{MEASURED.relative_to(ROOT)} written; `python docs/render.py` puts it into the pages")
