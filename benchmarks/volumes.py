"""What two workers send one another in a step, counted byte by byte in a real one, and what goes to rollout actors.

    python benchmarks/volumes.py [--out docs/measured/cluster.json]

Counts, not times: the machine may be busy. One forward and backward pass a worker and step.
"""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from collectives import counted
from measured import Row, parser, report, row
from side_posttrain import method_of, policy_of
from workload import Workload, write

from posttrain.cluster.rollouts import pack_weights
from posttrain.cluster.sharded import shard
from posttrain.training.loop import train
from posttrain.training.world import Distributed

KINDS = {
    "LoRA": (True, False),
    "LoRA, always cut": (True, True),
    "full": (False, False),
    "full, always cut": (False, True),
}
"""Of training: whether under an adapter, and whether all weights are cut within a step too."""


class Counted(Distributed):
    """Also how many bytes of objects the workers exchange."""

    def __init__(self, sent: Counter[str]) -> None:
        super().__init__()
        self.sent = sent

    def gather(self, value: Any) -> list[Any]:
        values = super().gather(value)
        self.sent["objects"] += sum(len(pickle.dumps(v)) for v in values)
        return values


def worker(rank: int, folder: str, model: str, lora: bool, always: bool, answer: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    sent = counted()
    policy = shard(policy_of(model, lora), Distributed(), always)
    work = Workload("sft", "sft", 4, 1e-5, lora, steps=2)
    policy, method, stage, _ = method_of(work, policy, Path(folder))
    steps: list[Counter[str]] = []

    def on_step(_: Any) -> None:
        steps.append(sent.copy())

    train(policy, method, stage, Path(folder, "run"), 0, on_step, world=Counted(sent))
    whole = policy.weights()
    if rank == 0:
        push = sum(array.nbytes for array in pack_weights(whole).values())
        answer.put({**(steps[1] - steps[0]), "push": push})
    dist.destroy_process_group()


def count(model: str, lora: bool, always: bool) -> dict[str, int]:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), Workload("sft", "sft", 4, 1e-5, lora, steps=2))
        args = (folder, model, lora, always, answer)
        workers = [context.Process(target=worker, args=(rank, *args)) for rank in range(2)]
        for process in workers:
            process.start()
        found: dict[str, int] = answer.get()
        for process in workers:
            process.join()
    return found


def main() -> None:
    args = parser(__doc__, "--model", "--out").parse_args()
    rows: list[Row] = []
    for name, (lora, always) in KINDS.items():
        found = count(args.model, lora, always)
        for kind in ("all-gather", "reduce-scatter", "objects"):
            unit, size = ("kB", 1e3) if kind == "objects" else ("MB", 1e6)
            rows.append(row(f"{name}: {kind} of one step", unit, [found.get(kind, 0) / size]))
        if not always:
            rows.append(row(f"{name}: weights to rollout actors, a version", "MB", [found["push"] / 1e6]))
    report(rows, args.out)


if __name__ == "__main__":
    main()
