"""RLOO, REINFORCE++ and whitening against arithmetic done by hand."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.credit import leave_one_out, reinforce, rloo, whiten
from posttrain.credit.reinforce import returns
from posttrain.records import Example, Rollout, Score, UserError

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
    """0, 0 and 3 have mean 1 and unbiased variance 3, over the tokens of both completions."""
    scale = math.sqrt(3 + 1e-8)
    assert whiten([[0.0], [0.0, 3.0]]) == [pytest.approx([-1 / scale]), pytest.approx([-1 / scale, 2 / scale])]


def test_whiten_has_mean_0_and_variance_1_and_does_not_see_shift_or_scale():
    values = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    (found,) = whiten([values])
    assert statistics.fmean(found) == pytest.approx(0, abs=1e-12)
    assert statistics.variance(found) == pytest.approx(1, abs=1e-6)
    assert whiten([[7 * v - 3 for v in values[:30]], [7 * v - 3 for v in values[30:]]]) == [
        pytest.approx(found[:30], rel=1e-6),
        pytest.approx(found[30:], rel=1e-6),
    ]


def test_equal_values_give_exactly_zero():
    """Three 0.1 have a rounded mean that is not 0.1, and a variance near 0 that would blow the difference up."""
    assert whiten([[0.1, 0.1], [0.1]]) == [[0.0, 0.0], [0.0]]
    assert whiten([[0.1]]) == [[0.0]]
    assert whiten([]) == []


# What tokens earn


def rollout(group: int, *ids: int) -> Rollout:
    return Rollout(Example(f"e:{group}"), group, (group, 9), ids, (-1.0,) * len(ids), "", "stop", "w")


ROLLOUTS = [rollout(0, 1, 2), rollout(0, 3), rollout(1, 4)]


def test_reinforce_is_what_is_earned_from_a_token_on_whitened():
    """Scores 3 and 1, the third unscored; penalties 1, 0.5 | 0.5. From each token on: 1.5, 2.5 | 0.5: mean 1.5, variance
    1. Without penalties: 3, 3 | 1: mean 7/3, variance 4/3."""
    scores = [Score(3.0, "wrong"), Score(1.0, "wrong"), Score(None, "error")]
    first, second, third = returns(ROLLOUTS, scores, [[1.0, 0.5], [0.5], [9.0]])
    assert first == pytest.approx([0, 1], abs=1e-7)
    assert second == pytest.approx([-1], abs=1e-7)
    assert third is None
    first, second, _ = returns(ROLLOUTS, scores)
    assert first == pytest.approx([2 / 3 / math.sqrt(4 / 3)] * 2)
    assert second == pytest.approx([-4 / 3 / math.sqrt(4 / 3)])


def test_batches_for_the_python_door():
    scores = [Score(3.0, "wrong"), Score(1.0, "wrong"), Score(2.0, "wrong")]
    batch = rloo(ROLLOUTS, scores)
    assert [batch.weights_T[a:b].tolist() for a, b in batch.spans] == [[2.0, 2.0], [-2.0]]  # nobody beside the third
    assert (batch.counts.tokens, batch.counts.sequences) == (4, 3)
    whole = reinforce(ROLLOUTS, scores)
    worth = [w for a, b in whole.spans for w in whole.weights_T[a:b].tolist()]
    assert worth == pytest.approx([w for own in whiten([[3.0, 3.0], [1.0], [2.0]]) for w in own])
