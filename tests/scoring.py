"""Small scoring models on disk, answers to score and samplers with a script, for tests of rewards that are models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tiny import tiny_policy
from tiny_runs import RENDERER, turn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from posttrain.models.policy import Policy, load
from posttrain.models.reward import reward_model
from posttrain.recipe.blocks import Lora, Sampling
from posttrain.records import Example, Ledger, Rollout
from posttrain.rewards.outrank import said

END = 2
"""Token that ends a turn of the tiny tokenizer."""
TEXTS = ("42.", "No, it is not far at all.", "Yes", "b c\nso it is d\n\nand e")


def shaken(policy: Policy, by: float = 0.2, seed: int = 1) -> Policy:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters().values():
            p.add_(by * torch.randn(p.shape, generator=rng))
    return policy


def saved(folder: Path, adapter: Lora | None = None, name: str = "reward", seed: int = 1) -> Policy:
    """A reward model as a stage leaves it in `folder / name`, on the base in `folder / "base"`."""
    if not (folder / "base").exists():
        tiny_policy().save(folder / "base")
    policy = shaken(reward_model(load(str(folder / "base"), adapter=adapter), {END}, 0), seed=seed)
    policy.save(folder / name)
    return policy


def plain(folder: Path, name: str = "reward") -> Callable[[Sequence[int]], float]:
    """From the ids of a sequence to its number, by Transformers and PEFT alone."""
    if (folder / name / "adapter_config.json").exists():
        pad = AutoTokenizer.from_pretrained(folder / name).pad_token_id
        base = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1, pad_token_id=pad)
        model: Any = PeftModel.from_pretrained(base, folder / name).eval()
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder / name).eval()

    @torch.no_grad()
    def number(ids: Sequence[int]) -> float:
        return float(model(torch.tensor([list(ids)])).logits[0, 0])

    return number


def question(text: str = "Is it far?", **fields: Any) -> Example:
    return Example(f"q:{text}", (turn("user", text),), **fields)


def answers(*texts: str, example: Example | None = None) -> list[Rollout]:
    """Completions of one prompt."""
    return [said(example or question(), text, RENDERER) for text in texts or TEXTS]


class Scripted:
    """A sampler that says what `line(prompt, k)` says; `asked` keeps the prompts."""

    def __init__(self, line: Callable[[Example, int], str]) -> None:
        self.line = line
        self.asked: list[Example] = []

    def __call__(
        self, prompts: Sequence[Example], n: int, sampling: Sampling, seed: int
    ) -> tuple[list[Rollout], Ledger]:
        self.asked += prompts
        rollouts = []
        for p, example in enumerate(prompts):
            for k in range(n):
                text = self.line(example, k)
                ids = (*RENDERER.tokenizer.encode(text), END)
                prompt = RENDERER.prompt_ids(example)
                rollouts.append(Rollout(example, p, prompt, ids, (-1.0,) * len(ids), text, "stop", "w"))
        return rollouts, Ledger(generated_tokens=sum(len(r.ids) for r in rollouts))
