"""Losses over single completions that are marked desirable or not. Scores are summed log-ratios to the reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _sign(desirable_S: Tensor) -> Tensor:
    return torch.where(desirable_S, 1, -1)


def kto(
    ratios_S: Tensor,
    desirable_S: Tensor,
    kl: Tensor | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """`loss_S` of Kahneman-Tversky optimisation (Ethayarajh et al., 2402.01306).

    lambda_D (1 - s(beta (r - z))) where `desirable_S`, lambda_U (1 - s(beta (z - r))) where not. z is `kl`, constant:
    `kto_kl` of the whole step's rows.
    """
    weight_S = torch.full_like(ratios_S, undesirable_weight).masked_fill(desirable_S, desirable_weight)
    return weight_S * torch.sigmoid(-_sign(desirable_S) * (beta * (ratios_S - kl)))


def kto_kl(mismatched_S: Tensor) -> Tensor:
    """KTO's estimate of KL(policy || reference), a constant of at least 0: the mean log-ratio of completions under
    prompts that are not theirs. Take it over the whole step, of which TRL takes each worker's micro-batch."""
    return mismatched_S.detach().mean().clamp(min=0)


def apo_zero_unpaired(ratios_S: Tensor, desirable_S: Tensor, *, beta: float = 0.1) -> Tensor:
    """Anchored preference optimisation without pairs (D'Oosterlinck et al., 2408.06266): 1 - s(beta r) where
    desirable, s(beta r) where not. It is KTO with z = 0."""
    return torch.sigmoid(-_sign(desirable_S) * (beta * ratios_S))


def bco_unpaired(ratios_S: Tensor, desirable_S: Tensor, shift: float, *, beta: float = 0.1) -> Tensor:
    """Binary classifier optimisation (Jung et al., 2404.04656): -log s(+-(beta r - shift)), + where desirable.

    `shift` is the running mean of beta r over all rows so far, those of this step with them (`running_mean`).
    """
    return -F.logsigmoid(_sign(desirable_S) * (beta * ratios_S - shift))


def running_mean(mean: float, count: int, values_S: Tensor) -> tuple[float, int]:
    """The mean of all values so far, and their number, with those of this step."""
    total = count + values_S.numel()
    return (mean * count + float(values_S.detach().sum())) / max(total, 1), total
