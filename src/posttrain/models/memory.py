"""Memory of a model in training: what a pass takes, counted without values, and activations computed twice."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.forest.attention import attending, decoder

DEPTHS = (3, 2)
"""Layers of the model that is counted, the deeper first; layers are alike, so the others add what the third adds."""


@contextmanager
def recomputing(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Keep of each decoder layer only what goes in, and compute the rest again for the backward pass.

    Chen et al., 1604.06174, with one segment a layer. The gradient is the same; an adapter's dropout drops the same
    entries twice. Unlike Transformers' own switch it needs no train mode, in which dropout of the base would fire. A
    layer's `forward` is wrapped, not its call, so that hooks (FSDP2's, which gather its weights) run once.
    """
    wrapped = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)] if on else []
    try:
        for layer in wrapped:
            layer.forward = functools.partial(_recomputed, model, layer.forward)
        yield
    finally:
        for layer in wrapped:
            vars(layer).pop("forward", None)


def _recomputed(model: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    name = decoder(model).config._attn_implementation

    def compute(*args: Any, **kwargs: Any) -> Any:
        with attending(model, name):  # by the time of the backward pass the model has its own again
            return forward(*args, **kwargs)

    return checkpoint(compute, *args, use_reentrant=False, **kwargs)


class Pass(NamedTuple):
    """Bytes at the peak of one forward and backward pass, beside weights; `gradients + activations + work` is it."""

    gradients: int
    activations: int
    """Kept from the forward pass for the backward one."""
    work: int
    """All else: what lives for one layer's time, or for the head's."""

    @property
    def peak(self) -> int:
        return sum(self)


def measure_pass(model: nn.Module, run: Callable[[nn.Module], Tensor], recompute: bool, again: bool) -> Pass:
    """What the backward pass of `run(model)` takes at its peak.

    The computation runs, layer by layer and operation by operation, on tensors that have a shape and no memory
    (the meta device), and the storages that live are added up. `DEPTHS` of the model's layers are enough: each of the
    moments at which the peak can fall costs the same for every further layer. Not seen is what a kernel allocates
    for itself.

    Args:
        model: real, or on the meta device; not changed.
        recompute: with activation checkpointing.
        again: with gradients of an earlier pass of the same step in place.
    """
    moments = []
    total = len(stack_of(model))
    shallow = _shallow(model, min(DEPTHS[0], total))
    for depth in DEPTHS if total > DEPTHS[0] else DEPTHS[:1]:
        del stack_of(shallow)[depth:]
        moments.append(_moments(shallow, run, recompute, again))
    deep = moments[0]
    if len(moments) == 1:
        each = [_Moment(0, 0, 0)] * len(deep)
    else:
        each = [_Moment(*(a - b for a, b in zip(x, y, strict=True))) for x, y in zip(*moments, strict=True)]
    more = total - min(DEPTHS[0], total)
    extended = [_Moment(*(a + more * b for a, b in zip(x, y, strict=True))) for x, y in zip(deep, each, strict=True)]
    top = max(extended, key=lambda m: m.peak)
    return Pass(top.gradients, top.activations, top.peak - top.gradients - top.activations)


@torch.no_grad()
def measure_forward(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> int:
    """Bytes at the peak of `run(model)` without a backward pass, beside weights; layers leave nothing behind."""
    shallow = _shallow(model, 2)
    with Meter([*shallow.parameters(), *shallow.buffers()]) as meter:
        run(shallow)
    return meter.peak


class _Moment(NamedTuple):
    peak: int
    gradients: int
    activations: int


def _moments(model: nn.Module, run: Callable[[nn.Module], Tensor], recompute: bool, again: bool) -> list[_Moment]:
    """The peak around the turn from forward to backward (until the last layer's is done), and the one at the end."""
    layers = stack_of(model)
    weights = [*model.parameters(), *model.buffers()]
    trained = [p for p in weights if p.requires_grad]
    for p in trained:
        p.grad = None
    with Meter(weights) as meter, recomputing(model, recompute):
        found: list[_Moment] = []
        gradients = sum(p.nbytes for p in trained)
        if again:
            for p in trained:
                p.grad = torch.zeros_like(p)

        def turned(_: Tensor) -> None:
            found.append(_Moment(meter.peak, gradients if again else 0, kept))
            meter.peak = meter.now

        def watch(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args[0].requires_grad:
                args[0].register_hook(turned)

        hook = layers[-1].register_forward_pre_hook(watch)
        output = run(model)
        hook.remove()
        kept = meter.now - (gradients if again else 0)
        output.sum().backward()
        found.append(_Moment(meter.peak, gradients, 0))
    return found


class Meter(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is on, without those that were there before.

    Of tensors without values, on the meta device, it answers what a pass over a forest asks all the same.
    """

    def __init__(self, before: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {t.untyped_storage()._cdata for t in before}

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, aten = kwargs or {}, torch.ops.aten
        if func is aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            out = torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        elif func is aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype == torch.bool:
            return False  # Transformers asks whether position ids are those of one sequence, and they are not
        else:
            out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._seen:
                    self._seen.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key, size)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def stack_of(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and all(isinstance(m, GradientCheckpointingLayer) for m in module):
            return module
    raise ValueError(f"{type(model).__name__} has no list of layers")


def _shallow(model: nn.Module, depth: int) -> nn.Module:
    """A copy with `depth` layers on the meta device."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    stack = stack_of(model)
    memo[id(stack)] = nn.ModuleList(copy.deepcopy(layer, memo) for layer in list(stack)[:depth])
    return copy.deepcopy(model, memo)
