"""Measurements as rows: printed, and kept in a JSON file that the documentation is rendered from."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from workload import MODEL

Row = dict[str, Any]

OPTIONS: dict[str, dict[str, Any]] = {
    "--runs": {"type": int, "default": 5},
    "--model": {"default": MODEL},
    "--quick": {"action": "store_true", "help": "tiny and once: does it run?"},
    "--out": {"type": Path},
}


def row(
    what: str, unit: str, values: Sequence[float], at_least: float | None = None, at_most: float | None = None
) -> Row:
    """The median of repeated measurements, the lowest and the highest of them, and whether the goal is met, if any."""
    value = round(statistics.median(values), 3)
    goals = {name: goal for name, goal in (("at_least", at_least), ("at_most", at_most)) if goal is not None}
    if goals:
        goals["met"] = value >= goals.get("at_least", value) and value <= goals.get("at_most", value)
    return {
        "what": what,
        "value": value,
        "unit": unit,
        "spread": [round(min(values), 3), round(max(values), 3)],
        **goals,
        "command": command(sys.argv),
        "machine": machine(),
    }


def show(rows: Sequence[Row]) -> None:
    width = max(len(r["what"]) for r in rows)
    for r in rows:
        ends = r.get("interval") or r.get("spread")
        between = f"  ({ends[0]:.2f} to {ends[1]:.2f})" if ends else ""
        goals = [f"{name.replace('_', ' ')} {r[name]}" for name in ("at_least", "at_most") if name in r]
        goal = f"  {'met' if r['met'] else 'NOT MET'}: {', '.join(goals)}" if goals else ""
        print(f"{r['what']:{width}}  {r['value']:10.2f} {r['unit']:10}{between}{goal}")


def parser(doc: str | None, *names: str) -> argparse.ArgumentParser:
    """Of a script whose documentation is `doc`, with those of the common options that it has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in names:
        made.add_argument(name, **OPTIONS[name])
    return made


def report(rows: list[Row], out: Path | None) -> None:
    """Print `rows`, and put them into the file `out`, if any, in place of those of the same names; the others stay."""
    show(rows)
    if out is None:
        return
    before = json.loads(out.read_text()) if out.exists() else []
    names = {r["what"] for r in rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([r for r in before if r["what"] not in names] + rows, indent=2) + "\n")


def command(argv: Sequence[str]) -> str:
    """As one would type it at the root of the project; where the rows are kept is left out."""
    out = argv.index("--out") if "--out" in argv else len(argv)
    return shlex.join(["python", os.path.relpath(argv[0]), *argv[1:out], *argv[out + 2 :]])


def machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{model}, cores: {os.cpu_count()}, {memory:.0f} GB, torch {version('torch')}"
