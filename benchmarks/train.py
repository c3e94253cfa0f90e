"""LoRA fine-tuning and DPO, posttrain against TRL: the same model, rows, batches, first weights and losses.

    python benchmarks/train.py [--only sft|dpo] [--runs 3] [--out docs/measured/engine.json]

The two sides run in turn, each run in a process of its own, and ratios are taken within each pair of runs. Both
train in float32, without gradient checkpointing, TRL otherwise with its defaults. Every step's loss must agree.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import peers
from measured import keep, row, show
from workload import ALPHA, MODEL, RANK, WORKLOADS, Workload, write

from posttrain.models.policy import load
from posttrain.models.source import resolve
from posttrain.recipe.schema import Lora

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-3
"""Relative, between the losses (DPO: also the summed log-probabilities of the chosen answers) of the two sides."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=WORKLOADS)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    pythons = {"posttrain": sys.executable, "trl": str(peers.python())}
    rows = []
    with tempfile.TemporaryDirectory() as shared:
        Path(shared, "model").symlink_to(resolve(MODEL))
        load(MODEL, adapter=Lora(r=RANK, alpha=ALPHA)).save(Path(shared, "adapter"))
        for work in WORKLOADS.values():
            if args.only in (None, work.kind):
                runs = [
                    {name: _run(name, python, work, Path(shared)) for name, python in pythons.items()}
                    for _ in range(args.runs)
                ]
                rows += _compared(work, runs)
    show(rows)
    if args.out:
        keep(args.out, rows)


def _run(name: str, python: str, work: Workload, shared: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        write(Path(folder, "rows.jsonl"), work)
        done = subprocess.run(
            [python, str(HERE / f"side_{name}.py"), work.kind, folder], capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{name} failed on {work.kind}:\n{done.stderr}")
        found = json.loads(Path(folder, "found.json").read_text())
    print(
        f"{work.kind} {name}: losses {', '.join(f'{x:.4f}' for x in found['loss'])}; tokens a step "
        f"{', '.join(map(str, found['tokens']))}; {_speed(found):.0f} tokens/s, {_cpu(found):.1f} processor seconds, "
        f"{found['memory'] / 1e9:.1f} GB",
        file=sys.stderr,
    )
    return found


def _compared(work: Workload, runs: list[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    for run in runs:
        ours, theirs = run["posttrain"], run["trl"]
        if ours["tokens"] != theirs["tokens"]:
            sys.exit(f"{work.kind}: the sides count different tokens: {ours['tokens']} and {theirs['tokens']}")
        for key in ("loss", "answers"):
            for a, b in zip(ours[key], theirs[key], strict=True):
                if abs(a - b) > TOLERANCE * max(1, abs(b)):
                    sys.exit(f"{work.kind}: the sides compute different things: {key} {ours[key]} and {theirs[key]}")
    name = work.kind.upper()
    pairs = [(run["posttrain"], run["trl"]) for run in runs]
    return [
        row(f"{name}: speed against TRL's", "times", [_speed(a) / _speed(b) for a, b in pairs], at_least=work.at_least),
        row(f"{name}: processor time against TRL's", "share", [_cpu(a) / _cpu(b) for a, b in pairs]),
        row(f"{name}: peak memory against TRL's", "share", [a["memory"] / b["memory"] for a, b in pairs], at_most=0.5),
        row(f"{name}: posttrain, speed", "tokens/s", [_speed(a) for a, _ in pairs]),
        row(f"{name}: TRL, speed", "tokens/s", [_speed(b) for _, b in pairs]),
        row(f"{name}: posttrain, peak memory", "GB", [a["memory"] / 1e9 for a, _ in pairs]),
        row(f"{name}: TRL, peak memory", "GB", [b["memory"] / 1e9 for _, b in pairs]),
    ]


def _speed(found: dict[str, Any]) -> float:
    """Tokens a second after the first step: of all sequences, each counted whole, padding not at all."""
    return sum(found["tokens"][1:]) / sum(found["seconds"])


def _cpu(found: dict[str, Any]) -> float:
    """Processor seconds, which a busy machine disturbs less than it does the clock."""
    return sum(found["cpu_seconds"])


if __name__ == "__main__":
    main()
