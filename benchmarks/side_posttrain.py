"""Our side of `train.py`, one process a run."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

from workload import BETA, Moment, Workload, now, side

from posttrain.data.chat import Renderer
from posttrain.data.prepare import Prepared, prepare
from posttrain.models.policy import Policy, load
from posttrain.recipe.schema import Data, Dpo, Optim, Sft, Source
from posttrain.training.dpo import DpoMethod, pairs_from_data
from posttrain.training.loop import peak_memory, train
from posttrain.training.sft import SftMethod


def run(work: Workload, folder: Path) -> dict[str, Any]:
    policy = load(str(folder.parent / "adapter"))
    stage = _stage(work, folder)
    data = prepare(stage.data, Renderer(policy.tokenizer), need="completion" if work.kind == "sft" else "pair")
    began = now()
    method = _method(policy, stage, data)
    # Of DPO's reference values: one pass over the data pays for them once.
    before = [(b - a) / (1 + work.steps) for a, b in zip(began, now(), strict=True)]
    # In the order of the file, as the other side reads it.
    method.order = [(0, row) for row in range(len(data.rows[0]))]
    ends: list[Moment] = []
    metrics: list[dict[str, Any]] = []

    def on_step(row: dict[str, Any]) -> None:
        ends.append(now())
        metrics.append(row)

    train(policy, method, stage, folder, 0, on_step)
    answers = "chosen_logp" if work.kind == "dpo" else "loss"
    return {
        "seconds": [b.wall - a.wall + before[0] for a, b in itertools.pairwise(ends)],
        "cpu_seconds": [b.cpu - a.cpu + before[1] for a, b in itertools.pairwise(ends)],
        "tokens": [sum(map(len, method.batch(step).rows)) for step in range(1 + work.steps)],
        "loss": [row["loss"] for row in metrics],
        "answers": [row[answers] for row in metrics],
        "memory": peak_memory(),
    }


def _stage(work: Workload, folder: Path) -> Sft | Dpo:
    common: dict[str, Any] = {
        "id": work.kind,
        "data": Data(sources=(Source(source=str(folder / "rows.jsonl")),)),
        "steps": 1 + work.steps,
        "batch_size": work.batch,
        "optim": Optim(lr=work.lr, schedule="constant", warmup=0.0),
    }
    return Sft(kind="sft", **common) if work.kind == "sft" else Dpo(kind="dpo", beta=BETA, **common)


def _method(policy: Policy, stage: Sft | Dpo, data: Prepared) -> SftMethod | DpoMethod:
    if isinstance(stage, Sft):
        return SftMethod(stage, data, 0)
    return DpoMethod(stage, data, 0, pairs_from_data(policy, stage, data, 0))


if __name__ == "__main__":
    side(run, sys.argv[1:])
