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
