"""The format of tags, and the punishment of length."""

from __future__ import annotations

import pytest
from rewarded import failures, outcome, question, said

from posttrain.recipe.rewards import FormatReward, LengthReward
from posttrain.rewards.form import tagged
from posttrain.rewards.length import length, overlong

THINK = tagged(FormatReward(kind="format"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("\n<think>\na\n</think>\n\n<answer>b</answer>\n", 1.0),
        ("<think>a < b > c</think><answer>b</answer>", 1.0),
        ("So: <think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think> so <answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer>!", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think> </think><answer>b</answer>", 0.0),
        ("<think>a</think><answer></answer>", 0.0),
        ("<think>a<answer>b</answer></think>", 0.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0),
        ("<think>a</think><answer>b", 0.0),
        ("", 0.0),
    ],
)
def test_tags(text: str, value: float) -> None:
    assert outcome(THINK, text)[0] == value


@pytest.mark.parametrize("tags", [("think", "answer"), ("answer",), ("plan", "draft", "answer")])
def test_the_format_is_proven(tags: tuple[str, ...]) -> None:
    assert failures(tagged(FormatReward(kind="format", tags=tags)), question()) == []


def test_soft_punishment_of_overlong_answers() -> None:
    """DAPO's example: 20480 tokens of which the last 4096 are the buffer; halfway through it costs a half."""
    assert [overlong(n, 20480, 4096) for n in (0, 16384, 18432, 20480, 30000)] == [0.0, 0.0, -0.5, -1.0, -1.0]


def test_length_counts_tokens_and_an_answer_that_was_cut_off_is_overlong() -> None:
    score = length(LengthReward(kind="length", max_tokens=8, buffer=4))
    rollouts = [said("x", tokens=4), said("x", tokens=6), said("x", tokens=8), said("x", tokens=2, finish="length")]
    assert [s.value for s in score(rollouts)] == [0.0, -0.5, -1.0, -1.0]
    assert [s.outcome for s in score(rollouts)] == ["correct", "wrong", "wrong", "wrong"]
