"""What the machine can do, and what share of it training gets.

    python benchmarks/peak.py [--runs 5] [--out docs/measured/engine.json]

The peak is the best float32 matrix product over several shapes, under `posttrain.machine.tune()` and before it. A
training step's share is its model FLOPs (models/cost.py: nothing that is computed twice counts twice) a second. To
say where the rest goes, the step's matrix products are run again alone, in the shapes the model has.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measured import Row, parser, report, row
from side_posttrain import method_of, policy_of
from torch import Tensor
from train import QUICK
from workload import Workload, write

from posttrain.forest import pack, split
from posttrain.forest.attention import decoder
from posttrain.forest.logprobs import CHUNK
from posttrain.machine import tune
from posttrain.models.policy import Policy
from posttrain.training.batch import Batch
from posttrain.training.loop import train

SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (1024, 576, 1536), (1024, 1536, 576), (4096, 1024, 1024))
"""Rows, inner and columns of the products of which the best is the peak."""
GOAL = 0.70


def matmul(seconds: float = 0.4) -> float:
    """Best FLOP/s of a float32 product, as the process is set up now."""
    rates = []
    for m, k, n in SHAPES:
        a, w = torch.randn(m, k), torch.randn(n, k)
        rates.append(2 * m * k * n / best(functools.partial(torch.nn.functional.linear, a, w), seconds))
    return max(rates)


def bandwidth(seconds: float = 0.4) -> float:
    """Bytes/s of reading memory far beyond the caches."""
    x = torch.ones(2**27)
    return x.nbytes / best(x.sum, seconds)


def best(call: Callable[[], Any], seconds: float) -> float:
    """Shortest time of a call over about so many seconds, after one to warm up."""
    call()
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    args = parser(__doc__, "--runs", "--model", "--quick", "--out").parse_args()
    runs, seconds = (1, 0.01) if args.quick else (args.runs, 0.4)
    plain = [matmul(seconds) / 1e9 for _ in range(runs)]
    tune()
    tuned = [matmul(seconds) / 1e9 for _ in range(runs)]
    rows = [
        row("machine: float32 matrix products, best shape", "GFLOP/s", tuned),
        row("machine: the same as PyTorch comes", "GFLOP/s", plain),
        row("machine: memory read", "GB/s", [bandwidth(seconds) / 1e9 for _ in range(runs)]),
    ]
    work = Workload("peak", "sft", batch=4, lr=2e-5, steps=1 + runs)
    work = work._replace(**QUICK) if args.quick else work
    peaks = 1e9 * max(tuned), 1e9 * max(plain)
    rows += _shares("SFT, LoRA", work, policy_of(args.model, lora=True), *peaks)
    rows += _shares("SFT, all weights", work._replace(lora=False), policy_of(args.model, lora=False), *peaks)
    report(rows, args.out)


def _shares(title: str, work: Workload, policy: Policy, peak: float, plain: float) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, work)
        policy, method, stage, _ = method_of(work, policy, folder)
        steps: list[dict[str, Any]] = []
        ledger = train(policy, method, stage, folder / "run", 0, steps.append)
    each = ledger.flops / ledger.trained_tokens
    shares, products, alone = [], [], []
    for step in steps[1:]:
        replay = _replayed(policy, method.batch(step["step"]), stage.tokens_per_forward)
        shares.append(each * step["tokens"] / step["seconds"] / peak)
        alone.append(each * step["tokens"] / replay / peak)
        products.append(replay / step["seconds"])
    return [
        row(f"{title}: share of the matrix-product peak", "share", shares, at_least=GOAL),
        row(f"{title}: share of the peak as PyTorch comes", "share", [x * peak / plain for x in shares]),
        row(f"{title}: share of that peak if only its matrix products ran", "share", alone),
        row(f"{title}: matrix products' share of a step", "share", products),
    ]


@torch.no_grad()
def _replayed(policy: Policy, batch: Batch, budget: int) -> float:
    """Seconds of the step's matrix products alone: every linear layer forward and backward, the head at targets."""
    began = time.perf_counter()
    for units in split(batch.rows, batch.units, budget):
        forest = pack([batch.rows[i] for u in units for i in batch.units[u]])
        targets = int(forest.target_T.sum())
        for weight in _matrices(policy):
            _product(weight, len(forest), backward=weight.requires_grad)
        head = decoder(policy.model).get_output_embeddings().weight
        for at in range(0, targets, CHUNK):
            rows = min(CHUNK, targets - at)
            _product(head, rows, backward=head.requires_grad)
            if head.requires_grad:  # then logits are computed again for the gradient
                torch.nn.functional.linear(_ones(rows, head.shape[1]), head)
    return time.perf_counter() - began


def _product(weight: Tensor, rows: int, backward: bool) -> None:
    x, g = _ones(rows, weight.shape[1]), _ones(rows, weight.shape[0])
    torch.nn.functional.linear(x, weight)
    torch.mm(g, weight)
    if backward:
        torch.mm(g.t(), x)


@functools.cache
def _ones(rows: int, columns: int) -> Tensor:
    return torch.ones(rows, columns)


def _matrices(policy: Policy) -> Iterator[Tensor]:
    head = decoder(policy.model).get_output_embeddings()
    for module in policy.model.modules():
        if type(module) is torch.nn.Linear and module is not head:
            yield module.weight


if __name__ == "__main__":
    main()
