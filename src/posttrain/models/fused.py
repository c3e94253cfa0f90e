"""Layers of PEFT and Transformers that keep and move what their mathematics needs, and no more.

Each computes what the layer it replaces does; where more is asked of it than it knows, that layer's own forward runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm


class FusedLora(Linear):
    """y = W x + s B A x, in which the update is added by the product that makes it.

    PEFT makes B A x, scales it and adds it as three tensors of the layer's width, and as many again in the backward
    pass. It is fused for one plain active adapter on a frozen `nn.Linear`.
    """

    folded = False
    """Whether the base layer holds W + s B A for the time being."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.folded:
            whole: Tensor = self.get_base_layer()(x)
            return whole
        name = self.plain()
        if args or kwargs or name is None or x.dtype != self.get_base_layer().weight.dtype:
            return super().forward(x, *args, **kwargs)
        base, a, b = self.get_base_layer(), self.lora_A[name].weight, self.lora_B[name].weight
        out: Tensor = _Product.apply(x, base.weight, base.bias, a, b, self.scaling[name])
        return out

    def plain(self) -> str | None:
        """The name of the adapter where it is one plain active one, of the precision of a frozen `nn.Linear`."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        (name,) = self.active_adapters
        base = self.get_base_layer()
        if type(base) is not nn.Linear or name not in self.lora_A or name in self.lora_variant:
            return None
        b = self.lora_B[name]
        odd = base.weight.requires_grad or _drops(self.lora_dropout[name]) or b.bias is not None
        return None if odd or b.weight.dtype != base.weight.dtype else name


class FusedNorm(LlamaRMSNorm):
    """y = w x / rms(x) in float32, which keeps x and 1/rms(x) where autograd would keep x / rms(x) as well."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or not x.dtype == self.weight.dtype == torch.float32:
            return super().forward(x)
        out: Tensor = _Norm.apply(x, self.weight, self.variance_epsilon)
        return out


class FusedGatedMlp(LlamaMLP):
    """y = W_down (silu(g) u) with g = W_gate x, u = W_up x, which does not keep silu(g)."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        inner = _Gated.apply(gate, up) if torch.is_grad_enabled() else self.act_fn(gate) * up
        out: Tensor = self.down_proj(inner)
        return out


@contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Compute with W + s B A as one matrix, without gradients: decoding multiplies few rows at a time, where an
    adapter's narrow products weigh. It costs a second copy of the matrices meanwhile; the first comes back untouched,
    after an exception too.
    """
    layers = foldable(model)
    kept = [weight.data for _, _, weight in layers]
    try:
        with torch.no_grad():
            for layer, name, weight in layers:
                a_RI, b_OR = layer.lora_A[name].weight, layer.lora_B[name].weight
                weight.data = torch.addmm(weight, b_OR, a_RI, alpha=layer.scaling[name])
                layer.folded = True
            yield
    finally:
        for (layer, _, weight), before in zip(layers, kept, strict=True):
            weight.data, layer.folded = before, False


def foldable(model: nn.Module) -> list[tuple[FusedLora, str, nn.Parameter]]:
    """Layers, their adapters and base weights: those in float32, for in bfloat16 the sum would round the update away,
    of which this process has the whole adapter."""
    found = [(layer, layer.plain()) for layer in model.modules() if type(layer) is FusedLora]
    adapted = [(layer, name, layer.get_base_layer().weight) for layer, name in found if name is not None]
    return [a for a in adapted if a[2].dtype == torch.float32 and not isinstance(a[0].lora_A[a[1]].weight, DTensor)]


def fuse(model: nn.Module) -> None:
    """Give the layers of `model` that compute what those above do their forward, in place; all else stays."""
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = FusedLora
        elif _same_forward(module, LlamaRMSNorm):
            module.__class__ = FusedNorm
        elif _same_forward(module, LlamaMLP) and type(module.act_fn) in (nn.SiLU, SiLUActivation):
            module.__class__ = FusedGatedMlp


def _same_forward(module: nn.Module, known: type[nn.Module]) -> bool:
    """Transformers writes such a layer out for each family of models, to the letter; so it is the same byte code."""
    mine, its = type(module).forward.__code__, known.forward.__code__
    return (mine.co_code, mine.co_consts, mine.co_names) == (its.co_code, its.co_consts, its.co_names)


def _drops(dropout: nn.Module) -> bool:
    return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0


class _Product(torch.autograd.Function):
    """T tokens, I inputs, O outputs, R rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_OI: Tensor, bias: Tensor | None, a_RI: Tensor, b_OR: Tensor, s: float) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        low_TR = (x_TI @ a_RI.t()).mul_(s)
        ctx.save_for_backward(x_TI, low_TR, w_OI, a_RI, b_OR)
        ctx.shape, ctx.s = x.shape, s
        return F.linear(x_TI, w_OI, bias).addmm_(low_TR, b_OR.t()).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, low_TR, w_OI, a_RI, b_OR = ctx.saved_tensors
        grad_TO = grad.reshape(-1, grad.shape[-1])
        low_grad_TR = (grad_TO @ b_OR).mul_(ctx.s)
        of_x = (grad_TO @ w_OI).addmm_(low_grad_TR, a_RI).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return of_x, None, None, low_grad_TR.t() @ x_TI, grad_TO.t() @ low_TR, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight_D, inverse)
        return (x * inverse).mul_(weight_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, inverse = ctx.saved_tensors
        unit = x * inverse
        of_weight = (grad * unit).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None
        of_unit = grad * weight_D
        along = (of_unit * unit).mean(-1, keepdim=True)  # a longer x is the same unit: no gradient along it
        return of_unit.sub_(unit.mul_(along)).mul_(inverse), of_weight, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)
