"""The batch: segments of tokens, each with at most one parent, packed into one row without padding.

Rows (a context and a completion) go in, a `Forest` comes out. Contexts that begin alike are computed once: a
system prompt shared by the whole batch, a prompt shared by the completions of a group, or by the two sides of a
pair. Tokens that carry loss are never merged, so every row keeps its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

MIN_SHARED = 8
"""Shorter common beginnings are computed again: a segment costs one attention call a layer."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence: `context` is given, `completion` follows it; `target` marks completion tokens with loss."""

    context: tuple[int, ...]
    completion: tuple[int, ...]
    target: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.target) != len(self.completion):
            raise ValueError(f"{len(self.completion)} completion tokens but {len(self.target)} target marks")
        if not self.context:
            raise ValueError("a row needs at least one context token: nothing predicts a row's first token")

    def __len__(self) -> int:
        return len(self.context) + len(self.completion)


@dataclass(frozen=True, slots=True)
class Segment:
    start: int
    """Index of its first token in the packed row."""
    stop: int
    parent: int
    """Index of the parent segment, always smaller than its own; -1 for a root."""
    position: int
    """Position of its first token: the length of all its ancestors."""


@dataclass(frozen=True)
class Forest:
    """Tokens of many sequences, each once. T counts the packed tokens, S the segments, R the rows that went in."""

    ids_T: Tensor
    target_T: Tensor
    """Boolean: the tokens whose log-probability is wanted."""
    segments: tuple[Segment, ...]
    sequence_T: Tensor
    """Index of the row that a completion token belongs to; -1 for shared context."""
    spans: tuple[tuple[int, int], ...]
    """[start, stop) of each row's completion in the packed row."""
    masks: dict[Any, Tensor] = field(default_factory=dict, repr=False, compare=False)
    """Attention masks by (segment, window, dtype), made by the attention backend on first use."""

    def __len__(self) -> int:
        return len(self.ids_T)

    @property
    def position_T(self) -> Tensor:
        return torch.cat([torch.arange(s.position, s.position + s.stop - s.start) for s in self.segments])

    @property
    def previous_T(self) -> Tensor:
        """Index of the token before each one on its path; -1 at the start of a root."""
        previous = torch.arange(-1, len(self) - 1)
        for s in self.segments:
            previous[s.start] = self.segments[s.parent].stop - 1 if s.parent >= 0 else -1
        return previous

    def path(self, segment: int) -> list[int]:
        """Segment indices from the root down to `segment`."""
        indices = [segment]
        while (parent := self.segments[indices[-1]].parent) >= 0:
            indices.append(parent)
        return indices[::-1]

    def spread(self, values_R: Sequence[Sequence[float]] | Sequence[float]) -> Tensor:
        """[T] float32 with each row's value, or its values token by token, at its completion; 0 elsewhere."""
        spread_T = torch.zeros(len(self))
        for (start, stop), value in zip(self.spans, values_R, strict=True):
            spread_T[start:stop] = torch.as_tensor(value, dtype=torch.float32)
        return spread_T


def grow(nodes: Iterable[tuple[Sequence[int], Sequence[bool], int]], leaves: Sequence[int]) -> Forest:
    """A forest from its segments as (token ids, target marks, parent) in an order in which parents come first.

    `leaves` are the segments that count as rows, in the order of the rows.
    """
    ids: list[int] = []
    target: list[bool] = []
    segments: list[Segment] = []
    for tokens, marks, parent in nodes:
        if not tokens or len(tokens) != len(marks) or parent >= len(segments):
            raise ValueError("a segment needs tokens, one mark for each, and a parent that stands before it")
        above = segments[parent] if parent >= 0 else None
        position = above.position + above.stop - above.start if above else 0
        segments.append(Segment(len(ids), len(ids) + len(tokens), parent, position))
        ids += tokens
        target += marks
        if parent < 0 and marks[0]:
            raise ValueError("the first token of a root cannot be a target: nothing predicts it")
    spans = tuple((segments[leaf].start, segments[leaf].stop) for leaf in leaves)
    sequence_T = torch.full((len(ids),), -1)
    for row, (start, stop) in enumerate(spans):
        sequence_T[start:stop] = row
    return Forest(torch.tensor(ids), torch.tensor(target), tuple(segments), sequence_T, spans)


def pack(rows: Sequence[Row]) -> Forest:
    """The forest of `rows`, contexts shared wherever they begin alike for at least `MIN_SHARED` tokens."""
    nodes: list[tuple[Sequence[int], Sequence[bool], int]] = []
    leaves = [-1] * len(rows)

    def add(tokens: Sequence[int], marks: Sequence[bool], parent: int) -> int:
        nodes.append((tokens, marks, parent))
        return len(nodes) - 1

    def branch(members: list[int], start: int, parent: int) -> None:
        """Rows whose contexts agree up to `start`, which `parent` ends at. Members are sorted by context."""
        shared = _agree(rows[members[0]].context, rows[members[-1]].context, start)
        alone = rows[members[0]].context == rows[members[-1]].context
        if shared > start and (alone or shared - start >= MIN_SHARED):
            context = rows[members[0]].context[start:shared]
            parent, start = add(context, [False] * len(context), parent), shared
        if alone:
            for i in members:
                leaves[i] = add(rows[i].completion, rows[i].target, parent)
            return
        if shared - start > 0:  # too short to share: every context goes its own way from here
            groups = [list(g) for _, g in groupby(members, key=lambda i: rows[i].context)]
        else:
            groups = [list(g) for _, g in groupby(members, key=lambda i: rows[i].context[start : start + 1])]
            groups = [part for group in groups for part in _worth(group, start)]
        for group in groups:
            branch(group, start, parent)

    def _worth(group: list[int], start: int) -> list[list[int]]:
        """The group as it is if its contexts share enough from `start` on, else one part for each context."""
        if _agree(rows[group[0]].context, rows[group[-1]].context, start) - start >= MIN_SHARED:
            return [group]
        return [list(g) for _, g in groupby(group, key=lambda i: rows[i].context)]

    if rows:
        branch(sorted(range(len(rows)), key=lambda i: rows[i].context), 0, -1)
    return grow(nodes, leaves)


def _agree(a: Sequence[int], b: Sequence[int], start: int) -> int:
    stop = min(len(a), len(b))
    while start < stop and a[start] == b[start]:
        start += 1
    return start


def split(rows: Sequence[Row], units: Sequence[tuple[int, ...]], budget: int) -> list[list[int]]:
    """Indices of `units` in packs of at most about `budget` tokens, units with like contexts together.

    A unit is a tuple of row indices that must share a forward pass (the two rows of a pair). A unit over the
    budget gets a pack of its own. Only speed and memory depend on the result.
    """
    order = sorted(range(len(units)), key=lambda u: rows[units[u][0]].context)
    packs: list[list[int]] = []
    used = 0
    context: tuple[int, ...] = ()
    for u in order:
        size = sum(len(rows[i].completion) for i in units[u])
        new = len(rows[units[u][0]].context)
        shared = _agree(context, rows[units[u][0]].context, 0)
        size_here = size + new - (shared if shared >= MIN_SHARED or shared == new else 0)
        if packs and used + size_here <= budget:
            packs[-1].append(u)
            used += size_here
        else:
            packs.append([u])
            used = size + new
        context = rows[units[u][-1]].context
    return packs
