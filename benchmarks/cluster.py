"""What spreading a step over workers costs: 2 Ray workers of 1 thread against 1 of 2 threads, the same steps.

    python benchmarks/cluster.py [--runs 5] [--out docs/measured/engine.json]

The two share the weights, gradients and moments by FSDP2 over gloo, as a run on a cluster does, on one machine: what
is measured is the work they do twice and the waiting for one another, not a network. Losses must agree. Beside it, how
long gloo's own collectives take for the parts of all weights, and ours.
"""

from __future__ import annotations

import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from measured import parser, report, row
from side_posttrain import method_of, policy_of
from torch import Tensor
from train import QUICK, TITLES, TOLERANCE, WORKLOADS
from workload import Workload, write

from posttrain.cluster.exchange import AllGather, ReduceScatter
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
        world = _meet(port, rank, size)
        policy = shard(policy, world)
    steps: list[dict[str, Any]] = []
    policy, method, stage, _ = method_of(work, policy, Path(folder))
    train(policy, method, stage, Path(folder, f"run-{size}"), 0, steps.append, world=world)
    if size > 1:
        dist.destroy_process_group()
    return steps


@ray.remote(num_cpus=1)
def collectives(parts: Sequence[int], runs: int, port: int, rank: int, size: int) -> dict[str, list[float]]:
    """How much faster ours are than gloo's, one ratio a run: `parts` are the numbers of weights of each call."""
    torch.set_num_threads(1)
    group = _meet(port, rank, size).group
    wholes = [torch.randn(n // size * size) for n in parts]
    cuts = [torch.randn(n // size) for n in parts]
    gather, scatter = AllGather(), ReduceScatter()

    def seconds(call: Callable[[Tensor, Tensor], Any]) -> float:
        dist.barrier()
        began = time.perf_counter()
        for whole, cut in zip(wholes, cuts, strict=True):
            call(whole, cut)
        return time.perf_counter() - began

    found: dict[str, list[float]] = {"all-gather": [], "reduce-scatter": []}
    for _ in range(1 + runs):
        ours = seconds(lambda whole, cut: gather(whole, cut, group, async_op=False))
        found["all-gather"].append(seconds(dist.all_gather_single) / ours)
        ours = seconds(lambda whole, cut: scatter(cut, whole, group, op=None))
        found["reduce-scatter"].append(seconds(lambda whole, cut: dist.reduce_scatter_single(cut, whole)) / ours)
    dist.destroy_process_group()
    return {name: ratios[1:] for name, ratios in found.items()}  # the first maps memory


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
    model = policy_of(args.model, lora=False).model
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.base_model.layers]
    parts, port = [model.num_parameters() - sum(layers), *layers], _port()
    for name, ratios in ray.get([collectives.remote(parts, args.runs, port, rank, 2) for rank in range(2)])[0].items():
        rows.append(row(f"2 workers: our {name} of all weights, speed against gloo's", "times", ratios))
    ray.shutdown()
    report(rows, args.out)


def _run(work: Workload, model: str, folder: str, size: int) -> list[dict[str, Any]]:
    options, port = worker.options(num_cpus=THREADS // size), _port()
    return ray.get([options.remote(work, model, folder, port, rank, size) for rank in range(size)])[0]


def _port() -> int:
    """One that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _meet(port: int, rank: int, size: int) -> Distributed:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    return Distributed(dist.group.WORLD)


if __name__ == "__main__":
    main()
