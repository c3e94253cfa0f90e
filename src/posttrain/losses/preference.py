"""Losses over pairs of a preferred (chosen) and a dispreferred (rejected) completion of one prompt."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def dpo(
    chosen_P: Tensor,
    rejected_P: Tensor,
    ref_chosen_P: Tensor,
    ref_rejected_P: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`loss_P` of direct preference optimisation (Rafailov et al., 2305.18290), sigmoid form.

    All four are sums of a completion's token log-probs in nats, of the policy and of the frozen reference. With
    `label_smoothing` e, a share e of the labels is taken to be flipped (cDPO, Mitchell 2023):
    -(1 - e) log s(d) - e log s(-d), d = beta ((chosen - ref_chosen) - (rejected - ref_rejected)).
    """
    chosen_P, rejected_P = chosen_P - ref_chosen_P.detach(), rejected_P - ref_rejected_P.detach()
    margin_P = beta * (chosen_P - rejected_P)
    return -(1 - label_smoothing) * F.logsigmoid(margin_P) - label_smoothing * F.logsigmoid(-margin_P)


def bradley_terry(
    chosen_P: Tensor, rejected_P: Tensor, *, margin_P: Tensor | float = 0.0, centring: float = 0.0
) -> Tensor:
    """`loss_P` of a reward model (Bradley & Terry 1952; Ouyang et al., 2203.02155): -log s(chosen - rejected).

    Both are rewards, one number for each completion. With `margin_P` the chosen one must win by that much (Llama 2,
    2307.09288). The loss says nothing of where the rewards lie; `centring` c adds c (chosen + rejected)^2, which
    draws them to a mean of 0 (Eisenstein et al., 2312.09244, with c = 0.01).
    """
    return -F.logsigmoid(chosen_P - rejected_P - margin_P) + centring * (chosen_P + rejected_P).square()
