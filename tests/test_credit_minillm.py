"""A student's credit from its teacher against arithmetic done by hand."""

from __future__ import annotations

import pytest

from posttrain.credit import gae, minillm

STUDENT, TEACHER = [-1.0, -2.0, -3.0], [-3.0, -1.0, -1.5]
REWARDS = [-2.0, 1.0, 1.5]


def test_by_hand():
    """Sums from each token on: 0.5, 2.5, 1.5; their means over 3, 2 and 1 tokens; gamma 0 sees the token alone."""
    assert minillm(STUDENT, TEACHER, mean=False) == pytest.approx([0.5, 2.5, 1.5])
    assert minillm(STUDENT, TEACHER) == pytest.approx([0.5 / 3, 1.25, 1.5])
    assert minillm(STUDENT, TEACHER, gamma=0.0) == pytest.approx(REWARDS)
    # gamma 1/2: -2 + 1/2 + 1.5/4 over 1 + 1/2 + 1/4; 1 + 0.75 over 1.5
    assert minillm(STUDENT, TEACHER, gamma=0.5) == pytest.approx([-1.125 / 1.75, 1.75 / 1.5, 1.5])


@pytest.mark.parametrize("gamma", [0.0, 0.7, 1.0])
def test_sums_are_those_of_gae_without_a_critic(gamma):
    expected, _ = gae(REWARDS, [0.0] * 3, gamma=gamma, lam=1.0)
    assert minillm(STUDENT, TEACHER, gamma=gamma, mean=False) == pytest.approx(expected)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    assert minillm(STUDENT, STUDENT) == [0.0, 0.0, 0.0]
    assert minillm([], []) == []


def test_every_token_needs_a_teacher():
    with pytest.raises(ValueError, match="shorter"):
        minillm([-1.0, -2.0], [-1.0])
