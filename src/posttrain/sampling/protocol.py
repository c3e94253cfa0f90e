"""What every sampler does: prompts in, rollouts out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

from posttrain.data.shapes import Malformed
from posttrain.recipe.blocks import Sampling
from posttrain.records import Example, Ledger, Rollout, UserError, derive

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


def attempted(
    sampler: Sampler, prompts: Sequence[Example], n: int, sampling: Sampling, seed: int, first: int = 0
) -> tuple[list[list[Rollout] | UserError], Ledger]:
    """`n` completions of each prompt, or why one cannot be asked: for prompts that are made of what a model wrote, and
    may be too long for its context.

    Those that cannot are found by halves, each with a seed of its own. `first` is the number of the first prompt, where
    these are a part of a larger call.
    """
    if not prompts:
        return [], Ledger()
    try:
        rollouts, ledger = sampler(prompts, n, sampling, seed)
    except (UserError, Malformed) as error:
        if len(prompts) == 1:
            return [UserError(str(error))], Ledger()
        half = len(prompts) // 2
        head = attempted(sampler, prompts[:half], n, sampling, derive(seed, "head"), first)
        tail = attempted(sampler, prompts[half:], n, sampling, derive(seed, "tail"), first + half)
        return head[0] + tail[0], head[1] + tail[1]
    groups = [rollouts[p * n : (p + 1) * n] for p in range(len(prompts))]
    return [[replace(rollout, group=first + p) for rollout in group] for p, group in enumerate(groups)], ledger
