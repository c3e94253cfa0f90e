"""What saving adds to training: steps of the 135M model, every third followed by a checkpoint.

    python benchmarks/checkpoint.py [--runs 5] [--out docs/measured/engine.json]

A step ends when the next can begin, so the copy that a save waits for counts, and so does what the writing thread
takes from the steps beside it: the two after a save are compared with the third, by when it is done. What a save adds
is given in steps; spread over the steps from one save to the next, as often as the default saves, it is what a run
pays. An adapter's state is 60 MB, that of all weights 1.6 GB.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

from measured import Row, parser, report, row
from side_posttrain import method_of, policy_of
from train import QUICK
from workload import Workload, write

from posttrain.machine import tune
from posttrain.models.policy import Policy
from posttrain.recipe.stage import StageBase
from posttrain.training.batch import interval
from posttrain.training.loop import train

CYCLE = 3
GOAL = 0.10


def main() -> None:
    args = parser(__doc__, "--runs", "--model", "--quick", "--out").parse_args()
    tune()
    rows = _added("LoRA", policy_of(args.model, lora=True), args.runs, args.quick)
    rows += _added("all weights", policy_of(args.model, lora=False), args.runs, args.quick)
    report(rows, args.out)


def _added(title: str, policy: Policy, runs: int, quick: bool) -> list[Row]:
    steps = 1 + CYCLE * (1 + (1 if quick else runs))
    work = Workload("checkpoint", "sft", batch=8, lr=2e-5, lora=policy.adapter is not None, steps=steps)
    work = work._replace(**QUICK) if quick else work
    ends: list[float] = []

    def on_step(_: dict[str, Any]) -> None:
        ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory(dir=".") as name:  # on the disk that runs are kept on, not in memory
        folder = Path(name)
        write(folder, work)
        policy, method, stage, _ = method_of(work, policy, folder)
        method.order = [(0, row) for row in range(work.batch)] * steps  # type: ignore[attr-defined]
        usual = interval(StageBase.model_fields["checkpoint_every"].default, method.period)
        often = next(n for n in itertools.count(1) if interval(n, method.period) == CYCLE)
        stage = stage.model_copy(update={"checkpoint_every": often})
        train(policy, method, stage, folder / "run", 0, on_step)
    took = [b - a for a, b in itertools.pairwise(ends)]  # took[i]: step i + 1, and the save before it
    added, plain = [], []
    for save in range(CYCLE, steps - CYCLE, CYCLE):  # saved after `save` steps: step number `save` comes next
        first, second, third = took[save - 1 : save + CYCLE - 1]
        plain.append(third)
        added.append((first + second - 2 * third) / third)
    return [
        row(f"checkpoint, {title}: time one save adds", "steps", added, at_most=GOAL),
        row(f"checkpoint, {title}: time a run pays, saving every {usual} steps", "share", [x / usual for x in added]),
        row(f"checkpoint, {title}: a step", "s", plain),
    ]


if __name__ == "__main__":
    main()
