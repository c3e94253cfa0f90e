"""What every sampler does: prompts in, rollouts out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from posttrain.recipe.blocks import Sampling
from posttrain.records import Example, Ledger, Rollout, UserError

Answer = Callable[[], tuple[list[Rollout], Ledger]]
"""Rollouts that may be on their way still: called once, waits for them."""


class Sampler(Protocol):
    def __call__(
        self, prompts: Sequence[Example], n: int, sampling: Sampling, seed: int
    ) -> tuple[list[Rollout], Ledger]:
        """`n` completions of each prompt, those of one prompt together and in the order of the prompts.

        The same seed gives the same rollouts, whatever else is in the batch.

        Raises:
            UserError: a prompt leaves no room for an answer in the model's context.
        """


@runtime_checkable
class Ahead(Protocol):
    """A sampler that can be asked before the rollouts are needed, and samples them with the weights of that time."""

    def request(self, prompts: Sequence[Example], n: int, sampling: Sampling, seed: int) -> Answer: ...


class Renderer(Protocol):
    """The part of the chat renderer that sampling needs."""

    def prompt_ids(self, example: Example) -> tuple[int, ...]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


def room(example: Example, prompt: int, most: int, context: int) -> int:
    """Tokens that a completion may have, at most `most`, after `prompt` tokens of a model that has `context`."""
    if prompt >= context:
        raise UserError(
            f"{example.id}: the prompt has {prompt} tokens and the model's context {context}: no room for an answer; "
            "shorten it, or drop it with data.max_length"
        )
    return min(most, context - prompt)


def completion_text(text: str, stops: Sequence[str]) -> str:
    """A completion as far as its first stop string."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]
