"""A recipe file to a `Recipe`: reading, `--set`, and problems told in plain words."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from posttrain.recipe import tree
from posttrain.recipe.base import Block, Misfit
from posttrain.recipe.blocks import Data, Reference, Source
from posttrain.recipe.document import Document
from posttrain.recipe.rewards import Reward, Rewarded
from posttrain.recipe.schema import SCHEMA_VERSION, Evals, Recipe
from posttrain.recipe.stage import StageBase
from posttrain.records import UserError

MAX_BYTES = 1_000_000


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file. Paths in it stay as written: see `resolved`.

    Raises UserError with every problem as `file:line: key.path: what`.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as e:
        raise UserError(f"{path}: cannot read the recipe: {e.strerror}") from e
    if len(raw) > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES} bytes; is it a recipe?")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = raw[: e.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 (byte 0x{raw[e.start]:02x}); save the file as UTF-8") from e
    return parse(text, str(path), overrides)


def parse(text: str, name: str, overrides: Sequence[str] = ()) -> Recipe:
    """`text` as a recipe. `name` stands for the file in messages; `overrides` are `key.path=value`."""
    document = Document(lambda line: f"{name}:{line}")
    data = document.read(text)
    if data is None:
        raise UserError(f"{name}:1: the recipe is empty; it starts with `schema: {SCHEMA_VERSION}`")
    if not isinstance(data, dict):
        raise UserError(f"{name}:1: a recipe is a block of keys (`name: ...`), not {_shown(data)}")
    where = document.where
    for override in overrides:
        _apply(override, data, where)
    _check_version(data, where)
    try:
        # By way of JSON because its strict mode takes a list for a tuple, yet not `true` for 1 nor "20" for 20.
        return Recipe.model_validate_json(json.dumps(data), strict=True, by_alias=True, by_name=False)
    except ValidationError as e:
        raise UserError("\n".join(_problems(e, data, where))) from None


def resolved(recipe: Recipe, base: Path) -> Recipe:
    """The recipe with its file paths made absolute; relative ones are relative to the folder `base`."""

    def absolute(path: str) -> str:
        return str((base / os.path.expanduser(path)).resolve())

    def in_source(source: Source) -> Source:
        if source.source.startswith(("hub:", "reasoning_gym/")):
            return source
        return source.model_copy(update={"source": absolute(source.source)})

    def in_data(data: Data) -> Data:
        return data.model_copy(update={"sources": tuple(map(in_source, data.sources))})

    def in_rewards(block: Rewarded) -> tuple[Reward, ...]:
        made = []
        for reward in block.rewards:
            given = {name: getattr(reward, name, None) for name in ("source", "reference")}  # of those that are models
            paths = {name: absolute(value) for name, value in given.items() if value and _is_path(value, base)}
            made.append(reward.model_copy(update=paths))
        return tuple(made)

    def in_stage(stage: StageBase) -> StageBase:
        update: dict[str, Any] = {"data": in_data(stage.data)}
        for name, block in stage:
            if isinstance(block, Reference) and _is_path(block.source, base):
                update[name] = block.model_copy(update={"source": absolute(block.source)})
            elif isinstance(block, Rewarded):
                update[name] = block.model_copy(update={"rewards": in_rewards(block)})
        if isinstance(stage, Rewarded):
            update["rewards"] = in_rewards(stage)
        return stage.model_copy(update=update)

    def in_evals(evals: Evals) -> Evals:
        suites = tuple(s.model_copy(update={"source": in_source(s.source)}) for s in evals.suites)
        retention = evals.retention
        if retention and retention.prompts != "builtin":
            retention = retention.model_copy(update={"prompts": absolute(retention.prompts)})
        return evals.model_copy(update={"suites": suites, "retention": retention})

    model = recipe.model
    if _is_path(model.source, base):
        model = model.model_copy(update={"source": absolute(model.source)})
    if model.chat_template not in (None, "chatml"):
        model = model.model_copy(update={"chat_template": absolute(model.chat_template)})
    stages = tuple(map(in_stage, recipe.stages))
    return recipe.model_copy(update={"model": model, "stages": stages, "evals": in_evals(recipe.evals)})


def _is_path(source: str, base: Path) -> bool:
    """Whether a model source is a file or folder; `owner/name` is a hub id unless it exists beside the recipe."""
    if source.startswith("pip:"):
        return False
    return source.startswith((".", "/", "~")) or source.endswith(".gguf") or (base / source).exists()


# --set


def _apply(override: str, data: dict[str, Any], where: dict[tree.Path, str]) -> None:
    """Set one `key.path=value` in `data`. An entry of a list is named by its `id` or its index."""
    place = f"--set {override}"
    key, equals, text = override.partition("=")
    if not equals or not text.strip() or not all(key.split(".")):
        raise UserError(f"{place}: write KEY=VALUE, such as stages.sft.steps=20 (null for none, '\"\"' for empty text)")
    value = Document(lambda line: place).read(text)
    node: Any = data
    path: tree.Path = ()
    *parents, last = key.split(".")
    for name in parents:
        step = _step(node, name, path, place)
        path = (*path, step)
        if (node.get(step) if isinstance(node, dict) else node[step]) is None:
            node[step] = {}
            where[path] = place
        node = node[step]
    step = _step(node, last, path, place)
    path = (*path, step)
    node[step] = value
    for below in [p for p in where if p[: len(path)] == path]:
        del where[below]
    where[path] = place


def _step(node: Any, name: str, path: tree.Path, place: str) -> str | int:
    if isinstance(node, dict):
        return name
    if not isinstance(node, list):
        raise UserError(f"{place}: {tree.dotted(path)} is {_shown(node)}, not a block of keys")
    ids = [str(entry["id"]) if isinstance(entry, dict) and "id" in entry else str(i) for i, entry in enumerate(node)]
    indices = [str(i) for i in range(len(node))]
    for names in (ids, indices):
        if name in names:
            return names.index(name)
    there = ", ".join(ids) or "none"
    raise UserError(
        f"{place}: {tree.dotted(path)} has no entry {name!r}{tree.did_you_mean(name, ids)}; it has: {there}"
    )


# Problems


def _check_version(data: dict[str, Any], where: dict[tree.Path, str]) -> None:
    version = data.get("schema")
    if not isinstance(version, int) or isinstance(version, bool) or version == SCHEMA_VERSION:
        return  # absent or of a wrong type: validation says so, with everything else
    if version > SCHEMA_VERSION:
        what = f"is newer than this posttrain, which reads {SCHEMA_VERSION}; upgrade posttrain"
    else:
        what = f"cannot be read or migrated; this posttrain reads {SCHEMA_VERSION}"
    raise UserError(f"{_place(('schema',), where)}: schema: recipe format {version} {what}")


def _problems(error: ValidationError, data: dict[str, Any], where: dict[tree.Path, str]) -> list[str]:
    found: dict[tree.Path, str] = {}
    for item in error.errors(include_url=False):
        path = _path(item["loc"], item["type"], data)
        reason = item.get("ctx", {}).get("error")
        if isinstance(reason, Misfit):
            found |= {(*path, *below): what for below, what in reason.problems}
        elif (problem := _problem(item, path, data)) is not None:
            found.setdefault(*problem)  # each branch of a union reports; together they are one problem
    lines = [(_place(path, where), f"{tree.dotted(path)}: {what}") for path, what in found.items()]
    return [f"{place}: {what}" for place, what in sorted(lines, key=lambda line: _line(line[0]))]


def _place(path: tree.Path, where: dict[tree.Path, str]) -> str:
    return next(where[path[:n]] for n in range(len(path), -1, -1) if path[:n] in where)


def _line(place: str) -> int:
    line = place.rpartition(":")[2]
    return int(line) if line.isdecimal() else 0


def _path(loc: Sequence[str | int], kind: str, data: Any) -> tree.Path:
    """Pydantic's `loc` without the names it adds for the branches of a union."""
    path: list[str | int] = []
    node, tagged = data, False
    for n, step in enumerate(loc):
        absent = kind == "missing" and n == len(loc) - 1
        if isinstance(node, dict) and not tagged and node.get("kind") == step:
            tagged = True
        elif isinstance(step, int) or absent or (isinstance(node, dict) and step in node):
            path.append(step)
            node, tagged = (None if absent else node[step]), False
    return tuple(path)


