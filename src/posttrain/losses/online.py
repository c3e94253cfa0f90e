"""Losses over answers that are sampled while the policy is trained. Online DPO is `logistic` or `ipo` on sums."""

from __future__ import annotations

from torch import Tensor

from posttrain.losses.preference import logistic
from posttrain.losses.reduce import masked


def nash_md(
    logps_T: Tensor, ref_logps_T: Tensor, preference_T: Tensor, target_T: Tensor, *, beta: float = 0.1
) -> Tensor:
    """`loss_T` of Nash-MD (Munos et al., 2312.00886), whose sum over an answer's tokens is that answer's loss.

    `preference_T` carries at each token the chance P that a judge prefers this answer of the policy to one of the
    mixture of policy and reference. beta sg(log pi - log ref) log pi - (P - 1/2) log pi, as a policy gradient has it.
    """
    logps_T = masked(logps_T, target_T)
    apart_T = logps_T.detach() - masked(ref_logps_T.detach(), target_T)
    return masked((beta * apart_T - (preference_T.detach() - 0.5)) * logps_T, target_T)


def xpo(chosen_P: Tensor, rejected_P: Tensor, explored_P: Tensor, *, beta: float = 0.1, alpha: float = 1e-5) -> Tensor:
    """`loss_P` of exploratory preference optimisation (Xie et al., 2405.21046): DPO's on log-ratios, and `alpha` times
    the summed log-probability that the policy gives the reference's own answer, so that it leaves what is known."""
    return logistic(chosen_P, rejected_P, beta=beta) + alpha * explored_P
