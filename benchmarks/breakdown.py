"""Where the time of our own training step goes, and that of a checkpoint, for the rows that miss a goal.

    python benchmarks/breakdown.py [--out docs/measured/engine.json]

PyTorch's profiler over one step, and over the reference pass of a preference loss, after the steps that fill the heap.
Every operation's own time counts for the part it belongs to; parts are shares of the whole. The profiler costs time
too, most where operations are small, so that what is not a product is rather less in a run without it.

Of a checkpoint of all weights: its copy, which training waits for, and what its thread then does, each alone.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measured import Row, parser, report, row
from side_posttrain import method_of, policy_of, reference_seconds
from torch.profiler import ProfilerActivity, profile
from train import QUICK, TITLES, WORKLOADS
from workload import RANK, Workload, write

from posttrain.machine import tune
from posttrain.training.checkpoint import Writer
from posttrain.training.loop import train

NAMES = ("sft", "sft-full", "dpo-long")
WARM = 8
"""Steps before the one that is looked at."""
SAVES = 5

PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_"}
LAYERS, ADAPTER, HEAD, ATTENTION = "products of the layers", "products of the adapter", "the head", "attention"
OPTIMISER, REST = "the optimiser", "norms, gates, rotations and the rest"
Event = Any
"""torch.profiler's, of one operation."""


def main() -> None:
    args = parser(__doc__, "--model", "--quick", "--out").parse_args()
    tune()
    rows: list[Row] = []
    for work in WORKLOADS:
        if work.name in NAMES:
            work = work._replace(steps=WARM + 2, **QUICK) if args.quick else work._replace(steps=WARM + 2)
            rows += _parts(work, args.model)
    report(rows + _checkpoint(args.model), args.out)


def _checkpoint(model: str) -> list[Row]:
    """What saving all weights and their two moments takes, with nothing beside it."""
    weights = policy_of(model, lora=False).parameters()
    tensors = {f"{kind}.{name}": weight.detach() for kind in ("w", "m", "v") for name, weight in weights.items()}
    copying, thread, hashing = [], [], []
    with tempfile.TemporaryDirectory(dir=".") as name, Writer(Path(name), keep=1) as writer:  # on the disk of runs
        for step in range(1 + SAVES):
            began = time.perf_counter()
            writer.save(step, tensors, {})
            copying.append(time.perf_counter() - began)
            began = time.process_time()
            writer.wait()
            thread.append(time.process_time() - began)
            [file] = Path(name).glob("step-*/tensors-*")
            content = file.read_bytes()
            began = time.process_time()
            hashlib.sha256(content)
            hashing.append(time.process_time() - began)
    title = "checkpoint, all weights"
    return [
        row(f"{title}: what is saved", "GB", [len(content) / 1e9]),
        row(f"{title}: the copy that training waits for", "s", copying[1:]),  # the first maps the memory
        row(f"{title}: processor time of the thread that writes", "s", thread[1:]),
        row(f"{title}: of which SHA-256", "s", hashing[1:]),
    ]


def _parts(work: Workload, model: str) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, work)
        policy, method, stage, _ = method_of(work, policy_of(model, lora=work.lora), folder)
        part = functools.partial(_part, policy.model.config.vocab_size)
        step, reference = _profile(), Counter[str]()
        for _ in range(2 if work.kind == "dpo" else 0):  # the first one fills the heap
            with _profile() as found:
                reference_seconds(policy, method, stage)
            reference = _times(found, part)

        def on_step(metrics: dict[str, Any]) -> None:
            if metrics["step"] == WARM - 1:
                step.start()
            if metrics["step"] == WARM:
                step.stop()

        train(policy, method, stage, folder / "run", 0, on_step)
    share = {name: spent / work.steps for name, spent in reference.items()}
    times = _times(step, part) + Counter(share)
    whole, title = sum(times.values()), TITLES[work.name]
    rows = [row(f"{title}: {name}, of a step", "share", [spent / whole]) for name, spent in times.most_common()]
    if share:
        rows.append(row(f"{title}: the reference pass in all, of a step", "share", [sum(share.values()) / whole]))
    return rows


def _profile() -> profile:
    return profile(activities=[ProfilerActivity.CPU], record_shapes=True)


def _times(found: profile, part: Callable[[Event], str]) -> Counter[str]:
    """Each part's time, in microseconds."""
    times: Counter[str] = Counter()
    for event in found.events():
        times[part(event)] += event.self_cpu_time_total
    return times


def _part(vocabulary: int, event: Event) -> str:
    above = set()
    ancestor = event
    while ancestor is not None:
        above.add(ancestor.name.split("#")[0])
        ancestor = ancestor.cpu_parent
    sizes = {size for shape in event.input_shapes for size in shape}
    if "Optimizer.step" in above:
        return OPTIMISER
    if above & {"_Blocks", "_BlocksBackward"}:
        return ATTENTION
    if vocabulary in sizes:
        return HEAD
    if event.name in PRODUCTS:
        return ADAPTER if RANK in sizes else LAYERS
    return REST


if __name__ == "__main__":
    main()
