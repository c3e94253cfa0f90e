"""REINFORCE with the other completions as the baseline, and with the whole batch as the scale."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.credit.advantages import finite


def leave_one_out(rewards_PG: Tensor) -> Tensor:
    """`advantages_PG` of RLOO (Ahmadian et al., 2402.14740): reward minus the mean reward of the group's others.

    NaN is unscored: it is nobody's other and gets 0, as does a group with fewer than two scored completions.
    """
    rewards_PG = finite(rewards_PG)
    scored_PG = ~rewards_PG.isnan()
    scored_P = scored_PG.sum(1, keepdim=True)
    others_PG = (rewards_PG.nansum(1, keepdim=True) - rewards_PG) / (scored_P - 1).clamp(min=1)
    return (rewards_PG - others_PG).masked_fill(~scored_PG | (scored_P < 2), 0.0)


def whiten(values_T: Tensor, target_T: Tensor, *, eps: float = 1e-8, shift: bool = True) -> Tensor:
    """The values of target tokens with mean 0 and variance 1 over all of them (unbiased, as in PPO's code); 0 elsewhere.

    REINFORCE++ (Hu, 2501.03262) takes reward minus KL at each token through this in place of a critic. Of the whole
    step's tokens: those of one micro-batch would make the loss depend on how the step is cut. Without `shift` the
    mean is put back.
    """
    values = values_T[target_T].to(torch.promote_types(values_T.dtype, torch.float32))
    if values.numel() < 2:
        return torch.zeros_like(values_T)
    mean = values.mean()
    white = (values - mean) * (values.var() + eps).rsqrt()
    return torch.zeros_like(values_T).masked_scatter(target_T, white if shift else white + mean)
