"""The batch: segments of tokens, each with at most one parent, packed into one row without padding.

Rows (a context and a completion) go in, a `Forest` comes out. Contexts that begin alike are computed once: a
system prompt shared by the whole batch, a prompt shared by the completions of a group, or by the two sides of a
pair. Tokens that carry loss are never merged, so every row keeps its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
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
    masks: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """What was made of it on first use: attention masks by keys of their layout, copies by device."""

    def __len__(self) -> int:
        return len(self.ids_T)

    def to(self, device: torch.device) -> Forest:
        """The same forest with its tensors on `device`; kept, so that its masks are made once there."""
        if self.ids_T.device == device:
            return self
        if device not in self.masks:
            moved = {name: getattr(self, name).to(device) for name in ("ids_T", "target_T", "sequence_T")}
            self.masks[device] = replace(self, **moved, masks={})
        return self.masks[device]

    @property
    def segment_T(self) -> Tensor:
        """Index of the segment that a token stands in."""
        size_S = self._each(s.stop - s.start for s in self.segments)
        return self._each(range(len(size_S))).repeat_interleave(size_S, output_size=len(self))

    @property
    def position_T(self) -> Tensor:
        shift_S = self._each(s.position - s.start for s in self.segments)
        return torch.arange(len(self), device=self.ids_T.device) + shift_S[self.segment_T]

    @property
    def previous_T(self) -> Tensor:
        """Index of the token before each one on its path; -1 at the start of a root."""
        previous_T = torch.arange(-1, len(self) - 1, device=self.ids_T.device)
        before = (self.segments[s.parent].stop - 1 if s.parent >= 0 else -1 for s in self.segments)
        previous_T[self._each(s.start for s in self.segments)] = self._each(before)
        return previous_T

    @property
    def predicting_N(self) -> Tensor:
        """Index of the token before each of the N target tokens: its hidden state gives the target's logits."""
        return self.previous_T[self.target_T]

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

    def _each(self, numbers: Iterable[int]) -> Tensor:
        return torch.tensor(list(numbers), device=self.ids_T.device)


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
    ids_T, target_T = torch.tensor(ids, dtype=torch.long), torch.tensor(target, dtype=torch.bool)
    return Forest(ids_T, target_T, tuple(segments), sequence_T, spans)


def pack(rows: Sequence[Row]) -> Forest:
    """The forest of `rows`, contexts shared wherever they begin alike for at least `MIN_SHARED` tokens.

    The span of a row without completion is that of the segment its context ends in.
    """
    nodes: list[tuple[Sequence[int], Sequence[bool], int]] = []
    leaves = [-1] * len(rows)

    def add(tokens: Sequence[int], marks: Sequence[bool], parent: int) -> int:
        nodes.append((tokens, marks, parent))
        return len(nodes) - 1

    def branch(members: list[int], start: int, parent: int) -> None:
        """Rows sorted by context, whose contexts agree up to `start`, which is where segment `parent` ends."""
        for run in _runs(rows, members, start):
            first, last = rows[run[0]].context, rows[run[-1]].context
            shared = _agree(first, last, start)
            here = add(first[start:shared], [False] * (shared - start), parent) if shared > start else parent
            if first == last:
                for i in run:
                    leaves[i] = add(rows[i].completion, rows[i].target, here) if rows[i].completion else here
            else:
                branch(run, shared, here)

    branch(sorted(range(len(rows)), key=lambda i: rows[i].context), 0, -1)
    return grow(nodes, leaves)


def _runs(rows: Sequence[Row], members: list[int], start: int) -> list[list[int]]:
    """Sorted members, cut where neighbours differ and agree for fewer than `MIN_SHARED` tokens after `start`."""
    runs: list[list[int]] = []
    for i in members:
        before = rows[runs[-1][-1]].context if runs else None
        context = rows[i].context
        if before is not None and (before == context or _agree(before, context, start) - start >= MIN_SHARED):
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def _agree(a: Sequence[int], b: Sequence[int], start: int) -> int:
    stop = min(len(a), len(b))
    while start < stop and a[start] == b[start]:
        start += 1
    return start


def split(rows: Sequence[Row], units: Sequence[tuple[int, ...]], budget: int) -> list[list[int]]:
    """Indices of `units` in packs of at most about `budget` tokens, units with like contexts together.

    A unit is a tuple of row indices, of one context, that must share a forward pass (the two rows of a pair). A
    unit over the budget gets a pack of its own. Only speed and memory depend on the result.
    """
    order = sorted(range(len(units)), key=lambda u: rows[units[u][0]].context)
    packs: list[list[int]] = []
    used = 0
    context: tuple[int, ...] = ()
    for u in order:
        before, context = context, rows[units[u][0]].context
        whole = len(context) + sum(len(rows[i].completion) for i in units[u])
        shared = _agree(before, context, 0)
        added = whole - shared if shared >= MIN_SHARED else whole
        if packs and used + added <= budget:
            packs[-1].append(u)
            used += added
        else:
            packs.append([u])
            used = whole
    return packs


def share(rows: Sequence[Row], units: Sequence[tuple[int, ...]], workers: int) -> list[list[int]]:
    """Indices of `units` for each of `workers`, about as many tokens for each; a worker may get none.

    Units of one context stay together while that leaves every worker with work, for then their context is computed
    once. The largest goes first, always to the worker with the least so far. Only speed depends on the result.
    """
    if workers == 1:
        return [list(range(len(units)))]
    alike: dict[tuple[int, ...], list[int]] = {}
    for u, unit in enumerate(units):
        alike.setdefault(rows[unit[0]].context, []).append(u)
    together = list(alike.values()) if len(alike) >= workers else [[u] for u in range(len(units))]

    def size(members: list[int]) -> int:
        new = sum(len(rows[i].completion) for u in members for i in units[u])
        return len(rows[units[members[0]][0]].context) + new

    shares: list[list[int]] = [[] for _ in range(workers)]
    loads = [0] * workers
    for members in sorted(together, key=size, reverse=True):
        least = loads.index(min(loads))
        shares[least] += members
        loads[least] += size(members)
    return [sorted(share) for share in shares]
