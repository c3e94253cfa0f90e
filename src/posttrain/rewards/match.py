"""Rewards on the letters of an answer: it is the reference answer, or it matches a pattern."""

from __future__ import annotations

import re

from posttrain.recipe.rewards import ExactReward, RegexReward
from posttrain.records import Example, Score, UserError
from posttrain.rewards.protocol import Cases, Rule
from posttrain.rewards.prove import nonsense, reference_cases
from posttrain.rewards.text import MAX_ANSWER, broken, extract


def exact(reward: ExactReward) -> Rule:
    """Exact match (Rajpurkar et al., 1606.05250). Departure: articles and punctuation count."""

    def words(text: str) -> list[str]:
        return (text.casefold() if reward.ignore_case else text).split()

    def score(example: Example, text: str) -> Score:
        answer = extract(text)
        if not answer:
            return Score(0.0, "unparsed", None, "empty")
        if words(answer) == words(example.answer or ""):
            return Score(1.0, "correct", answer)
        return Score(0.0, "wrong", answer[:MAX_ANSWER], "not the reference answer")

    return Rule(score, reference_cases, lacks=no_reference, where="here")


def regex(reward: RegexReward) -> Rule:
    """The whole answer must match, so that a pattern found in its midst is no match.

    Raises:
        UserError: the pattern is none.
    """
    if why := broken(reward.pattern):
        raise UserError(f"reward {reward.name!r}: pattern {reward.pattern!r}: {why}")
    pattern = re.compile(reward.pattern)

    def score(example: Example, text: str) -> Score:
        answer = extract(text)
        if not answer or len(answer) > MAX_ANSWER:
            return Score(0.0, "unparsed", None, "no answer of a sensible size")
        if pattern.fullmatch(answer):
            return Score(1.0, "correct", answer)
        return Score(0.0, "wrong", answer, "does not match the pattern")

    def cases(example: Example) -> Cases:
        return Cases({"the pattern's example": reward.example}, nonsense(example))

    return Rule(score, cases, seconds=reward.timeout_s, form=True)


def no_reference(example: Example) -> str:
    """`Rule.lacks` of a rule that compares with the reference answer."""
    return "" if example.answer and example.answer.strip() else "it has no reference answer"
