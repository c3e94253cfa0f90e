"""Programs that take turns: one step of one, one step of the other, each alone on the machine while it works.

A comparison of two long runs one after the other measures the weather as well. Here both are loaded once, both
have had a step to warm up, and the two steps of a pair are seconds apart.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

Found = dict[str, Any]


class Side:
    """A process whose `workload.Turn` reports one line a step and then waits for one."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name, self.log = name, log
        with open(log, "w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.started = False

    def step(self) -> Found:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if self.started:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        self.started = True
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended with code {self.process.wait()}:\n{self.log.read_text()[-4000:]}")
        found = json.loads(line)
        print(f"  {self.name}: {found['seconds']:.2f} s, {found['memory'] / 1e9:.1f} GB", file=sys.stderr, flush=True)
        return found


@contextmanager
def _running(name: str, command: Sequence[str], folder: Path) -> Iterator[Side]:
    side = Side(name, command, folder / f"{name}.log")
    try:
        yield side
    finally:
        side.process.kill()
        side.process.communicate()


def take_turns(commands: Mapping[str, Sequence[str]], steps: int, folder: Path) -> list[dict[str, Found]]:
    """What each side reports of each step, the warm-up first. A side starts when the one before it has warmed up."""
    with ExitStack() as stack:
        warm, sides = {}, []
        for name, command in commands.items():
            sides.append(stack.enter_context(_running(name, command, folder)))
            warm[name] = sides[-1].step()
        return [warm] + [{side.name: side.step() for side in sides} for _ in range(steps - 1)]
