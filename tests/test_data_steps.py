"""Steps of a solution: where each ends, by the ids alone."""

from __future__ import annotations

import random

import pytest
from tiny_runs import RENDERER, turn

from posttrain.data.shapes import Malformed, convert
from posttrain.data.steps import solution, split_steps, step_ends
from posttrain.records import Example

TOKENIZER = RENDERER.tokenizer


def pieces(text: str, separator: str = "\n", end: tuple[int, ...] = (2,)) -> list[str]:
    """The text from one step's end to the next."""
    ids = (*TOKENIZER.encode(text), *end)
    ends = step_ends(ids, RENDERER.decode, separator)
    starts = (0, *(e + 1 for e in ends[:-1]))[: len(ends)]
    return [RENDERER.decode(ids[a : b + 1]) for a, b in zip(starts, ends, strict=True)]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("one", ["one"]),
        ("one\ntwo", ["one\n", "two"]),
        ("one\n\ntwo\n three", ["one\n", "\ntwo\n", " three"]),
        ("\n\none\ntwo\n", ["\n\none\n", "two\n"]),
        ("", []),
        (" \n \n", []),
    ],
)
def test_a_step_ends_with_its_separator_and_the_last_with_the_answer(text: str, wanted: list[str]) -> None:
    assert pieces(text) == wanted
    assert split_steps(text) == [step.strip() for step in wanted]


def test_the_last_step_is_read_at_the_end_of_the_turn() -> None:
    ids = (*TOKENIZER.encode("one\ntwo\n"), 2)
    assert step_ends(ids, RENDERER.decode)[-1] == len(ids) - 1
    assert step_ends(ids[:-1], RENDERER.decode)[-1] == len(ids) - 2  # where it was cut off


def test_another_separator() -> None:
    assert pieces("a\nb\n\nc\n\n\n\nd", "\n\n") == ["a\nb\n\n", "c\n\n", "\n\nd"]
    assert pieces("x;y;z", ";") == ["x;", "y;", "z"]


def test_a_token_may_hold_the_end_of_a_step_and_the_beginning_of_the_next() -> None:
    """The first step ends with the second token, and two with the last but one."""
    words = {0: "a", 1: "\n.b", 2: "c", 3: "\n\nd\ne", 4: "f"}

    def decode(ids: list[int]) -> str:
        return "".join(words[i] for i in ids)

    assert step_ends([0, 1, 2, 3, 4], decode) == (1, 3, 3, 4)


def test_ends_are_found_whatever_the_text() -> None:
    rng = random.Random(0)
    for _ in range(50):
        text = "".join(
            rng.choice(["\n", "\n\n", " ", "ab", "é", "ß.", "12", "\u2028"]) for _ in range(rng.randint(1, 30))
        )
        ids = (*TOKENIZER.encode(text), 2)
        ends = step_ends(ids, RENDERER.decode)
        assert len(ends) == len(split_steps(text))
        assert list(ends) == sorted(set(ends))
        for step, end in zip(split_steps(text)[:-1], ends, strict=False):
            assert RENDERER.decode(ids[: end + 1]).rstrip("\n").rstrip().endswith(step)


# Labelled solutions


def labelled(steps: list[str], labels: list[object]) -> Example:
    return convert({"prompt": "Why?", "completions": steps, "labels": labels}, "step_labels", "f:1")


def test_labelled_steps_are_targets() -> None:
    (row,) = solution(labelled(["one is one", " two\n", "three"], [True, None, 0.25]), RENDERER)
    assert RENDERER.decode(row.completion_ids) == "one is one\ntwo\nthree"
    ends = step_ends(row.completion_ids, RENDERER.decode)
    assert [i for i, target in enumerate(row.completion_target) if target] == [ends[0], ends[2]]
    assert ends[2] == len(row.completion_ids) - 1
    assert row.example.step_labels == (True, None, 0.25)
    assert row.prompt_ids == RENDERER.prompt_ids(row.example)


@pytest.mark.parametrize(
    ("steps", "labels", "separator", "why"),
    [
        (["a", "b"], [None, None], "\n", "no solution in steps of which one is labelled"),
        (
            ["a", "b\nc"],
            [True, True],
            "\n",
            r"completions\[1\] holds the separator; set another `separator` than '\\n'",
        ),
        (["a and b", "c"], [True, True], " and ", r"completions\[0\] holds the separator"),
    ],
)
def test_steps_that_cannot_be_used(steps: list[str], labels: list[object], separator: str, why: str) -> None:
    with pytest.raises(Malformed, match=why):
        solution(labelled(steps, labels), RENDERER, separator)


def test_a_row_without_steps_says_what_is_missing() -> None:
    with pytest.raises(Malformed, match="columns prompt, completions, labels"):
        solution(Example("x", (turn("user", "q"),), (turn("assistant", "a"),)), RENDERER)


@pytest.mark.parametrize("label", ["much", 1.5, float("nan"), [1]])
def test_a_label_is_a_chance(label: object) -> None:
    with pytest.raises(Malformed, match=r"labels\[1\] must be true, false, null or a number from 0 to 1"):
        labelled(["a", "b"], [True, label])
