"""REINFORCE with the other completions as the baseline, and with the whole step as the scale."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.credit.advantages import group_advantages


def leave_one_out(rewards_PG: Tensor) -> Tensor:
    """`advantages_PG` of RLOO (Ahmadian et al., 2402.14740): reward minus the mean reward of the group's others, which
    is reward minus the group's mean, times n / (n - 1).

    NaN is unscored: it is nobody's other and gets 0, as do groups without signal (`group_advantages`).
    """
    scored_P = (~rewards_PG.isnan()).sum(1, keepdim=True)
    return group_advantages(rewards_PG, std="none") * scored_P / (scored_P - 1).clamp(min=1)


def whiten(values_T: Tensor, target_T: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Target tokens' values with mean 0 and variance 1 over all of them (unbiased, as in PPO's code); 0 elsewhere.

    PPO does so with its advantages, and REINFORCE++ (Hu, 2501.03262) with reward minus KL in place of a critic's. Take
    the whole step's tokens: those of one micro-batch would make the loss depend on how the step is cut. Values that
    are all equal give exactly 0.
    """
    values = values_T[target_T].to(torch.promote_types(values_T.dtype, torch.float32))
    white_T = torch.zeros_like(values_T, dtype=values.dtype)
    if values.numel() < 2 or bool((values == values[0]).all()):
        return white_T
    return white_T.masked_scatter(target_T, (values - values.mean()) * (values.var() + eps).rsqrt())
