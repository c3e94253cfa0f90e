"""The key/value grid of the local engine: P prompts side by side, up to G completions under each.

A prompt's keys and values stand once, however many completions look at them. Attention runs over the whole grid in
two batched products, prefix and suffix, under one softmax; the linear layers see only the rows still being written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.forest.attention import Scoring, Tree, soften
from posttrain.forest.tree import Forest

BLOCK = 32
"""Suffix slots are added so many tokens at a time."""


class Prefill(Tree):
    """A forest of prompts whose keys and values are kept for the grid."""

    def __init__(self, forest: Forest) -> None:
        super().__init__(forest)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        self.kept[layer] = (key[0], value[0])
        return super().attend(layer, query, key, value, scoring)


class Grid:
    """Keys and values of P prompts and of P x G completions, for every layer.

    `prompt_P` and `length_PG` count the tokens that stand in each place; a place may be used again once its
    prompt is done.
    """

    def __init__(self, prompts: int, completions: int) -> None:
        self.P, self.G = prompts, completions
        self.prompt_P = torch.zeros(prompts, dtype=torch.long)
        self.length_PG = torch.zeros(prompts, completions, dtype=torch.long)
        self.prefix: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> two [P, Hkv, prompt, d]
        self.suffix: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> two [P, G, Hkv, completion, d]

    def enter(self, places: list[int], paths: list[Tensor], prefill: Prefill) -> None:
        """Put prompts in `places`; `paths` are each prompt's tokens as indices into the prefill's row."""
        for place, path in zip(places, paths, strict=True):
            self.prompt_P[place] = len(path)
            self.length_PG[place] = 0
        longest = int(self.prompt_P.max())
        for layer, (key, value) in prefill.kept.items():
            heads, width = key.shape[0], key.shape[-1]
            if layer not in self.prefix:
                empty = key.new_zeros(self.P, heads, 0, width)
                self.prefix[layer] = (empty, empty)
                none = key.new_zeros(self.P, self.G, heads, 0, width)
                self.suffix[layer] = (none, none)
            kept = tuple(_grown(x, 2, longest) for x in self.prefix[layer])
            for place, path in zip(places, paths, strict=True):
                kept[0][place, :, : len(path)] = key[:, path]
                kept[1][place, :, : len(path)] = value[:, path]
            self.prefix[layer] = (kept[0], kept[1])


class Decode:
    """One token for each live completion: row b of the batch stands at prompt `p_B[b]`, completion `g_B[b]`."""

    def __init__(self, grid: Grid, p_B: Tensor, g_B: Tensor) -> None:
        self.grid, self.p_B, self.g_B = grid, p_B, g_B
        self.at_B = grid.length_PG[p_B, g_B]
        grid.length_PG[p_B, g_B] += 1
        self.position_B = grid.prompt_P[p_B] + self.at_B
        self._hidden: dict[int | None, Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """query [1, H, B, d]; key, value [1, Hkv, B, d]."""
        scale, window, softcap, sinks = scoring
        grid, p_B, g_B = self.grid, self.p_B, self.g_B
        P, G, (_, H, _, d), Hkv = grid.P, grid.G, query.shape, key.shape[1]
        r = H // Hkv
        longest = int(grid.length_PG.max())
        keys, values = grid.suffix[layer]
        if keys.shape[3] < longest:
            size = -(-longest // BLOCK) * BLOCK
            keys, values = _grown(keys, 3, size), _grown(values, 3, size)
            grid.suffix[layer] = (keys, values)
        keys[p_B, g_B, :, self.at_B] = key[0].transpose(0, 1)
        values[p_B, g_B, :, self.at_B] = value[0].transpose(0, 1)
        keys, values = keys[:, :, :, :longest], values[:, :, :, :longest]

        q = query.new_zeros(P, G, Hkv, r, d)
        q[p_B, g_B] = query[0].transpose(0, 1).reshape(-1, Hkv, r, d)
        before_k, before_v = grid.prefix[layer]
        L = before_k.shape[2]
        q_prefix = q.transpose(1, 2).reshape(P, Hkv, G * r, d)
        far = (q_prefix @ before_k.transpose(-1, -2)).view(P, Hkv, G, r, L).transpose(1, 2)
        near = q @ keys.transpose(-1, -2)
        scores = torch.cat([far, near], -1) * scale  # [P, G, Hkv, r, L + longest]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(self._mask(window, L, longest)[:, :, None, None], float("-inf"))
        # [P * G, H, 1, keys] is the shape that sinks (one a head) are written for.
        weights = soften(scores.reshape(P * G, H, 1, -1), sinks).view_as(scores)
        far, near = weights[..., :L], weights[..., L:]
        out = (far.transpose(1, 2).reshape(P, Hkv, G * r, L) @ before_v).view(P, Hkv, G, r, d).transpose(1, 2)
        out = out + near @ values
        return out[p_B, g_B].reshape(-1, H, d).transpose(0, 1)[None]

    def _mask(self, window: int | None, prefix: int, suffix: int) -> Tensor:
        """[P, G, prefix + suffix], true at what a completion's newest token must not see."""
        if window not in self._hidden:
            grid = self.grid
            newest_PG = grid.prompt_P[:, None] + grid.length_PG - 1
            far_PL = torch.arange(prefix).expand(grid.P, -1)
            near_PL = grid.prompt_P[:, None] + torch.arange(suffix)
            position_PGL = torch.cat([far_PL, near_PL], 1)[:, None].expand(-1, grid.G, -1)
            gone_PGL = torch.cat(
                [
                    (far_PL >= grid.prompt_P[:, None])[:, None].expand(-1, grid.G, -1),
                    torch.arange(suffix) >= grid.length_PG[..., None],
                ],
                2,
            )
            if window is not None:
                gone_PGL = gone_PGL | (newest_PG[..., None] - position_PGL >= window)
            # A place nobody is in would be a softmax over nothing: let it see something, it is thrown away.
            gone_PGL[..., 0] &= ~gone_PGL.all(-1)
            self._hidden[window] = gone_PGL
        return self._hidden[window]


def _grown(x: Tensor, dim: int, size: int) -> Tensor:
    """`x` with at least `size` entries along `dim`, the new ones zero."""
    if x.shape[dim] >= size:
        return x
    shape = list(x.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([x, x.new_zeros(shape)], dim)
