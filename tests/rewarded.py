"""Answers to score, for the tests of rewards."""

from __future__ import annotations

from typing import Any

from posttrain.records import Example, Rollout, Score
from posttrain.rewards.protocol import Rule, judged
from posttrain.rewards.prove import prove


def question(text: str = "What is it?", answer: str | None = None, **fields: Any) -> Example:
    return Example("q", ({"role": "user", "content": text},), answer=answer, **fields)


def said(text: str, example: Example | None = None, tokens: int = 3, finish: Any = "stop", group: int = 0) -> Rollout:
    return Rollout(example or question(), group, (1,), (2,) * tokens, (-1.0,) * tokens, text, finish, "w")


def outcome(rule: Rule, text: str, example: Example | None = None) -> tuple[float | None, str]:
    score: Score = judged(rule, example or question(), text)
    return score.value, score.outcome


def failures(rule: Rule, *examples: Example) -> list[str]:
    return prove(rule, examples, lambda example, text: judged(rule, example, text))
