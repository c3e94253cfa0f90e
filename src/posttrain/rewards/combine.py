"""Several rewards for one answer: their weighted sum behind gates, and ensembles of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.recipe.rewards import EnsembleReward, How
from posttrain.records import Rollout, Score
from posttrain.rewards.protocol import Scorer, guarded, spent


@dataclass(frozen=True)
class Part:
    """One term of the sum."""

    name: str
    score: Scorer
    weight: float = 1.0
    gate: float | None = None
    """An answer that scores below it earns at most 0 altogether."""


def ensemble(values: Sequence[float], how: How, penalty: float = 1.0) -> float:
    """One value for the several that rewards give to the same answer (Coste et al., 2310.02743).

    Their mean; the lowest (worst-case optimisation); or the mean less `penalty` times their standard deviation (n, not
    n - 1, below the root), which is the uncertainty-weighted objective. Departure: the paper subtracts the variance,
    whose unit is not that of a reward.
    """
    if how == "worst":
        return min(values)
    mean = statistics.fmean(values)
    return mean if how == "mean" else mean - penalty * statistics.pstdev(values)


def combined(parts: Sequence[Part], ensembles: Sequence[EnsembleReward] = ()) -> Scorer:
    """sum_k weight_k value_k, at most 0 where a gate is not passed. Where there are several, `Score.parts` keeps each.

    Parts that an ensemble is made of count through it alone. One part without a value leaves the answer without one,
    unless nothing depends on it (weight 0, no gate). The first part that has one says how an answer was read and
    whether it is right; a gate that is not passed makes it wrong.
    """
    terms: list[Part | EnsembleReward] = [*parts, *ensembles]
    inside = {name for group in ensembles for name in group.of}

    def score(rollouts: Sequence[Rollout]) -> list[Score]:
        found = {part.name: guarded(part.score)(rollouts) for part in parts}
        return [_one({name: scores[i] for name, scores in found.items()}) for i in range(len(rollouts))]

    def _one(scores: dict[str, Score]) -> Score:
        first = next((got for got in scores.values() if got.value is not None), next(iter(scores.values())))
        values = {name: got.value for name, got in scores.items() if got.value is not None}
        for group in ensembles:
            if all(name in values for name in group.of):
                values[group.name] = ensemble([values[name] for name in group.of], group.how, group.penalty)
        total, shut, unscored = 0.0, False, False
        for term in terms:
            weight = 0.0 if term.name in inside else term.weight
            if term.name not in values:
                unscored = unscored or bool(weight) or term.gate is not None
                continue
            total += weight * values[term.name]
            shut = shut or (term.gate is not None and values[term.name] < term.gate)
        kept = values if len(scores) > 1 else {}
        said = {name: got for name, got in scores.items() if got.why and (got.value is None or not unscored)}
        told = "; ".join(f"{name}: {got.why}" for name, got in said.items()) if len(scores) > 1 else first.why
        cost = spent(list(scores.values()))
        if unscored:
            return Score(None, "error", first.extracted, told, kept, cost)
        if shut:
            return Score(min(total, 0.0), "wrong", first.extracted, told, kept, cost)
        return Score(total, first.outcome, first.extracted, told, kept, cost)

    return score
