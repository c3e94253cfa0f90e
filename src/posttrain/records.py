"""The frozen records that rooms pass to one another. No torch, no I/O."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

Message = Mapping[str, Any]
"""One chat turn as Transformers' chat templates take it: `role`, `content`, perhaps `tool_calls` and so on."""

Outcome = Literal["correct", "wrong", "unparsed", "error"]


class UserError(Exception):
    """A mistake the user can mend: says what, where and what to do. The command line prints it and exits 2."""


class Failure(Exception):
    """Right input, and yet it cannot go on: says what, where and what to try. The command line exits 1."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row of data.

    `prompt + completion` is one conversation. Assistant turns in `completion` (and in `rejected`, the other
    continuation of the same prompt) are what is learned; user and tool turns between them are context.
    """

    id: str
    """Where the row came from: `train.jsonl:12` or `reasoning_gym/chain_sum?seed=1#42`."""
    prompt: tuple[Message, ...] = ()
    completion: tuple[Message, ...] = ()
    rejected: tuple[Message, ...] = ()
    label: bool | None = None
    """Unpaired feedback on `completion`: good or bad."""
    margin: float | None = None
    """By how much `completion` is better than `rejected`, where that was judged; in units of a reward."""
    step_labels: tuple[float | None, ...] = ()
    """Of a solution in steps, one for each turn of `completion`: good or bad, or the chance that it is good."""
    text: str | None = None
    """Raw text for continued pre-training; the conversation is then empty."""
    tools: tuple[Mapping[str, Any], ...] = ()
    task: str | None = None
    """Name of the verifier that can score an answer to `prompt`; None where there is none."""
    answer: str | None = None
    """A reference answer, where one is known."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    begun: tuple[int, ...] = ()
    """Tokens of an answer that a sampler is to go on from."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """What something cost. Additive: the ledger of a whole is the sum over its parts."""

    prompt_tokens: int = 0
    """Prompt tokens computed by the sampler."""
    cached_tokens: int = 0
    """Prompt tokens that a completion could share instead of computing them."""
    generated_tokens: int = 0
    reward_tokens: int = 0
    """Tokens that rewards which are models read, and those that a judge wrote."""
    trained_tokens: int = 0
    """Tokens put through forward and backward."""
    shared_tokens: int = 0
    """Tokens that one-sequence-at-a-time training would have computed again and the Forest did not."""
    target_tokens: int = 0
    """Tokens that carried loss."""
    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __sub__(self, other: Ledger) -> Ledger:
        return Ledger(*(a - b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclass(frozen=True, slots=True)
class Score:
    """What a reward says of one completion. `value` is None where it could not be scored: never a silent 0."""

    value: float | None
    outcome: Outcome
    extracted: str | None = None
    """The answer as the scorer read it out of the completion."""
    why: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    """What each reward gave, by its name and before its weight, where the value is made of several."""
    cost: Ledger = field(default=Ledger(), compare=False, repr=False)
    """What having it cost, where a model was asked. Of answers scored together, the first bears the cost of all."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion, with what is needed to train on it without asking the sampler again."""

    example: Example
    group: int
    """Index of the prompt among the prompts of the call; completions of one prompt share it."""
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    """Completion tokens, the end-of-turn token included where the model produced it."""
    logps: tuple[float, ...]
    """log pi(token | what came before) under the sampling temperature and before any top-k/top-p/min-p cut, nats."""
    text: str
    finish: Literal["stop", "length"]
    weights: str
    """Digest of the weights that made it."""
    target: tuple[bool, ...] = ()
    """Which of `ids` the model sampled; all of them unless told. The others were said to it between its turns, have 0
    for a log-probability and are never learned."""

    def __post_init__(self) -> None:
        if not self.target:
            object.__setattr__(self, "target", (True,) * len(self.ids))

    @property
    def sampled(self) -> int:
        """Tokens that the model sampled."""
        return sum(self.target)


class Entry(NamedTuple):
    """What is listed of a reward or of a kind of stage."""

    summary: str
    paper: str


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished thing in a run folder, named by the digest of what it holds."""

    kind: Literal["model", "adapter"]
    path: Path
    digest: str


def derive(seed: int, *names: str | int) -> int:
    """The seed of one component: a 63-bit number from the run's seed and the component's name.

    Components that do not share a generator cannot shift one another's random choices.
    """
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
