"""Leave-one-out advantages and whitening against arithmetic done by hand."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.credit import leave_one_out, whiten
from posttrain.records import UserError

NAN = math.nan


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_leave_one_out_by_hand():
    """1 against the mean of 0 and 4; 0 against 2.5; 4 against 0.5."""
    torch.testing.assert_close(leave_one_out(rows([1, 0, 4])), rows([-1, -2.5, 3.5]))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=8))
def test_leave_one_out_is_the_centred_reward_times_n_over_n_minus_1(row):
    n, total = len(row), sum(row)
    (found,) = leave_one_out(rows(row)).tolist()
    assert found == pytest.approx([r - (total - r) / (n - 1) for r in row], abs=1e-9)
    assert found == pytest.approx([(r - total / n) * n / (n - 1) for r in row], abs=1e-9)


def test_unscored_is_nobodys_other():
    found = leave_one_out(rows([1, NAN, 0, 4], [NAN, NAN, 3, NAN]))
    torch.testing.assert_close(found, rows([-1, 0, -2.5, 3.5], [0, 0, 0, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("row", [[0.1] * 3, [NAN] * 3, [NAN, 5.0, NAN], [0.1, NAN, 0.1], [1e30] * 3])
def test_no_signal_is_exactly_zero(row, dtype):
    assert (leave_one_out(torch.tensor([row], dtype=dtype)) == 0).all()


def test_an_infinite_reward_is_named():
    with pytest.raises(UserError, match="prompt 0 completion 1"):
        leave_one_out(rows([0, math.inf]))


def test_whiten_by_hand():
    """0 and 2 have mean 1 and unbiased variance 2; what stands elsewhere is not read."""
    values_T = torch.tensor([0.0, NAN, 2.0, math.inf], dtype=torch.float64)
    found = whiten(values_T, torch.tensor([True, False, True, False])).tolist()
    assert found == pytest.approx([-1 / math.sqrt(2 + 1e-8), 0, 1 / math.sqrt(2 + 1e-8), 0], abs=1e-15)


def test_whiten_has_mean_0_and_variance_1_and_does_not_see_shift_or_scale():
    values_T = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    every_T = torch.ones(100, dtype=torch.bool)
    found_T = whiten(values_T, every_T)
    assert statistics.fmean(found_T.tolist()) == pytest.approx(0, abs=1e-12)
    assert statistics.variance(found_T.tolist()) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(whiten(7 * values_T - 3, every_T), found_T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_equal_values_give_exactly_zero(dtype, n):
    """Three 0.1 have a rounded mean that is not 0.1, and a variance near 0 that would blow the difference up."""
    values_T = torch.full((3,), 0.1, dtype=dtype)
    assert whiten(values_T, torch.arange(3) < n).tolist() == [0.0, 0.0, 0.0]
