"""Losses of models that score: whole answers, steps of an answer, and what is still to come (a critic)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.losses.reduce import masked


def bradley_terry(
    chosen_P: Tensor, rejected_P: Tensor, *, margin_P: Tensor | float = 0.0, centring: float = 0.0
) -> Tensor:
    """`loss_P` of a reward model (Bradley & Terry 1952; Ouyang et al., 2203.02155): -log s(chosen - rejected).

    Both are rewards, one number for each completion. With `margin_P` the chosen one must win by that much (Llama 2,
    2307.09288). The loss says nothing of where the rewards lie; `centring` c adds c (chosen + rejected)^2, which
    draws them to a mean of 0 (Eisenstein et al., 2312.09244, with c = 0.01).
    """
    return -F.logsigmoid(chosen_P - rejected_P - margin_P) + centring * (chosen_P + rejected_P).square()


def process_reward(logits_T: Tensor, labels_T: Tensor, target_T: Tensor) -> Tensor:
    """`loss_T` at the last token of each step: cross-entropy with the chance in `labels_T` that the step is good
    (Lightman et al., 2305.20050, with labels 0 and 1; Wang et al., 2312.08935, with the share of rollouts that
    succeed). `logits_T` is one number a token, log-odds; TRL's old PRM has two, of which this is the difference.
    """
    logits_T, labels_T = masked(logits_T, target_T), masked(labels_T, target_T)
    return masked(F.binary_cross_entropy_with_logits(logits_T, labels_T, reduction="none"), target_T)


def value(
    values_T: Tensor, old_values_T: Tensor, returns_T: Tensor, target_T: Tensor, *, clip: float | None = 0.2
) -> Tensor:
    """`loss_T` of PPO's critic, half the squared error to the returns, of the value or of the value held within
    +-`clip` of what it was when the rollouts were scored, whichever is worse (Schulman et al., 1707.06347, as
    OpenAI's baselines have it)."""
    values_T, old_T, returns_T = (masked(x, target_T) for x in (values_T, old_values_T.detach(), returns_T.detach()))
    loss_T = (values_T - returns_T).square()
    if clip is not None:
        held_T = old_T + (values_T - old_T).clamp(-clip, clip)
        loss_T = torch.maximum(loss_T, (held_T - returns_T).square())
    return loss_T / 2
