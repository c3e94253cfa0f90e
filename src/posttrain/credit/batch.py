"""What one optimiser step learns from, packed: a forest with what its losses need."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from posttrain.forest import Forest, Row
from posttrain.losses import Counts
from posttrain.records import Rollout


@dataclass(frozen=True, kw_only=True)
class Counted(Forest):
    """A forest that knows what its loss is divided by."""

    counts: Counts
    """Of the whole step: what was left out of the forest because it could not teach anything counts too."""


@dataclass(frozen=True, kw_only=True)
class Credited(Counted):
    """A forest of sampled completions with what each token is worth."""

    weights_T: Tensor
    """float32, the advantage of each completion token; 0 at the prompts."""
    behaviour_logps_T: Tensor
    """float32, nats: each token's log-probability when it was sampled; 0 at the prompts."""


def as_row(rollout: Rollout) -> Row:
    """A sampled completion, every token of it a target, the end of the turn too."""
    return Row(rollout.prompt_ids, rollout.ids, (True,) * len(rollout.ids))


def groups(rollouts: Sequence[Rollout]) -> list[list[int]]:
    """Indices of the rollouts of each prompt; those of one prompt stand side by side, as samplers return them.

    The rollouts of several calls may follow one another: their groups stay apart.
    """

    def key(i: int) -> tuple[int, tuple[int, ...]]:
        return rollouts[i].group, rollouts[i].prompt_ids

    return [list(group) for _, group in itertools.groupby(range(len(rollouts)), key)]
