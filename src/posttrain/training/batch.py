"""What one optimiser step learns from, and what a training method has to say for itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from posttrain.data.chat import Rendered
from posttrain.forest import Forest, Row, pack, split, token_logprobs
from posttrain.forest.logprobs import States
from posttrain.losses import Counts
from posttrain.records import Example, Ledger


@dataclass(frozen=True)
class Batch:
    """The rows of one step, before they are cut into forward passes."""

    rows: tuple[Row, ...]
    units: tuple[tuple[int, ...], ...]
    """Rows that must meet in one forward pass: (i,) alone, (chosen, rejected) of a pair."""
    counts: Counts
    metrics: dict[str, float] = field(default_factory=dict)
    """What is known before the update: rewards, lengths."""
    samples: tuple[dict[str, Any], ...] = ()
    """A few completions to keep for the reader."""
    ledger: Ledger = field(default_factory=Ledger)
    """What sampling it cost."""


class Method(Protocol):
    """One way to train. The loop calls `batch` once a step and `loss` once for each forward pass of it."""

    period: int
    """A checkpoint may only be taken after so many steps or a multiple: 1, or how often a batch is used."""

    def batch(self, step: int) -> Batch:
        """The same for the same step and weights, whatever ran before: a resumed run asks for it again."""

    def forward(self, model: torch.nn.Module, forest: Forest, states: States) -> Tensor:
        """What the loss needs of the model. `states` gives the hidden states [T, D] of a forest."""

    def loss(
        self, batch: Batch, rows: Sequence[int], forest: Forest, outputs: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """This forward pass's part of the step's loss, and of its metrics. `rows[i]` is row i of the forest.

        Parts add up over the passes of a step and over workers; metrics that end in _min and _max are combined so.
        """


class LogProbs:
    """The `forward` of every method that learns from log-probabilities [T]."""

    temperature = 1.0
    """Logits are divided by it before log-probabilities are taken: what the rollouts were sampled at."""

    def forward(self, model: torch.nn.Module, forest: Forest, states: States) -> Tensor:
        return token_logprobs(model, forest, self.temperature, states)


def row(prompt: Sequence[int], completion: Sequence[int], target: Sequence[bool]) -> Row:
    """A row; raw text, which has no prompt, is given its first token as context."""
    if prompt:
        return Row(tuple(prompt), tuple(completion), tuple(target))
    return Row(tuple(completion[:1]), tuple(completion[1:]), tuple(target[1:]))


def chosen(rendered: Rendered) -> Row:
    return row(rendered.prompt_ids, rendered.completion_ids, rendered.completion_target)


def rejected(rendered: Rendered) -> Row:
    return row(rendered.prompt_ids, rendered.rejected_ids, rendered.rejected_target)


def asked(example: Example) -> str:
    """What the answer answers, for a reader."""
    return str(example.prompt[-1]["content"]) if example.prompt else ""


def pair_sample(example: Example) -> dict[str, Any]:
    """How a pair from the data looks to a reader."""
    sides = (example.completion, example.rejected)
    text, other = (str(side[-1].get("content", "")) if side else "" for side in sides)
    return {"prompt": asked(example), "text": text, "rejected": other}


@torch.no_grad()
def frozen_logprobs(
    model: torch.nn.Module, rows: Sequence[Row], budget: int, temperature: float = 1.0
) -> list[list[float]]:
    """For each row the log-probabilities of its completion tokens (0 where not a target), as constants."""
    found: list[list[float]] = [[] for _ in rows]
    for units in split(rows, [(i,) for i in range(len(rows))], budget):
        forest = pack([rows[i] for i in units])
        logps_T = token_logprobs(model, forest, temperature)
        for i, (start, stop) in zip(units, forest.spans, strict=True):
            found[i] = logps_T[start:stop].tolist()
    return found
