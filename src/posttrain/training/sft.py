"""The likelihood of text as it stands: of the assistant's tokens, or of all of a document's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from posttrain.data.prepare import Prepared
from posttrain.forest import Forest
from posttrain.losses import dft, nll, reduce_tokens
from posttrain.recipe.stage import StageBase
from posttrain.recipe.supervised import Sft
from posttrain.training.batch import Batch, LogProbs, chosen, draws, singly


class SftMethod(LogProbs):
    """Mean over all target tokens of the step, of their negative log-likelihood or of what `stage.loss` makes of it."""

    period = 1

    def __init__(self, stage: StageBase, data: Prepared, seed: int) -> None:
        self.stage, self.data = stage, data
        self.order = draws(stage, data.rows, data.weights, seed)
        self.function = dft if isinstance(stage, Sft) and stage.loss == "dft" else nll

    def batch(self, step: int) -> Batch:
        size = self.stage.batch_size
        return singly([chosen(self.data.rows[s][i]) for s, i in self.order[step * size : (step + 1) * size]])

    def loss(
        self, batch: Batch, rows: Sequence[int], forest: Forest, logps_T: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        return reduce_tokens(self.function(logps_T), forest.target_T, batch.counts), {}
