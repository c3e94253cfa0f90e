"""Exact softmax attention by matrix products over blocks of queries, with a backward pass that keeps no scores.

On a CPU the large products are where the speed is: the query heads that share a key head are folded into the rows
of one product, and a block sees a key once, straight from where it stands in the packed row. The backward pass
computes the probabilities again from queries and keys (as FlashAttention does, Dao et al., 2205.14135, without its
tiling over keys), so that what a layer keeps grows with the tokens and not with their square.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERIES = 256
"""Of a block, at most. Smaller ones waste less on keys that a causal mask hides, and cost more calls."""


class Block(NamedTuple):
    """Queries [start, stop) of the packed row, and the runs of it that they look at, the last one their own."""

    start: int
    stop: int
    keys: tuple[tuple[int, int], ...]
    mask: Tensor
    """[queries, m], added to the scores of the last m keys: 0 where a query may look, -inf where not."""


def attend(query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], scale: float) -> Tensor:
    """query [1, H, T, d]; key, value [1, Hkv, T, d]; returns [1, H, T, d]. Blocks must cover every query once."""
    out: Tensor = _Blocks.apply(query, key, value, blocks, scale)
    return out


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.blocks, ctx.scale = blocks, scale
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        for block in blocks:
            q, k, v = _parts(block, query, key, value, scale)
            _fold(out, block, key.shape[1])[:] = (_probabilities(q, k, block) @ v).view(_grouped(q, block))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        heads = key.shape[1]
        grad_q = torch.empty_like(query, memory_format=torch.contiguous_format)
        grad_k = torch.zeros_like(key, memory_format=torch.contiguous_format)
        grad_v = torch.zeros_like(value, memory_format=torch.contiguous_format)
        for block in ctx.blocks:
            q, k, v = _parts(block, query, key, value, ctx.scale)
            p = _probabilities(q, k, block)
            g = _fold(grad, block, heads).reshape(q.shape)
            of_v, of_p = p.transpose(1, 2) @ g, g @ v.transpose(1, 2)
            of_scores = of_p.sub_((of_p * p).sum(-1, keepdim=True)).mul_(p)
            of_k = of_scores.transpose(1, 2) @ q
            _fold(grad_q, block, heads)[:] = (of_scores @ k).mul_(ctx.scale).view(_grouped(q, block))
            at = 0
            for start, stop in block.keys:
                grad_k[0, :, start:stop] += of_k[:, at : at + stop - start]
                grad_v[0, :, start:stop] += of_v[:, at : at + stop - start]
                at += stop - start
        return grad_q, grad_k, grad_v, None, None


def _fold(x: Tensor, block: Block, heads: int) -> Tensor:
    """The block's part of [1, H, T, d] as a view [Hkv, H / Hkv, queries, d]."""
    return x[0].unflatten(0, (heads, -1))[:, :, block.start : block.stop]


def _grouped(q: Tensor, block: Block) -> tuple[int, int, int, int]:
    return (q.shape[0], -1, block.stop - block.start, q.shape[2])


def _parts(block: Block, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled queries [Hkv, rows, d], keys and values [Hkv, K, d]."""
    q = (_fold(query, block, key.shape[1]) * scale).flatten(1, 2)
    k, v = (torch.cat([x[0, :, start:stop] for start, stop in block.keys], 1) for x in (key, value))
    return q, k, v


def _probabilities(q: Tensor, k: Tensor, block: Block) -> Tensor:
    """[Hkv, rows, K], in the precision of the queries; scores and softmax in float32 or better."""
    scores = (q @ k.transpose(1, 2)).to(torch.promote_types(q.dtype, torch.float32))
    masked = scores.view(q.shape[0], -1, block.stop - block.start, k.shape[1])
    masked[..., k.shape[1] - block.mask.shape[1] :] += block.mask
    return scores.softmax(-1).to(q.dtype)
