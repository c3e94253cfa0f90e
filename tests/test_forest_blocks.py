"""Attention in blocks of queries against a dense softmax over the whole row, values and gradients."""

from __future__ import annotations

import pytest
import torch

from posttrain.forest import Row, pack
from posttrain.forest.attention import Scoring, Tree
from posttrain.forest.blocks import QUERIES


def tree(lengths: list[int], shared: int) -> Tree:
    """Roots with one completion each, and three completions under one prompt."""
    rows = [
        Row(tuple(range(100 * i, 100 * i + n)), (7,) * (n + 1), (True,) * (n + 1)) for i, n in enumerate(lengths, 1)
    ]
    prompt = tuple(range(5000, 5000 + shared))
    return Tree(pack([*rows, *(Row(prompt, (i,) * 9, (True,) * 9) for i in range(3))]))


def visible(layout: Tree, window: int | None) -> torch.Tensor:
    """[T, T] by walking up from each token."""
    forest = layout.forest
    previous, T = forest.previous_T.tolist(), len(forest)
    seen = torch.zeros(T, T, dtype=torch.bool)
    for token in range(T):
        at, back = token, 0
        while at >= 0 and (window is None or back < window):
            seen[token, at] = True
            at, back = previous[at], back + 1
    return seen


def dense(q, k, v, seen, scoring):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * scoring.scale).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("window", [None, 1, 6, 40])
@pytest.mark.parametrize("shared", [12, QUERIES + 5])
def test_blocks_are_a_dense_softmax(window, shared):
    layout = tree([3, 30, 2 * QUERIES + 1], shared)
    generator = torch.Generator().manual_seed(0)
    T = len(layout.forest)
    q, k, v = (
        torch.randn(1, heads, T, 8, generator=generator, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    )
    weight = torch.randn(1, 4, T, 8, generator=generator, dtype=torch.float64)
    scoring = Scoring(0.3, window)
    got = layout.attend(0, q, k, v, scoring)
    want = dense(q, k, v, visible(layout, window), scoring)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradients_by_finite_differences():
    layout = tree([3, 5], 10)
    T = len(layout.forest)
    q, k, v = (torch.randn(1, heads, T, 2, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1))
    assert torch.autograd.gradcheck(lambda *x: layout.attend(0, *x, Scoring(0.7)), (q, k, v))


def test_nothing_of_square_size_is_kept_for_the_backward_pass():
    kept = []

    def keep(x):
        kept.append(x.numel())
        return x

    layout = tree([200], 10)
    T = len(layout.forest)
    q, k, v = (torch.randn(1, 2, T, 4, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        layout.attend(0, q, k, v, Scoring(0.5))
    assert sum(kept) == 3 * 2 * T * 4


def test_bfloat16_sums_in_float32():
    layout = tree([60], 10)
    T = len(layout.forest)
    q, k, v = (torch.randn(1, 2, T, 16).bfloat16() for _ in range(3))
    want = dense(q.float(), k.float(), v.float(), visible(layout, None), Scoring(0.25))
    torch.testing.assert_close(layout.attend(0, q, k, v, Scoring(0.25)).float(), want, rtol=0.02, atol=0.02)
