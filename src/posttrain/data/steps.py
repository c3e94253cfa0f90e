"""A solution in steps, and the token that ends each of them. Positions are found among the ids that are there, a
sampler's or a renderer's: nothing is tokenised again."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

from posttrain.data.chat import Rendered, Renderer
from posttrain.data.shapes import Malformed
from posttrain.records import Example

SEPARATOR = "\n"
"""What stands between two steps: a line each, with or without blank lines between them."""


def split_steps(text: str, separator: str = SEPARATOR) -> list[str]:
    """The steps as text, without the blank space around them; a piece that is all blank is no step."""
    return [step for piece in text.split(separator) if (step := piece.strip())]


def step_ends(
    ids: Sequence[int], decode: Callable[[Sequence[int]], str], separator: str = SEPARATOR
) -> tuple[int, ...]:
    """Index of the last token of each step: the one with which the separator after it is complete.

    The last step ends with the last token, the end of the turn where the answer has one. Two steps may end with one
    token, and a blank answer has none.
    """
    steps = len(split_steps(decode(ids), separator))

    def ended(tokens: int) -> int:
        """Steps among the first `tokens` tokens that a separator follows."""
        return sum(bool(piece.strip()) for piece in decode(ids[:tokens]).split(separator)[:-1])

    inner = [bisect_left(range(len(ids)), k, key=ended) - 1 for k in range(1, steps)]
    return (*inner, len(ids) - 1) if steps else ()


def solution(example: Example, renderer: Renderer, separator: str = SEPARATOR) -> tuple[Rendered]:
    """`example`'s steps as one answer, with a target at the last token of each labelled step.

    Raises:
        Malformed: no step is labelled, or the steps would not be told apart again where an answer is scored.
    """
    if len(example.step_labels) != len(example.completion) or all(label is None for label in example.step_labels):
        raise Malformed("it holds no solution in steps of which one is labelled (columns prompt, completions, labels)")
    steps = [str(turn["content"]).strip() for turn in example.completion]
    answer = {"role": "assistant", "content": separator.join(steps)}
    (rendered,) = renderer.render(dataclasses.replace(example, completion=(answer,), rejected=()))
    found = at_steps(example, rendered.prompt_ids, rendered.completion_ids, renderer.decode, separator)
    if found is None:
        whole = next((i for i, step in enumerate(steps) if len(split_steps(step, separator)) != 1), None)
        why = "two of them end in one token" if whole is None else f"completions[{whole}] holds the separator"
        raise Malformed(
            f"its {len(steps)} steps cannot be told apart: {why}; set another `separator` than {separator!r}"
        )
    return (found,)


def at_steps(
    example: Example,
    prompt_ids: tuple[int, ...],
    ids: tuple[int, ...],
    decode: Callable[[Sequence[int]], str],
    separator: str = SEPARATOR,
) -> Rendered | None:
    """The answer `ids` with a target at the last token of each step that `example` has a label for; None where the
    steps of the two are not the same in number, or two end with one token."""
    ends = step_ends(ids, decode, separator)
    if not len(set(ends)) == len(ends) == len(example.step_labels):
        return None
    labelled = {end for end, label in zip(ends, example.step_labels, strict=True) if label is not None}
    return Rendered(example, prompt_ids, ids, tuple(i in labelled for i in range(len(ids))))


def solution_row(example: Example) -> dict[str, Any]:
    """A solution in labelled steps as a row of the shape `step_labels`."""
    steps = [turn["content"] for turn in example.completion]
    return {"prompt": list(example.prompt), "completions": steps, "labels": list(example.step_labels)}
