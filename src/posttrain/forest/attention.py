"""Attention over a forest, registered with Transformers so that any decoder that asks it can use it unchanged.

A `Layout` travels through the model's keyword arguments to every attention layer and says how the tokens of this
forward pass see one another: `Tree` here, the decoding grid in `sampling/`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from posttrain.forest.blocks import QUERIES, Block, attend
from posttrain.forest.tree import Forest

NAME = "posttrain_forest"


class Scoring(NamedTuple):
    """What a model asks of its attention, beside queries, keys and values."""

    scale: float
    """Scores are multiplied by it."""
    window: int | None = None
    """Tokens a query may look back on, itself included; None for all."""
    softcap: float | None = None
    """Gemma 2's bound: scores become softcap * tanh(score / softcap)."""
    sinks: Tensor | None = None
    """[H], gpt-oss's extra logits in the softmax."""


class Layout(Protocol):
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """query [1, H, T, d]; key, value [1, Hkv, T, d]; returns [1, H, T, d]."""


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if dropout:
        raise ValueError("attention dropout is on: put the model in eval mode (posttrain trains without dropout)")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = layout.attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        query,
        key,
        value,
        Scoring(scale, sliding_window, softcap, s_aux),
    )
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, _attention)
# The layout holds what a mask would say; Transformers must not build one.
AttentionMaskInterface.register(NAME, lambda *_, **__: None)


class Tree:
    """Each segment attends to its ancestors and, causally, to itself, in blocks of queries."""

    def __init__(self, forest: Forest) -> None:
        self.forest = forest

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        scale, window, softcap, sinks = scoring
        blocks = self._blocks(window)
        if softcap is None and sinks is None:
            return attend(query, key, value, blocks, scale)
        heads, outs = key.shape[1], []
        for block in blocks:
            q = query[0, :, block.start : block.stop].unflatten(0, (heads, -1))
            k, v = (torch.cat([x[0, :, None, a:b] for a, b in block.keys], 2) for x in (key, value))
            scores = q @ k.transpose(-1, -2) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores + F.pad(block.mask, (k.shape[2] - block.mask.shape[1], 0)).to(scores.dtype)
            weights = soften(scores.flatten(0, 1)[None], sinks)[0].unflatten(0, (heads, -1))
            outs.append((weights @ v).flatten(0, 1))
        return torch.cat(outs, 1)[None]

    def _blocks(self, window: int | None) -> list[Block]:
        """Made on first use and kept with the forest, for all layers and every later pass."""
        made: list[Block] | None = self.forest.masks.get(("blocks", window))
        if made is None:
            made = [block for i in range(len(self.forest.segments)) for block in self._of_segment(i, window)]
            self.forest.masks["blocks", window] = made
        return made

    def _of_segment(self, i: int, window: int | None) -> Iterator[Block]:
        *above, own = (self.forest.segments[s] for s in self.forest.path(i))
        n = own.stop - own.start
        size = -(-n // -(-n // QUERIES))  # as many blocks as it takes, about equally long
        for start in range(own.start, own.stop, size):
            stop = min(start + size, own.stop)
            keys = (*((s.start, s.stop) for s in above), (own.start, stop))
            position = own.position + start - own.start
            # Where a window hides nothing, only the block's own keys need a mask.
            narrow = window if window is not None and position + stop - start > window else None
            seen = stop - start if narrow is None else position + stop - start
            back = torch.arange(stop - start)[:, None] - torch.arange(stop - start - seen, stop - start)
            hidden = back < 0 if narrow is None else (back < 0) | (back >= narrow)
            mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf")).to(self.forest.ids_T.device)
            yield Block(start, stop, keys, mask)


def soften(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last axis of [B, H, Q, K], with a sink [H] that takes its share and gives nothing back."""
    if sinks is None:
        return scores.softmax(-1)
    sink = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]


def decoder(model: torch.nn.Module) -> PreTrainedModel:
    """The causal language model itself, without the adapter's wrapper around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def unsupported(model: torch.nn.Module) -> str | None:
    """Why this model cannot score a forest in one pass, or None if it can."""
    base = decoder(model)
    name = type(base).__name__
    if not getattr(base, "_supports_attention_backend", False):
        return f"{name} does not take attention functions from Transformers' AttentionInterface"
    if getattr(base, "_is_stateful", False):
        return f"{name} keeps a recurrent state, which cannot branch inside one row"
    odd = set(getattr(base.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if odd:
        return f"{name} has layers of kind {', '.join(sorted(odd))}"
    return None


@contextmanager
def attending(model: torch.nn.Module, name: str) -> Iterator[None]:
    """The model with the named attention implementation, and with its own again afterwards."""
    config = decoder(model).config
    before = config._attn_implementation
    if before == name:
        yield
        return
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
