"""What one optimiser step learns from, and what a training method has to say for itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from posttrain.data.chat import Rendered
from posttrain.data.prepare import schedule
from posttrain.forest import Forest, Row, pack, share, split, token_logprobs
from posttrain.forest.logprobs import States
from posttrain.losses import Counts
from posttrain.models.policy import Policy
from posttrain.recipe.stage import StageBase
from posttrain.records import Example, Ledger, Rollout, Score, derive
from posttrain.training.world import ALONE, World

Metrics = Mapping[str, float | Mapping[str, float]]
"""What is measured in a step: numbers, and counts by the name of what was counted."""


@dataclass(frozen=True)
class Batch:
    """The rows of one step, before they are cut into forward passes."""

    rows: tuple[Row, ...]
    units: tuple[tuple[int, ...], ...]
    """Rows that must meet in one forward pass: (i,) alone, (chosen, rejected) of a pair."""
    counts: Counts
    metrics: Metrics = field(default_factory=dict)
    """What is known before the update: rewards, lengths."""
    samples: tuple[dict[str, Any], ...] = ()
    """A few completions to keep for the reader."""
    ledger: Ledger = field(default_factory=Ledger)
    """What sampling it cost."""


def singly(rows: Sequence[Row], **more: Any) -> Batch:
    """Each row a unit, and the loss a mean over the target tokens of all of them; `more` of a batch."""
    counts = Counts(tokens=sum(sum(row.target) for row in rows), sequences=len(rows))
    return Batch(tuple(rows), tuple((i,) for i in range(len(rows))), counts, **more)


class Objective(Protocol):
    """What is minimised: one forward pass after another, whose parts add up."""

    def forward(self, model: torch.nn.Module, forest: Forest, states: States) -> Tensor:
        """What the loss needs of the model. `states` gives the hidden states [T, D] of a forest."""

    def loss(self, batch: Batch, rows: Sequence[int], forest: Forest, outputs: Tensor) -> tuple[Tensor, Metrics]:
        """This forward pass's part of the step's loss, and of its metrics. `rows[i]` is row i of the forest.

        Parts add up over the passes of a step and over workers; metrics that end in _min and _max are combined so.
        """


class Method(Objective, Protocol):
    """One way to train. The loop calls `batch` once a step and `loss` once for each forward pass of it."""

    period: int
    """A checkpoint may only be taken after so many steps or a multiple: 1, or how often a batch is used."""

    def batch(self, step: int) -> Batch:
        """The same for the same step and weights, whatever ran before: a resumed run asks for it again."""


@runtime_checkable
class Stateful(Protocol):
    """A method that carries more from step to step than the policy's weights."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Weights of its own (a critic's), by names that the policy has not; trained and kept as the policy's are."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint must hold besides, as tensors and as what JSON can hold."""

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""


class LogProbs:
    """The `forward` of every method that learns from log-probabilities [T]."""

    temperature = 1.0
    """Logits are divided by it before log-probabilities are taken: what the rollouts were sampled at."""

    def forward(self, model: torch.nn.Module, forest: Forest, states: States) -> Tensor:
        return token_logprobs(model, forest, self.temperature, states)


def draws(
    stage: StageBase,
    sources: Sequence[Sequence[Any]],
    weights: Sequence[float],
    seed: int,
    period: int = 1,
    choice: int = 1,
) -> list[tuple[int, int]]:
    """(source, row) of all that the stage learns from, batch after batch, each used `period` steps.

    There are `batch_size` for a batch, or `choice` times as many where it is chosen from so many.
    """
    slots = math.ceil(stage.steps / period) * stage.batch_size * choice
    return schedule([len(rows) for rows in sources], weights, slots, derive(seed, stage.id, "order"))


def chosen(rendered: Rendered) -> Row:
    return Row(rendered.prompt_ids, rendered.completion_ids, rendered.completion_target)


def rejected(rendered: Rendered) -> Row:
    return Row(rendered.prompt_ids, rendered.rejected_ids, rendered.rejected_target)


def asked(example: Example) -> str:
    """What the answer answers, for a reader."""
    return str(example.prompt[-1]["content"]) if example.prompt else ""


def pair_sample(example: Example) -> dict[str, Any]:
    """How a pair from the data looks to a reader."""
    sides = (example.completion, example.rejected)
    text, other = (str(side[-1].get("content", "")) if side else "" for side in sides)
    return {"prompt": asked(example), "text": text, "rejected": other}


def scored_sample(rollout: Rollout, score: Score) -> dict[str, Any]:
    """How a sampled answer looks to a reader."""
    return {"prompt": asked(rollout.example), "text": rollout.text, "score": score.value, "outcome": score.outcome}


def interval(checkpoint_every: int, period: int) -> int:
    """Steps from one checkpoint to the next, a multiple of `period`.

    A quarter less than what a kill may cost, in steps: that long the last one may take to reach the disk.
    """
    return max((checkpoint_every - checkpoint_every // 4) // period, 1) * period


def passes(
    rows: Sequence[Row], units: Sequence[tuple[int, ...]], budget: int, world: World
) -> tuple[list[list[int]], int]:
    """This worker's forward passes, each as indices of units, and how many more it must make because others do."""
    plans = [
        [[mine[u] for u in members] for members in split(rows, [units[u] for u in mine], budget)]
        for mine in share(rows, units, world.size)
    ]
    return plans[world.rank], max(map(len, plans)) - len(plans[world.rank])


@torch.no_grad()
def frozen(
    policy: Policy,
    compute: Callable[..., Tensor],
    rows: Sequence[Row],
    budget: int,
    *args: Any,
    world: World = ALONE,
) -> list[Tensor]:
    """For each row what `compute(model, forest, *args)`, [..., T], gives at its completion, as constants."""
    mine, idle = passes(rows, [(i,) for i in range(len(rows))], budget, world)
    found: dict[int, Tensor] = {}
    for members in mine:
        forest = pack([rows[i] for i in members])
        outputs = policy.run(compute, forest, *args)
        found |= {i: outputs[..., start:stop].clone() for i, (start, stop) in zip(members, forest.spans, strict=True)}
    for _ in range(idle):
        policy.run(compute, pack([min(rows, key=len)]), *args)
    together = {i: outputs for part in world.gather(found) for i, outputs in part.items()}
    return [together[i] for i in range(len(rows))]


def frozen_logprobs(
    policy: Policy, rows: Sequence[Row], budget: int, temperature: float = 1.0, world: World = ALONE
) -> list[list[float]]:
    """For each row the log-probabilities of its completion tokens (0 where not a target), as constants."""
    return [logps.tolist() for logps in frozen(policy, token_logprobs, rows, budget, temperature, world=world)]
