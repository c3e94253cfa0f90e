"""Rollouts as rows of a model that scores them, in that model's own tokens."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from posttrain.data.chat import Renderer
from posttrain.data.shapes import Malformed
from posttrain.forest import Row
from posttrain.models.policy import Policy
from posttrain.models.template import end_of_turn
from posttrain.records import Rollout, Score, UserError
from posttrain.rewards.protocol import Scorer

TOKENS = 4096
"""Of one forward pass, where nothing is kept for a gradient."""


def same_tokens(a: Any, b: Any) -> bool:
    """Whether two tokenizers give a conversation the same ids: the same vocabulary and the same chat template."""
    return a.get_vocab() == b.get_vocab() and a.chat_template == b.chat_template


class Rows:
    """What `model` reads of a rollout that `renderer`'s model wrote.

    Where both have the same tokens, the ids are those that were sampled; with `ended` an end of turn follows an answer
    that was cut off, for a reward is read there. Any other model is given prompt and answer as text, rendered with its
    own template; a warning says so.

    Raises:
        UserError: the tokens are others and the model has no chat template.
    """

    def __init__(
        self,
        model: Policy,
        renderer: Renderer,
        marks: Callable[[Sequence[int]], Sequence[bool]],
        ended: bool = True,
    ) -> None:
        self.context = model.context
        self.marks = marks
        """Which tokens of an answer are read."""
        own = (end_of_turn(model.tokenizer), model.tokenizer.eos_token_id)
        self.ends = [token for token in own if token is not None] if ended else []
        self.renderer: Renderer | None = None
        if same_tokens(model.tokenizer, renderer.tokenizer):
            return
        if not model.tokenizer.chat_template:
            raise UserError(
                f"{model.source}: has another tokenizer than the model that answers, and no chat template by which the "
                "answers could be rendered for it; take a scoring model with one, or one of the same tokenizer"
            )
        warnings.warn(f"{model.source} has other tokens: answers are rendered for it again, as text", stacklevel=2)
        self.renderer = Renderer(model.tokenizer, system=renderer.system)

    def __call__(self, rollout: Rollout) -> Row:
        """Malformed where the rollout cannot be rendered or is longer than the model's context."""
        prompt, ids = rollout.prompt_ids, rollout.ids
        if self.renderer is not None:
            answer = {"role": "assistant", "content": rollout.text}
            (rendered,) = self.renderer.render(dataclasses.replace(rollout.example, completion=(answer,), rejected=()))
            prompt, ids = rendered.prompt_ids, rendered.completion_ids
        elif self.ends and ids[-1] not in self.ends:
            ids = (*ids, self.ends[0])
        if len(prompt) + len(ids) > self.context:
            raise Malformed(f"{len(prompt) + len(ids)} tokens, and the scoring model's context is {self.context}")
        return Row(prompt, ids, tuple(self.marks(ids)))


def last(ids: Sequence[int]) -> list[bool]:
    """The token that ends the answer."""
    return [*[False] * (len(ids) - 1), True]


def every(ids: Sequence[int]) -> list[bool]:
    return [True] * len(ids)


def by_rows(
    rows: Rows, read: Callable[[Sequence[Row]], list[list[float]]], score: Callable[[list[float]], Score]
) -> Scorer:
    """A scorer by what a model says at the marked tokens of each row: all rows are read together, and `score` makes of
    one row's numbers a Score. What cannot be made a row is unscored, with its cause."""

    def scored(rollouts: Sequence[Rollout]) -> list[Score]:
        made: dict[int, Row] = {}
        found: dict[int, Score] = {}
        for i, rollout in enumerate(rollouts):
            try:
                made[i] = rows(rollout)
            except Malformed as error:
                found[i] = Score(None, "error", why=f"{rollout.example.id}: {error}")
        found |= {i: score(values) for i, values in zip(made, read(list(made.values())), strict=True)}
        return [found[i] for i in range(len(rollouts))]

    return scored


def graded(value: float, middle: float, why: str = "") -> Score:
    """A number on a scale. It is called correct above the middle of it, which says no more than that."""
    return Score(value, "correct" if value > middle else "wrong", why=why)
