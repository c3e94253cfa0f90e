"""What a run says while it goes: a bar on a terminal, a line now and then elsewhere. Always on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from posttrain.recipe.stage import StageBase

QUIET = 15.0
"""Seconds between lines where there is no terminal."""
SHOWN = ("loss", "reward", "accuracy", "kl")


class Progress:
    def __init__(self) -> None:
        self.console = Console(file=sys.stderr, highlight=False)
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.tasks: dict[str, Any] = {}
        self.last = 0.0

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.bars.stop()

    def line(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def step(self, stage: StageBase, row: dict[str, Any]) -> None:
        done = row["step"] + 1
        told = " ".join(f"{name} {row[name]:.3f}" for name in SHOWN if row.get(name) is not None)
        told += f" {row['tokens_per_second']:.0f} tokens/s"
        if self.console.is_terminal:
            if stage.id not in self.tasks:
                self.tasks[stage.id] = self.bars.add_task(stage.id, total=stage.steps, told="")
            self.bars.update(self.tasks[stage.id], completed=done, told=told)
        elif time.monotonic() - self.last >= QUIET or done == stage.steps:
            self.last = time.monotonic()
            left = (stage.steps - done) * row["seconds"]
            self.line(f"{stage.id} {done}/{stage.steps}  {told}  about {left:.0f} s left")
