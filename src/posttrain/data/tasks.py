"""Generators of verifiable tasks: reasoning_gym (2505.24760), made as Examples."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import io
import json
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from posttrain.records import Example, UserError

PREFIX = "reasoning_gym/"


def names() -> list[str]:
    """Every task there is, as a recipe writes it without the `reasoning_gym/`."""
    return sorted(_factory().DATASETS)


def dataset(name: str, config: Mapping[str, Any], **reserved: int) -> Any:
    """The generator of task `name`; UserError for an unknown name, an unknown key or a value it refuses."""
    factory = _factory()
    if name not in factory.DATASETS:
        near = did_you_mean(name, factory.DATASETS)
        raise UserError(f"{PREFIX}{name}: no such task{near} (`posttrain tasks` lists them)")
    keys = {f.name for f in dataclasses.fields(factory.DATASETS[name][1])} - {"seed", "size"}
    for key in config:
        if key in ("seed", "size"):
            raise UserError(f"{PREFIX}{name}: config.{key} is set by the source's own `seed` and `rows`; use these")
        if key not in keys:
            near = did_you_mean(key, keys)
            raise UserError(f"{PREFIX}{name}: config has no key {key!r}{near} (known: {', '.join(sorted(keys))})")
    try:
        return factory.create_dataset(name, **config, **reserved)
    except Exception as error:  # generators assert, raise ValueError, TypeError, ... on values they refuse
        raise UserError(f"{PREFIX}{name}: config {dict(config)} is refused: {error}") from None


def load(name: str, rows: int, seed: int, config: Mapping[str, Any]) -> list[Example]:
    """`rows` items of task `name`.

    reasoning_gym seeds item i with seed + i, so that its seeds 0 and 1 share all items but one. Here the
    seed is hashed first, and two seeds share nothing but what the task's own smallness repeats.
    """
    first = int.from_bytes(hashlib.sha256(f"{name}:{seed}".encode()).digest()[:8], "big") % 2**31
    items = dataset(name, config, seed=first, size=rows)
    examples = []
    for index in range(rows):
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # some generators print
                entry = json.loads(json.dumps(items[index]))
        except Exception as error:  # any task's generator may fail in its own way
            raise UserError(f"{PREFIX}{name}: cannot make item {index} with config {dict(config)}: {error}") from None
        answer = entry["answer"]
        examples.append(
            Example(
                id=f"{PREFIX}{name}?seed={seed}#{index}",
                prompt=({"role": "user", "content": entry["question"]},),
                completion=() if answer is None else ({"role": "assistant", "content": answer},),
                task=f"{PREFIX}{name}",
                answer=answer,
                meta={"entry": entry, "config": dict(config)},
            )
        )
    return examples


def did_you_mean(given: str, known: Any) -> str:
    near = difflib.get_close_matches(given, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _factory() -> ModuleType:
    try:
        import reasoning_gym.factory
    except ImportError:
        raise UserError("reasoning_gym is not installed: pip install posttrain[tasks]") from None
    return reasoning_gym.factory
