"""What a reward is: answers in, one Score for each out. A score that cannot be had is None, never 0."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from posttrain.records import Example, Failure, Ledger, Rollout, Score, UserError

Scorer = Callable[[Sequence[Rollout]], list[Score]]
"""Scores a whole batch, one Score for each rollout and in their order."""


@dataclass(frozen=True)
class Cases:
    """Answers to one example by which a rule is proven: what must earn 1, and what must not; by what they are."""

    right: Mapping[str, str] = field(default_factory=dict)
    wrong: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """A reward that goes by what an answer says, one answer at a time."""

    score: Callable[[Example, str], Score]
    cases: Callable[[Example], Cases]
    lacks: Callable[[Example], str] = lambda example: ""
    """Why no answer to this example could be scored; empty where one can."""
    where: Literal["worker", "threads", "here"] = "worker"
    """What may hang or crash runs in worker processes, which end with it; what waits for processes of its own, in
    threads; only what takes time linear in its text, here."""
    seconds: float = 10.0
    """Time limit of one answer in a worker."""
    form: bool = False
    """Whether it looks at the form of an answer alone, so that one text may be right for every example."""


def judged(rule: Rule, example: Example, text: str) -> Score:
    """The rule's score, finite or None with its cause."""
    try:
        return finite(rule.score(example, text))
    except UserError:
        raise
    except Exception as error:  # a rule may raise anything on what a model writes
        return broke(error)


def broke(error: Exception) -> Score:
    """Of an answer on which a reward raised: no value, and the cause."""
    return Score(None, "error", why=f"{type(error).__name__}: {error}")


def finite(score: Score) -> Score:
    """`score`, or an unscored one where its value is no finite number."""
    value = score.value
    if value is None:
        return replace(score, outcome="error", why=score.why or "the reward gave no value")
    if not isinstance(value, int | float) or not math.isfinite(value):
        return replace(score, value=None, outcome="error", why=f"the reward gave {value!r}")
    return score


def guarded(score: Scorer) -> Scorer:
    """`score`, where one that raises leaves its whole batch unscored, and NaN or infinity is no score.

    Raises:
        Failure: it gives more or fewer scores than there are rollouts.
    """

    def scored(rollouts: Sequence[Rollout]) -> list[Score]:
        try:
            scores = score(rollouts)
        except (UserError, Failure):
            raise
        except Exception as error:  # learned rewards and those of users may raise anything
            scores = [broke(error)] * len(rollouts)
        if len(scores) != len(rollouts):
            raise Failure(f"a reward gave {len(scores)} scores for {len(rollouts)} answers; it must give one for each")
        return [finite(found) for found in scores]

    return scored


def limited(score: Scorer, max_unscored: float) -> Scorer:
    """`score`, which stops the run where too much of a batch has no score (`check_scored`)."""

    def scored(rollouts: Sequence[Rollout]) -> list[Score]:
        scores = score(rollouts)
        check_scored(scores, max_unscored)
        return scores

    return scored


def check_scored(scores: Sequence[Score], max_unscored: float) -> None:
    """Refuse a batch of which more than the share `max_unscored` has no score, or all of it whatever the share.

    Raises:
        Failure: so it is; names the most frequent causes.
    """
    causes = Counter(found.why for found in scores if found.value is None)
    if not causes or (causes.total() < len(scores) and causes.total() <= max_unscored * len(scores)):
        return
    if causes.total() == len(scores):
        what = "so there is nothing to learn from; mend the reward, or have more answers scored at a time"
    else:
        what = f"more than max_unscored ({max_unscored:.0%}) allows; mend the reward, or raise max_unscored"
    listed = "\n  ".join(f"{n} x {why}" for why, n in causes.most_common(3))
    raise Failure(f"{causes.total()} of {len(scores)} answers could not be scored, {what}. Most often:\n  {listed}")


def charged(scores: Sequence[Score], cost: Ledger) -> list[Score]:
    """`scores`, which cost that together."""
    return [replace(found, cost=found.cost + cost) if i == 0 else found for i, found in enumerate(scores)]


def spent(scores: Sequence[Score]) -> Ledger:
    """What having them cost."""
    return sum((found.cost for found in scores), Ledger())


def as_reward(ledger: Ledger) -> Ledger:
    """What a sampler cost that was asked for a reward: its tokens are not the policy's."""
    tokens = ledger.prompt_tokens + ledger.generated_tokens
    return Ledger(reward_tokens=tokens, flops=ledger.flops, seconds=ledger.seconds)
