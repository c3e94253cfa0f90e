"""From per-token or per-pair losses to the scalar that is differentiated. The only place that divides by a count.

The counts are those of the whole optimiser step, over all micro-batches and workers. Each micro-batch's scalar is
its part of the step's loss, and the parts add up to the loss of one big batch, however the step was cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Reduction = Literal["token", "sequence", "constant"]


@dataclass(frozen=True, slots=True)
class Counts:
    """What one optimiser step holds, over all its micro-batches and workers."""

    tokens: int = 0
    """Target tokens."""
    sequences: int = 0
    """Sequences with at least one target token."""
    pairs: int = 0


def segment_sum(values_T: Tensor, sequence_T: Tensor, S: int) -> Tensor:
    """`values_S`: the sum of the values of each of S sequences (0 for one without tokens)."""
    return values_T.new_zeros(S).index_add(0, sequence_T, values_T)


def masked(values_T: Tensor, target_T: Tensor) -> Tensor:
    """The values at target tokens and 0 elsewhere, in float32 or better.

    Selects, never multiplies: what stands at other tokens, be it inf or NaN, reaches neither value nor gradient.
    """
    return values_T.to(torch.promote_types(values_T.dtype, torch.float32)).masked_fill(~target_T, 0.0)


def sequence_sums(values_T: Tensor, target_T: Tensor, sequence_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`sums_S, tokens_S, index_T`: each sequence's sum over its target tokens, their number, and the S of each token.

    Only target tokens need a sequence: the index of any other token (a prompt that several completions share, say)
    is ignored, and reads 0 in the index that is returned.
    """
    index_T = sequence_T.masked_fill(~target_T, 0)
    S = int(index_T.max()) + 1 if index_T.numel() else 0
    values_T = masked(values_T, target_T)
    tokens_S = segment_sum(target_T.to(values_T.dtype), index_T, S)
    return segment_sum(values_T, index_T, S), tokens_S, index_T


def reduce_tokens(
    loss_T: Tensor,
    target_T: Tensor,
    counts: Counts,
    *,
    how: Reduction = "token",
    sequence_T: Tensor | None = None,
    constant: float | None = None,
) -> Tensor:
    """This micro-batch's part of the step's loss, a scalar.

    `token`: the mean over the step's target tokens; long sequences weigh more (SFT; DAPO, 2503.14476).
    `sequence`: the mean over the step's sequences of each one's own token mean (GRPO, 2402.03300). `sequence_T` is
    needed, and a sequence must not be split over micro-batches.
    `constant`: the mean over sequences of each one's token sum divided by `constant`, usually the longest allowed
    completion, so that length carries no weight of its own (Dr. GRPO, 2503.20783); 1 is the sum (LUSPO, 2602.05261).

    A step without targets gives 0, still attached to the graph.
    """
    if how == "token":
        return masked(loss_T, target_T).sum() / max(counts.tokens, 1)
    if how == "sequence":
        if sequence_T is None:
            raise ValueError("reduce_tokens: how='sequence' needs sequence_T")
        sums_S, tokens_S, _ = sequence_sums(loss_T, target_T, sequence_T)
        return (sums_S / tokens_S.clamp(min=1)).sum() / max(counts.sequences, 1)
    if how == "constant":
        if constant is None or constant <= 0:
            raise ValueError(f"reduce_tokens: how='constant' needs a positive constant, not {constant}")
        return masked(loss_T, target_T).sum() / (max(counts.sequences, 1) * constant)
    raise ValueError(f"reduce_tokens: how is token, sequence or constant, not {how!r}")


class Reducible(Protocol):
    """Tokens that know which of them carry loss, whose they are, and what their loss is divided by."""

    @property
    def target_T(self) -> Tensor: ...
    @property
    def sequence_T(self) -> Tensor: ...
    @property
    def counts(self) -> Counts: ...


def reduce(loss_T: Tensor, batch: Reducible, *, how: Reduction = "token", constant: float | None = None) -> Tensor:
    """`reduce_tokens` of a batch."""
    return reduce_tokens(loss_T, batch.target_T, batch.counts, how=how, sequence_T=batch.sequence_T, constant=constant)


def reduce_pairs(loss_P: Tensor, counts: Counts) -> Tensor:
    """This micro-batch's part of the mean over the step's pairs, a scalar; 0, attached to the graph, without pairs."""
    return loss_P.sum() / max(counts.pairs, 1)
