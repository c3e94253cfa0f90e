"""A reward model's number for an answer (models/reward.py)."""

from __future__ import annotations

from functools import partial

from posttrain.data.chat import Renderer
from posttrain.models.policy import Policy
from posttrain.models.reward import marked
from posttrain.rewards.protocol import Scorer
from posttrain.rewards.rows import TOKENS, Rows, by_rows, graded, last, reader


def model_scorer(model: Policy, renderer: Renderer, tokens: int = TOKENS) -> Scorer:
    """A scorer by a reward model, of answers by the model whose renderer is given: its number at the token that ends
    the answer, in its own units. Passes hold about `tokens`, and a prompt is computed once for the answers to it that
    meet in one.

    Raises:
        UserError: it cannot read these answers (see `Rows`).
    """
    ask = reader(model, partial(marked, model.model), tokens)
    return by_rows(Rows(model, renderer, last), ask, lambda values: graded(values[0], 0.0))
