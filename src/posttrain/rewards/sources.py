"""The rewards of a recipe, made of their blocks: what goes by a rule here, what is a model in `learned`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from posttrain.recipe.rewards import (
    EnsembleReward,
    ImplicitReward,
    JudgeReward,
    LengthReward,
    MajorityReward,
    ModelReward,
    ProcessReward,
    Reward,
)
from posttrain.records import Example, Rollout, Score, UserError
from posttrain.rewards.combine import Part, combined
from posttrain.rewards.form import tagged
from posttrain.rewards.instructions import instructions
from posttrain.rewards.json_schema import json_schema
from posttrain.rewards.length import length
from posttrain.rewards.match import exact, regex
from posttrain.rewards.maths import math
from posttrain.rewards.pool import SIZE, pool
from posttrain.rewards.protocol import Rule, Scorer, judged, limited
from posttrain.rewards.prove import PROOF, prove
from posttrain.rewards.unit_tests import python
from posttrain.rewards.verifier import verifier

if TYPE_CHECKING:
    from posttrain.data.chat import Renderer

RULES: dict[str, Callable[[Any], Rule]] = {
    "verifier": verifier,
    "math": math,
    "exact": exact,
    "regex": regex,
    "json_schema": json_schema,
    "format": tagged,
    "instructions": instructions,
    "python": python,
}
"""Kind of reward to the rule that its block makes."""
MODELS = ModelReward, ProcessReward, JudgeReward, ImplicitReward
ASKED = 8
"""Examples on which a reward that is a model must prove itself: each costs it some ten answers."""


def build(
    rewards: Sequence[Reward],
    renderer: Renderer,
    *,
    max_unscored: float,
    examples: Sequence[Example] = (),
    device: str = "auto",
    among: Callable[[Scorer], Scorer] = lambda score: score,
) -> Scorer:
    """One scorer of all of `rewards`, for answers by the model whose renderer is given.

    Rewards that are models are loaded, and prove themselves on those `examples` whose right answer is known; rules
    prove themselves by `proven`. `among` shares the answers of a batch out, where several workers score it.

    Raises:
        UserError: a reward cannot be made, or a model is taken in by answers that say nothing.
    """

    def scorer(reward: Reward) -> Scorer:
        if isinstance(reward, LengthReward):
            return length(reward)
        if isinstance(reward, MajorityReward):
            from posttrain.rewards.majority import majority

            return majority(reward)
        if not isinstance(reward, MODELS):
            return by_rule(reward, RULES[reward.kind](reward))
        from posttrain.rewards.learned import learned
        from posttrain.rewards.outrank import outranks

        model = learned(reward, renderer, device)
        if failures := outranks(model, examples[:ASKED], renderer):
            listed = "\n  ".join(failures)
            raise UserError(f"reward {reward.name!r} did not prove itself, so no model may train on it:\n  {listed}")
        return model

    parts = [
        Part(reward.name, scorer(reward), reward.weight, reward.gate)
        for reward in rewards
        if not isinstance(reward, EnsembleReward)
    ]
    ensembles = [reward for reward in rewards if isinstance(reward, EnsembleReward)]
    return limited(among(combined(parts, ensembles)), max_unscored)


def by_rule(reward: Reward, rule: Rule) -> Scorer:
    """A scorer by the rule of `reward`, answer by answer, where the rule may run."""
    one = _one(reward, rule)

    def score(rollouts: Sequence[Rollout]) -> list[Score]:
        if rule.where == "here":
            return [one(rollout.example, rollout.text) for rollout in rollouts]
        with ThreadPoolExecutor(SIZE) as threads:
            return list(threads.map(lambda rollout: one(rollout.example, rollout.text), rollouts))

    return score


def lacking(rewards: Sequence[Reward]) -> Callable[[Example], str]:
    """Why answers to an example could not be scored by all of `rewards`; empty where they can.

    Raises:
        UserError: a reward cannot be made, or the model that it is is not there.
    """
    rules = []
    for reward in rewards:
        if isinstance(reward, MODELS):
            from posttrain.rewards.learned import check

            check(reward)
        elif reward.kind in RULES:
            rules.append(RULES[reward.kind](reward))
    return lambda example: next(filter(None, (rule.lacks(example) for rule in rules)), "")


def proven(rewards: Sequence[Reward], groups: Mapping[str, Sequence[Example]]) -> None:
    """Let every rule among `rewards` prove itself on the first examples of each group, which bear the group's name.

    Raises:
        UserError: one does not.
    """
    for reward in rewards:
        if reward.kind not in RULES:
            continue
        rule = RULES[reward.kind](reward)
        for name, examples in groups.items():
            if failures := prove(rule, examples[:PROOF], _one(reward, rule)):
                listed = "\n  ".join(failures[:5])
                raise UserError(
                    f"reward {reward.name!r} can be fooled on {name}, so no model may train on it:\n  {listed}"
                )


def _one(reward: Reward, rule: Rule) -> Callable[[Example, str], Score]:
    """The rule's score of one answer, had where the rule may run."""
    if rule.where == "worker":
        return partial(pool().ask, reward, seconds=rule.seconds)
    return partial(judged, rule)
