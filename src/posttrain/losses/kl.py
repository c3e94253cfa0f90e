"""Estimates of KL(policy || reference) from the log-probs of sampled tokens alone."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from posttrain.losses.policy import MAX_LOG_RATIO, log_ratio

Estimator = Literal["k1", "k2", "k3"]


def kl(logps_T: Tensor, ref_logps_T: Tensor, target_T: Tensor, estimator: Estimator = "k3") -> Tensor:
    """`kl_T`, nats, at target tokens and 0 elsewhere: Schulman's estimators (2020, joschu.net/blog/kl-approx.html).

    With r = log pi - log ref of a token drawn from pi, value and gradient mean different things:

    | | formula | value in expectation | gradient in expectation, used as a loss |
    |---|---|---|---|
    | k1 | r | KL(pi, ref); a sample may be negative | 0: no pull at all, only noise. For measuring, or in a reward |
    | k2 | r^2 / 2 | not KL, only close to it near r = 0 | that of KL(pi, ref), exactly |
    | k3 | e^-r - 1 + r | KL(pi, ref); never negative | that of the reversed KL(ref, pi) |

    All hold for the next-token distribution at a given prefix; none has the term by which pi changes which prefixes
    are visited. Tokens drawn from an older policy need its importance ratio as a factor. In k3, r is held within
    +-20, where its gradient stops, so that e^-r cannot overflow.
    """
    log_T = log_ratio(logps_T, ref_logps_T, target_T)
    if estimator == "k1":
        return log_T
    if estimator == "k2":
        return log_T.square() / 2
    if estimator == "k3":
        log_T = log_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return torch.expm1(-log_T) + log_T  # expm1: e^-r - 1 cancels to noise near r = 0
    raise ValueError(f"kl: estimator is k1, k2 or k3, not {estimator!r}")
