"""From logits to a token: temperature, cuts, and a draw that does not depend on the rest of the batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from posttrain.recipe.blocks import Sampling
from posttrain.records import Failure

BLOCK = 128
"""Tokens of a block in the cumulative sum over the vocabulary; it divides most vocabularies in use."""


def uniforms(seed: int, group: int, index: int, length: int) -> Tensor:
    """[length] uniform numbers in [0, 1): the private random stream of completion `index` of prompt `group`."""
    return torch.from_numpy(np.random.default_rng([seed, group, index]).random(length))


def choose(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token a row, and its log-probability under the temperature alone, before the cuts.

    Args:
        logits_BV: as the model gave them.
        uniform_B: one number in [0, 1) a row; the token is where the cumulative probability passes it.

    Returns:
        ids_B and logps_B (float32, nats). Greedy decoding (temperature 0) reports log-probabilities at 1.

    Raises:
        Failure: a row of logits holds NaN, or an infinity for its largest.
    """
    logits_BV = logits_BV.float()
    if sampling.temperature not in (0, 1):
        logits_BV = logits_BV / sampling.temperature
    top_B1, best_B1 = logits_BV.max(-1, keepdim=True)
    mass_BV = (logits_BV - top_B1).exp_()
    sum_B = mass_BV.sum(-1)
    if not sum_B.isfinite().all():
        raise Failure(
            "the model's logits are NaN or infinite, so no token can be drawn from them: its weights are damaged. Load "
            "them again, or go on from an earlier checkpoint"
        )
    ids_B = best_B1.squeeze(1) if sampling.temperature == 0 else _draw(cut(mass_BV, sampling), uniform_B)
    return ids_B, (logits_BV.gather(1, ids_B[:, None]) - top_B1).squeeze(1) - sum_B.log()


def _draw(mass_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The first token in each row at which the cumulative mass exceeds `uniform` times the whole.

    Sums over blocks tell in which block that is, so that only one block a row is summed up token by token.
    """
    B, V = mass_BV.shape
    if V % BLOCK:
        mass_BV = pad(mass_BV, (0, -V % BLOCK))
    mass_BNK = mass_BV.view(B, -1, BLOCK)
    mass_BN = mass_BNK.sum(-1).double()
    until_BN = mass_BN.cumsum(-1)
    target_B1 = uniform_B.double()[:, None] * until_BN[:, -1:]
    # right=True: the first sum above the draw, so that a block or token without mass is never it. A draw that is
    # rounded up to the whole mass belongs to the last one that has any.
    block_B1 = torch.minimum(torch.searchsorted(until_BN, target_B1, right=True), _last(until_BN))
    inside_BK = mass_BNK.gather(1, block_B1[..., None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(-1)
    into_B1 = (target_B1 - (until_BN - mass_BN).gather(1, block_B1)).clamp_(min=0)
    token_B1 = torch.minimum(torch.searchsorted(inside_BK, into_B1, right=True), _last(inside_BK))
    return (block_B1 * BLOCK + token_B1).squeeze(1)


def _last(sums_BN: Tensor) -> Tensor:
    """[B, 1]: where a row of growing sums reaches its end, the last entry that added anything."""
    return torch.searchsorted(sums_BN, sums_BN[:, -1:].contiguous())


def cut(p_BV: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities with those outside top-k, then top-p, then min-p set to 0; not renormalised.

    Anything in proportion to probabilities will do.
    """
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
