"""Every row shape, by the row it is known for, and what makes a row unusable."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.shapes import SHAPES, Malformed, convert, detect

U, A = "user", "assistant"


def m(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TALK = [m(U, "q"), m(A, "a")]
ROWS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("messages", {"messages": [m("system", "s"), *TALK, *TALK]},
     {"prompt": [m("system", "s"), m(U, "q")], "completion": [m(A, "a"), *TALK]}),
    ("messages", {"messages": [{"role": U, "content": [{"type": "text", "text": "q"}]}, m(A, "a")]},
     {"prompt": [m(U, "q")], "completion": [m(A, "a")]}),
    ("prompt_completion", {"prompt": "q", "completion": "a"}, {"prompt": [m(U, "q")], "completion": [m(A, "a")]}),
    ("prompt_completion", {"prompt": [m("system", "s"), m(U, "q")], "completion": [m(A, "a")]},
     {"prompt": [m("system", "s"), m(U, "q")], "completion": [m(A, "a")]}),
    ("alpaca", {"instruction": "Add", "input": "1 2", "output": "3", "system": "s", "history": [["q", "a"]]},
     {"prompt": [m("system", "s"), m(U, "q")], "completion": [m(A, "a"), m(U, "Add\n1 2"), m(A, "3")]}),
    ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
     {"prompt": [m("system", "s"), m(U, "q")], "completion": [m(A, "a")]}),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"},
     {"prompt": [m(U, "q")], "completion": [m(A, "a")], "rejected": [m(A, "b")]}),
    ("conversation_preference", {"chosen": [*TALK, m(U, "r"), m(A, "c")], "rejected": [*TALK, m(U, "r"), m(A, "d")]},
     {"prompt": [*TALK, m(U, "r")], "completion": [m(A, "c")], "rejected": [m(A, "d")]}),
    ("conversation_preference", {"prompt": [m(U, "q")], "chosen": [m(A, "a")], "rejected": [m(A, "b")]},
     {"prompt": [m(U, "q")], "completion": [m(A, "a")], "rejected": [m(A, "b")]}),
    ("conversation_preference", {"prompt": "q", "chosen": TALK, "rejected": [m(U, "q"), m(A, "b")]},
     {"prompt": [m(U, "q")], "completion": [m(A, "a")], "rejected": [m(A, "b")]}),
    ("sharegpt_preference", {"conversations": [{"from": "human", "value": "q"}],
                             "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
     {"prompt": [m(U, "q")], "completion": [m(A, "a")], "rejected": [m(A, "b")]}),
    ("alpaca_preference", {"instruction": "q", "input": "", "output": "a", "chosen": "a", "rejected": "b"},
     {"prompt": [m(U, "q")], "completion": [m(A, "a")], "rejected": [m(A, "b")]}),
    ("hh_dialogue", {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nb\n\nHuman: r\n\nAssistant: c",
                     "rejected": "\n\nHuman: q\n\nAssistant: a\n\nb\n\nHuman: r\n\nAssistant: d"},
     {"prompt": [m(U, "q"), m(A, "a\n\nb"), m(U, "r")], "completion": [m(A, "c")], "rejected": [m(A, "d")]}),
    ("unpaired", {"prompt": "q", "completion": "a", "label": "False"},
     {"prompt": [m(U, "q")], "completion": [m(A, "a")], "label": False}),
    ("unpaired", {"messages": [*TALK, m(U, "r"), m(A, "c")], "label": True},
     {"prompt": [*TALK, m(U, "r")], "completion": [m(A, "c")], "label": True}),
    ("step_labels", {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]},
     {"prompt": [m(U, "q")], "completion": [m(A, "a"), m(A, "b")], "step_labels": (True, False)}),
    ("question_answer", {"question": "q", "answer": "1 + 1 = 2\n#### 2"},
     {"prompt": [m(U, "q")], "completion": [m(A, "1 + 1 = 2\n#### 2")], "answer": "2"}),
    ("self_instruct", {"instruction": "q", "instances": [{"input": "", "output": "a"}], "is_classification": False},
     {"prompt": [m(U, "q")], "completion": [m(A, "a")]}),
    ("prompt", {"prompt": "q", "answer": 3, "system": "s"}, {"prompt": [m("system", "s"), m(U, "q")], "answer": "3"}),
    ("prompt", {"prompt": [m(U, "q")]}, {"prompt": [m(U, "q")], "answer": None}),
    ("unit_tests", {"prompt": "def f():\n", "test": "def check(f):\n    assert f() == 1\n", "entry_point": "f",
                    "canonical_solution": "    return 1\n"},
     {"prompt": [m(U, "def f():\n")], "completion": [m(A, "def f():\n    return 1\n")],
      "meta": {"tests": "def check(f):\n    assert f() == 1\n\ncheck(f)", "entry_point": "f", "prefix": "def f():\n"}}),
    ("unit_tests", {"prompt": "Define x.", "test": "assert x"},
     {"prompt": [m(U, "Define x.")], "meta": {"tests": "assert x"}}),
    ("instructions", {"prompt": "q", "instruction_id_list": ["en:punctuation:no_comma", "startend:quotation"],
                      "kwargs": [{}, {"unused": None}]},
     {"prompt": [m(U, "q")], "meta": {"instructions": [["punctuation:no_comma", {}], ["startend:quotation", {}]]}}),
    ("text", {"text": "words", "id": 3}, {"text": "words"}),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "row", "fields"), ROWS)
def test_a_row_is_detected_and_read(shape: str, row: dict[str, Any], fields: dict[str, Any]) -> None:
    found = detect([row, row])
    assert found is not None
    assert found.name == shape
    assert "2 of the first 2 rows" in found.reason
    example = convert(row, shape, "f:1")
    assert example.id == "f:1"
    for name in ("prompt", "completion", "rejected"):
        assert list(getattr(example, name)) == fields.pop(name, [])
    assert {name: getattr(example, name) for name in fields} == fields


def test_every_shape_has_a_row_here() -> None:
    assert {shape for shape, *_ in ROWS} == set(SHAPES)


def test_tool_calls_in_both_dialects_mean_the_same() -> None:
    tools = json.dumps([{"name": "add", "parameters": {}}])
    share = {"tools": tools, "conversations": [
        {"from": "human", "value": "sum?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"}, {"from": "gpt", "value": "two"}]}  # fmt: skip
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    openai = {"tools": json.loads(tools), "messages": [
        m(U, "sum?"), {"role": A, "content": None, "tool_calls": [call]}, m("tool", "2"), m(A, "two")]}  # fmt: skip
    ours = [convert(share, "sharegpt", "f:1"), convert(openai, "messages", "f:1")]
    assert ours[0] == ours[1]
    assert ours[0].completion[0]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert ours[0].tools[0]["function"]["name"] == "add"


@pytest.mark.parametrize(
    ("shape", "row", "why"),
    [
        ("messages", ["x"], "must be an object"),
        ("messages", {"text": "x"}, "not the shape messages"),
        ("messages", {"messages": "hello"}, "must be a list"),
        ("messages", {"messages": []}, "empty"),
        ("messages", {"messages": [m(U, "q")]}, "must end with an assistant turn"),
        ("messages", {"messages": [m("boss", "q"), m(A, "a")]}, "unknown role 'boss'"),
        ("messages", {"messages": [m(U, "q"), m(A, " ")]}, r"messages\[1\] \(assistant\) has no content"),
        ("messages", {"messages": [m(U, "q"), m(A, "a\0")]}, "NUL"),
        ("messages", {"messages": [m(U, "q"), m(A, "\ud800")]}, "UTF-8"),
        ("messages", {"messages": [{"role": U, "content": [{"type": "image_url"}]}, m(A, "a")]}, "image_url"),
        ("messages", {"messages": TALK, "images": ["1.jpg"]}, "images"),
        ("messages", {"messages": TALK, "tools": "[not json"}, "not valid JSON"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "add(1)"}]}, "not valid JSON"),
        ("prompt_completion", {"prompt": 3, "completion": "a"}, "prompt must be text, it is a number"),
        ("prompt_completion", {"prompt": "q", "completion": ""}, "completion is empty"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "a"}, "the same"),
        ("hh_dialogue", {"chosen": "\n\nHuman: q\n\nAssistant:", "rejected": "\n\nHuman: q\n\nAssistant: a"}, "empty"),
        ("hh_dialogue", {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: r\n\nAssistant: a"}, "part"),
        ("unpaired", {"prompt": "q", "completion": "a", "label": "maybe"}, "true or false"),
        ("step_labels", {"prompt": "q", "completions": ["a"], "labels": []}, "1 completions and 0 labels"),
        ("alpaca", {"instruction": "q", "output": "a", "history": [["q"]]}, r"history\[0\]"),
        ("self_instruct", {"instruction": "q", "instances": []}, "exactly one"),
    ],
)
def test_a_malformed_row_says_why(shape: str, row: Any, why: str) -> None:
    with pytest.raises(Malformed, match=why):
        convert(row, shape, "f:1")


def test_detection_goes_with_most_rows_and_gives_up_on_none() -> None:
    rows = [{"text": "x"}, *[{"prompt": "q", "completion": "a"}] * 3, "junk"]
    found = detect(rows)
    assert found is not None
    assert found == ("prompt_completion", "prompt, completion in 3 of the first 5 rows")
    assert detect([{"foo": 1}, 3]) is None


KEYS = """messages prompt completion chosen rejected conversations instruction input output history system tools label
labels completions question answer text instances test entry_point instruction_id_list kwargs role content from value
tool_calls"""
keys = st.sampled_from(KEYS.split())
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["user", "[1]"]),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(keys, v, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(row=st.dictionaries(keys, values, max_size=8))
def test_any_row_is_an_example_or_malformed(row: dict[str, Any]) -> None:
    for shape in SHAPES:
        try:
            example = convert(row, shape, "f:1")
        except Malformed:
            continue
        for side in (example.completion, example.rejected):
            assert not side or side[-1]["role"] == "assistant"
        assert example.text is not None or example.prompt