def _problem(item: Any, path: tree.Path, data: Any) -> tuple[tree.Path, str] | None:
    """One of pydantic's errors in plain words, and the key it is about; None for an echo of another error."""
    field, _ = tree.at(data, path)
    kinds = list(tree.blocks(field.annotation)) if field else []
    match item["type"]:
        case "missing" if field and isinstance(path[-1], str):
            meaning = f" ({field.description})" if field.description else ""
            return path, f"missing; it takes {tree.takes(field)}{meaning}"
        case "union_tag_not_found":
            return (*path, "kind"), f"missing; it takes {tree.listed(kinds)}"
        case "union_tag_invalid":
            tag = item["ctx"]["tag"]
            what = f"unknown kind {tag!r}{tree.did_you_mean(tag, kinds)}; it takes {tree.listed(kinds)}"
            return (*path, "kind"), what
        case "extra_forbidden":
            return path, f"unknown key{_nearby(str(path[-1]), tree.at(data, path[:-1])[1])}"
        case "too_short" if len(item["input"]) >= item["ctx"]["min_length"]:
            return None  # entries that failed were not counted
        case "value_error":
            return path, str(item["ctx"]["error"])
    if field is None:
        return path, item["msg"]
    entry = isinstance(path[-1], int) and bool(kinds)
    while isinstance(path[-1], int) and not entry:
        path = path[:-1]
    value = tree.get(data, path)
    what = "a block of keys" if entry else tree.takes(field)
    return path, f"must be {what}, not {_shown(value)}{tree.did_you_mean(value, tree.words(field))}"


def _nearby(key: str, block: type[Block] | None) -> str:
    if block is None:
        return ""
    fields = tree.fields(block)
    for name, info in fields.items():  # a key one level too high
        if tree.is_block(info) and any(key in tree.fields(inner) for inner in tree.blocks(info.annotation).values()):
            return f" (did you mean `{name}.{key}`?)"
    return tree.did_you_mean(key, list(fields)) or f"; this block takes {tree.listed(fields)}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a block of keys"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
