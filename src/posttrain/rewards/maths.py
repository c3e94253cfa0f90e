"""Whether a mathematical answer equals the reference answer, by math-verify, which compares with SymPy."""

from __future__ import annotations

import logging
import re
from typing import Any

from posttrain.recipe.rewards import MathReward
from posttrain.records import Example, Score, UserError
from posttrain.rewards.match import no_reference
from posttrain.rewards.protocol import Cases, Rule
from posttrain.rewards.prove import reference_cases
from posttrain.rewards.text import NUMBER, extract

MAX_EXPRESSION = 500
"""Characters; a longer text is no answer to a question that has a short one."""
_WORD = re.compile(r"\b(?!(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt|min|max|gcd|lcm|mod|inf)\b)[A-Za-z]{3,}")
_COMMAND = re.compile(r"\\(?:text|mathrm|mathbf)\{[^{}]*\}|\\[A-Za-z]+")
_SEVERAL = re.compile(r"[,;=]|\b(?:or|and)\b|\\quad\b")
_UNIT = re.compile(r"\\(?:text|%|$).*|\s", re.DOTALL)
_NAMED = re.compile(r"[A-Za-z]\s*=\s*")
_WRAPPED = re.compile(r"\$\$?(.*?)\$\$?|\\\((.*?)\\\)|\\\[(.*?)\\\]", re.DOTALL)


def math(reward: MathReward) -> Rule:
    """math-verify (Kydlicek et al., github.com/huggingface/Math-Verify), given one expression, no prose (x = 5 is 5).

    Departures: it does not search a text for answers, for the more of them a text holds, the likelier one is right.
    The answer is what stands in the only <answer> tags, or in the only \\boxed{}, or else the whole text.

    Raises:
        UserError: math-verify is not installed.
    """
    try:
        import math_verify
    except ImportError:
        raise UserError("math-verify is not installed: pip install 'posttrain[tasks]'") from None
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it has no time limit

    def parsed(text: str) -> list[Any]:
        try:  # without its own time limits, which are signals: the worker has one
            found = math_verify.parse(f"${text}$", parsing_timeout=None)
        except Exception:  # its parsers raise errors of their own on what is no expression
            return []
        return [value for value in found if not isinstance(value, str)]  # what it could not read, it gives back

    def score(example: Example, text: str) -> Score:
        gold = expression(example.answer or "") or ""
        answer = expression(text)
        if not answer:
            return Score(0.0, "unparsed", None, "not one answer: empty, or several in \\boxed{}")
        if len(answer) > MAX_EXPRESSION or (prose(answer) and not prose(gold)):
            numbers = NUMBER.findall(answer)
            return Score(0.0, "unparsed", numbers[-1] if numbers else None, "prose, of which this is the last number")
        if several(answer) and not several(gold):
            return Score(0.0, "unparsed", None, "several answers")
        if answer == gold:
            return Score(1.0, "correct", answer)
        reference = parsed(gold)
        if not reference:
            return Score(None, "error", answer, f"math-verify cannot read the reference answer {gold!r}")
        if math_verify.verify(reference, parsed(answer), timeout_seconds=None):
            return Score(1.0, "correct", answer)
        return Score(0.0, "wrong", answer, f"not equal to {gold}")

    return Rule(score, cases, lacks=no_reference, seconds=reward.timeout_s)


def cases(example: Example) -> Cases:
    """Those of an answer that is compared, but for what is right in mathematics: to leave the unit out, or to name the
    members of a set twice."""
    gold = example.answer or ""
    found = reference_cases(example)
    wrong = {what: text for what, text in found.wrong.items() if _UNIT.sub("", text) != _UNIT.sub("", gold)}
    if "," in gold:
        wrong.pop("the answer twice", None)
    return Cases(found.right, wrong)


def expression(text: str) -> str | None:
    """The one answer in `text` without what it is wrapped in; None where there are several boxes or none closes."""
    answer = extract(text)
    if "\\boxed" in answer:
        boxes = boxed(answer)
        if len(set(boxes)) != 1:
            return None
        answer = boxes[0]
    answer = answer.strip().rstrip(".").strip()
    if whole := _WRAPPED.fullmatch(answer):
        answer = next(part for part in whole.groups() if part is not None).strip()
    answer = _NAMED.sub("", answer, count=1) if _NAMED.match(answer) else answer
    answer = re.sub(r"\\[,;:!]", "", answer.replace("{,}", ","))  # LaTeX's spaces
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer)


def boxed(text: str) -> list[str]:
    """What stands in each \\boxed{...} of `text`; one whose braces do not close is none."""
    found = []
    for match in re.finditer(r"\\boxed\s*\{", text):
        depth = 1
        for at in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if depth == 0:
                found.append(text[match.end() : at].strip())
                break
    return found


def prose(expression: str) -> bool:
    """Whether it holds a word that is no command of LaTeX."""
    return _WORD.search(_COMMAND.sub(" ", expression)) is not None


def several(expression: str) -> bool:
    return _SEVERAL.search(expression) is not None
