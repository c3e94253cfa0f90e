"""What an environment is, and what comes of an episode in it."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from posttrain.records import Example, Message, Rollout, Score


@dataclass(frozen=True, slots=True)
class Budget:
    """What one episode may take. One that would take more is cut where it stands."""

    tokens: int
    """Behind the prompt: the model's, and those of what it is told between its turns."""
    context: int = sys.maxsize
    """The model's, which the prompt counts for too."""
    seconds: float = math.inf
    """Wall-clock, looked at between turns: a turn that has begun is not broken off, nor is a tool, which has limits of
    its own. Episodes go step by step together, so each waits for the slowest. Runs that it cuts cannot be repeated."""


@dataclass(frozen=True, slots=True)
class Episode:
    """What was said in one environment, to learn from and to look at."""

    rollout: Rollout
    """To learn from: `ids` are all that follows the prompt, as it was sampled and said, `target` what was sampled, and
    `text` is the model's last turn. `finish` is `length` where the episode was cut."""
    messages: tuple[Message, ...]
    """The whole conversation, the prompt too. What was said after the model's last turn has no tokens in `rollout`."""
    ended: Literal["done", "tokens", "seconds", "error"]
    """By the environment, by a budget, or by an exception in it."""
    why: str = ""
    """The exception."""


class Environment(Protocol):
    """The other party of one episode. There is a new one for each, so it may keep what it needs in itself."""

    def reset(self, example: Example) -> Example:
        """The example as the model is asked it: perhaps with tools, or with instructions before its question.

        Equal for equal examples, for the episodes of one example share their prompt.
        """

    def step(self, messages: Sequence[Message]) -> tuple[tuple[Message, ...], bool]:
        """What is said to the model after its turn, which ends `messages`, and whether the episode is over.

        It may run in a thread, beside the steps of other episodes.
        """

    def reward(self, episode: Episode) -> Score:
        """What the whole was worth. Not asked where `step` raised: such an episode is unscored."""
