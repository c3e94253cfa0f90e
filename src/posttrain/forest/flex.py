"""The same attention over a forest in one fused kernel: PyTorch's FlexAttention (Dong et al., 2412.05496).

`Tree` makes a few products a segment, which suits a CPU; a GPU wants one call a layer. FlexAttention takes the
pattern as a function of two token indices, and a block mask that says which 128 x 128 blocks of it are empty and
need no work, or full and need no test. Which token sees which is answered in constant time from the segments'
numbers in a depth-first walk.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from posttrain.forest.attention import Scoring
from posttrain.forest.tree import Forest


class Flex:
    """A `Layout` for a forest. Compiled on CUDA; elsewhere FlexAttention's plain implementation, which is an oracle:
    it makes all T x T scores.
    """

    def __init__(self, forest: Forest) -> None:
        self.forest = forest

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        scale, window, softcap, sinks = scoring
        out, aux = (compiled() if query.is_cuda else flex_attention)(
            query,
            key,
            value,
            score_mod=None if softcap is None else bounded(softcap, query.device),
            block_mask=self.block_mask(window),
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
            return_aux=AuxRequest(lse=sinks is not None),
        )
        if sinks is None:
            return out
        # exp(sink) joins the softmax's denominator, exp(lse): the tokens keep exp(lse) / (exp(lse) + exp(sink)) of it.
        share = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[None, :, None])
        return (out * share[..., None]).to(out.dtype)

    def block_mask(self, window: int | None) -> BlockMask:
        """Made on first use and kept with the forest, for all layers and every later pass.

        Making it takes a boolean for every pair of tokens for a moment: T * T bytes.
        """
        made: BlockMask | None = self.forest.masks.get(("flex", window))
        if made is None:
            T = len(self.forest)
            device = self.forest.ids_T.device
            made = create_block_mask(sees(self.forest, window), None, None, T, T, device=device)
            self.forest.masks["flex", window] = made
        return made


def sees(forest: Forest, window: int | None = None) -> Any:
    """The function (batch, head, q, k) -> may token q look at token k?

    A segment's subtree holds the walk's numbers [enter, leave), so that k's segment is q's own or an ancestor if
    and only if q's number lies in k's interval.
    """
    segment_T, position_T = forest.segment_T, forest.position_T
    enter_T, leave_T = (torch.tensor(numbers, device=segment_T.device)[segment_T] for numbers in walk(forest))

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        related = (enter_T[k] <= enter_T[q]) & (enter_T[q] < leave_T[k])
        back = position_T[q] - position_T[k]
        return related & (back >= 0) if window is None else related & (back >= 0) & (back < window)

    return visible


def bounded(softcap: float, device: torch.device) -> Any:
    """Gemma 2's bound on a score, in FlexAttention's form."""
    cap = torch.full((), softcap, device=device)  # of a number, each other value would be compiled anew, or fail

    def bound(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return bound


def walk(forest: Forest) -> tuple[list[int], list[int]]:
    """For each segment the number at which a depth-first walk enters it, and the first number after its subtree."""
    under = [1] * len(forest.segments)
    for i, s in reversed(list(enumerate(forest.segments))):  # children stand after their parents
        if s.parent >= 0:
            under[s.parent] += under[i]
    enter: list[int] = []
    free: list[int] = []  # where a segment's next child enters
    roots = 0
    for i, s in enumerate(forest.segments):
        if s.parent >= 0:
            at, free[s.parent] = free[s.parent], free[s.parent] + under[i]
        else:
            at, roots = roots, roots + under[i]
        enter.append(at)
        free.append(at + 1)
    return enter, [at + n for at, n in zip(enter, under, strict=True)]


@cache
def compiled() -> Any:
    # Forests differ in their number of tokens: without `dynamic` each new one would be compiled anew.
    return torch.compile(flex_attention, dynamic=True)
