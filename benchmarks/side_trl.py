"""TRL's side of `train.py`, in the environment of `peers.py`.

With a second argument `onednn`, under the float32 products that posttrain takes: what TRL would gain from them alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from workload import ALPHA, BETA, RANK, Turn, Workload, code, side

ANSWERS = {"dpo": "logps/chosen"}
TRAINERS = {
    "sft": (SFTTrainer, SFTConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "grpo": (GRPOTrainer, GRPOConfig),
    "reward": (RewardTrainer, RewardConfig),
}


class EndOfStep(TrainerCallback):
    """The trainer logs a step once it has taken it."""

    def __init__(self, work: Workload, turn: Turn) -> None:
        self.work, self.turn, self.step = work, turn, 0
        self.tokens: list[int] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" not in logs:
            return
        work = self.work
        sampled = round(logs.get("completions/mean_length", 0) * work.batch * work.group)
        self.turn(
            loss=float(logs["loss"]),
            norm=float(logs["grad_norm"]),
            answers=float(logs[ANSWERS.get(work.kind, "loss")]),
            tokens=sampled or self.tokens[self.step],
        )
        self.step += 1


def run(work: Workload, folder: Path, turn: Turn) -> None:
    if sys.argv[2:] == ["onednn"]:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    shared = folder.parent
    tokenizer = AutoTokenizer.from_pretrained(shared / ("classifier" if work.kind == "reward" else "model"))
    # Rendered here and given as text: TRL would also train on the newline after the end of the turn.
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        row["prompt"] = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, tokenize=False
        )
    trainer_class, config = TRAINERS[work.kind]
    clock = EndOfStep(work, turn)
    more: dict[str, Any] = {"reward_funcs": lambda completions, **_: list(map(code, completions))}
    trainer = trainer_class(
        model=str(shared / "model"),
        args=config(**_settings(work, folder, tokenizer)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=_adapter(work),
        callbacks=[clock],
        **(more if work.kind == "grpo" else {}),
    )
    if work.lora:
        kept = "classifier" if work.kind == "reward" else "adapter"
        set_peft_model_state_dict(trainer.model, load_file(shared / kept / "adapter_model.safetensors"))
    if work.kind == "grpo":
        _begin_alike(trainer, folder)
    else:
        lengths = [_length(row) for row in trainer.train_dataset]
        clock.tokens = [sum(lengths[at : at + work.batch]) for at in range(0, len(lengths), work.batch)]
    trainer.train()


def _settings(work: Workload, folder: Path, tokenizer: Any) -> dict[str, Any]:
    common: dict[str, Any] = {
        "output_dir": str(folder / "trl"),
        "max_steps": work.steps,
        "per_device_train_batch_size": work.batch,
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
    if work.kind == "grpo":
        length = {"max_completion_length": work.new_tokens, "generation_kwargs": {"min_new_tokens": work.new_tokens}}
        group = {
            "num_generations": work.group,
            "per_device_train_batch_size": work.batch * work.group // work.accumulate,
            "gradient_accumulation_steps": work.accumulate,
        }
        return common | length | group | {"temperature": 1.0, "shuffle_dataset": False}
    common |= {"train_sampling_strategy": "sequential"}
    return common | {"dpo": {"beta": BETA}, "reward": {"pad_token": tokenizer.pad_token}}.get(work.kind, {})


def _adapter(work: Workload) -> LoraConfig | None:
    if not work.lora:
        return None
    kind = (
        {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if work.kind == "reward" else {"task_type": "CAUSAL_LM"}
    )
    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", **kind)


def _begin_alike(trainer: GRPOTrainer, folder: Path) -> None:
    """The first step, which is not timed, is taken on the other side's completions: its gradient must be the same."""
    generate = trainer._generate_single_turn

    def first(*_: Any, **__: Any) -> tuple[list[list[int]], None]:
        trainer._generate_single_turn = generate
        return json.loads((folder / "completions.json").read_text()), None

    trainer._generate_single_turn = first


def _length(row: dict[str, list[int]]) -> int:
    if "input_ids" in row:
        return len(row["input_ids"])
    return 2 * len(row.get("prompt_ids", ())) + len(row["chosen_ids"]) + len(row["rejected_ids"])


if __name__ == "__main__":
    side(run)
