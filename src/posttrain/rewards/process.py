"""Process rewards: what a process reward model says of each step, made one number; and labels of steps by rollouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import TypeVar

from torch import Tensor, nn

from posttrain.data.chat import Renderer
from posttrain.data.steps import SEPARATOR, split_steps, step_ends
from posttrain.forest import Forest
from posttrain.models.policy import Policy
from posttrain.models.reward import marked
from posttrain.recipe.blocks import Sampling
from posttrain.recipe.rewards import Aggregate
from posttrain.records import Example, Ledger, Rollout, Score
from posttrain.rewards.protocol import Scorer, spent
from posttrain.rewards.rows import TOKENS, Rows, by_rows, graded, reader
from posttrain.sampling.protocol import Sampler, completion_text

T = TypeVar("T")
AGGREGATES: dict[Aggregate, Callable[[Sequence[float]], float]] = {
    "min": min,  # a chain is as good as its weakest step: Math-Shepherd (2312.08935)
    "product": math.prod,  # that all steps are good, if they were independent: Lightman et al. (2305.20050)
    "last": lambda chances: chances[-1],  # the last step has seen the whole: Snell et al. (2408.03314)
    "mean": fmean,
}


def process_scorer(
    model: Policy, renderer: Renderer, *, aggregate: Aggregate = "min", separator: str = SEPARATOR, tokens: int = TOKENS
) -> Scorer:
    """A scorer by a process reward model, of answers by the model whose renderer is given: the chance that a step is
    good at the token that ends it, over the steps by `aggregate`, from 0 to 1. Steps are told apart as in training
    (data/steps.py); a blank answer is worth 0.

    Raises:
        UserError: it cannot read these answers (see `Rows`).
    """
    decode = Renderer(model.tokenizer).decode

    def marks(ids: Sequence[int]) -> list[bool]:
        ends = set(step_ends(ids, decode, separator))
        return [i in ends for i in range(len(ids))]

    def score(chances: list[float]) -> Score:
        if not chances:
            return Score(0.0, "unparsed", why="no step: the answer is blank")
        return graded(AGGREGATES[aggregate](chances), 0.5, f"steps: {' '.join(f'{chance:.3f}' for chance in chances)}")

    return by_rows(Rows(model, renderer, marks), reader(model, partial(chances_at, model.model), tokens), score)


def chances_at(model: nn.Module, forest: Forest) -> Tensor:
    """[T]: the chance that the steps which end at the forest's target tokens are good, 0.5 at other tokens."""
    return marked(model, forest).sigmoid()


# Labels


def label_steps(
    solutions: Sequence[Rollout],
    sampler: Sampler,
    scorer: Scorer,
    renderer: Renderer,
    *,
    n: int,
    sampling: Sampling,
    seed: int,
    separator: str = SEPARATOR,
    hard: bool = False,
) -> tuple[list[Example], Ledger]:
    """Solutions with a label for each step, from what becomes of them (Math-Shepherd, Wang et al., 2312.08935).

    From the end of each step but the last `n` completions are drawn; the step's label is the share of them that the
    verifier calls correct, or with `hard` whether any is. The last step's label is what the solution itself came to.
    Departure from the paper: completions that cannot be scored are left out of the share; a step of which none could
    be is not labelled.

    Args:
        solutions: of prompts that `scorer` can score.
        sampler: draws from the model that completes; `renderer` is that model's, and its own.

    Returns:
        An example for each solution, `completion` holding its steps; and what sampling and scoring cost.
    """
    ends = [step_ends(solution.ids, renderer.decode, separator) for solution in solutions]
    begun = [(s, end + 1) for s, those in enumerate(ends) for end in those[:-1]]
    prompts = [replace(solutions[s].example, begun=solutions[s].ids[:tokens]) for s, tokens in begun]
    tails, ledger = sampler(prompts, n, sampling, seed) if prompts else ([], Ledger())
    whole = [
        _whole(solutions[s], tokens, tail, renderer, sampling)
        for (s, tokens), of_one in zip(begun, _chunks(tails, n), strict=True)
        for tail in of_one
    ]
    scores = scorer([*solutions, *whole])
    after = iter(_chunks(scores[len(solutions) :], n))
    examples = []
    for s, solution in enumerate(solutions):
        labels = [_label(next(after), hard) for _ in ends[s][:-1]]
        labels += [_label([scores[s]], hard) for _ in ends[s][-1:]]
        steps = split_steps(renderer.decode(solution.ids), separator)
        completion = tuple({"role": "assistant", "content": step} for step in steps)
        examples.append(replace(solution.example, completion=completion, step_labels=tuple(labels)))
    return examples, ledger + spent(scores)


def _label(scores: Sequence[Score], hard: bool) -> float | None:
    right = [score.outcome == "correct" for score in scores if score.value is not None]
    if not right:
        return None
    return float(any(right)) if hard else fmean(right)


def _whole(solution: Rollout, tokens: int, tail: Rollout, renderer: Renderer, sampling: Sampling) -> Rollout:
    """The first `tokens` of a solution and what was drawn after them, as one answer."""
    ids = (*solution.ids[:tokens], *tail.ids)
    return replace(
        tail,
        example=solution.example,
        group=solution.group,
        prompt_ids=solution.prompt_ids,
        ids=ids,
        logps=(*solution.logps[:tokens], *tail.logps),
        target=(*solution.target[:tokens], *tail.target),
        text=completion_text(renderer.decode(ids), sampling.stop),
    )


def _chunks(items: Sequence[T], n: int) -> list[Sequence[T]]:
    return [items[i : i + n] for i in range(0, len(items), n)]
