"""What every sampler does: prompts in, rollouts out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from posttrain.recipe.schema import Sampling
from posttrain.records import Example, Ledger, Rollout


class Sampler(Protocol):
    def __call__(
        self, prompts: Sequence[Example], n: int, sampling: Sampling, seed: int
    ) -> tuple[list[Rollout], Ledger]:
        """`n` completions of each prompt, those of one prompt together and in the order of the prompts.

        The same seed gives the same rollouts, whatever else is in the batch.

        Raises:
            UserError: a prompt leaves no room for an answer in the model's context.
        """
