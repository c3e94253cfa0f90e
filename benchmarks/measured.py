"""Measurements as rows: printed, and kept in a JSON file that the documentation is rendered from."""

from __future__ import annotations

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

Row = dict[str, Any]


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
        "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "machine": machine(),
    }


def show(rows: Sequence[Row]) -> None:
    width = max(len(r["what"]) for r in rows)
    for r in rows:
        low, high = r["spread"]
        goals = [f"{name.replace('_', ' ')} {r[name]}" for name in ("at_least", "at_most") if name in r]
        goal = f"  {'met' if r['met'] else 'NOT MET'}: {', '.join(goals)}" if goals else ""
        print(f"{r['what']:{width}}  {r['value']:10.2f} {r['unit']:8}  ({low:.2f} to {high:.2f}){goal}")


def keep(path: Path, rows: list[Row]) -> None:
    """Put `rows` into the file in place of those of the same names; the others stay."""
    before = json.loads(path.read_text()) if path.exists() else []
    names = {r["what"] for r in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([r for r in before if r["what"] not in names] + rows, indent=2) + "\n")


def machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{model}, cores: {os.cpu_count()}, {memory:.0f} GB, torch {version('torch')}"
