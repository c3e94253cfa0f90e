"""Policy gradients from sampled completions: importance ratios, clipping, and the sampler's correction.

Every loss takes the tokens' log-probs now and when the step began, their advantages, which of them carry loss, and the
sequence of each, and returns `loss_T`, 0 at other tokens. Old log-probs and advantages are constants.

Every exponential here is of a log-ratio that is 0 at tokens without loss and lies within +-20 elsewhere. The bound is
ours, not the papers': e^20 is far outside any clip range, and without it float32 overflows to inf at e^88.8, whose
gradient through a clip is 0 * inf = NaN. Beyond the bound the ratio is constant, so its gradient is 0.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from posttrain.losses.reduce import Counts, masked, reduce_tokens, sequence_sums

Level = Literal["token", "sequence", "sequence_token", "product"]
MAX_LOG_RATIO = 20.0


def log_ratio(logps_T: Tensor, other_logps_T: Tensor, target_T: Tensor) -> Tensor:
    """`logps_T - other_logps_T` at target tokens and 0 elsewhere; `other_logps_T` is a constant."""
    return masked(logps_T, target_T) - masked(other_logps_T.detach(), target_T)


def ratio(logps_T: Tensor, old_logps_T: Tensor, target_T: Tensor, sequence_T: Tensor, level: Level = "token") -> Tensor:
    """`ratio_T`, pi / pi_old at target tokens and 1 elsewhere. The gradient flows through `logps_T` alone.

    `token`: each token's own. `sequence`: the geometric mean over the sequence's target tokens, one number that all
    of them carry (GSPO, Zheng et al., 2507.18071). `sequence_token`: the same number, with each token's own gradient,
    so that tokens of one sequence may differ in advantage; where they do not, it is GSPO (GSPO-token, same paper).
    `product`: their product, the ratio of the whole sequence (RLOO, Ahmadian et al., 2402.14740).
    Passing `logps_T` as `old_logps_T` too means exactly on-policy: the value is 1, its gradient that of log pi (of
    the whole sequence's, or its mean, at each of its tokens).
    """
    log_T = log_ratio(logps_T, old_logps_T, target_T)
    if level == "sequence":
        log_T = _whole(log_T, target_T, sequence_T, mean=True)
    elif level == "sequence_token":
        log_T = _whole(log_T, target_T, sequence_T, mean=True).detach() + (log_T - log_T.detach())
    elif level == "product":
        log_T = _whole(log_T, target_T, sequence_T, mean=False)
    elif level != "token":
        raise ValueError(f"ratio: level is token, sequence, sequence_token or product, not {level!r}")
    return _bounded_exp(log_T)


def _whole(log_T: Tensor, target_T: Tensor, sequence_T: Tensor, *, mean: bool) -> Tensor:
    """Each sequence's sum or mean of log-ratios, at all its target tokens; 0 elsewhere."""
    whole_S, tokens_S, index_T = sequence_sums(log_T, target_T, sequence_T)
    if mean:
        whole_S = whole_S / tokens_S.clamp(min=1)
    return masked(whole_S[index_T], target_T)


def _bounded_exp(log_T: Tensor) -> Tensor:
    return log_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _by_sign(advantages_T: Tensor, positive: float, other: float) -> Tensor:
    return torch.full_like(advantages_T, other).masked_fill(advantages_T > 0, positive)


def _bounds(
    advantages_T: Tensor, clip_low: float | None, clip_high: float | None, ratio_cap: float | None
) -> tuple[Tensor, Tensor]:
    """`lower_T, upper_T`: the range outside which the ratio of a token carries no gradient.

    min(w A, clip(w, 1 - low, 1 + high) A) only ever binds on one side: above for A > 0, below for A < 0; the dual
    clip then bounds A < 0 from above. Hence one clamp per token in place of nested minima.
    """
    negative_T = advantages_T < 0
    lower = 0.0 if clip_low is None else 1 - clip_low
    upper = math.inf if clip_high is None else 1 + clip_high
    lower_T = torch.zeros_like(advantages_T).masked_fill(negative_T, lower)
    upper_T = torch.full_like(advantages_T, upper).masked_fill(negative_T, math.inf if ratio_cap is None else ratio_cap)
    return lower_T, upper_T


def policy_gradient(
    logps_T: Tensor,
    old_logps_T: Tensor,
    advantages_T: Tensor,
    target_T: Tensor,
    sequence_T: Tensor,
    *,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    ratio_cap: float | None = None,
    level: Level = "token",
) -> Tensor:
    """`loss_T`, the clipped surrogate -min(w A, clip(w, 1 - clip_low, 1 + clip_high) A) of PPO (1707.06347).

    It is what GRPO (2402.03300) minimises, per target token; 0 at other tokens. `clip_high` above `clip_low` is
    clip-higher (DAPO, 2503.14476); None for both leaves the plain importance-weighted policy gradient. `ratio_cap`
    is the dual clip (Ye et al., 1912.09729): the largest ratio where the advantage is negative; it never touches
    positive advantages. `level` as in `ratio`; `product` goes with the reduction by `sequence`. The reference-model
    penalty is apart, in `kl`.
    """
    advantages_T = masked(advantages_T.detach(), target_T)
    ratio_T = ratio(logps_T, old_logps_T, target_T, sequence_T, level)
    return -advantages_T * ratio_T.clamp(*_bounds(advantages_T, clip_low, clip_high, ratio_cap))


def cispo(
    logps_T: Tensor,
    old_logps_T: Tensor,
    advantages_T: Tensor,
    target_T: Tensor,
    sequence_T: Tensor,
    *,
    cap: float = 5.0,
    level: Level = "token",
) -> Tensor:
    """`loss_T` of CISPO (MiniMax-M1, 2506.13585): -sg(min(w, cap)) A log pi. A ratio that is too large is held, and its
    token still teaches, where PPO's clip takes its gradient away.

    `cap` is the largest weight itself, 5 as in ScaleRL (2510.13786) and TRL (where it is called epsilon_high, and the
    default of 0.2 makes every weight 0.2). By the paper it is 1 + epsilon_high: 1.28, say.
    """
    weight_T = ratio(logps_T.detach(), old_logps_T, target_T, sequence_T, level).clamp(max=cap)
    return -weight_T * masked(advantages_T.detach(), target_T) * masked(logps_T, target_T)


def sapo(
    logps_T: Tensor,
    old_logps_T: Tensor,
    advantages_T: Tensor,
    target_T: Tensor,
    sequence_T: Tensor,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    level: Level = "token",
) -> Tensor:
    """`loss_T` of soft adaptive policy optimisation (Gao et al., 2511.20347): -(4 / tau) s(tau (w - 1)) A, a gate that
    closes smoothly where PPO's clip cuts; its gradient at w = 1 is that of the plain ratio. It closes faster, with the
    larger tau, where the advantage is not positive."""
    advantages_T = masked(advantages_T.detach(), target_T)
    tau_T = _by_sign(advantages_T, tau_positive, tau_negative)
    gate_T = torch.sigmoid(tau_T * (ratio(logps_T, old_logps_T, target_T, sequence_T, level) - 1))
    return -advantages_T * 4 / tau_T * gate_T


def gmpo(
    logps_T: Tensor,
    old_logps_T: Tensor,
    advantages_T: Tensor,
    target_T: Tensor,
    sequence_T: Tensor,
    *,
    clip: float = 0.4,
) -> Tensor:
    """`loss_T` of geometric-mean policy optimisation (Zhao et al., 2507.20673): -A exp(mean_t log w_t), each log w_t
    held within +-`clip` on the side on which PPO's clip binds. Every token carries its sequence's loss: reduce it by
    `sequence`.
    """
    advantages_T = masked(advantages_T.detach(), target_T)
    log_T = log_ratio(logps_T, old_logps_T, target_T)
    held_T = torch.where(advantages_T > 0, log_T.clamp(max=clip), log_T.clamp(min=-clip))
    return -advantages_T * _bounded_exp(_whole(held_T, target_T, sequence_T, mean=True))


def vespo(
    logps_T: Tensor,
    old_logps_T: Tensor,
    advantages_T: Tensor,
    target_T: Tensor,
    sequence_T: Tensor,
    *,
    positive: tuple[float, float] = (2.0, 3.0),
    negative: tuple[float, float] = (3.0, 2.0),
) -> Tensor:
    """`loss_T` of VESPO (2602.10693): -sg(phi) A log pi, phi = w^k e^(b - b w), w the ratio of the whole sequence: a
    weight that is 1 at w = 1, largest at w = k / b, and goes to 0 on either side smoothly, with no clip.

    `positive` and `negative` are (k, b) by the sign of the advantage (one of 0 teaches nothing). log w is held in
    [log 1e-8, 20], each token's part of it in +-20, as in TRL.
    """
    advantages_T = masked(advantages_T.detach(), target_T)
    log_T = log_ratio(logps_T.detach(), old_logps_T, target_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    log_T = _whole(log_T, target_T, sequence_T, mean=False).clamp(math.log(1e-8), MAX_LOG_RATIO)
    k_T, b_T = (_by_sign(advantages_T, p, n) for p, n in zip(positive, negative, strict=True))
    phi_T = (k_T * log_T + b_T - b_T * log_T.exp()).exp()
    return -phi_T * advantages_T * masked(logps_T, target_T)


def entropy_bonus(entropies_T: Tensor, target_T: Tensor) -> Tensor:
    """`loss_T`, minus the entropy of each target token's distribution, nats. Added to a policy's loss, with a small
    weight, it keeps the policy from settling too early (Williams & Peng, 1991)."""
    return -masked(entropies_T, target_T)


@torch.no_grad()
def clipped_share(
    logps_T: Tensor,
    old_logps_T: Tensor,
    advantages_T: Tensor,
    target_T: Tensor,
    sequence_T: Tensor,
    counts: Counts,
    *,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    ratio_cap: float | None = None,
    level: Level = "token",
) -> Tensor:
    """This micro-batch's part of the share of the step's target tokens whose gradient `policy_gradient` cuts off."""
    advantages_T = masked(advantages_T, target_T)
    ratio_T = ratio(logps_T, old_logps_T, target_T, sequence_T, level)
    lower_T, upper_T = _bounds(advantages_T, clip_low, clip_high, ratio_cap)
    clipped_T = (advantages_T != 0) & ((ratio_T < lower_T) | (ratio_T > upper_T))
    return reduce_tokens(clipped_T.to(ratio_T.dtype), target_T, counts)


@torch.no_grad()
def importance(
    logps_T: Tensor,
    sampler_logps_T: Tensor,
    target_T: Tensor,
    *,
    how: Literal["truncate", "mask", "none"] = "truncate",
    cap: float = 2.0,
) -> Tensor:
    """`weight_T`, a constant factor for the loss where sampler and trainer give one token different log-probs.

    w = exp(logps - sampler_logps), `logps_T` being the trainer's under the weights that sampled. `truncate`:
    min(w, cap) (Ionides 2008; applied to this mismatch by Yao et al. 2025). `mask`: w, and 0 where it is above the
    cap. `none`: 1. Per token, as the per-token loss is; 1 at tokens without loss.
    """
    weight_T = _bounded_exp(log_ratio(logps_T, sampler_logps_T, target_T))
    if how == "truncate":
        return weight_T.clamp(max=cap)
    if how == "mask":
        return weight_T.masked_fill(weight_T > cap, 0.0)
    if how == "none":
        return torch.ones_like(weight_T)
    raise ValueError(f"importance: how is truncate, mask or none, not {how!r}")
