"""What saving adds to training: steps of the whole 135M model, every third followed by a checkpoint.

    python benchmarks/checkpoint.py [--runs 5] [--out docs/measured/engine.json]

A step ends when the next can begin, so the copy that a save waits for counts, and so does what the writing thread
takes from the steps beside it: the two after a save are compared with the third, by when it is done.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

from measured import keep, row, show
from side_posttrain import method_of
from train import QUICK
from workload import MODEL, Workload, write

from posttrain.machine import tune
from posttrain.models.policy import load
from posttrain.training.loop import train

CYCLE = 3
GOAL = 0.10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--quick", action="store_true", help="tiny and once: does it run?")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tune()
    steps = 1 + CYCLE * (1 + (1 if args.quick else args.runs))
    work = Workload("checkpoint", "sft", batch=4, lr=2e-5, lora=False, steps=steps)
    work = work._replace(**QUICK) if args.quick else work
    ends: list[float] = []

    def on_step(_: dict[str, Any]) -> None:
        ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory(dir=".") as name:  # on the disk that runs are kept on, not in memory
        folder = Path(name)
        write(folder, work)
        policy, method, stage, _ = method_of(work, load(args.model), folder)
        method.order = [(0, row) for row in range(work.batch)] * steps  # type: ignore[attr-defined]
        # The loop begins a save half as often as `checkpoint_every` says.
        stage = stage.model_copy(update={"checkpoint_every": 2 * CYCLE})
        train(policy, method, stage, folder / "run", 0, on_step)
    took = [b - a for a, b in itertools.pairwise(ends)]  # took[i]: step i + 1, and the save before it
    added, plain = [], []
    for save in range(CYCLE, steps - CYCLE, CYCLE):  # saved after `save` steps: step number `save` comes next
        first, second, third = took[save - 1 : save + CYCLE - 1]
        plain.append(third)
        added.append((first + second - 2 * third) / third)
    rows = [
        row("checkpoint: time added to a step, SFT of all weights", "share", added, at_most=GOAL),
        row("checkpoint: that step", "s", plain),
    ]
    show(rows)
    if args.out:
        keep(args.out, rows)


if __name__ == "__main__":
    main()
