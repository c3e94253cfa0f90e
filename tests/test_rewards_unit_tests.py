"""Generated Python: what passes its tests earns 1, and nothing that only looks like passing does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from rewarded import failures, outcome, question

from posttrain.data.shapes import convert
from posttrain.data.sources import read
from posttrain.recipe.blocks import Source
from posttrain.recipe.rewards import PythonReward
from posttrain.rewards.protocol import judged
from posttrain.rewards.unit_tests import defines, python

RULE = python(PythonReward(kind="python", timeout_s=5.0))
PROMPT = 'def double(x: int) -> int:\n    """Twice x."""\n'
ROW = {
    "prompt": PROMPT,
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
}
DOUBLE = convert(ROW, "unit_tests", "row 1")


@pytest.mark.parametrize(
    "text",
    [
        "def double(x):\n    return x + x",
        "Like so:\n```python\ndef double(x):\n    return x + x\n```\nand it works.",
        "```python\nTWO = 2\n```\nthen\n```py\ndef double(x):\n    return TWO * x\n```",
        "double = lambda x: x * 2",
        "```python\n    return 2 * x\n```",
        "<answer>\ndef double(x):\n    print(x)\n    return x + x\n</answer>",
    ],
)
def test_right_code(text: str) -> None:
    assert outcome(RULE, text, DOUBLE) == (1.0, "correct")


@pytest.mark.parametrize(
    "text",
    [
        "def double(x):\n    return x * x",
        "def double(x):\n    return 4",
        "def double(x)\n    return x + x",
        "def double(x):\n    raise SystemExit(0)",
        "import os, sys\nos.write(1, b'passed')\nos._exit(0)",
        "print(open(0).read())\nraise SystemExit(0)",
        "import sys\nsys.exit = None\ndef double(x):\n    sys.exit()",
        "class A:\n    __eq__ = lambda s, o: True\ndef double(x):\n    return A()",
        "class A(int):\n    __eq__ = lambda s, o: True\ndef double(x):\n    return A()",
        "import builtins\nbuiltins.AssertionError = None\ndef double(x):\n    return 4",
        "import builtins\nbuiltins.exec = lambda *a: None\ndef double(x):\n    return 4",
        "import builtins\nclass A(list):\n    __eq__ = lambda s, o: True\nbuiltins.list = A\ndouble = lambda x: A()",
        "def double(x):\n    while True: pass",
        "def double(x):\n    return double(x)",
        "def double(x):\n    import os\n    os.fork()\n    return 2 * x",
        "I would write a function that doubles.",
        "",
    ],
)
def test_wrong_code(text: str) -> None:
    rule = python(PythonReward(kind="python", timeout_s=1.5))
    assert outcome(rule, text, DOUBLE)[0] == 0.0


def test_the_reason_is_told() -> None:
    assert judged(RULE, DOUBLE, "def double(x):\n    return missing").why.startswith("NameError: name 'missing'")
    assert (
        judged(python(PythonReward(kind="python", timeout_s=0.5)), DOUBLE, "while True: pass").why
        == "took longer than 0.5 s"
    )


def test_it_is_proven_and_tells_tests_that_prove_nothing() -> None:
    assert failures(RULE, DOUBLE) == []
    lax = dataclasses.replace(DOUBLE, meta={**DOUBLE.meta, "tests": "assert callable(double)"})
    assert any("a function that returns nothing earned 1.0" in failure for failure in failures(RULE, lax))
    empty = dataclasses.replace(DOUBLE, meta={"tests": "pass"})
    assert any("code that does nothing earned 1.0" in failure for failure in failures(RULE, empty))
    unknown = dataclasses.replace(DOUBLE, completion=())
    assert "there is no answer known to be right" in failures(RULE, unknown)[0]
    assert RULE.lacks(question()) == "it has no unit tests"
    assert RULE.lacks(DOUBLE) == ""


def test_definitions() -> None:
    assert defines("x = 1\nasync def f(a):\n", "f")
    assert defines("f = g", "f")
    assert not defines("def ff(a): pass\n    def f(): pass\nf(3) == 4", "f")


def test_rows_of_humaneval(shared_data: Path) -> None:
    examples = read(Source(source=str(shared_data / "humaneval/HumanEval.jsonl.gz"), rows=6)).examples
    for example in examples:
        assert outcome(RULE, str(example.completion[0]["content"]), example) == (1.0, "correct"), example.id
    assert failures(RULE, *examples[:2]) == []
