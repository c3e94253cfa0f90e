"""YAML that keeps its line numbers, refuses a key given twice and bounds what aliases expand to.

The scalars are those of YAML 1.2: `no` is text, 2e-4 a number, 2026-01-01 text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import yaml

from posttrain.recipe import tree
from posttrain.records import UserError

MAX_VALUES = 20_000
MAX_DEPTH = 50
"""Far above any recipe."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


_TAG = "tag:yaml.org,2002:"
for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(rf"^(?:{_pattern})$"), _first)

_SCALARS: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": int,
    "float": float,
    "str": str,
}


class Document:
    """Plain values from YAML text, and in `where` for each key path where it stands."""

    def __init__(self, place: Callable[[int], str]) -> None:
        """`place` words a line number: `recipe.yaml:12`."""
        self.place = place
        self.where: dict[tree.Path, str] = {}
        self._count = 0

    def read(self, text: str) -> Any:
        """The value; None for an empty text. UserError for what is not YAML, or not plain data."""
        try:
            node = _Loader(text).get_single_node()
            return None if node is None else self._value(node, ())
        except yaml.reader.ReaderError as e:
            line = text[: e.position].count("\n") + 1
            raise UserError(f"{self.place(line)}: character U+{ord(text[e.position]):04X} cannot stand here") from e
        except yaml.MarkedYAMLError as e:
            line = e.problem_mark.line + 1 if e.problem_mark else 1
            tab = "; indent with spaces, not tabs" if r"'\t'" in str(e.problem) else ""
            context = f" {e.context}" if e.context else ""
            raise UserError(f"{self.place(line)}: not valid YAML{context}: {e.problem}{tab}") from e
        except RecursionError:
            raise UserError(f"{self.place(1)}: nested too deeply, or an alias that contains itself") from None

    def _value(self, node: yaml.Node, path: tree.Path) -> Any:
        self._spend(node, path)
        self.where[path] = self.place(node.start_mark.line + 1)
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self._value(child, (*path, i)) for i, child in enumerate(node.value)]
        if not isinstance(node, yaml.ScalarNode) or kind not in _SCALARS:
            raise self._error(node, f"the tag {node.tag} has no place in a recipe")
        try:
            value = _SCALARS[kind](node.value)
            str(value).encode()  # half a surrogate pair, written as an escape, is no text
        except ValueError as e:
            raise self._error(node, f"{node.value[:40]!r} cannot be read as {kind}") from e
        if isinstance(value, float) and not math.isfinite(value):
            raise self._error(node, f"{node.value} is too large")
        return value

    def _mapping(self, node: yaml.MappingNode, path: tree.Path) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for key, value in node.value:
            if key.tag == _TAG + "merge":
                # The first of several wins, and the block's own keys over all, in the values and in `where`.
                for source in reversed(value.value if isinstance(value, yaml.SequenceNode) else [value]):
                    if not isinstance(source, yaml.MappingNode):
                        raise self._error(key, "<<: takes a block or a list of blocks")
                    self._spend(source, path)
                    merged.update(self._mapping(source, path))
        own: dict[str, Any] = {}
        for key, value in node.value:
            if key.tag == _TAG + "merge":
                continue
            if key.tag != _TAG + "str":
                raise self._error(key, f"a key must be text{f': put {key.value} in quotes' if key.value else ''}")
            at = (*path, key.value)
            if key.value in own:
                raise self._error(key, f"{tree.dotted(at)}: given twice, first at {self.where[at]}")
            own[key.value] = self._value(value, at)
            self.where[at] = self.place(key.start_mark.line + 1)
        return merged | own

    def _spend(self, node: yaml.Node, path: tree.Path) -> None:
        self._count += 1
        if self._count > MAX_VALUES or len(path) > MAX_DEPTH:
            raise self._error(node, f"more than {MAX_VALUES} values or {MAX_DEPTH} levels, aliases expanded")

    def _error(self, node: yaml.Node, what: str) -> UserError:
        return UserError(f"{self.place(node.start_mark.line + 1)}: {what}")
