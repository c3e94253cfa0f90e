"""Losses over K ranked completions of each of P prompts: `scores_PK`, and `rewards_PK` that say which is better.

`scores_PK` are what the policy gives them: means of log-probabilities (RRHF, PRO), or beta times summed log-ratios to a
reference (LiPO). NaN in `rewards_PK` marks a place that holds no completion; what it scores is not read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _better(rewards_PK: Tensor) -> Tensor:
    """`better_PKK` (bool): whether completion i of a prompt has a higher reward than completion j. NaN has neither."""
    return rewards_PK[:, :, None] > rewards_PK[:, None, :]


def rrhf(scores_PK: Tensor, rewards_PK: Tensor) -> Tensor:
    """`loss_P`: the sum of max(0, score_j - score_i) over all i better than j (Yuan et al., 2304.05302). The paper adds
    the negative log-likelihood of the best completion, which is `nll`."""
    scores_PK = scores_PK.masked_fill(rewards_PK.isnan(), 0.0)
    gaps_PKK = (scores_PK[:, None, :] - scores_PK[:, :, None]).relu()
    return gaps_PKK.masked_fill(~_better(rewards_PK), 0.0).sum((1, 2))


def pro(scores_PK: Tensor, rewards_PK: Tensor, *, temperature: float = 1.0) -> Tensor:
    """`loss_P` of preference ranking optimisation (Song et al., 2306.17492): the best completion against all worse
    ones in one softmax, then the second best, and so on, as by Plackett and Luce.

    Scores are divided by `temperature`; the paper's own, by differences of rewards, is not here. Completions that no
    other is worse than give nothing. Of equally good ones each stands against those below it.
    """
    scores_PK = scores_PK.masked_fill(rewards_PK.isnan(), 0.0) / temperature
    own_KK = torch.eye(scores_PK.shape[1], dtype=torch.bool, device=scores_PK.device)
    better_PKK = _better(rewards_PK)
    logits_PKK = scores_PK[:, None, :].masked_fill(~(better_PKK | own_KK), float("-inf"))
    return (logits_PKK.logsumexp(2) - scores_PK).masked_fill(~better_PKK.any(2), 0.0).sum(1)


def lipo(scores_PK: Tensor, rewards_PK: Tensor) -> Tensor:
    """`loss_P` of LiPO-lambda (Liu et al., 2402.01878): the sum over i better than j of
    |2^r_i - 2^r_j| |1 / log(1 + rank_i) - 1 / log(1 + rank_j)| log(1 + e^-(s_i - s_j)), with the ranks that the scores
    give (1 the highest), constant. `rewards_PK` are the paper's labels r in [0, 1], where they are shares of wins over
    the others of the list.

    Equal scores rank in their order, so that a policy that is still its own reference, where all are 0, can learn.
    """
    empty_PK = rewards_PK.isnan()
    scores_PK = scores_PK.masked_fill(empty_PK, 0.0)
    order_PK = scores_PK.detach().masked_fill(empty_PK, float("-inf")).argsort(dim=1, descending=True, stable=True)
    discount_PK = 1 / (order_PK.argsort(dim=1) + 2).to(scores_PK.dtype).log()
    gain_PK = rewards_PK.masked_fill(empty_PK, 0.0).to(scores_PK.dtype).exp2()
    delta_PKK = (gain_PK[:, :, None] - gain_PK[:, None, :]).abs()
    delta_PKK = delta_PKK * (discount_PK[:, :, None] - discount_PK[:, None, :]).abs()
    lost_PKK = -F.logsigmoid(scores_PK[:, :, None] - scores_PK[:, None, :])
    return (delta_PKK * lost_PKK).masked_fill(~_better(rewards_PK), 0.0).sum((1, 2))
