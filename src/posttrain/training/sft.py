"""Supervised fine-tuning: the likelihood of the assistant's tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from posttrain.data.prepare import Prepared
from posttrain.forest import Forest
from posttrain.losses import Counts, nll, reduce_tokens
from posttrain.recipe.schema import Sft
from posttrain.training.batch import Batch, LogProbs, chosen, draws


class SftMethod(LogProbs):
    """Mean negative log-likelihood over all target tokens of the step."""

    period = 1

    def __init__(self, stage: Sft, data: Prepared, seed: int) -> None:
        self.stage, self.data = stage, data
        self.order = draws(stage, data.rows, data.weights, seed)

    def batch(self, step: int) -> Batch:
        size = self.stage.batch_size
        rows = tuple(chosen(self.data.rows[s][i]) for s, i in self.order[step * size : (step + 1) * size])
        counts = Counts(tokens=sum(sum(row.target) for row in rows), sequences=len(rows))
        return Batch(rows, tuple((i,) for i in range(len(rows))), counts)

    def loss(
        self, batch: Batch, rows: Sequence[int], forest: Forest, logps_T: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        return reduce_tokens(nll(logps_T), forest.target_T, batch.counts), {}
