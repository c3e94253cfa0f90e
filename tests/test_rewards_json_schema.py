"""JSON answers: the keywords, strict reading, and the proof. Values agree with the package jsonschema."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewarded import failures, outcome, question

from posttrain.recipe.rewards import JsonSchemaReward
from posttrain.records import UserError
from posttrain.rewards.json_schema import json_schema, problems

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 1}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
EXAMPLE = {"name": "Ada", "age": 36}


def reward(schema: Any = PERSON, example: Any = EXAMPLE) -> JsonSchemaReward:
    return JsonSchemaReward.model_validate({"kind": "json_schema", "schema": schema, "example": example})


@pytest.mark.parametrize(
    ("text", "value", "how"),
    [
        ('{"name": "Ada", "age": 36}', 1.0, "correct"),
        ('```json\n{"name": "Ada", "age": 36}\n```', 1.0, "correct"),
        ('<answer>{"name": "Ada", "age": 36.0}</answer>', 1.0, "correct"),
        ('{"name": "", "age": 36}', 0.0, "wrong"),
        ('{"name": "Ada", "age": -1}', 0.0, "wrong"),
        ('{"name": "Ada", "age": true}', 0.0, "wrong"),
        ('{"name": "Ada"}', 0.0, "wrong"),
        ('{"name": "Ada", "age": 36, "more": 1}', 0.0, "wrong"),
        ('{"name": "Ada", "age": 1, "age": 36}', 0.0, "unparsed"),
        ('{"name": "Ada", "age": NaN}', 0.0, "unparsed"),
        ('{"name": "Ada", "age": 1e999}', 0.0, "unparsed"),
        ('Here: {"name": "Ada", "age": 36}', 0.0, "unparsed"),
        ("[" * 100_000, 0.0, "unparsed"),
        ("[" * 9_000, 0.0, "unparsed"),
        ("", 0.0, "unparsed"),
    ],
)
def test_answers(text: str, value: float, how: str) -> None:
    assert outcome(json_schema(reward()), text) == (value, how)


SCHEMAS: list[Any] = [
    True,
    False,
    PERSON,
    {"enum": [1, "a", None, [1, {"b": 2}]]},
    {"const": {"a": [1.0]}},
    {"type": ["null", "boolean"]},
    {"type": "array", "items": {"type": "number", "exclusiveMaximum": 3}, "minItems": 1, "uniqueItems": True},
    {"anyOf": [{"type": "string", "pattern": "^a"}, {"maximum": 2}, {"maxItems": 1}]},
    {"properties": {"a": {"const": 1}}, "additionalProperties": {"type": "string", "maxLength": 2}},
]
scalars = st.none() | st.booleans() | st.integers(-2, 3) | st.sampled_from([1.0, 2.5, "", "a", "abc"])
values = st.recursive(
    scalars,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "name", "age"]), v, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(value=values)
def test_the_reference_implementation_agrees(value: Any) -> None:
    for schema in SCHEMAS:
        valid = jsonschema.Draft202012Validator(schema).is_valid(value)
        assert (not list(problems(value, schema))) == valid, (value, schema)


def test_problems_say_where() -> None:
    schema = {"properties": {"a": {"items": {"type": "string"}}}}
    assert list(problems({"a": ["x", 1]}, schema)) == ["$.a[1]: must be string"]


def test_the_proof() -> None:
    assert failures(json_schema(reward()), question()) == []
    assert "the example earned 0.0" in failures(json_schema(reward(example={"name": "Ada"})), question())[0]
    loose = failures(json_schema(reward(schema={"type": "object"})), question())
    assert any("an empty object earned 1.0" in failure for failure in loose)
    assert failures(json_schema(reward(schema={"type": "integer"}, example=12)), question()) == []


@pytest.mark.parametrize(
    ("schema", "what"),
    [
        ({"oneOf": []}, "schema: no keyword 'oneOf'"),
        ({"type": "text"}, "schema.type: no type 'text'"),
        ({"properties": {"a": {"items": {"format": "date"}}}}, "schema.properties.a.items: no keyword 'format'"),
        ({"anyOf": ["x"]}, r"schema.anyOf\[0\]: a schema is a block"),
        ({"type": 5}, "schema.type: no type 5"),
        ({"type": [["string"]]}, r"schema.type: no type \['string'\]"),
        ({"properties": ["name"]}, r'schema.properties: must be of type object, not \["name"\]'),
        ({"required": "name"}, 'schema.required: must be of type array, not "name"'),
        ({"enum": 5}, "schema.enum: must be of type array, not 5"),
        ({"anyOf": {"type": "string"}}, "schema.anyOf: must be of type array"),
        ({"minimum": "3"}, 'schema.minimum: must be of type number, not "3"'),
        ({"minItems": 1.5}, "schema.minItems: must be of type integer, not 1.5"),
        ({"properties": {"a": {"pattern": "("}}}, r"schema.properties.a.pattern: '\(' is no pattern: missing \)"),
        ({"pattern": "a{99999999999}"}, "is no pattern: the repetition number is too large"),
    ],
)
def test_what_cannot_be_checked_is_refused(schema: Any, what: str) -> None:
    with pytest.raises(UserError, match=what):
        json_schema(reward(schema=schema))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_number_without_end_is_no_integer(value: Any) -> None:
    """The arguments of a tool are read by Python's json, for which 1e999 and NaN are numbers."""
    assert list(problems(value, {"type": "integer", "enum": [1]})) == [
        "$: must be integer",
        "$: none of the values of enum",
    ]


def test_an_answer_nested_too_deep_to_be_compared_is_wrong_not_unscored() -> None:
    deep = json_schema(reward(schema={"enum": [[1]]}, example=[1]))
    assert outcome(deep, "[" * 900 + "]" * 900)[0] == 0.0


def test_equal_values_are_equal_whatever_their_order() -> None:
    schema = {"const": {"a": 1, "b": 2}}
    assert not list(problems(json.loads('{"b": 2.0, "a": 1}'), schema))
    assert list(problems({"a": True, "b": 2}, schema))
