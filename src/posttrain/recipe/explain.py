"""What a key means: the schema's own descriptions, looked up."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from posttrain.recipe import tree
from posttrain.recipe.base import Block
from posttrain.recipe.schema import Recipe
from posttrain.records import UserError


@dataclass(frozen=True)
class Key:
    path: str
    """`stages.grpo.clip_low`: stages stand under their kind."""
    takes: str
    """Empty, as `default` is, for a kind of stage: `stages.grpo`."""
    default: str
    description: str
    keys: tuple[str, ...] = ()
    """Names of the keys below, where it is a block or a list of blocks."""


def explain(key: str) -> str:
    """What `key` takes, its default and its meaning, as text.

    Any ending that names one thing will do: `optim.lr`, `lr`. UserError for a key that is unknown or ambiguous.
    """
    found = lookup(key)
    first = found[0]
    lines = [", ".join(k.path for k in found), *(f"  {line}" for line in first.description.splitlines())]
    if first.takes:
        lines.append(f"  takes:    {first.takes}")
    defaults: dict[str, list[str]] = {}
    for k in found:
        defaults.setdefault(k.default, []).append(k.path)
    for n, (default, paths) in enumerate(defaults.items() if first.takes else ()):
        label = "default:" if n == 0 else ""
        lines.append(f"  {label:9} {default}" + (f" ({', '.join(paths)})" if len(defaults) > 1 else ""))
    if first.keys:
        lines.append("  keys:")
        width = max(map(len, first.keys))
        below = {k.path: k.description.partition("\n")[0] for k in keys()}
        lines += [f"    {name:{width}}  {below[f'{first.path}.{name}']}" for name in first.keys]
    return "\n".join(lines)


def lookup(key: str) -> list[Key]:
    """The keys that `key` names: more than one only where they are the same key of several kinds of stage."""
    ending = tuple(key.split("."))
    found = [k for k in keys() if k.path == key] or [k for k in keys() if _ends(k, ending)]
    if not found:
        names = [k.path for k in keys()] + sorted({k.path.rpartition(".")[2] for k in keys()})
        raise UserError(f"no key `{key}` in a recipe{tree.did_you_mean(key, names)}; `posttrain schema` has them all")
    if len({(k.takes, k.description) for k in found}) > 1:
        raise UserError(f"`{key}` may be {tree.listed(k.path for k in found)}; say which")
    return found


def _ends(key: Key, ending: tuple[str, ...]) -> bool:
    return tuple(key.path.split("."))[-len(ending) :] == ending


@cache
def keys() -> tuple[Key, ...]:
    """Every key of a recipe, in the schema's order."""
    return tuple(_below(Recipe, "", None))


def _below(block: type[Block], prefix: str, given: Block | None) -> list[Key]:
    """`given`: the instance that is the default here, whose values go before those of the class."""
    found: list[Key] = []
    for (alias, field), name in zip(tree.fields(block).items(), block.model_fields, strict=True):
        path = prefix + alias
        required = field.is_required()
        default = None if required else field.get_default(call_default_factory=True)
        if given is not None:
            default = getattr(given, name)
        inner = tree.blocks(field.annotation)
        names = tuple(tree.fields(inner[""])) if "" in inner else tuple(inner)
        shown = "none; it must be given" if required else _shown(default)
        about = [field.description or "", *(_doc(b) for b in inner.values() if "" in inner)]
        found.append(Key(path, tree.takes(field), shown, "\n".join(filter(None, about)), names))
        for kind, child in inner.items():
            if kind:
                found.append(Key(f"{path}.{kind}", "", "", _doc(child), tuple(tree.fields(child))))
            below = f"{path}.{kind}." if kind else f"{path}."
            found += _below(child, below, default if isinstance(default, child) else None)
    return found


def _doc(block: type[Block]) -> str:
    return " ".join((block.__doc__ or "").split())


def _shown(default: Any) -> str:
    if isinstance(default, Block):
        return "its keys' own"
    return json.dumps(default, default=lambda block: block.model_dump(exclude_unset=True, by_alias=True))


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe, for editors."""
    schema = Recipe.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "posttrain recipe"}
