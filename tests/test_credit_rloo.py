"""Leave-one-out advantages against arithmetic done by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.credit import leave_one_out, rloo
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


def test_every_token_carries_its_completions_advantage():
    """Rewards 1, 0, 0.5 of one prompt, so 0.75, -0.75 and 0, which is counted and not computed."""
    completions = [(1, 2), (3,), (4, 5, 6)]
    rollouts = [Rollout(Example("e"), 0, (10, 11), ids, (-0.5,) * len(ids), "", "stop", "w") for ids in completions]
    batch = rloo(rollouts, [Score(1.0, "correct"), Score(0.0, "wrong"), Score(0.5, "wrong")])
    assert [batch.weights_T[a:b].tolist() for a, b in batch.spans] == [[0.75, 0.75], [-0.75]]
    assert (batch.counts.tokens, batch.counts.sequences) == (6, 3)
