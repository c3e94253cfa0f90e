"""One question, one answer: the environment that adds nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.environments.protocol import Episode
from posttrain.records import Example, Message, Score
from posttrain.rewards.protocol import Scorer
from posttrain.rewards.verifier import verify


@dataclass(frozen=True)
class SingleTurn:
    """Episodes of one turn are exactly the sampler's rollouts, and their scores the scorer's: by default those of
    generated tasks (reasoning_gym)."""

    score: Scorer = verify

    def reset(self, example: Example) -> Example:
        return example

    def step(self, messages: Sequence[Message]) -> tuple[tuple[Message, ...], bool]:
        return (), True

    def reward(self, episode: Episode) -> Score:
        return self.score([episode.rollout])[0]
