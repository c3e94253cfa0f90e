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


def row(what: str, values: Sequence[float], at_least: float | None = None) -> dict[str, Any]:
    """The median of repeated measurements, with the lowest and the highest."""
    value = statistics.median(values)
    return {
        "what": what,
        "value": round(value, 3),
        "spread": [round(min(values), 3), round(max(values), 3)],
        "at_least": at_least,
        "met": None if at_least is None else value >= at_least,
        "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "machine": machine(),
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    width = max(len(r["what"]) for r in rows)
    for r in rows:
        low, high = r["spread"]
        goal = "" if r["at_least"] is None else f"  {'meets' if r['met'] else 'MISSES'} {r['at_least']}"
        print(f"{r['what']:{width}}  {r['value']:10.2f}  ({low:.2f} to {high:.2f}){goal}")


def keep(path: Path, rows: list[dict[str, Any]]) -> None:
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
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {version('torch')}"
