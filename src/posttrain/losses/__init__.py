"""Losses: pure functions, tensors in, one value per token, sequence or pair out; `reduce` alone makes them a scalar.

Shapes: T tokens of a packed row, S sequences, P pairs, K ranked completions, N target tokens, V vocabulary. `target_T`
(bool) marks the tokens that carry loss, `sequence_T` (long) names the sequence each belongs to. Log-probs are in nats,
float32; float64 stays float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from posttrain.losses.distil import jsd, kl_divergence
from posttrain.losses.kl import kl
from posttrain.losses.listwise import lipo, pro, rrhf
from posttrain.losses.online import nash_md, xpo
from posttrain.losses.policy import (
    cispo,
    clipped_share,
    entropy_bonus,
    gmpo,
    importance,
    policy_gradient,
    ratio,
    sapo,
    vespo,
)
from posttrain.losses.preference import (
    aot,
    apo_down,
    apo_zero,
    bco,
    discopop,
    exo,
    hinge,
    ipo,
    logistic,
    nca,
    robust,
    sppo,
)
from posttrain.losses.reduce import Counts, reduce, reduce_pairs, reduce_tokens, segment_sum
from posttrain.losses.reward import bradley_terry, process_reward, value
from posttrain.losses.scores import alpha_length, desensitised, divergence, log_odds, wpo_weight
from posttrain.losses.sft import dft, nll
from posttrain.losses.unpaired import apo_zero_unpaired, bco_unpaired, kto, kto_kl, running_mean

__all__ = [
    "TABLE",
    "Counts",
    "Entry",
    "alpha_length",
    "aot",
    "apo_down",
    "apo_zero",
    "apo_zero_unpaired",
    "bco",
    "bco_unpaired",
    "bradley_terry",
    "cispo",
    "clipped_share",
    "desensitised",
    "dft",
    "discopop",
    "divergence",
    "entropy_bonus",
    "exo",
    "gmpo",
    "hinge",
    "importance",
    "ipo",
    "jsd",
    "kl",
    "kl_divergence",
    "kto",
    "kto_kl",
    "lipo",
    "log_odds",
    "logistic",
    "nash_md",
    "nca",
    "nll",
    "policy_gradient",
    "pro",
    "process_reward",
    "ratio",
    "reduce",
    "reduce_pairs",
    "reduce_tokens",
    "robust",
    "rrhf",
    "running_mean",
    "sapo",
    "segment_sum",
    "sppo",
    "value",
    "vespo",
    "wpo_weight",
    "xpo",
]


class Entry(NamedTuple):
    """A loss, or a method of which this is the loss."""

    function: Callable[..., Tensor]
    """What computes the loss, or the score or weight that makes the method, with the settings of its paper; the
    function itself has those that its kind has in common (a `beta` of 0.1 for all pairs, as in TRL)."""
    summary: str
    """For preferences: what the two sides score. For policies: how the tokens are reduced, where it is the method."""
    paper: str


TABLE: dict[str, Entry] = {
    # Demonstrations
    "nll": Entry(nll, "Negative log-likelihood of each target token", "maximum likelihood"),
    "dft": Entry(dft, "Likelihood weighted by the token's own probability", "Wu et al., 2508.05629"),
    # Pairs against a reference: scores are summed log-ratios, or their means over tokens
    "dpo": Entry(logistic, "Logistic loss on summed log-ratios", "Rafailov et al., 2305.18290"),
    "cdpo": Entry(
        partial(logistic, label_smoothing=0.1), "DPO that takes a share of labels for flipped", "Mitchell 2023"
    ),
    "robust": Entry(
        partial(robust, beta=0.01), "DPO, unbiased under a share of flipped labels", "Chowdhury et al., 2403.00409"
    ),
    "hinge": Entry(
        partial(hinge, beta=0.05), "Hinge on summed log-ratios", "Zhao et al., 2305.10425; Liu et al., 2309.06657"
    ),
    "ipo": Entry(ipo, "A margin to reach, on means of log-ratios", "Azar et al., 2310.12036"),
    "exo": Entry(exo, "Reverse KL to the labels, on summed log-ratios", "Ji et al., 2402.00856"),
    "nca": Entry(partial(nca, beta=0.01), "Noise contrast of each side with the reference", "Chen et al., 2402.05369"),
    "bco": Entry(partial(bco, beta=0.01), "Each side classified on its own", "Jung et al., 2404.04656"),
    "sppo": Entry(
        partial(sppo, beta=1e-3), "Self-play with hard labels: each side to its target", "Wu et al., 2405.00675"
    ),
    "aot": Entry(aot, "Optimal transport: chosen dominate rejected log-ratios, sorted", "Melnyk et al., 2406.05882"),
    "aot_paired": Entry(aot, "The same on margins, of the policy and of the reference", "Melnyk et al., 2406.05882"),
    "apo_zero": Entry(apo_zero, "Anchored: chosen up, rejected down", "D'Oosterlinck et al., 2408.06266"),
    "apo_down": Entry(apo_down, "Anchored: both down, rejected more", "D'Oosterlinck et al., 2408.06266"),
    "discopop": Entry(
        partial(discopop, beta=0.05), "Logistic and exponential, mixed by the margin", "Lu et al., 2406.08414"
    ),
    "dpo_norm": Entry(
        partial(logistic, beta=5.0), "Logistic loss on means of log-ratios", "Lambert et al., 2411.15124"
    ),
    "ld_dpo": Entry(
        partial(desensitised, alpha=0.5), "Scores of DPO with less weight on surplus length", "Liu et al., 2409.06411"
    ),
    "wpo": Entry(wpo_weight, "Weight of a pair by how likely the policy is to write it", "Zhou et al., 2406.11827"),
    "f_dpo": Entry(
        partial(divergence, kind="forward_kl"), "Scores of DPO under other divergences", "Wang et al., 2309.16240"
    ),
    # Pairs without a reference: scores are log-probabilities
    "cpo": Entry(logistic, "Logistic loss on summed log-probs, with nll of the chosen", "Xu et al., 2401.08417"),
    "simpo": Entry(
        partial(logistic, beta=2.0, gamma=1.0),
        "Logistic loss with a margin, on mean log-probs",
        "Meng et al., 2405.14734",
    ),
    "alphapo": Entry(partial(alpha_length, alpha=0.25), "Scores of SimPO, bent by alpha", "Gupta et al., 2501.03884"),
    "orpo": Entry(log_odds, "Scores for a logistic loss of beta 1, with nll of the chosen", "Hong et al., 2403.07691"),
    "tpo": Entry(
        partial(logistic, beta=0.01),
        "Logistic loss on summed log-probs, with nll of a third, best answer",
        "Saeidi et al., 2405.16681",
    ),
    # Single completions, good or bad
    "kto": Entry(kto, "Prospect theory's utility of a log-ratio above the mean", "Ethayarajh et al., 2402.01306"),
    "apo_zero_unpaired": Entry(
        apo_zero_unpaired, "Anchored, without pairs: good up, bad down", "D'Oosterlinck et al., 2408.06266"
    ),
    "bco_unpaired": Entry(
        partial(bco_unpaired, beta=0.01), "Classifier of good and bad, with a running shift", "Jung et al., 2404.04656"
    ),
    # Ranked lists
    "rrhf": Entry(rrhf, "Hinge between all pairs of a list, on mean log-probs", "Yuan et al., 2304.05302"),
    "pro": Entry(pro, "Plackett-Luce likelihood of a ranking, on mean log-probs", "Song et al., 2306.17492"),
    "lipo": Entry(lipo, "LambdaRank between all pairs, on summed log-ratios", "Liu et al., 2402.01878"),
    # Models that score
    "bradley_terry": Entry(
        bradley_terry, "Reward model on preference pairs, with margin and centring", "Ouyang et al., 2203.02155"
    ),
    "process_reward": Entry(process_reward, "Cross-entropy at the end of each step", "Lightman et al., 2305.20050"),
    "value": Entry(value, "Clipped squared error of a critic", "Schulman et al., 1707.06347"),
    # Policies, on sampled completions
    "ppo": Entry(policy_gradient, "Clipped policy gradient; advantages by `credit.gae`", "Schulman et al., 1707.06347"),
    "grpo": Entry(policy_gradient, "The same on group advantages, mean of sequence means", "Shao et al., 2402.03300"),
    "bnpo": Entry(policy_gradient, "GRPO reduced by the step's tokens (TRL: the micro-batch's)", "TRL, loss_type bnpo"),
    "dr_grpo": Entry(policy_gradient, "GRPO without std, reduced by a constant", "Liu et al., 2503.20783"),
    "dapo": Entry(
        partial(policy_gradient, clip_high=0.28), "GRPO with clip-higher, reduced by tokens", "Yu et al., 2503.14476"
    ),
    "cispo": Entry(cispo, "Policy gradient with capped, constant ratios", "MiniMax, 2506.13585"),
    "sapo": Entry(sapo, "A smooth gate in place of the clip", "Gao et al., 2511.20347"),
    "gspo": Entry(
        partial(policy_gradient, level="sequence", clip_low=3e-4, clip_high=4e-4),
        "One ratio per sequence, its mean",
        "Zheng et al., 2507.18071",
    ),
    "gspo_token": Entry(
        partial(policy_gradient, level="sequence_token", clip_low=3e-4, clip_high=4e-4),
        "GSPO with each token's own advantage",
        "Zheng et al., 2507.18071",
    ),
    "luspo": Entry(
        partial(policy_gradient, level="sequence"), "GSPO, sums over sequences: by a constant of 1", "2602.05261"
    ),
    "gmpo": Entry(
        gmpo, "Geometric mean of ratios clipped in log space, reduced by sequence", "Zhao et al., 2507.20673"
    ),
    "vespo": Entry(vespo, "A smooth weight by the ratio of the whole sequence", "2602.10693"),
    "rloo": Entry(
        partial(policy_gradient, level="product"),
        "REINFORCE on `credit.leave_one_out`, reduced by sequence",
        "Ahmadian et al., 2402.14740",
    ),
    "reinforce_pp": Entry(policy_gradient, "REINFORCE++: no critic, advantages by `credit.whiten`", "Hu, 2501.03262"),
    "entropy": Entry(entropy_bonus, "Bonus for not settling too early", "Williams & Peng 1991"),
    "kl": Entry(kl, "Penalty for leaving the reference: estimators k1, k2, k3", "Schulman 2020"),
    # From a teacher
    "jsd": Entry(jsd, "Generalised Jensen-Shannon divergence (GKD)", "Agarwal et al., 2306.13649"),
    "forward_kl": Entry(
        partial(jsd, beta=0.0), "KL(teacher, student): covers what the teacher says", "Hinton et al., 1503.02531"
    ),
    "reverse_kl": Entry(
        partial(jsd, beta=1.0), "KL(student, teacher): says what the teacher would", "Gu et al., 2306.08543"
    ),
    "minillm": Entry(
        policy_gradient,
        "Policy gradient of KL(student, teacher); advantages by `credit.minillm`",
        "Gu et al., 2306.08543",
    ),
    # From preferences between samples of now
    "online_dpo": Entry(logistic, "DPO on two samples that a judge ranks", "Guo et al., 2402.04792"),
    "nash_md": Entry(
        nash_md, "Policy gradient of the win rate against a mixture with the reference", "Munos et al., 2312.00886"
    ),
    "xpo": Entry(xpo, "Online DPO with a bonus for leaving what is known", "Xie et al., 2405.21046"),
}
"""What `posttrain losses` lists."""
