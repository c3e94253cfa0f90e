"""Mathematical answers: one expression, equal to the reference answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from rewarded import failures, outcome, question

from posttrain.recipe.blocks import Source
from posttrain.recipe.rewards import MathReward
from posttrain.rewards.maths import boxed, expression, math

MATH = MathReward(kind="math")
RULE = math(MATH)


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        (
            "72",
            ["72", "$72$", "72.", r"\boxed{72}", "So <answer>72</answer>", r"Hence \boxed{72}.", "x = 72", "72.0"],
            ["27"],
        ),
        ("1/2", [r"\frac{1}{2}", "0.5", r"\boxed{\dfrac12}", "2/4"], ["1", "2", "0.51"]),
        ("1,234", ["1234", "1,234", r"1{,}234"], ["1", "234", "1,2,3,4"]),
        (r"2\sqrt{3}", [r"\sqrt{12}", r"2 \sqrt 3"], ["3.4", r"\sqrt{3}"]),
        ("(1, 2)", ["(1,2)", r"\left(1, 2\right)"], ["(2, 1)", "1"]),
        ("x^2 + 2x + 1", ["(x+1)^2", "1 + 2x + x^2"], ["x^2 + 1"]),
        (r"\frac{\pi}{4}", [r"\pi/4"], ["0.8"]),
    ],
)
def test_equal_answers(gold: str, right: list[str], wrong: list[str]) -> None:
    example = question(answer=gold)
    assert [(text, outcome(RULE, text, example)[0]) for text in right] == [(text, 1.0) for text in right]
    assert [(text, outcome(RULE, text, example)[0]) for text in wrong] == [(text, 0.0) for text in wrong]


@pytest.mark.parametrize(
    "text",
    [
        "5 or 72",
        "72, 72",
        "5; 72",
        r"5 \text{ or } 72",
        "The answer is 72",
        r"\boxed{5} or \boxed{72}",
        r"\boxed{72",
        "5 = 72",
        "",
        "?!",
        "7" * 600,
        r"\frac{72}{",
    ],
)
def test_more_or_less_than_one_expression_is_no_answer(text: str) -> None:
    assert outcome(RULE, text, question(answer="72"))[0] == 0.0


def test_what_is_read() -> None:
    assert boxed(r"\boxed{\frac{1}{2}} and \boxed {3} and \boxed{4") == [r"\frac{1}{2}", "3"]
    assert expression(r"So \boxed{7} and again \boxed{7}") == "7"
    assert expression(r"\(1\,000\)") == "1000"
    assert expression("$y = 3$") == "3"


def test_a_reference_that_cannot_be_read_gives_no_score() -> None:
    assert outcome(RULE, "7", question(answer="?!")) == (None, "error")
    assert RULE.lacks(question(answer=None)) == "it has no reference answer"


@pytest.mark.parametrize("gold", [r"575\text{ students}", r"44\%", "4, 6, 15", r"\frac{68}{3}\text{ kg}", "(-1, 3]"])
def test_units_and_sets_are_proven(gold: str) -> None:
    assert failures(RULE, question(answer=gold)) == []


def test_it_is_proven_on_real_answers(shared_data: Path) -> None:
    from posttrain.data.sources import read

    examples = read(Source(source=str(shared_data / "gsm8k/test.jsonl.gz"), rows=40)).examples
    assert failures(RULE, *examples) == []
