"""Supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor


def nll(logps_T: Tensor) -> Tensor:
    """`loss_T`, the negative log-likelihood of each target token, nats."""
    return -logps_T
