"""The reducer against arithmetic done by hand, and its invariance to how a step is cut and padded."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.losses import Counts, reduce_pairs, reduce_tokens, segment_sum

WAYS = ["token", "sequence", "constant"]


def reduce(loss_T, target_T, sequence_T, counts, how):
    return reduce_tokens(loss_T, target_T, counts, how=how, sequence_T=sequence_T, constant=8.0)


def test_by_hand():
    """Sequence 0 has losses 1, 2, 3, sequence 1 has 10; one more token carries no loss.

    token: (1 + 2 + 3 + 10) / 4 = 4. sequence: (6 / 3 + 10 / 1) / 2 = 6. constant 8: (6 + 10) / (2 * 8) = 1.
    """
    loss_T = torch.tensor([1.0, 2.0, 99.0, 3.0, 10.0])
    target_T = torch.tensor([True, True, False, True, True])
    sequence_T = torch.tensor([0, 0, 0, 0, 1])
    counts = Counts(tokens=4, sequences=2)
    values = [reduce(loss_T, target_T, sequence_T, counts, how).item() for how in WAYS]
    assert values == [4.0, 6.0, 1.0]
    assert reduce_pairs(torch.tensor([1.0, 2.0]), Counts(pairs=4)).item() == 0.75


def test_segment_sum_by_hand():
    """1 + 3 in segment 2, 2 in segment 0, nothing in segments 1 and 3."""
    sums_S = segment_sum(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2, 0, 2]), 4)
    assert sums_S.tolist() == [2.0, 0.0, 4.0, 0.0]


@pytest.mark.parametrize("how", WAYS)
@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    cut=st.integers(0, 6),
    seed=st.integers(0, 2**31),
)
def test_value_and_gradient_do_not_depend_on_micro_batches_order_or_padding(how, lengths, cut, seed):
    """One big batch = the sum over two micro-batches, in another order, with tokens that carry no loss in between.

    Whole sequences go to either side of the cut; each side numbers its own sequences.
    """
    rng = torch.Generator().manual_seed(seed)
    counts = Counts(tokens=sum(lengths), sequences=len(lengths))
    leaf_T = torch.randn(sum(lengths), generator=rng, dtype=torch.float64, requires_grad=True)
    sequence_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    whole = reduce(leaf_T, torch.ones(len(leaf_T), dtype=torch.bool), sequence_T, counts, how)
    (gradient_T,) = torch.autograd.grad(whole, leaf_T)

    parts = torch.zeros((), dtype=torch.float64)
    for part_T in (sequence_T < cut, sequence_T >= cut):
        order = part_T.nonzero()[:, 0][torch.randperm(int(part_T.sum()), generator=rng)]
        padding = torch.tensor([math.nan, math.inf, 7.0], dtype=torch.float64)
        loss_T = torch.cat([padding, leaf_T[order]])
        target_T = torch.cat([torch.zeros(3, dtype=torch.bool), torch.ones(len(order), dtype=torch.bool)])
        other = torch.cat([torch.tensor([-1, 0, 10**6]), len(lengths) - 1 - sequence_T[order]])
        parts = parts + reduce(loss_T, target_T, other, counts, how)
    (gradient_of_parts_T,) = torch.autograd.grad(parts, leaf_T)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient_of_parts_T, gradient_T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("T", [0, 3])
def test_nothing_to_learn_is_zero_and_still_differentiable(how, T):
    leaf_T = torch.full((T,), math.nan, requires_grad=True)
    target_T = torch.zeros(T, dtype=torch.bool)
    loss = reduce(leaf_T, target_T, torch.zeros(T, dtype=torch.long), Counts(), how)
    loss.backward()
    assert loss.item() == 0
    assert leaf_T.grad.tolist() == [0.0] * T


def test_no_pairs_is_zero_and_still_differentiable():
    leaf_P = torch.zeros(0, requires_grad=True)
    loss = reduce_pairs(leaf_P, Counts())
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("how", WAYS)
def test_gradient_agrees_with_finite_differences(how):
    loss_T = torch.randn(6, dtype=torch.float64, requires_grad=True)
    target_T = torch.tensor([True, False, True, True, True, False])
    sequence_T = torch.tensor([0, 0, 0, 1, 1, 1])
    counts = Counts(tokens=4, sequences=2)
    assert torch.autograd.gradcheck(lambda x: reduce(x, target_T, sequence_T, counts, how), (loss_T,))


def test_half_precision_is_summed_in_float32():
    """In bfloat16 4096 + 1 is 4096, so adding up ones would stop short."""
    ones_T = torch.ones(5000, dtype=torch.bfloat16)
    total = reduce_tokens(ones_T, torch.ones(5000, dtype=torch.bool), Counts(tokens=1))
    assert total.dtype == torch.float32
    assert total.item() == 5000


@pytest.mark.parametrize("options", [{"how": "sequence"}, {"how": "constant"}, {"how": "mean"}])
def test_what_is_missing_is_named(options):
    with pytest.raises(ValueError, match=options["how"]):
        reduce_tokens(torch.ones(1), torch.ones(1, dtype=torch.bool), Counts(tokens=1), **options)
