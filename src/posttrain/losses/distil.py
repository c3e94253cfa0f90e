"""Distances between the next-token distributions of a student and a teacher, at N target tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def jsd(student_NV: Tensor, teacher_NV: Tensor, *, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """`loss_N`, the generalised Jensen-Shannon divergence of GKD (Agarwal et al., 2306.13649), of logits, nats.

    With p the student's and q the teacher's distribution and M = (1 - beta) p + beta q:
    beta KL(q || M) + (1 - beta) KL(p || M), and in its limits, rescaled, `beta` 0 is KL(q || p), forward (Hinton et
    al., 1503.02531), and 1 is KL(p || q), reverse (MiniLLM's single-step part, 2306.08543). Both logits are divided by
    `temperature`; there is no factor of its square. TRL's GKD applies its temperature to sampling alone.
    """
    p_NV, q_NV = ((z / temperature).log_softmax(-1) for z in (student_NV, teacher_NV.detach()))
    if beta == 0:
        return kl_divergence(q_NV, p_NV)
    if beta == 1:
        return kl_divergence(p_NV, q_NV)
    if not 0 < beta < 1:
        raise ValueError(f"jsd: beta must lie in [0, 1], not {beta}")
    # Where both are -inf, a token neither can say, log(e^p + e^q) would have a gradient of NaN.
    least = torch.finfo(p_NV.dtype).min / 2
    m_NV = torch.logaddexp(p_NV.clamp(min=least) + math.log1p(-beta), q_NV.clamp(min=least) + math.log(beta))
    return beta * kl_divergence(q_NV, m_NV) + (1 - beta) * kl_divergence(p_NV, m_NV)


def kl_divergence(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """`kl_N`, KL(p || q) of log-probabilities, nats. A token of probability 0 under p adds 0, whatever q says."""
    return (p_NV.exp() * (p_NV - q_NV).masked_fill(p_NV.isneginf(), 0.0)).sum(-1)
