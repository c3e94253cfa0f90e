"""The answer that most of a group give, taken for the right one: a reward without labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal

from posttrain.credit.batch import groups
from posttrain.recipe.rewards import MajorityReward
from posttrain.records import Rollout, Score
from posttrain.rewards.maths import MAX_EXPRESSION, expression, prose, several
from posttrain.rewards.protocol import Scorer
from posttrain.rewards.text import MAX_ANSWER, NUMBER, extract


def majority(reward: MajorityReward) -> Scorer:
    """1 for an answer that is the one elected by its group, 0 for another (TTRL, Zuo et al., 2504.16084, eq. 3).

    Departures. An answer that cannot be read has no vote, and earns 0. Where nothing is elected the whole group is
    unscored, where TTRL takes whichever of the most frequent it met first. All completions of the group vote and are
    learned from, where TTRL draws more votes than it learns from.
    """
    read = READ[reward.by]

    def score(rollouts: Sequence[Rollout]) -> list[Score]:
        found: dict[int, Score] = {}
        for group in groups(rollouts):
            answers = [read(rollouts[i].text) for i in group]
            found |= zip(group, _scores(answers), strict=True)
        return [found[i] for i in range(len(rollouts))]

    return score


def _scores(answers: Sequence[str | None]) -> list[Score]:
    right = elected(answers)
    if right is None:
        why = f"no answer has most of the {len(answers)} votes of its group, and two at least"
        return [Score(None, "error", answer, why) for answer in answers]
    told = f"{answers.count(right)} of {len(answers)} say {right[:80]!r}"
    return [
        Score(0.0, "unparsed", None, told)
        if answer is None
        else Score(float(answer == right), "correct" if answer == right else "wrong", answer, told)
        for answer in answers
    ]


def elected(answers: Sequence[str | None]) -> str | None:
    """The answer with the most votes; None where another has as many, or nobody but one gave it."""
    votes = Counter(answer for answer in answers if answer is not None).most_common(2)
    if not votes or votes[0][1] < 2 or (len(votes) > 1 and votes[0][1] == votes[1][1]):
        return None
    return votes[0][0]


def _answer(text: str) -> str | None:
    """As the verifier reads it, equal ones in the same letters."""
    answer = " ".join(extract(text).split())
    if not answer or len(answer) > MAX_ANSWER:
        return None
    return str(Decimal(answer.replace(",", "")).normalize()) if NUMBER.fullmatch(answer) else answer


def _expression(text: str) -> str | None:
    """As `math` reads it; expressions that are equal but not written alike are two answers."""
    answer = expression(text)
    if not answer or len(answer) > MAX_EXPRESSION or prose(answer) or several(answer):
        return None
    return _answer(answer.replace(" ", ""))


READ: dict[str, Callable[[str], str | None]] = {"answer": _answer, "math": _expression}
"""How an answer is read out of a text; None where there is none."""
