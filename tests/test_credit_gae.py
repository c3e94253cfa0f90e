"""Generalised advantages against arithmetic done by hand, and at the ends of lambda."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.credit import gae

numbers = st.floats(-10, 10, width=32)
episodes = st.integers(1, 8).flatmap(
    lambda n: st.tuples(st.lists(numbers, min_size=n, max_size=n), st.lists(numbers, min_size=n, max_size=n))
)


def test_by_hand():
    """gamma 0.5, lambda 0.8; rewards 0, 0, 1; values 0.4, 0.2, 0.6; over after the third.

    delta: 0.5 * 0.2 - 0.4 = -0.3; 0.5 * 0.6 - 0.2 = 0.1; 1 - 0.6 = 0.4.
    A: 0.4; 0.1 + 0.4 * 0.4 = 0.26; -0.3 + 0.4 * 0.26 = -0.196. Returns are these plus the values.
    """
    advantages, returns = gae([0.0, 0.0, 1.0], [0.4, 0.2, 0.6], gamma=0.5, lam=0.8)
    assert advantages == pytest.approx([-0.196, 0.26, 0.4], abs=1e-12)
    assert returns == pytest.approx([0.204, 0.46, 1.0], abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(episodes, st.floats(0, 1))
def test_lambda_1_is_returns_minus_values_and_lambda_0_one_step(episode, gamma):
    rewards, values = episode
    discounted = [sum(gamma ** (i - t) * rewards[i] for i in range(t, len(rewards))) for t in range(len(rewards))]
    advantages, returns = gae(rewards, values, gamma=gamma, lam=1.0)
    assert returns == pytest.approx(discounted, abs=1e-6)
    assert advantages == pytest.approx([r - v for r, v in zip(discounted, values, strict=True)], abs=1e-6)
    one_step = [r + gamma * after - v for r, v, after in zip(rewards, values, [*values[1:], 0.0], strict=True)]
    assert gae(rewards, values, gamma=gamma, lam=0.0)[0] == pytest.approx(one_step, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(episodes, st.floats(0, 1), st.floats(0, 1))
def test_a_critic_that_is_right_leaves_no_advantage(episode, gamma, lam):
    rewards, _ = episode
    values = [sum(gamma ** (i - t) * rewards[i] for i in range(t, len(rewards))) for t in range(len(rewards))]
    assert gae(rewards, values, gamma=gamma, lam=lam)[0] == pytest.approx([0.0] * len(rewards), abs=1e-6)


def test_nothing_is_nothing_and_unequal_lengths_are_refused():
    assert gae([], []) == ([], [])
    for rewards, values in (([1.0], [1.0, 2.0]), ([1.0, 2.0], [1.0])):
        with pytest.raises(ValueError, match="zip"):
            gae(rewards, values)
