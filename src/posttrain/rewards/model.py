"""A reward model's number for an answer (models/reward.py)."""

from __future__ import annotations

from functools import partial

from posttrain.data.chat import Renderer
from posttrain.models.policy import Policy
from posttrain.models.reward import load_reward_model, marked
from posttrain.rewards.protocol import Scorer
from posttrain.rewards.rows import TOKENS, Rows, by_rows, graded, last, reader


def model_scorer(source: str, renderer: Renderer, *, revision: str | None = None, device: str = "auto") -> Scorer:
    """A scorer by the reward model that `source` names, of answers by the model whose renderer is given.

    Raises:
        UserError: the model cannot be had or has no head that scores, or cannot read these answers (see `Rows`).
    """
    return scored_by(load_reward_model(source, revision=revision, device=device), renderer)


def scored_by(model: Policy, renderer: Renderer, tokens: int = TOKENS) -> Scorer:
    """A scorer by a loaded reward model: its number at the token that ends the answer, in its own units. Passes hold
    about `tokens`, and a prompt is computed once for the answers to it that meet in one."""
    ask = reader(model, partial(marked, model.model), tokens)
    return by_rows(Rows(model, renderer, last), ask, lambda values: graded(values[0], 0.0))
