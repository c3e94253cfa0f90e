"""From logits to a token: temperature, cuts, and a draw that does not depend on the rest of the batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from posttrain.recipe.schema import Sampling


def draws(seed: int, group: int, index: int, length: int) -> Tensor:
    """[length] uniform numbers in [0, 1): the private random stream of completion `index` of prompt `group`."""
    return torch.from_numpy(np.random.default_rng([seed, group, index]).random(length))


def choose(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token a row, and its log-probability under the temperature alone, before the cuts.

    Args:
        logits_BV: as the model gave them.
        uniform_B: one number in [0, 1) a row; the token is where the cumulative probability passes it.

    Returns:
        ids_B and logps_B (float32, nats). Greedy decoding (temperature 0) reports log-probabilities at 1.
    """
    logits_BV = logits_BV.float()
    if sampling.temperature == 0:
        ids_B = logits_BV.argmax(-1)
        return ids_B, _logps(logits_BV, ids_B)
    logits_BV = logits_BV / sampling.temperature
    p_BV = cut(logits_BV.softmax(-1), sampling)
    cdf_BV = p_BV.cumsum(-1)
    # right=True: the first token whose cumulative mass exceeds the draw, so one of probability 0 is never it.
    ids_B = torch.searchsorted(cdf_BV, uniform_B.to(cdf_BV.dtype)[:, None] * cdf_BV[:, -1:], right=True).squeeze(1)
    last_B = cdf_BV.shape[1] - 1 - (p_BV > 0).flip(-1).int().argmax(-1)
    ids_B = torch.minimum(ids_B, last_B)  # a draw rounded up to the whole mass
    return ids_B, _logps(logits_BV, ids_B)


def cut(p_BV: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities with those outside top-k, then top-p, then min-p set to 0; not renormalised."""
    if 0 < sampling.top_k < p_BV.shape[1]:
        least = p_BV.topk(sampling.top_k).values[:, -1:]
        p_BV = p_BV.masked_fill(p_BV < least, 0.0)
    if sampling.top_p < 1:
        sorted_BV, order_BV = p_BV.sort(-1, descending=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        out_BV = before_BV >= sampling.top_p * sorted_BV.sum(-1, keepdim=True)
        p_BV = p_BV.masked_fill(torch.zeros_like(out_BV).scatter(1, order_BV, out_BV), 0.0)
    if sampling.min_p > 0:
        p_BV = p_BV.masked_fill(p_BV < sampling.min_p * p_BV.amax(-1, keepdim=True), 0.0)
    return p_BV


def _logps(logits_BV: Tensor, ids_B: Tensor) -> Tensor:
    return logits_BV.gather(1, ids_B[:, None]).squeeze(1) - logits_BV.logsumexp(-1)
