"""PEFT's low-rank linear layer with the passes over memory that its mathematics needs, and no more."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class FusedLora(Linear):
    """y = W x + s B A x, in which the update is added by the product that makes it.

    PEFT makes B A x, scales it and adds it as three tensors of the layer's width, and as many again in the backward
    pass. Where more is asked than one plain active adapter on a frozen `nn.Linear`, PEFT's own forward runs.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        base = self.get_base_layer()
        plain = type(base) is nn.Linear and name in self.lora_A and name not in self.lora_variant
        if not plain or base.weight.requires_grad or _drops(self.lora_dropout[name]):
            return super().forward(x)
        a, b = self.lora_A[name].weight, self.lora_B[name]
        if b.bias is not None or not x.dtype == base.weight.dtype == a.dtype:
            return super().forward(x)
        out: Tensor = _Product.apply(x, base.weight, base.bias, a, b.weight, self.scaling[name])
        return out


def fuse(model: nn.Module) -> None:
    """Give every low-rank linear layer of `model` the forward above; it stays PEFT's in all else."""
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = FusedLora


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
