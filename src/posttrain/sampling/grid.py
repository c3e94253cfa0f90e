"""Keys and values of the local engine, and its attention: prompts once, completions under them.

A prompt's keys and values stand once, however many completions look at them. Attention to the prompts and attention
to a completion's own tokens are two batched products, joined by the two masses that their softmaxes would divide by
(the merge of FlashAttention, 2205.14135, and of shared-prefix decoding, Hydragen, 2402.05099).

Letters beside the common ones: B completions being written, each one row of the batch; P prompts with a place; G rows
of the fullest place; Q tokens of a row in one step (more than one where tokens are drafted); L and N tokens that there
is room for in each place and in each row; Hkv key heads, each serving r of the H query heads, of d channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.forest.attention import Scoring, Tree
from posttrain.forest.tree import Forest

BLOCK = 32
"""Room is made for so many tokens at a time."""


class Prefill(Tree):
    """A forest of prompts whose keys and values are kept, by layer: two [Hkv, T, d]."""

    def __init__(self, forest: Forest) -> None:
        super().__init__(forest)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        self.kept[layer] = (key[0], value[0])
        return super().attend(layer, query, key, value, scoring)


class Cache:
    """Keys and values of sequences side by side, for every layer: two [sequences, Hkv, tokens, d].

    Sequences in use always stand first, so that a slice holds them all; how many there are, and how long each is, its
    users know. Attention reads all the tokens there is room for, under a mask: over a part of them, which is not
    contiguous, its products take twice as long.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.sequences = self.tokens = 0

    def fit(self, sequences: int, tokens: int) -> None:
        """Have room for so many when a layer is next used; give up tokens where twice as many are not needed."""
        tokens = -(-tokens // BLOCK) * BLOCK
        self.sequences = max(self.sequences, sequences)
        if not self.tokens / 2 < tokens <= self.tokens:
            self.tokens = tokens

    def room(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's keys and values, zero where none were written; `like` is [Hkv, _, d]."""
        shape = (self.sequences, like.shape[0], self.tokens, like.shape[2])
        kept = self.layers.get(layer)
        if kept is None or kept[0].shape != shape:
            made = (like.new_zeros(shape), like.new_zeros(shape))
            for new, old in zip(made, kept or (), strict=kept is not None):
                shared = min(self.tokens, old.shape[2])
                new[: old.shape[0], :, :shared] = old[:, :, :shared]
            kept = self.layers[layer] = made
        return kept

    def keep(self, order: Sequence[int]) -> None:
        """Sequence `order[i]` becomes sequence i, the others are forgotten. Only what moves is copied."""
        to = [i for i, source in enumerate(order) if i != source]
        source = [order[i] for i in to]
        if to:
            for pair in self.layers.values():
                for kept in pair:
                    kept[to] = kept[source]

    def enter(self, at: int, spans: Sequence[tuple[int, int]], computed: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """Put in sequence `at`: its tokens are the [start, stop) spans of what a prefill `computed`."""
        tokens = sum(stop - start for start, stop in spans)
        for layer, pair in computed.items():
            for kept, new in zip(self.room(layer, pair[0]), pair, strict=True):
                kept[at, :, :tokens] = torch.cat([new[:, start:stop] for start, stop in spans], 1)


def survivors(alive: Sequence[bool]) -> list[int]:
    """An order for `Cache.keep`: those alive, where each dead one in front is replaced by the last one alive."""
    order = list(range(len(alive)))
    i = 0
    while i < len(order):
        if alive[order[i]]:
            i += 1
        elif len(order) == i + 1:
            order.pop()
        else:
            order[i] = order.pop()
    return order


class Decode:
    """The next tokens of B completions, row after row: `counts[b]` of row b, each seeing those before it.

    Row b continues the prompt at place `places[b]`, `prompts[place]` tokens long, and holds `lengths[b]` tokens of
    its own already.
    """

    def __init__(
        self,
        prefix: Cache,
        suffix: Cache,
        prompts: Sequence[int],
        places: Sequence[int],
        lengths: Sequence[int],
        counts: Sequence[int],
        device: torch.device | None = None,
    ) -> None:
        self.prefix, self.suffix = prefix, suffix
        self.prompt_P = torch.tensor(prompts, device=device)
        self.place_B = torch.tensor(places, device=device)
        self.length_B = torch.tensor(lengths, device=device)
        self.P, self.B, self.Q = len(prompts), len(places), max(counts)
        suffix.fit(self.B, max(n + k for n, k in zip(lengths, counts, strict=True)))
        prefix.fit(self.P, max(prompts))
        self.L, self.N = prefix.tokens, suffix.tokens
        self.row_T = torch.arange(self.B, device=device).repeat_interleave(torch.tensor(counts, device=device))
        self.query_T = torch.tensor([q for k in counts for q in range(k)], device=device)
        self.at_T = self.length_B[self.row_T] + self.query_T
        self.position_T = (self.prompt_P[self.place_B] + self.length_B)[self.row_T] + self.query_T
        # The rows of each place side by side, as many as the fullest place has; where one has fewer, row 0 fills up.
        members: list[list[int]] = [[] for _ in prompts]
        ranks = []
        for row, place in enumerate(places):
            ranks.append(len(members[place]))
            members[place].append(row)
        self.G = max(map(len, members))
        self.rank_B = torch.tensor(ranks, device=device)
        self.row_PG = torch.tensor([rows + [0] * (self.G - len(rows)) for rows in members], device=device)
        self._masks: dict[tuple[int | None, int], tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """query [1, H, T, d]; key, value [1, Hkv, T, d]; returns [1, H, T, d]."""
        P, G, B, Q, (H, _, d), Hkv = self.P, self.G, self.B, self.Q, query.shape[1:], key.shape[1]
        keys, values = self.suffix.room(layer, key[0])
        keys[self.row_T, :, self.at_T] = key[0].transpose(0, 1)
        values[self.row_T, :, self.at_T] = value[0].transpose(0, 1)
        before_k, before_v = self.prefix.room(layer, key[0])
        far_mask, near_mask = self._mask(scoring.window, H // Hkv)

        q = (query[0] * scoring.scale).transpose(0, 1)  # [T, H, d]
        if Q > 1:
            padded = q.new_zeros(B, Q, H, d)
            padded[self.row_T, self.query_T] = q
            q = padded
        q = q.reshape(B, Q, Hkv, -1, d).transpose(1, 2).reshape(B, Hkv, -1, d)  # [B, Hkv, Q * r, d]
        near = _part(q, keys[:B], values[:B], near_mask, scoring.softcap)
        q = q[self.row_PG].transpose(1, 2).reshape(P, Hkv, -1, d)  # [P, Hkv, G * Q * r, d]
        far = _part(q, before_k[:P], before_v[:P], far_mask, scoring.softcap)
        far = Part(*(x.view(P, Hkv, G, -1, x.shape[-1])[self.place_B, :, self.rank_B] for x in far))
        out = _join(far, near, scoring.sinks)  # [B, Hkv, Q * r, d]
        out = out.view(B, Hkv, Q, -1, d).transpose(1, 2).reshape(B, Q, H, d)
        out = out[self.row_T, self.query_T] if Q > 1 else out[:, 0]
        return out.to(query.dtype).transpose(0, 1)[None]

    def _mask(self, window: int | None, r: int) -> tuple[Tensor, Tensor]:
        """What to add to the scores of the prompts and to those of the completions, -inf where a token must not
        look: [P, 1, 1 or G * Q * r, L] and [B, 1, Q * r, N].
        """
        if (window, r) not in self._masks:
            device = self.place_B.device
            key_L, key_N = torch.arange(self.L, device=device), torch.arange(self.N, device=device)
            at_BQ = self.length_B[:, None] + torch.arange(self.Q, device=device)
            far, near = (key_L >= self.prompt_P[:, None])[:, None], key_N > at_BQ[..., None]
            if window is not None:
                near |= at_BQ[..., None] - key_N >= window
                position_BQ = self.prompt_P[self.place_B][:, None] + at_BQ
                if int(position_BQ.max()) >= window:
                    gone = (position_BQ[..., None] - key_L >= window)[self.row_PG].flatten(1, 2)
                    far = (gone | far).repeat_interleave(r, 1)
            self._masks[window, r] = (_bias(far), _bias(near.repeat_interleave(r, 1)))
        return self._masks[window, r]


class Part(NamedTuple):
    """Attention to a part of the keys, with what it takes to join it to another part."""

    out: Tensor
    """[.., d]: the weighted sum of values, before its division by `mass`."""
    top: Tensor
    """[.., 1]: the largest score; `out` and `mass` are relative to its exponential."""
    mass: Tensor
    """[.., 1]: the sum of the exponentials."""


def _bias(hidden: Tensor) -> Tensor:
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))[:, None]


def _part(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, softcap: float | None) -> Part:
    """query [_, Hkv, queries, d]; keys and values [_, Hkv, K, d]; mask to be added to scores [_, Hkv, queries, K]."""
    scores = query @ keys.transpose(-1, -2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    scores = scores.add_(mask)
    # Where a window leaves no key in this part, the largest score is -inf, from which nothing can be subtracted.
    top = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    weights = scores.sub_(top).exp_()
    return Part(weights.to(values.dtype) @ values, top, weights.sum(-1, keepdim=True))


def _join(a: Part, b: Part, sinks: Tensor | None) -> Tensor:
    """[B, Hkv, Q * r, d]: attention to both parts under one softmax; sinks [H] take their share of it."""
    top = torch.maximum(a.top, b.top)
    if sinks is not None:
        heads, queries = top.shape[1:3]
        sink = sinks.to(top.dtype).view(heads, 1, -1).repeat(1, queries * heads // len(sinks), 1).view(heads, -1, 1)
        top = torch.maximum(top, sink)
    share_a, share_b = (a.top - top).exp_(), (b.top - top).exp_()
    mass = a.mass * share_a + b.mass * share_b
    if sinks is not None:
        mass += (sink - top).exp_()
    return (a.out * share_a + b.out * share_b) / mass
