"""Rounds of sampling and learning: what a round samples is kept, and a continued run learns from the same."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from posttrain.data.prepare import Prepared, schedule
from posttrain.models.disk import read_json, write_json
from posttrain.models.policy import Policy
from posttrain.recipe.stage import Rounds
from posttrain.records import Ledger, UserError, derive
from posttrain.sampling.protocol import Sampler
from posttrain.training.batch import Batch, LogProbs, Metrics
from posttrain.training.own import Own
from posttrain.training.world import ALONE, World


class RoundMethod(LogProbs, ABC):
    """Each round samples for `prompts` prompts with the weights that the one before it left, and learns from that in
    its share of the steps.

    What a round samples stands in `folder`, in NAME-ROUND.jsonl, and beside it in NAME-ROUND.json the digest of the
    `weights` that sampled it, the `metrics` of that and its `ledger`: a continued run learns from the same and samples
    none of it again.
    """

    name: str
    """Of the files."""
    period = 1

    def __init__(
        self,
        stage: Rounds,
        data: Prepared,
        policy: Policy,
        sampler: Sampler,
        folder: Path,
        seed: int,
        world: World = ALONE,
    ) -> None:
        self.stage, self.data, self.policy, self.sampler = stage, data, policy, Own(sampler, policy, stage)
        self.folder, self.seed, self.world = folder, seed, world
        sizes, slots = [len(rows) for rows in data.rows], stage.rounds * stage.prompts
        self.slots = schedule(sizes, data.weights, slots, derive(seed, stage.id, "prompts"))
        self.round = -1

    @abstractmethod
    def sample(self, number: int) -> tuple[Any, Metrics, Ledger]:
        """What a round learns from, by the policy of now, what that showed and what it cost."""

    @abstractmethod
    def write(self, path: Path, found: Any) -> None:
        """Keep what `sample` gave first."""

    @abstractmethod
    def take(self, path: Path, number: int) -> None:
        """Learn from now on what `write` kept for a round."""

    @abstractmethod
    def learn(self, at: int) -> Batch:
        """The batch of the round's step `at`."""

    def batch(self, step: int) -> Batch:
        number, at = divmod(step, self.stage.round_steps)
        if at == 0 or number != self.round:
            made = self._begin(number, at == 0)
        batch = self.learn(at)
        return batch if at else dataclasses.replace(batch, metrics=made["metrics"], ledger=Ledger(**made["ledger"]))

    def _begin(self, number: int, first: bool) -> dict[str, Any]:
        """Have what a round learns from; returns its record. At its `first` step that is sampled, if these very weights
        have not done so before; later it must be there. All workers call this; the leader writes.

        Raises:
            UserError: it is not.
        """
        path = self.folder / f"{self.name}-{number}.jsonl"
        record, digest = path.with_suffix(".json"), self.policy.digest()
        made: dict[str, Any] | None = self.world.gather(read_json(record))[0]
        if first and (made is None or made["weights"] != digest):
            found, metrics, ledger = self.sample(number)
            # JSON has no NaN: what could not be measured is left out.
            known = {k: v for k, v in metrics.items() if not (isinstance(v, float) and math.isnan(v))}
            made = {"weights": digest, "metrics": known, "ledger": dataclasses.asdict(ledger)}
            if self.world.rank == 0:
                self.write(path, found)
                write_json(record, made)
            self.world.gather(None)  # nobody reads before it is written
        if made is None:
            raise UserError(f"{record}: is missing, and the checkpoint was learned from it; choose another --out")
        self.take(path, number)
        self.round = number
        return made
