"""What stands where in a model's answer."""

from __future__ import annotations

import math
import re

NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,3})?|[+-]?\.\d+")
MAX_ANSWER = 10_000
"""Characters; a longer text is no answer that is compared with another."""

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_FENCE = re.compile(r"^```[^\n`]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)


def extract(text: str) -> str:
    """The answer in `text`: what its only <answer>...</answer> holds, or else all of it, stripped."""
    found = _ANSWER.findall(text)
    return (found[0] if len(found) == 1 else text).strip()


def unfenced(text: str) -> str:
    """What the only ```-fenced block of `text` holds, or else all of it, stripped."""
    found = _FENCE.findall(text)
    return (found[0] if len(found) == 1 else text).strip()


def broken(pattern: str) -> str:
    """Why `pattern` is none of Python's re; empty where it is one."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:  # the last two of a{99999999999} and of deep brackets
        return str(error)
    return ""


def same(a: str, b: str) -> bool:
    """The same words, or numbers within 1 %: a rounded answer is no exploit."""
    if NUMBER.fullmatch(a.strip()) and NUMBER.fullmatch(b.strip()):
        return math.isclose(float(a.replace(",", "")), float(b.replace(",", "")), rel_tol=0.01)
    return a.split() == b.split()
