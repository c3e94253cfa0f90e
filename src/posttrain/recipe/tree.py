"""The schema seen as a tree of keys: what stands where, what it takes, in plain words."""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from posttrain.recipe.base import Block
from posttrain.recipe.schema import Recipe

Path = tuple[str | int, ...]


def dotted(path: Sequence[str | int]) -> str:
    return ".".join(map(str, path))


def fields(block: type[Block]) -> dict[str, FieldInfo]:
    """The keys a block takes, as they are written in a recipe."""
    return {info.alias or name: info for name, info in block.model_fields.items()}


def blocks(annotation: Any) -> dict[str, type[Block]]:
    """The blocks a key may hold, by `kind`; by the empty string where there is only one."""
    if isinstance(annotation, type) and issubclass(annotation, Block):
        kind = annotation.model_fields.get("kind")
        return {get_args(kind.annotation)[0] if kind else "": annotation}
    return {tag: block for part in get_args(annotation) for tag, block in blocks(part).items()}


def is_block(field: FieldInfo) -> bool:
    """Whether the key holds one block, not a list of them."""
    return any(isinstance(part, type) and issubclass(part, Block) for part in _parts(field.annotation))


def at(data: Any, path: Path) -> tuple[FieldInfo | None, type[Block] | None]:
    """What the schema says of `path` in `data`: its field, and the block that stands there.

    Entries of a list share the list's field. (None, None) outside the schema: unknown keys, free-form blocks.
    """
    block: type[Block] | None = Recipe
    field: FieldInfo | None = None
    for depth, step in enumerate(path, start=1):
        if isinstance(step, str):
            field = fields(block).get(step) if block else None
        if field is None:
            return None, None
        choices, value = blocks(field.annotation), get(data, path[:depth])
        kind = value.get("kind") if isinstance(value, dict) else None
        block = choices.get("") or choices.get(kind if isinstance(kind, str) else "")
    return field, block


def get(data: Any, path: Path) -> Any:
    """What stands at `path`; None where nothing does."""
    for step in path:
        try:
            data = data[step]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def did_you_mean(word: object, options: Sequence[str]) -> str:
    """` (did you mean `x`?)`, or nothing where no option is near."""
    near = get_close_matches(str(word), options, n=1)
    return f" (did you mean `{near[0]}`?)" if near else ""


def listed(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def words(field: FieldInfo) -> list[str]:
    """The literal words a key takes."""
    return [w for part in _parts(field.annotation) if get_origin(part) is Literal for w in get_args(part)]


def takes(field: FieldInfo) -> str:
    """What a key may hold: `a number above 0 and at most 1, or null`."""
    parts = _parts(field.annotation)
    nullable = type(None) in parts
    text = " or ".join(_noun(part) for part in parts if part is not type(None))
    limits = [
        f"{words} {value}"
        for attribute, words in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
        for m in field.metadata
        if (value := getattr(m, attribute, None)) is not None
    ]
    least = "not empty" if str in parts else "at least {} entry"
    limits += [least.format(m.min_length) for m in field.metadata if getattr(m, "min_length", None)]
    limits += [f"pattern `{m.pattern}`" for m in field.metadata if getattr(m, "pattern", None)]
    return text + (f", {' and '.join(limits)}" if limits else "") + (", or null" if nullable else "")


def _parts(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


_NOUNS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Any: "anything"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


def _noun(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _noun(args[0])
    if origin is Literal:
        return " or ".join(f"`{a}`" for a in args)
    if origin is tuple:
        count = "" if args[-1] is Ellipsis else f"{len(args)} "
        inside = _noun(args[0]) if get_origin(args[0]) is Literal else _PLURALS.get(args[0], "blocks")
        return f"a list of {count}{inside}"
    return _NOUNS.get(annotation, "a block of keys")
