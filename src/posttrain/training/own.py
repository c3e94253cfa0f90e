"""Learning from the policy's own answers: asked for, shown to be its own, scored."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from posttrain.credit.batch import as_row
from posttrain.data.prepare import Prepared
from posttrain.forest import Row
from posttrain.models.policy import Policy
from posttrain.recipe.blocks import Sampling
from posttrain.recipe.rl import Rl
from posttrain.recipe.stage import SamplingStage, StageBase
from posttrain.records import Example, Failure, Ledger, Rollout, Score
from posttrain.rewards.protocol import Scorer, finite, spent
from posttrain.sampling.protocol import Ahead, Answer, Sampler
from posttrain.training.batch import LogProbs, frozen_logprobs
from posttrain.training.world import ALONE, World

Slot = tuple[int, int]
"""A prompt: its source, and its row there."""
Scored = tuple[Rollout, Score]

ON_POLICY = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Largest mean difference, nats a token, between the log-probabilities that sampler and trainer give the first
rollouts, by the precision of the weights. One token off, or another temperature, makes it whole nats."""
CHECKED = 512
"""Tokens on which that is looked at."""


class Own:
    """A sampler whose rollouts must have been drawn with the weights that `policy` had when they were asked for.

    With the stage's `check_first_step` it also compares, once, what sampler and trainer say of rollouts of the weights
    of now: both must give them the same probability.

    Raises, where the rollouts are had:
        Failure: they are of other weights, or of other probabilities; to train on them would go wrong quietly.
    """

    def __init__(self, sampler: Sampler, policy: Policy, stage: StageBase) -> None:
        self.sampler, self.policy, self.stage = sampler, policy, stage
        self.unchecked = stage.check_first_step

    def __call__(
        self, prompts: Sequence[Example], n: int, sampling: Sampling, seed: int
    ) -> tuple[list[Rollout], Ledger]:
        return self.request(prompts, n, sampling, seed)()

    def request(self, prompts: Sequence[Example], n: int, sampling: Sampling, seed: int) -> Answer:
        """Ask; a sampler that can be asked ahead answers later."""
        digest = self.policy.digest()
        if isinstance(self.sampler, Ahead):
            answer = self.sampler.request(prompts, n, sampling, seed)
            return lambda: self._checked(*answer(), sampling, digest)
        found = self._checked(*self.sampler(prompts, n, sampling, seed), sampling, digest)
        return lambda: found

    def _checked(
        self, rollouts: list[Rollout], ledger: Ledger, sampling: Sampling, digest: str
    ) -> tuple[list[Rollout], Ledger]:
        for rollout in rollouts:
            if rollout.weights != digest:
                raise Failure(
                    f"{rollout.example.id}: sampled with weights {rollout.weights[:12]}, and the policy's were "
                    f"{digest[:12]} when it was asked; the sampler did not get the policy's weights"
                )
        if self.unchecked and digest == self.policy.digest():
            self.unchecked = False
            self._compare(rollouts, sampling.temperature or 1.0)  # greedy ones are told at temperature 1
        return rollouts, ledger

    def _compare(self, rollouts: Sequence[Rollout], temperature: float) -> None:
        stage = self.stage
        ends = accumulate(len(r.prompt_ids) + len(r.ids) for r in rollouts)
        some = [r for r, end in zip(rollouts, ends, strict=True) if end <= CHECKED] or rollouts[:1]
        found = frozen_logprobs(self.policy, [as_row(r) for r in some], stage.tokens_per_forward, temperature)
        apart = [abs(a - b) for r, logps in zip(some, found, strict=True) for a, b in zip(r.logps, logps, strict=True)]
        mean = sum(apart) / sum(r.sampled for r in some)
        elsewhere = isinstance(stage, Rl) and stage.endpoint is not None
        dtype = torch.bfloat16 if elsewhere else next(self.policy.model.parameters()).dtype
        if not mean <= ON_POLICY[dtype]:
            raise Failure(
                f"stage {stage.id!r}: the sampler's log-probabilities are {mean:.2g} nats a token from the trainer's "
                f"on the first rollouts (allowed: {ON_POLICY[dtype]:.2g}), though both have the same weights: they do "
                "not compute the same; please report it. `check_first_step: false` goes on regardless"
            )


def with_scores(score: Scorer, rollouts: Sequence[Rollout], ledger: Ledger) -> tuple[list[Scored], Ledger]:
    """The rollouts with what they earn, and what they cost with that."""
    scores = [finite(found) for found in score(rollouts)]
    return list(zip(rollouts, scores, strict=True)), ledger + spent(scores)


class OwnMethod(LogProbs):
    """What methods share that sample while they train: log-probabilities are those at the sampler's temperature."""

    def __init__(
        self,
        stage: SamplingStage,
        data: Prepared,
        policy: Policy,
        sampler: Sampler,
        score: Scorer,
        seed: int,
        world: World = ALONE,
    ) -> None:
        self.stage, self.data, self.policy, self.score = stage, data, policy, score
        self.sampler, self.seed, self.world = Own(sampler, policy, stage), seed, world
        self.temperature = stage.sampling.temperature

    def logprobs(self, rows: Sequence[Row]) -> list[list[float]]:
        """What the policy of now gives the completion tokens of each row (0 where not a target), as constants."""
        return frozen_logprobs(self.policy, rows, self.stage.tokens_per_forward, self.temperature, self.world)
