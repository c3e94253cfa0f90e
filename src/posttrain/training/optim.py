"""AdamW, its learning rate and its state as plain named tensors, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from posttrain.recipe.blocks import Optim
from posttrain.records import UserError
from posttrain.training.world import local

FUSED_DEVICES = {"cpu", "cuda"}
MASTER = "master"


class AdamW(torch.optim.AdamW):
    """AdamW whose weights of less than float32 have a float32 master copy, on which it steps and which they are rounded
    from: bfloat16 has 8 significant bits, so that a step below 1/512 of a weight would be lost each time.
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        self.rounded: dict[Parameter, Parameter] = {}
        """The model's weight for each master."""
        for group in groups:
            group["params"] = [(name, self._master(p)) for name, p in group["params"]]
        super().__init__(groups, **settings)

    def _master(self, weight: Parameter) -> Parameter:
        if weight.dtype not in (torch.bfloat16, torch.float16):
            return weight
        master = Parameter(weight.detach().float())
        self.rounded[master] = weight
        return master

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for master, weight in self.rounded.items():
            master.grad = None if weight.grad is None else weight.grad.float()
        super().step()
        for master, weight in self.rounded.items():
            master.grad = None
            weight.copy_(master)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for weight in self.rounded.values():
            weight.grad = None


def adamw(named_parameters: Iterable[tuple[str, Parameter]], optim: Optim) -> AdamW:
    """AdamW (Loshchilov & Hutter, 1711.05101) over the parameters that require a gradient.

    Weight decay applies to matrices, not to norms and biases (fewer than two dimensions).
    """
    trained = [(name, p) for name, p in named_parameters if p.requires_grad]
    if not trained:
        raise UserError("no parameter requires a gradient: the model is frozen; add an adapter or unfreeze it")
    groups = [
        {
            "params": [(name, p) for name, p in trained if (p.ndim >= 2) == matrix and isinstance(p, DTensor) == cut],
            "weight_decay": optim.weight_decay if matrix else 0.0,
        }
        for cut in (True, False)  # what workers share and what each has whole cannot be stepped in one operation
        for matrix in (True, False)
    ]
    fused = all(p.device.type in FUSED_DEVICES for _, p in trained)
    return AdamW(
        [group for group in groups if group["params"]], lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused
    )


def learning_rate(step: int, steps: int, optim: Optim) -> float:
    """The rate of step `step` (from 0) of `steps`.

    It rises linearly over the warm-up share of the steps, reaches the peak at the first step after them, and decays
    so as to be zero at `steps`, just past the last one: no step has rate zero.
    """
    if not 0 <= step < steps:
        raise ValueError(f"learning_rate: step {step} is not among {steps} steps")
    warmup = min(round(optim.warmup * steps), steps - 1)
    if step < warmup:
        return optim.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / (steps - warmup)
    if optim.schedule == "linear":
        return optim.lr * (1 - done)
    if optim.schedule == "cosine":
        return optim.lr * (1 + math.cos(math.pi * done)) / 2
    return optim.lr


def clip(parameters: Iterable[Parameter], max_norm: float | None) -> Tensor:
    """Scale the gradients in place so that their global 2-norm is at most `max_norm`; return the norm before.

    With a norm of NaN or inf the gradients stay as they are: scaling by it would turn them to 0 or NaN and hide what
    was wrong. The caller checks the norm before it steps.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    norm = norm_of(gradients)
    if max_norm is not None and norm.isfinite() and norm > max_norm:
        torch._foreach_mul_([local(g) for g in gradients], (max_norm / norm).item())
    return norm


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """2-norm of all entries together, in float32 or better; those that other workers hold are counted."""
    device = tensors[0].device
    norms: list[Tensor] = []
    for some in ([t for t in tensors if isinstance(t, DTensor)], [t for t in tensors if not isinstance(t, DTensor)]):
        parts = [
            torch.linalg.vector_norm(local(t), dtype=torch.promote_types(t.dtype, torch.float32)).to(device)
            for t in some
        ]
        if not parts:
            continue
        norm = torch.linalg.vector_norm(torch.stack(parts))
        if isinstance(some[0], DTensor):
            square = norm.square()
            dist.all_reduce(square, group=some[0].device_mesh.get_group())
            norm = square.sqrt()
        norms.append(norm)
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def _named(optimizer: AdamW) -> Iterator[tuple[str, Parameter]]:
    """Names and parameters in the order in which the optimiser numbers them."""
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)


def state_tensors(optimizer: AdamW) -> dict[str, Tensor]:
    """The optimiser's state as `NAME/KEY` (`lm_head.weight/exp_avg`), step counters and masters included; not copied.

    Hyperparameters are the recipe's, not state.
    """
    masters = {f"{name}/{MASTER}": p.detach() for name, p in _named(optimizer) if p in optimizer.rounded}
    return masters | {
        f"{name}/{key}": value
        for name, parameter in _named(optimizer)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def zero_state(optimizer: AdamW) -> None:
    """The state with which the first step begins anyway, so that it has the same names before that step as after."""
    begun: dict[str, Tensor] = {}
    for name, p in _named(optimizer):
        begun |= {f"{name}/{key}": torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
        begun[f"{name}/step"] = torch.zeros(())
    load_state(optimizer, begun)


def load_state(optimizer: AdamW, tensors: Mapping[str, Tensor]) -> None:
    """Put the state of `state_tensors` back; the optimiser takes the tensors over.

    State of a parameter that the optimiser does not have, or has in another shape, raises UserError.
    """
    numbers = {name: (number, parameter) for number, (name, parameter) in enumerate(_named(optimizer))}
    state: dict[int, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        if name not in numbers or (value.ndim and value.shape != numbers[name][1].shape):
            found = f"shape {tuple(numbers[name][1].shape)}" if name in numbers else "no such parameter"
            raise UserError(
                f"optimiser state {path!r} of shape {tuple(value.shape)} does not fit the model ({found}): the "
                "checkpoint is of another model or adapter; start the run in another folder"
            )
        if key == MASTER:
            numbers[name][1].data.copy_(value)
        else:
            state.setdefault(numbers[name][0], {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
