"""What a preference loss compares: from the log-probabilities of tokens to one score for a sequence.

A score is a sum of log-probabilities (CPO), a sum of log-ratios to a reference (DPO), the mean of either over tokens
(SimPO, IPO), or a function of it (f-divergences, log-odds, AlphaPO).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.losses.reduce import masked, segment_sum, sequence_sums

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
MAX_EXPONENT = 40.0
"""e^40 can still be squared in float32. Beyond it a score is constant, and so has no gradient."""


def divergence(ratios_P: Tensor, kind: Divergence, *, alpha: float = 0.5) -> Tensor:
    """Scores of f-DPO (Wang et al., 2309.16240): f'(pi / ref) of summed log-ratios r, shifted so that r = 0 scores 0.

    `reverse_kl` r (DPO itself), `forward_kl` 1 - e^-r, `js` log 2 + log s(r), `alpha` (e^((a - 1) r) - 1) / (a - 1),
    which is r in the limit of a = 1. The shift is TRL's since 1.16; it cancels in differences, not in means over
    tokens of unequal number.
    """
    if kind == "reverse_kl" or (kind == "alpha" and alpha == 1):
        return ratios_P
    if kind == "forward_kl":
        return -torch.expm1((-ratios_P).clamp(max=MAX_EXPONENT))
    if kind == "js":
        return math.log(2) + F.logsigmoid(ratios_P)
    if kind == "alpha":
        return torch.expm1(((alpha - 1) * ratios_P).clamp(max=MAX_EXPONENT)) / (alpha - 1)
    raise ValueError(f"divergence: kind is reverse_kl, forward_kl, js or alpha, not {kind!r}")


def log_odds(means_P: Tensor) -> Tensor:
    """log(p / (1 - p)) of the geometric mean p of a sequence's token probabilities (ORPO, Hong et al., 2403.07691).

    `means_P` are means of log-probabilities; one of 0, where p rounds to 1, counts as the largest below 0.
    log(1 - e^x) by expm1 near 0 and by log1p far from it.
    """
    means_P = means_P.clamp(max=-torch.finfo(means_P.dtype).tiny)
    near_P = means_P > -math.log(2)
    # The branch not taken must be finite too, or its gradient of 0 is 0 * inf.
    by_expm1_P = (-torch.expm1(means_P.masked_fill(~near_P, -1.0))).log()
    by_log1p_P = torch.log1p(-means_P.masked_fill(near_P, -1.0).exp())
    return means_P - torch.where(near_P, by_expm1_P, by_log1p_P)


def alpha_length(means_P: Tensor, *, alpha: float) -> Tensor:
    """(1 - e^(-alpha x)) / alpha of means of log-probabilities x (AlphaPO, Gupta et al., 2501.03884); x for 0."""
    if alpha == 0:
        return means_P
    return -torch.expm1((-alpha * means_P).clamp(max=MAX_EXPONENT)) / alpha


def desensitised(logps_T: Tensor, target_T: Tensor, sequence_T: Tensor, *, alpha: float) -> Tensor:
    """`sums_S` of log-probabilities of pairs (sequence 2p is chosen, 2p + 1 rejected) in which every token beyond the
    length of the shorter side counts `alpha` only (LD-DPO, Liu et al., 2409.06411; 1 is DPO). Used for policy and
    reference alike. Each sequence's tokens stand together, in their order.
    """
    _, tokens_S, index_T = sequence_sums(logps_T, target_T, sequence_T)
    tokens_S = F.pad(tokens_S, (0, len(tokens_S) % 2)).long()
    order_T = torch.cumsum(target_T.long(), 0) - 1  # target tokens before this one, over all sequences
    first_S = torch.full_like(tokens_S, len(target_T)).scatter_reduce(0, index_T[target_T], order_T[target_T], "amin")
    shorter_S = tokens_S.view(len(tokens_S) // 2, 2).amin(1).repeat_interleave(2)
    beyond_T = order_T - first_S[index_T] >= shorter_S[index_T]
    logps_T = masked(logps_T, target_T)
    return segment_sum(torch.where(beyond_T, alpha * logps_T, logps_T), index_T, len(tokens_S))


def wpo_weight(logps_T: Tensor, collision_T: Tensor, target_T: Tensor, sequence_T: Tensor, S: int) -> Tensor:
    """`weight_S`, constant: how likely the policy is to write such a sequence itself (WPO, Zhou et al., 2406.11827),
    e to the mean of log p(token) - log sum_v p(v)^2. A pair's loss is multiplied by those of both sides.

    `collision_T` is log sum_v p(v)^2 at each target token. A sequence without one has weight 1.
    """
    sums_S, tokens_S, _ = sequence_sums((logps_T - collision_T).detach(), target_T, sequence_T)
    return F.pad(sums_S / tokens_S.clamp(min=1), (0, S - len(sums_S))).exp()
