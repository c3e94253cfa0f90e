"""Group advantages against arithmetic done by hand."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.credit.advantages import group_advantages
from posttrain.records import UserError

NAN = math.nan


def advantages(*rows: list[float], **options: object) -> list[list[float]]:
    return group_advantages(torch.tensor(rows, dtype=torch.float64), **options).tolist()


def test_by_hand():
    """Group 1, 0, 0, 1: mean 1/2, unbiased variance 4 * (1/4) / 3 = 1/3, so +-(1/2) / (sqrt(1/3) + 1e-4)."""
    a = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    assert advantages([1, 0, 0, 1]) == [pytest.approx([a, -a, -a, a])]
    assert advantages([1, 0, 0, 1], eps=0.5) == [
        pytest.approx([x * 0.5 / (math.sqrt(1 / 3) + 0.5) for x in (1, -1, -1, 1)])
    ]
    assert advantages([1, 0, 0, 1], std="none") == [[0.5, -0.5, -0.5, 0.5]]


def test_batch_deviation_by_hand():
    """Rewards 0, 2 and 5, 9: group means 1 and 7; over the batch mean 4, variance (16 + 4 + 1 + 25) / 3."""
    std = math.sqrt(46 / 3) + 1e-4
    found = advantages([0, 2], [5, 9], std="batch")
    assert found == [pytest.approx([-1 / std, 1 / std]), pytest.approx([-2 / std, 2 / std])]


@pytest.mark.parametrize("std", ["group", "batch", "none"])
def test_unscored_counts_nowhere_and_gets_zero(std):
    """The scored ones get what they would get without it; batch: the deviation is over the scored ones alone."""
    found = advantages([1, NAN, 0, 4], std=std)[0]
    assert found[1] == 0
    assert [found[0], found[2], found[3]] == pytest.approx(advantages([1, 0, 4], std=std)[0])


@pytest.mark.parametrize("std", ["group", "batch", "none"])
@pytest.mark.parametrize("row", [[0.1] * 3, [NAN] * 3, [NAN, 5.0, NAN], [0.1, NAN, 0.1], [1e30] * 3])
def test_no_signal_is_exactly_zero(std, row):
    """Rounded, the mean of three 0.1 is not 0.1; the advantage must be 0 all the same, in either precision."""
    for dtype in (torch.float32, torch.float64):
        rewards_PG = torch.tensor([row, [0.0, 1.0, 2.0]], dtype=dtype)
        found_PG = group_advantages(rewards_PG, std=std)
        assert (found_PG[0] == 0).all()
        assert (found_PG[1] != 0).tolist() == [True, False, True]
        assert found_PG.dtype == dtype
        assert (group_advantages(rewards_PG[:1], std=std) == 0).all()


@settings(max_examples=100, deadline=None)
@given(
    row=st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=8),
    shift=st.integers(-8, 8),
    order=st.randoms(use_true_random=False),
)
def test_invariances(row, shift, order):
    """Advantages sum to 0, do not see a constant added to a group, follow a permutation, and match statistics.stdev."""
    (found,) = advantages(row)
    assert sum(found) == pytest.approx(0, abs=1e-6)
    (shifted,) = advantages([r + shift for r in row])
    assert shifted == pytest.approx(found, abs=1e-5)
    places = list(range(len(row)))
    order.shuffle(places)
    (mixed,) = advantages([row[i] for i in places])
    assert mixed == pytest.approx([found[i] for i in places], abs=1e-9)
    std = statistics.stdev(row) + 1e-4
    assert found == pytest.approx([(r - statistics.fmean(row)) / std for r in row], abs=1e-6)


def test_an_infinite_reward_is_named():
    with pytest.raises(UserError, match="prompt 1 completion 0"):
        advantages([0, 1], [math.inf, 1])


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="global"):
        advantages([0, 1], std="global")
