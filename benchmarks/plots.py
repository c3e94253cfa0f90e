"""Plots for docs/performance.md and docs/results.md from docs/measured/*.json; the same numbers give the same bytes.

python benchmarks/plots.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter
from measured import Row

ROOT = Path(__file__).resolve().parent.parent
MEASURED, PLOTS = ROOT / "docs" / "measured", ROOT / "docs" / "plots"
WIDTH = 3.75
"""Inches: 360 px on a page, where type of 8 points can be read."""
STYLE = {
    "svg.hashsalt": "posttrain",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
OURS, OTHERS, GOAL = "#1b6ca8", "#9a9a9a", "#c03a2b"
LINES = (("#1b6ca8", "o"), ("#d1741d", "s"), ("#2b8a4b", "^"), ("#8e4a9e", "D"), ("#555555", "v"))
"""Colour and mark of each method: to be told apart without colour too."""
AGAINST = ": speed against "
ENDINGS = {"TRL's": "TRL", "generate's": "generate"}


def main() -> None:
    found = {name: json.loads((MEASURED / f"{name}.json").read_text()) for name in ("engine", "growth", "rlvr")}
    draw(found["engine"], found["growth"], PLOTS)
    draw_learning(found["rlvr"], PLOTS)


def draw(rows: list[Row], growth: dict[str, Any], folder: Path) -> list[Path]:
    return _saved(
        lambda: {"engine": speeds(rows), **{f"growth-{name}": curve(found) for name, found in growth.items()}}, folder
    )


def draw_learning(found: dict[str, Any], folder: Path) -> list[Path]:
    return _saved(lambda: {"rlvr": learning(found)}, folder)


def _saved(make: Callable[[], dict[str, Figure]], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figures = make()
        paths = []
        for name, figure in figures.items():
            paths.append(folder / f"{name}.svg")
            figure.savefig(paths[-1], metadata={"Date": None, "Creator": None})
    return paths


def speeds(rows: list[Row]) -> Figure:
    """How many times as fast, with the lowest and the highest run, and the goal."""
    goals = [row for row in rows if AGAINST in row["what"] and "at_least" in row][::-1]
    figure = Figure(figsize=(WIDTH, 0.7 + 0.38 * len(goals)), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(goals):
        what, _, against = row["what"].partition(AGAINST)
        low, high = row["spread"]
        axes.barh(y, row["value"], height=0.45, color=OURS)
        axes.plot([low, high], [y, y], color="black", linewidth=1)
        axes.plot([row["at_least"]] * 2, [y - 0.22, y + 0.22], color=GOAL, linewidth=2)
        axes.text(0, y + 0.3, f" {what}, against {ENDINGS.get(against, against)}", va="bottom", fontsize=7)
    axes.set_yticks([])
    axes.set_ylim(-0.5, len(goals) - 0.2)
    axes.axvline(1, color=OTHERS, linewidth=1)
    axes.set_xlabel("times as fast (red: the goal)")
    return figure


def curve(found: dict[str, Any]) -> Figure:
    """Both sides over one axis, both logarithmic: a straight line is a power, a gap of one height a factor."""
    figure = Figure(figsize=(WIDTH, 2.4), layout="constrained")
    axes = figure.subplots()
    points = found["points"]
    xs = [point["x"] for point in points]
    names = [name for name in points[0] if name != "x"]
    for name in names:
        color = OURS if name == "posttrain" else OTHERS
        axes.plot(xs, [point[name] for point in points], marker="o", markersize=3, color=color, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(xs, [f"{x:,}" for x in xs])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.minorticks_off()
    axes.set_xlabel(found["axis"])
    axes.set_ylabel(found["unit"])
    if len(names) > 1:
        axes.legend(frameon=False)
    return figure


def learning(found: dict[str, Any]) -> Figure:
    """Of each method the mean over its seeds, and what lies between the lowest and the highest of them."""
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    axes = figure.subplots()
    for (name, seeds), (color, marker) in zip(found["curves"].items(), LINES, strict=True):
        accuracies = 100 * np.array(seeds)
        xs = np.linspace(0, found["tokens"], accuracies.shape[1])
        axes.fill_between(xs, accuracies.min(0), accuracies.max(0), color=color, alpha=0.12, linewidth=0)
        axes.plot(xs, accuracies.mean(0), marker=marker, markersize=4, color=color, label=name)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("sampled tokens")
    axes.set_ylabel("held-out sums right, %")
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
