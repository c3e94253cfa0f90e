"""Whether an answer is JSON of a given shape: the keywords of JSON Schema (draft 2020-12) that answers need."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from posttrain.recipe.rewards import JsonSchemaReward
from posttrain.records import Example, Score, UserError
from posttrain.rewards.protocol import Cases, Rule
from posttrain.rewards.prove import nonsense
from posttrain.rewards.text import MAX_ANSWER, broken, extract, unfenced

TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "integer": lambda v: TYPES["number"](v) and v % 1 == 0,  # infinity is none
}
LIMITS: dict[str, tuple[str, str, Callable[[Any, Any], bool]]] = {
    "minimum": ("number", "number", lambda v, limit: v >= limit),
    "maximum": ("number", "number", lambda v, limit: v <= limit),
    "exclusiveMinimum": ("number", "number", lambda v, limit: v > limit),
    "exclusiveMaximum": ("number", "number", lambda v, limit: v < limit),
    "minLength": ("string", "integer", lambda v, limit: len(v) >= limit),
    "maxLength": ("string", "integer", lambda v, limit: len(v) <= limit),
    "pattern": ("string", "string", lambda v, pattern: re.search(pattern, v) is not None),
    "minItems": ("array", "integer", lambda v, limit: len(v) >= limit),
    "maxItems": ("array", "integer", lambda v, limit: len(v) <= limit),
    "uniqueItems": ("array", "boolean", lambda v, unique: not unique or len({_frozen(x) for x in v}) == len(v)),
    "required": ("object", "array", lambda v, names: all(name in v for name in names)),
}
"""Keywords that hold or not, each for values of one type, and the type of its own argument. Values of other types pass
them, as JSON Schema has it."""
ARGUMENT = {"properties": "object", "anyOf": "array", "enum": "array"} | {k: own for k, (_, own, _) in LIMITS.items()}
"""The type of a keyword's own argument, where it is one."""
BELOW = ("properties", "additionalProperties", "items", "anyOf", "type", "enum", "const")
SAID = ("$schema", "title", "description", "default", "examples")
"""Keywords that ask nothing."""


def json_schema(reward: JsonSchemaReward) -> Rule:
    """The whole answer, or its only fenced block, must be one JSON value that the schema allows.

    Departures from JSON: no object may name a key twice, and NaN and Infinity are refused.

    Raises:
        UserError: it is no schema, or has a keyword that is not in the tables above.
    """
    schema = reward.schema_
    if problem := next(unknown(schema, "schema"), ""):
        raise UserError(f"reward {reward.name!r}: {problem}")

    def score(example: Example, text: str) -> Score:
        answer = unfenced(extract(text))
        if not answer or len(answer) > MAX_ANSWER:
            return Score(0.0, "unparsed", None, "no answer of a sensible size")
        try:
            problem = next(problems(parse(answer), schema), "")
        except (ValueError, RecursionError) as error:
            return Score(0.0, "unparsed", None, f"not JSON: {error}")
        if problem:
            return Score(0.0, "wrong", answer, problem)
        return Score(1.0, "correct", answer)

    def cases(example: Example) -> Cases:
        good = json.dumps(reward.example)
        empty = {"an empty object": "{}", "an empty list": "[]", "an empty text": '""', "null": "null"}
        wrong = {"the example cut off": good[:-1], "the example in prose": f"Here it is: {good}", **empty}
        same = {what for what, text in empty.items() if text == good} | (
            {"the example cut off"} if TYPES["number"](reward.example) else set()
        )
        return Cases({"the example": good}, nonsense(example) | {k: v for k, v in wrong.items() if k not in same})

    return Rule(score, cases, form=True)


def parse(text: str) -> Any:
    """JSON, strictly. Raises ValueError or RecursionError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("an object names a key twice")
        return found

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    def number(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text} is too large")
        return value

    return json.loads(text, object_pairs_hook=once, parse_constant=refuse, parse_float=number)


def problems(value: Any, schema: Any, path: str = "$") -> Iterator[str]:
    """What `schema` does not allow in `value`, with where; nothing where it allows all of it."""
    if isinstance(schema, bool):
        if not schema:
            yield f"{path}: not allowed"
        return
    kinds = schema.get("type", list(TYPES))
    if not any(TYPES[kind](value) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        yield f"{path}: must be {kinds if isinstance(kinds, str) else ' or '.join(kinds)}"
    if "enum" in schema and _frozen(value) not in map(_frozen, schema["enum"]):
        yield f"{path}: none of the values of enum"
    if "const" in schema and _frozen(value) != _frozen(schema["const"]):
        yield f"{path}: not the value of const"
    for keyword, (kind, _, holds) in LIMITS.items():
        if keyword in schema and TYPES[kind](value) and not holds(value, schema[keyword]):
            yield f"{path}: {keyword} {schema[keyword]} does not hold"
    if isinstance(value, dict):
        named = schema.get("properties", {})
        for key, below in value.items():
            yield from problems(below, named.get(key, schema.get("additionalProperties", True)), f"{path}.{key}")
    if isinstance(value, list):
        for i, below in enumerate(value):
            yield from problems(below, schema.get("items", True), f"{path}[{i}]")
    if "anyOf" in schema and all(next(problems(value, option, path), "") for option in schema["anyOf"]):
        yield f"{path}: none of anyOf holds"


def unknown(schema: Any, path: str) -> Iterator[str]:
    """What in a schema cannot be checked here, or makes it none; to be asked for the next only where that is mended."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        yield f"{path}: a schema is a block of keywords, or true or false"
        return
    for keyword, argument in schema.items():
        if keyword not in (*LIMITS, *BELOW, *SAID):
            yield f"{path}: no keyword {keyword!r} (known: {', '.join((*BELOW, *LIMITS))})"
        if keyword in ARGUMENT and not TYPES[ARGUMENT[keyword]](argument):
            yield f"{path}.{keyword}: must be of type {ARGUMENT[keyword]}, not {json.dumps(argument)}"
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if not (isinstance(kind, str) and kind in TYPES):
            yield f"{path}.type: no type {kind!r} (known: {', '.join(TYPES)})"
    if why := broken(schema.get("pattern", "")):
        yield f"{path}.pattern: {schema['pattern']!r} is no pattern: {why}"
    for name, below in schema.get("properties", {}).items():
        yield from unknown(below, f"{path}.properties.{name}")
    for keyword in ("items", "additionalProperties"):
        if keyword in schema:
            yield from unknown(schema[keyword], f"{path}.{keyword}")
    for i, option in enumerate(schema.get("anyOf", [])):
        yield from unknown(option, f"{path}.anyOf[{i}]")


def _frozen(value: Any) -> str:
    """Equal for equal JSON values: 1 and 1.0 are, 1 and true are not."""
    if TYPES["integer"](value):
        value = int(value)
    elif isinstance(value, list):
        return f"[{','.join(map(_frozen, value))}]"
    elif isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(k)}:{_frozen(v)}" for k, v in sorted(value.items())) + "}"
    return json.dumps(value)
