"""Verifiers: an answer is right or wrong by rule. Strict, apart from `unparsed`, and proven before use."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from posttrain.data import tasks
from posttrain.records import Example, Score, UserError


class Entry(NamedTuple):
    summary: str
    paper: str
    score: Callable[[Example, str], Score]


def score(example: Example, text: str) -> Score:
    """What `text` is worth as an answer to `example`: 1, 0, or no value where it could not be scored."""
    entry = VERIFIERS.get((example.task or "").split("/")[0])
    if entry is None:
        return Score(None, "error", why=f"no verifier for task {example.task!r}")
    return entry.score(example, text)


def extract(text: str) -> str:
    """The answer in `text`: what its only <answer>...</answer> holds, or else all of it, stripped."""
    found = _ANSWER.findall(text)
    return (found[0] if len(found) == 1 else text).strip()


def prove(task: str, examples: Sequence[Example]) -> list[str]:
    """Why the verifier of `task` must not be trained on; empty if it holds on `examples`.

    The gold answer must earn 1. Nothing, garbage, the question, part of the gold, the gold in prose or among
    other answers, and the answer that is right for most other items must earn 0.
    """
    if not examples:
        raise UserError(f"{task}: a verifier cannot be proven on no example")
    failures = []
    for example in examples:
        gold = example.answer
        if gold is None:
            failures.append(f"{example.id}: there is no reference answer")
            continue
        if (got := score(example, gold)).value != 1.0:
            failures.append(f"{example.id}: the reference answer earned {got.value} ({got.why or got.outcome})")
        for what, text in _exploits(example, gold).items():
            if (got := score(example, text)).value != 0.0:
                failures.append(f"{example.id}: {what} earned {got.value} ({got.why or got.outcome}): {text[:80]!r}")
    return failures + _constants(examples)


def _exploits(example: Example, gold: str) -> dict[str, str]:
    tried = {
        "nothing": "",
        "garbage": "qwxz vlk",
        "punctuation": "?!",
        "the question": "\n".join(str(m["content"]) for m in example.prompt),
        "the answer's beginning": gold[:3],
        "half of the answer": gold[: len(gold) // 2],
        "the answer in prose": f"I believe that the answer is {gold}.",
        "a list with the answer first": f"{gold} or qwxz",
        "a list with the answer last": f"5 or {gold}",
        "the answer twice": f"{gold}, {gold}",
    }
    return {what: text for what, text in tried.items() if not _same(text, gold)}


def _constants(examples: Sequence[Example]) -> list[str]:
    """Answers of one item that are right for too many others. Some tasks have several right answers each, so
    one hit by chance is no failure; with few distinct answers a constant says nothing of the verifier."""
    golds = Counter(e.answer for e in examples if e.answer is not None)
    if len(golds) <= FEW:
        return []
    failures = []
    for constant, _ in golds.most_common(3):
        others = [e for e in examples if e.answer is not None and not _same(constant, e.answer)]
        earned = sum(score(e, constant).value == 1.0 for e in others) / max(1, len(others))
        if earned > BY_CHANCE:
            failures.append(
                f"one constant is right for {earned:.0%} of the items it is no answer to: {constant[:80]!r}"
            )
    return failures


FEW = 4
BY_CHANCE = 0.2


def _same(a: str, b: str) -> bool:
    """The same words, or numbers within 1 %: a rounded answer is no exploit."""
    if _NUMBER.fullmatch(a.strip()) and _NUMBER.fullmatch(b.strip()):
        return math.isclose(float(a.replace(",", "")), float(b.replace(",", "")), rel_tol=0.01)
    return a.split() == b.split()


_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,3})?|[+-]?\.\d+")
_HUGE_EXPONENT = re.compile(r"[eE][+-]?\d{4,}")
MAX_ANSWER = 10_000
"""Characters; a longer text is no answer to any of these tasks."""

# Some scorers of reasoning_gym 0.1.25 hand the answer to eval() or to SymPy's parser, which is eval() too: what
# a model writes would be run. Their answers must match one of these first, or they are not scored at all.
_WORDS = re.compile(r"[\w\s,.'\"-]*")
_SUM = re.compile(r"(?!.*\*\s*\*)[\d\s+*/().-]{1,200}", re.DOTALL)
EVALUATED: dict[str, re.Pattern[str] | None] = {
    "binary_matrix": _WORDS, "n_queens": _WORDS, "spiral_matrix": _WORDS, "string_insertion": _WORDS,
    "countdown": _SUM, "puzzle24": _SUM,
    "intermediate_integration": None, "polynomial_multiplication": None, "simple_integration": None,
}  # fmt: skip


def reasoning_gym(example: Example, text: str) -> Score:
    """The task's own score, of which only exactly 1 counts: partial credit is given to prose around an answer.

    Departures from reasoning_gym (2505.24760): no partial credit; one answer, not the last of several; where
    the gold is a number the text must be a single number; answers that would be run as code are screened.
    """
    answer = extract(text)
    gold = example.answer
    if gold is None:
        return Score(None, "error", answer, "there is no reference answer")
    if not answer:
        return Score(0.0, "unparsed", None, "empty")
    if len(answer) > MAX_ANSWER or _HUGE_EXPONENT.search(answer):
        return Score(0.0, "unparsed", None, "no answer of a sensible size")
    if _NUMBER.fullmatch(gold) and not _NUMBER.fullmatch(answer):
        numbers = _NUMBER.findall(answer)
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


@functools.lru_cache(maxsize=64)
def _scorer(name: str, config: str) -> Any:
    return tasks.dataset(name, json.loads(config), seed=0, size=1)


VERIFIERS: dict[str, Entry] = {
    "reasoning_gym": Entry("The generator's own check, exact or nothing", "2505.24760", reasoning_gym),
}
