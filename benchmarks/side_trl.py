"""TRL's side of `train.py`, one process a run, in the environment of `peers.py`."""

from __future__ import annotations

import itertools
import json
import resource
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from workload import ALPHA, BETA, RANK, Moment, Workload, now, side


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[Moment] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(now())


def run(work: Workload, folder: Path) -> dict[str, Any]:
    model = str(folder.parent / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    # Rendered here and given as text: TRL would also train on the newline after the end of the turn.
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        row["prompt"] = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, tokenize=False
        )
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 1 + work.steps,
        "per_device_train_batch_size": work.batch,
        "train_sampling_strategy": "sequential",
        "learning_rate": work.lr,
        "lr_scheduler_type": "constant",
        "model_init_kwargs": {"dtype": "float32"},
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    clock = Clock()
    trainer_class, arguments = (
        (SFTTrainer, SFTConfig(**common)) if work.kind == "sft" else (DPOTrainer, DPOConfig(beta=BETA, **common))
    )
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear"),
        callbacks=[clock],
    )
    set_peft_model_state_dict(trainer.model, load_file(folder.parent / "adapter" / "adapter_model.safetensors"))
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    lengths = [_length(row) for row in trainer.train_dataset]
    return {
        "seconds": [b.wall - a.wall for a, b in itertools.pairwise(clock.ends)],
        "cpu_seconds": [b.cpu - a.cpu for a, b in itertools.pairwise(clock.ends)],
        "tokens": [sum(lengths[at : at + work.batch]) for at in range(0, len(lengths), work.batch)],
        "loss": [entry["loss"] for entry in steps],
        "answers": [entry["logps/chosen" if work.kind == "dpo" else "loss"] for entry in steps],
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _length(row: dict[str, list[int]]) -> int:
    if "input_ids" in row:
        return len(row["input_ids"])
    return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


if __name__ == "__main__":
    side(run, sys.argv[1:])
