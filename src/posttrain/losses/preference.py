"""Losses over pairs of a preferred (chosen) and a dispreferred (rejected) completion of one prompt.

Every one takes what the two sides score, `chosen_P` and `rejected_P`, and returns `loss_P`. What a score is decides
the method: summed log-ratios to a reference (DPO), their means over tokens, log-probabilities without any reference
(CPO, SimPO), log-odds (ORPO): `scores.py` makes them.
s is the sigmoid, d = chosen - rejected.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def logistic(
    chosen_P: Tensor, rejected_P: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0, gamma: float = 0.0
) -> Tensor:
    """-log s(beta d - gamma): DPO (Rafailov et al., 2305.18290), CPO (2401.08417), SimPO (2405.14734), ORPO's odds.

    `label_smoothing` e takes a share e of the labels for flipped (cDPO, Mitchell 2023): the loss becomes
    -(1 - e) log s(u) - e log s(-u). `gamma` is SimPO's target margin, by which the chosen side must win.
    """
    margin_P = beta * (chosen_P - rejected_P) - gamma
    return -(1 - label_smoothing) * F.logsigmoid(margin_P) - label_smoothing * F.logsigmoid(-margin_P)


def hinge(chosen_P: Tensor, rejected_P: Tensor, *, beta: float = 0.1) -> Tensor:
    """max(0, 1 - beta d): SLiC's margin (Zhao et al., 2305.10425) on log-ratios, as in RSO (Liu et al., 2309.06657),
    which calls beta gamma and sets it to 0.05."""
    return (1 - beta * (chosen_P - rejected_P)).relu()


def ipo(chosen_P: Tensor, rejected_P: Tensor, *, beta: float = 0.1) -> Tensor:
    """(d - 1 / (2 beta))^2 (Azar et al., 2310.12036): a margin to reach, not to exceed without end."""
    return (chosen_P - rejected_P - 1 / (2 * beta)).square()


def exo(chosen_P: Tensor, rejected_P: Tensor, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    """KL(s(beta d) || 1 - e), the reverse of DPO's (EXO for pairs, Ji et al., 2402.00856); e must be above 0."""
    if not 0 < label_smoothing < 0.5:
        raise ValueError(f"exo: label_smoothing must lie between 0 and 0.5, not {label_smoothing}: its loss has log e")
    u_P = beta * (chosen_P - rejected_P)
    won_P, lost_P = F.logsigmoid(u_P), F.logsigmoid(-u_P)
    return won_P.exp() * (won_P - math.log1p(-label_smoothing)) + lost_P.exp() * (lost_P - math.log(label_smoothing))


def nca(chosen_P: Tensor, rejected_P: Tensor, *, beta: float = 0.1) -> Tensor:
    """Noise contrastive alignment for pairs (Chen et al., 2402.05369): each side against the reference, in itself."""
    chosen_P, rejected_P = beta * chosen_P, beta * rejected_P
    return -F.logsigmoid(chosen_P) - 0.5 * F.logsigmoid(-chosen_P) - 0.5 * F.logsigmoid(-rejected_P)


def robust(chosen_P: Tensor, rejected_P: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """DPO's loss, unbiased where a share e of the labels is flipped (rDPO, Chowdhury et al., 2403.00409)."""
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"robust: label_smoothing must lie in [0, 0.5), not {label_smoothing}")
    u_P = beta * (chosen_P - rejected_P)
    e = label_smoothing
    return (-(1 - e) * F.logsigmoid(u_P) + e * F.logsigmoid(-u_P)) / (1 - 2 * e)


def bco(chosen_P: Tensor, rejected_P: Tensor, *, beta: float = 0.1, shift: float = 0.0) -> Tensor:
    """Each side classified on its own (BCO, Jung et al., 2404.04656). `shift` is the paper's running mean of beta
    times all scores, 0 in TRL's pairwise form; `unpaired.running_mean` keeps it.
    """
    return -F.logsigmoid(beta * chosen_P - shift) - F.logsigmoid(-(beta * rejected_P - shift))


def sppo(chosen_P: Tensor, rejected_P: Tensor, *, beta: float = 0.1) -> Tensor:
    """(chosen - 1 / (2 beta))^2 + (rejected + 1 / (2 beta))^2 (SPPO with hard labels, Wu et al., 2405.00675)."""
    return (chosen_P - 0.5 / beta).square() + (rejected_P + 0.5 / beta).square()


def aot(chosen_P: Tensor, rejected_P: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Alignment by optimal transport (Melnyk et al., 2406.05882), unpaired: what chosen answers score shall dominate,
    as a distribution, what rejected ones do. Both are sorted, so a value has no pair of its own.

    The paired form is this with the margins of the policy as chosen and those of the reference as rejected. The loss
    depends on which pairs stand together; TRL sorts those of a micro-batch.
    """
    return logistic(chosen_P.sort().values, rejected_P.sort().values, beta=beta, label_smoothing=label_smoothing)


def apo_zero(chosen_P: Tensor, rejected_P: Tensor, *, beta: float = 0.1) -> Tensor:
    """Anchored preference optimisation (D'Oosterlinck et al., 2408.06266): chosen up, rejected down. For data better
    than the model."""
    return 1 - torch.sigmoid(beta * chosen_P) + torch.sigmoid(beta * rejected_P)


def apo_down(chosen_P: Tensor, rejected_P: Tensor, *, beta: float = 0.1) -> Tensor:
    """Anchored preference optimisation (2408.06266): both down, rejected more. For a model better than the data."""
    return torch.sigmoid(beta * chosen_P) + 1 - torch.sigmoid(beta * (chosen_P - rejected_P))


def discopop(chosen_P: Tensor, rejected_P: Tensor, *, beta: float = 0.1, tau: float = 0.05) -> Tensor:
    """The log-ratio modulated loss that a language model found (Lu et al., 2406.08414), with u = beta d:
    (1 - s(u / tau)) (-log s(u)) + s(u / tau) e^-u, logistic where the pair is ordered wrong, exponential where right.
    """
    if not 0 < tau <= 1:
        raise ValueError(f"discopop: tau must lie in (0, 1], not {tau}: above 1 the exponential is not held back")
    u_P = beta * (chosen_P - rejected_P)
    exponential_P = (F.logsigmoid(u_P / tau) - u_P).exp()  # one exponent: s(u / tau) e^-u is 0 * inf for u << 0
    return torch.sigmoid(-u_P / tau) * -F.logsigmoid(u_P) + exponential_P
