"""Rollouts as rows of a model that scores them, in that model's own tokens."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from posttrain.data.chat import Renderer
from posttrain.data.shapes import Malformed
from posttrain.forest import Forest, Row
from posttrain.models.cost import forward_flops_per_token
from posttrain.models.policy import Policy
from posttrain.models.reward import read
from posttrain.models.template import end_of_turn
from posttrain.records import Failure, Ledger, Rollout, Score, UserError
from posttrain.rewards.protocol import Scorer, broke, charged

TOKENS = 4096
"""Of one forward pass, where nothing is kept for a gradient."""
Reader = Callable[[Sequence[Row], list[Ledger]], list[list[float]]]
"""Gives for each row what a model says at its target tokens, and adds to the list what each pass has cost."""


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
        marks: Callable[[Sequence[int]], Sequence[bool]] | None,
        ended: bool = True,
    ) -> None:
        self.context = model.context
        self.marks = marks
        """Which tokens of an answer are read; where it is None, all that the model wrote, not what it was told."""
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
        prompt, ids, written = rollout.prompt_ids, rollout.ids, rollout.target
        if self.renderer is not None:
            answer = {"role": "assistant", "content": rollout.text}
            (rendered,) = self.renderer.render(dataclasses.replace(rollout.example, completion=(answer,), rejected=()))
            prompt, ids, written = rendered.prompt_ids, rendered.completion_ids, rendered.completion_target
        elif self.ends and ids[-1] not in self.ends:
            ids, written = (*ids, self.ends[0]), (*written, True)
        if len(prompt) + len(ids) > self.context:
            raise Malformed(f"{len(prompt) + len(ids)} tokens, and the scoring model's context is {self.context}")
        return Row(prompt, ids, tuple(self.marks(ids)) if self.marks else written)


def last(ids: Sequence[int]) -> list[bool]:
    """The token that ends the answer."""
    return [*[False] * (len(ids) - 1), True]


def reader(model: Policy, compute: Callable[[Forest], Tensor], budget: int, *, logits: bool = False) -> Reader:
    """`models.reward.read`, with its cost; `logits` says whether `compute` makes those of target tokens."""

    def reads(rows: Sequence[Row], costs: list[Ledger]) -> list[list[float]]:
        began = time.perf_counter()

        def counted(forest: Forest) -> Tensor:
            values_T = compute(forest)
            context, targets = int(forest.position_T.max()) + 1, int(forest.target_T.sum()) if logits else 0
            each = forward_flops_per_token(model.model.config, context, targets / len(forest))
            costs.append(Ledger(reward_tokens=len(forest), flops=each * len(forest)))
            return values_T

        try:
            return read(counted, rows, budget)
        finally:
            costs.append(Ledger(seconds=time.perf_counter() - began))

    return reads


def by_rows(rows: Rows, ask: Reader, score: Callable[[list[float]], Score]) -> Scorer:
    """A scorer by what a model says at the marked tokens of each row: all rows are read together, and `score` makes of
    one row's numbers a Score. What cannot be made a row is unscored, with its cause. Where reading breaks down, all are
    unscored, and cost what was read by then."""

    def scored(rollouts: Sequence[Rollout]) -> list[Score]:
        made: dict[int, Row] = {}
        found: dict[int, Score] = {}
        costs: list[Ledger] = []
        for i, rollout in enumerate(rollouts):
            try:
                made[i] = rows(rollout)
            except Malformed as error:
                found[i] = Score(None, "error", why=f"{rollout.example.id}: {error}")
        try:
            scores = [score(of_one) for of_one in ask(list(made.values()), costs)]
        except (UserError, Failure):
            raise
        except Exception as error:  # `guarded` would not know the costs
            scores = [broke(error)] * len(made)
        found |= zip(made, charged(scores, sum(costs, Ledger())), strict=True)
        return [found[i] for i in range(len(rollouts))]

    return scored


def graded(value: float, middle: float, why: str = "") -> Score:
    """A number on a scale. It is called correct above the middle of it, which says no more than that."""
    return Score(value, "correct" if value > middle else "wrong", why=why)
