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
    """Each segment attends to its ancestors and, causally, to itself: one kernel call for each segment."""

    def __init__(self, forest: Forest) -> None:
        self.forest = forest
        self.paths = [forest.path(i) for i in range(len(forest.segments))]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        scale, window, softcap, sinks = scoring
        repeat = query.shape[1] // key.shape[1]
        if repeat > 1:
            key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        segments = self.forest.segments
        # Split once: the gradient of a slice is a tensor of the whole row's size, one for every slice.
        sizes = [s.stop - s.start for s in segments]
        queries, keys, values = query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2)
        outs = []
        for i, s in enumerate(segments):
            q = queries[i]
            k, v = (torch.cat([parts[p] for p in self.paths[i]], 2) for parts in (keys, values))
            plain = softcap is None and sinks is None
            if plain and s.parent < 0 and not _windowed(s, window):
                outs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale))
                continue
            mask = self._mask(i, window, query.dtype)
            if plain:
                outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale))
            else:
                scores = q @ k.transpose(-1, -2) * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                outs.append(soften(scores + mask, sinks) @ v)
        return torch.cat(outs, 2)

    def _mask(self, i: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """[tokens of segment i, tokens of its path]: 0 where it may look, -inf where not."""
        s = self.forest.segments[i]
        window = window if _windowed(s, window) else None
        made = self.forest.masks.get((i, window, dtype))
        if made is None:
            stop = s.position + s.stop - s.start
            back = torch.arange(s.position, stop)[:, None] - torch.arange(stop)
            hidden = back < 0 if window is None else (back < 0) | (back >= window)
            made = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
            self.forest.masks[i, window, dtype] = made
        return made


def soften(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last axis of [B, H, Q, K], with a sink [H] that takes its share and gives nothing back."""
    if sinks is None:
        return scores.softmax(-1)
    sink = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]


def _windowed(s: Any, window: int | None) -> bool:
    return window is not None and s.position + s.stop - s.start > window


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
