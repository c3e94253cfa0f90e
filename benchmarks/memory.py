"""Predicted against measured peak memory of stages, each in a process of its own.

    python benchmarks/memory.py [--only NAME ...] [--out docs/measured/memory.json]

A stage takes two steps (three where a checkpoint falls due); its peak is the process's largest resident size. The
prediction is that of `posttrain run --dry-run`, made by another process that never loads a weight.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from measured import parser, report, row
from workload import MODEL, Workload, write

WITHIN = 0.15
"""Largest error of a prediction, as a share of what was measured."""
RANDOM: dict[str, dict[str, Any]] = {
    "wide": {"model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6,
             "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 49152},
    "qwen3": {"model_type": "qwen3", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 16,
              "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 49152,
              "tie_word_embeddings": False},
}  # fmt: skip
"""Configurations of other sizes, with random weights and the default model's tokenizer."""


class Shape(NamedTuple):
    kind: str = "sft"
    lora: bool = True
    budget: int = 1024
    recompute: bool = False
    model: str = MODEL
    batch: int = 16
    checkpoint: bool = False
    dtype: str = "float32"

    @property
    def name(self) -> str:
        model = "135M" if self.model == MODEL else self.model
        parts = [model, self.kind, "LoRA" if self.lora else "full", f"{self.budget} tokens"]
        parts += ["recomputed"] * self.recompute + ["checkpoint"] * self.checkpoint
        return " ".join(parts + [self.dtype] * (self.dtype != "float32"))


SHAPES = (
    *(Shape(lora=lora, budget=budget) for lora in (True, False) for budget in (256, 1024, 4096)),
    *(Shape(lora=lora, recompute=True, budget=4096) for lora in (True, False)),
    Shape(lora=False, checkpoint=True),
    Shape("dpo", batch=8),
    Shape("dpo", batch=8, lora=False),
    Shape("grpo", batch=4),
    Shape("grpo", batch=4, budget=256),
    Shape("reward_model", batch=8),
    Shape(model="wide", budget=2048),
    Shape(model="qwen3", lora=False, budget=512),
    Shape(lora=False, dtype="bfloat16"),
)


def recipe(shape: Shape, folder: Path) -> dict[str, Any]:
    stage: dict[str, Any] = {
        "id": "stage",
        "kind": {"dpo": "preference"}.get(shape.kind, shape.kind),
        "data": {"sources": [{"source": str(folder / "rows.jsonl")}]},
        "steps": 3 if shape.checkpoint else 2,
        "batch_size": shape.batch,
        "tokens_per_forward": shape.budget,
        "activation_checkpointing": shape.recompute,
        "checkpoint_every": 1 if shape.checkpoint else 10,
        "check_first_step": False,
    }
    if shape.kind == "grpo":
        stage |= {"n": 8, "kl_weight": 0.1, "sampling": {"max_new_tokens": 48}}
        stage["data"] = {"sources": [{"source": "reasoning_gym/chain_sum", "rows": 64}]}
    source = MODEL if shape.model == MODEL else str(folder / "model")
    return {
        "schema": 1,
        "name": "memory",
        "model": {"source": source, "dtype": shape.dtype, "adapter": {} if shape.lora else None},
        "stages": [stage],
    }


def prepare(shape: Shape, folder: Path) -> None:
    kind = {"reward_model": "reward"}.get(shape.kind, shape.kind)
    write(folder, Workload(shape.name, kind, shape.batch, 1e-5, steps=3))
    if shape.model != MODEL:
        from posttrain.models.source import resolve

        config = folder / "model"
        config.mkdir()
        for file in resolve(MODEL).iterdir():
            if file.name.startswith(("tokenizer", "special_tokens", "chat_template")):
                shutil.copy(file, config)
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        settings = dict(RANDOM[shape.model])
        made = AutoConfig.for_model(settings.pop("model_type"), eos_token_id=2, bos_token_id=1, **settings)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(made).save_pretrained(config)


def side(what: str, shape: Shape, folder: Path) -> dict[str, Any]:
    """In a fresh process: predict, or run and measure."""
    from posttrain.machine import own_memory, peak_memory
    from posttrain.models.policy import load, outline
    from posttrain.pipeline.memory import stage_memory
    from posttrain.pipeline.stages import Job, Say, run_stage, stage_data
    from posttrain.recipe.schema import Recipe

    own = own_memory()
    made = Recipe.model_validate(recipe(shape, folder))
    stage, model = made.stages[0], made.model
    policy = outline(model.source, adapter=model.adapter, dtype=model.dtype)
    data = stage_data(stage, policy, frozenset())
    if what == "predict":
        began = time.perf_counter()
        terms = stage_memory(stage, data, policy, made.seed)
        return {"terms": terms, "peak": sum(terms.values()), "seconds": time.perf_counter() - began}
    start = load(model.source, adapter=model.adapter, dtype=model.dtype)
    base = start.snapshot()  # as a run keeps it, to compare with
    steps: list[float] = []
    say = Say(lambda line: None, lambda _, metrics: steps.append(metrics["seconds"]))
    run_stage(Job(stage, lambda: start, data, folder / "run", made.seed), say)
    del base
    return {"peak": peak_memory(), "own": own, "seconds": steps[-1]}


def measured(shape: Shape) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        prepare(shape, Path(folder))
        found = {}
        for what in ("predict", "run"):
            done = subprocess.run(
                [sys.executable, __file__, "--side", what, json.dumps(shape), folder], capture_output=True, text=True
            )
            if done.returncode:
                sys.exit(f"{shape.name} ({what}) failed:\n{done.stderr[-3000:]}")
            found[what] = json.loads(done.stdout.splitlines()[-1])
    predicted, real = found["predict"], found["run"]
    terms = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in predicted["terms"].items())
    print(
        f"{shape.name}: predicted {predicted['peak'] / 1e9:.2f} GB ({terms}; {predicted['seconds']:.1f} s), measured "
        f"{real['peak'] / 1e9:.2f} ({real['own'] / 1e9:.2f} before the model), "
        f"error {predicted['peak'] / real['peak'] - 1:+.1%}, {real['seconds']:.1f} s a step",
        file=sys.stderr,
        flush=True,
    )
    return found


def main() -> None:
    options = parser(__doc__, "--out")
    options.add_argument("--only", nargs="+", metavar="NAME", help="shapes whose name begins so")
    options.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.side:
        what, shape, folder = args.side
        print(json.dumps(side(what, Shape(*json.loads(shape)), Path(folder))))
        return
    rows = []
    for shape in SHAPES:
        if args.only is None or shape.name.startswith(tuple(args.only)):
            found = measured(shape)
            predicted, real = found["predict"]["peak"], found["run"]["peak"]
            rows += [
                row(f"{shape.name}: predicted", "GB", [predicted / 1e9]),
                row(f"{shape.name}: measured", "GB", [real / 1e9]),
                row(f"{shape.name}: error", "share", [abs(predicted / real - 1)], at_most=WITHIN),
            ]
    report(rows, args.out)


if __name__ == "__main__":
    main()
