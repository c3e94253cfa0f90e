"""Verifiers of generated tasks: strict, apart from `unparsed`, and proven before use."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
from collections.abc import Sequence
from typing import Any

from posttrain.data import tasks
from posttrain.recipe.rewards import VerifierReward
from posttrain.records import Example, Rollout, Score, UserError
from posttrain.rewards.protocol import Rule, judged
from posttrain.rewards.prove import reference_cases
from posttrain.rewards.text import MAX_ANSWER, NUMBER, extract

_HUGE_EXPONENT = re.compile(r"[eE][+-]?\d{4,}")

# Some scorers of reasoning_gym 0.1.25 hand the answer to eval() or to SymPy's parser, which is eval() too: what
# a model writes would be run. Their answers must match one of these first, or they are not scored at all.
_WORDS = re.compile(r"[\w\s,.'\"-]*")
_SUM = re.compile(r"(?!.*\*\s*\*)[\d\s+*/().-]{1,200}", re.DOTALL)
EVALUATED: dict[str, re.Pattern[str] | None] = {
    "binary_matrix": _WORDS, "n_queens": _WORDS, "spiral_matrix": _WORDS, "string_insertion": _WORDS,
    "countdown": _SUM, "puzzle24": _SUM,
    "intermediate_integration": None, "polynomial_multiplication": None, "simple_integration": None,
}  # fmt: skip


def verifier(reward: VerifierReward) -> Rule:
    """The check that belongs to the example's task."""
    return Rule(score, reference_cases, lacks=lambda example: "" if _known(example) else NONE, where="here")


NONE = "no verifier can score an answer to it (only generated tasks have one)"


def score(example: Example, text: str) -> Score:
    """What `text` is worth as an answer to `example`: 1, 0, or no value where it could not be scored.

    It is the task's own score, of which only exactly 1 counts: partial credit is given to prose around an answer.

    Departures from reasoning_gym (2505.24760): no partial credit; one answer, not the last of several; where
    the gold is a number the text must be a single number; answers that would be run as code are screened.
    """
    if not _known(example):
        return Score(None, "error", why=f"no verifier for task {example.task!r}")
    answer = extract(text)
    gold = example.answer
    if gold is None:
        return Score(None, "error", answer, "there is no reference answer")
    if not answer:
        return Score(0.0, "unparsed", None, "empty")
    if len(answer) > MAX_ANSWER or _HUGE_EXPONENT.search(answer):
        return Score(0.0, "unparsed", None, "no answer of a sensible size")
    if NUMBER.fullmatch(gold) and not NUMBER.fullmatch(answer):
        numbers = NUMBER.findall(answer)
        return Score(0.0, "unparsed", numbers[-1] if numbers else None, "prose, of which this is the last number")
    name = str(example.task).removeprefix(tasks.PREFIX)
    if name in EVALUATED:
        allowed = EVALUATED[name]
        if allowed is None:
            return Score(None, "error", answer, "the task's scorer would run the answer as code")
        if not allowed.fullmatch(answer):
            return Score(0.0, "unparsed", None, "holds signs that no answer needs and that would be run as code")
    try:
        scorer = _scorer(name, json.dumps(example.meta.get("config", {}), sort_keys=True))
        with contextlib.redirect_stdout(io.StringIO()):  # some scorers print
            own = scorer.score_answer(answer, example.meta["entry"])
    except UserError:
        raise
    except Exception as error:  # a scorer may raise anything on what a model writes
        return Score(None, "error", answer, f"the task's scorer failed: {type(error).__name__}: {error}")
    if own == 1.0:
        return Score(1.0, "correct", answer)
    return Score(0.0, "wrong", answer, f"the task's own score is {own}")


def _known(example: Example) -> bool:
    return (example.task or "").startswith(tasks.PREFIX)


@functools.lru_cache(maxsize=64)
def _scorer(name: str, config: str) -> Any:
    return tasks.dataset(name, json.loads(config), seed=0, size=1)


RULE = verifier(VerifierReward(kind="verifier"))


def verify(rollouts: Sequence[Rollout]) -> list[Score]:
    """The scorer of suites and of tasks: what each answer is worth by the check of its own task."""
    return [judged(RULE, rollout.example, rollout.text) for rollout in rollouts]
