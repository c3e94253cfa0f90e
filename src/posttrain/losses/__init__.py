"""Losses: pure functions, tensors in, one value per token, sequence or pair out; `reduce` alone turns them into a scalar.

Shapes: T tokens of a packed row, S sequences, P pairs, K ranked completions, N target tokens, V vocabulary. `target_T`
(bool) marks the tokens that carry loss, `sequence_T` (long) names the sequence each belongs to. Log-probs are in nats,
float32; float64 stays float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from posttrain.losses.distil import jsd, kl_divergence
from posttrain.losses.kl import kl
from posttrain.losses.listwise import lipo, pro, rrhf
from posttrain.losses.online import nash_md, xpo
from posttrain.losses.policy import (
    cispo,
    clipped_share,
    gmpo,
    gspo_token,
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
    "bradley_terry",
    "clipped_share",
    "dpo",
    "importance",
    "kl",
    "nll",
    "policy_gradient",
    "ratio",
    "reduce",
    "reduce_pairs",
    "reduce_tokens",
    "segment_sum",
]


class Entry(NamedTuple):
    function: Callable[..., Tensor]
    summary: str
    paper: str


TABLE: dict[str, Entry] = {
    "nll": Entry(nll, "Negative log-likelihood of each target token", "maximum likelihood"),
    "dpo": Entry(
        dpo, "Preference pairs against a frozen reference; cDPO with label smoothing", "Rafailov et al., 2305.18290"
    ),
    "bradley_terry": Entry(
        bradley_terry, "Reward model on preference pairs, with margin and centring", "Ouyang et al., 2203.02155"
    ),
    "policy_gradient": Entry(
        policy_gradient,
        "Clipped policy gradient of PPO and GRPO; GSPO with one ratio per sequence",
        "Shao et al., 2402.03300",
    ),
    "kl": Entry(kl, "Penalty for leaving the reference: estimators k1, k2, k3", "Schulman 2020"),
}
"""What `posttrain losses` lists."""
