"""Advantages of completions relative to the others of their group."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from posttrain.records import UserError


def finite_rewards(rewards_PG: Tensor) -> Tensor:
    """The rewards in float32 or better; NaN, which is unscored, is among what is allowed.

    Raises:
        UserError: one is infinite.
    """
    if rewards_PG.isinf().any():
        where = ", ".join(f"prompt {p} completion {g}" for p, g in rewards_PG.isinf().nonzero()[:3].tolist())
        raise UserError(f"infinite reward ({where}): a reward is a finite number, or no value where it cannot score")
    return rewards_PG.to(torch.promote_types(rewards_PG.dtype, torch.float32))


def group_advantages(
    rewards_PG: Tensor, *, std: Literal["group", "batch", "none"] = "group", eps: float = 1e-4
) -> Tensor:
    """`advantages_PG` of G completions for each of P prompts: (reward - group mean) / (std + eps).

    `std` (always the unbiased, n - 1, one): that of the `group` (GRPO, 2402.03300), that of all rewards of the
    `batch` (the mean stays the group's), or `none`, no division (Dr. GRPO, 2503.20783).
    NaN means unscored: it counts in no mean or deviation and gets advantage 0. A group with fewer than two scored
    completions, or whose scores are all equal, gets exactly 0 and so needs no forward pass.
    """
    rewards_PG = finite_rewards(rewards_PG)
    scored_PG = ~rewards_PG.isnan()
    scored_P = scored_PG.sum(dim=1, keepdim=True)
    mean_P = rewards_PG.nansum(dim=1, keepdim=True) / scored_P.clamp(min=1)
    # Compared rather than subtracted: the rounded mean of equal rewards may differ from them.
    low_P = rewards_PG.nan_to_num(nan=torch.inf).amin(dim=1, keepdim=True)
    high_P = rewards_PG.nan_to_num(nan=-torch.inf).amax(dim=1, keepdim=True)
    signal_PG = scored_PG & (low_P < high_P)
    centred_PG = (rewards_PG - mean_P).masked_fill(~signal_PG, 0.0)
    if std == "group":
        variance_P = centred_PG.square().sum(dim=1, keepdim=True) / (scored_P - 1).clamp(min=1)
        return centred_PG / (variance_P.sqrt() + eps)
    if std == "batch":
        rewards = rewards_PG[scored_PG]
        return centred_PG / (rewards.std() + eps) if rewards.numel() > 1 else centred_PG
    if std == "none":
        return centred_PG
    raise ValueError(f"group_advantages: std is group, batch or none, not {std!r}")
