"""What spreading a step over workers costs: 2 Ray workers of 1 thread against 1 of 2 threads, the same steps.

    python benchmarks/cluster.py [--runs 5] [--out docs/measured/engine.json]

The two share the weights, gradients and moments by FSDP2 over gloo, as a run on a cluster does, on one machine: what
is measured is the work they do twice and the waiting for one another, not a network. Losses must agree.
"""

from __future__ import annotations

import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from measured import parser, report, row
from side_posttrain import method_of, policy_of
from train import QUICK, TITLES, TOLERANCE, WORKLOADS
from workload import Workload, write

from posttrain.cluster.sharded import shard
from posttrain.machine import tune
from posttrain.training.loop import train
from posttrain.training.world import ALONE, Distributed, World

HERE = Path(__file__).resolve().parent
THREADS = 2
GOAL = 0.85


@ray.remote
def worker(work: Workload, model: str, folder: str, port: int, rank: int, size: int) -> list[dict[str, Any]]:
    """The metrics of each step, on the worker that leads; none on the others."""
    torch.set_num_threads(THREADS // size)
    tune()
    world: World = ALONE
    policy = policy_of(model, work.lora)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
        world = Distributed()
        policy = shard(policy, world)
    steps: list[dict[str, Any]] = []
    policy, method, stage, _ = method_of(work, policy, Path(folder))
    train(policy, method, stage, Path(folder, f"run-{size}"), 0, steps.append, world=world)
    if size > 1:
        dist.destroy_process_group()
    return steps


def main() -> None:
    args = parser(__doc__, "--runs", "--model", "--quick", "--out").parse_args()
    environment = {"env_vars": {"PYTHONPATH": str(HERE)}}
    ray.init(num_cpus=THREADS, include_dashboard=False, logging_level="ERROR", runtime_env=environment)
    rows = []
    for work in (work for work in WORKLOADS if work.kind == "sft"):
        work = work._replace(steps=1 + (1 if args.quick else args.runs), **(QUICK if args.quick else {}))
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), work)
            found = {size: _run(work, args.model, folder, size) for size in (1, 2)}
        for one, two in zip(found[1], found[2], strict=True):
            if abs(one["loss"] - two["loss"]) > TOLERANCE:
                sys.exit(f"step {one['step']}: the loss is {one['loss']} on one worker and {two['loss']} on two")
        ratios = [one["seconds"] / two["seconds"] for one, two in zip(found[1][1:], found[2][1:], strict=True)]
        rows.append(row(f"2 Ray workers: throughput against 1, {TITLES[work.name]}", "times", ratios, at_least=GOAL))
    ray.shutdown()
    report(rows, args.out)


def _run(work: Workload, model: str, folder: str, size: int) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = worker.options(num_cpus=THREADS // size)
    return ray.get([options.remote(work, model, folder, port, rank, size) for rank in range(size)])[0]


if __name__ == "__main__":
    main()
