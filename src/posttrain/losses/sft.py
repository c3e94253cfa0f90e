"""Supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor


def nll(logps_T: Tensor) -> Tensor:
    """`loss_T`, the negative log-likelihood of each target token, nats."""
    return -logps_T


def dft(logps_T: Tensor) -> Tensor:
    """`loss_T` of dynamic fine-tuning (Wu et al., 2508.05629): -sg(p) log p. What the model finds unlikely weighs less,
    so that its gradient, that of -p, is bounded where that of -log p is not."""
    return -logps_T.detach().exp() * logps_T
