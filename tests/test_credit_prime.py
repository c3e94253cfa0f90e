"""PRIME's process returns by hand."""

from __future__ import annotations

import pytest

from posttrain.credit.prime import process_returns
from posttrain.records import Example, Rollout


def rolled(group: int, tokens: int) -> Rollout:
    return Rollout(Example(f"e:{group}"), group, (group,), (5,) * tokens, (-1.0,) * tokens, "", "stop", "w")


def test_rewards_are_held_against_the_others_of_the_group() -> None:
    """Means a token: 1, 0.5 and 3. The first's baseline is (0.5 + 3) / 2 = 1.75, so it earns -0.75, -1.75 and 0.25,
    summed from each token on; the second's is 2, the third's 0.75. The next group does not count."""
    rollouts = [rolled(0, 3), rolled(0, 1), rolled(0, 2), rolled(1, 1), rolled(1, 1)]
    worth = process_returns(rollouts, [[1, 0, 2], [0.5], [2, 4], [10], [4]])
    assert worth == [[-2.25, -1.5, 0.25], [-1.5], [4.5, 3.25], [6], [-6]]


def test_later_rewards_are_discounted() -> None:
    """Against 0.5: 0.5, -0.5, 1.5. With gamma 1/2: 1.5, then -0.5 + 0.75, then 0.5 + 0.125."""
    rollouts = [rolled(0, 3), rolled(0, 1)]
    assert process_returns(rollouts, [[1, 0, 2], [0.5]], gamma=0.5) == [[0.625, 0.25, 1.5], [-0.5]]


def test_what_is_unscored_is_nobodys_other() -> None:
    rollouts = [rolled(0, 2), rolled(0, 1), rolled(0, 1), rolled(1, 2), rolled(1, 1)]
    worth = process_returns(rollouts, [[1, 2], None, [3], [4, 5], None])
    assert worth == [[-3, -1], None, [1.5], [0, 0], None]


def test_a_constant_added_to_every_reward_changes_nothing() -> None:
    rollouts, rewards = [rolled(0, 3), rolled(0, 2)], [[0.3, -0.2, 0.9], [0.1, 0.4]]
    moved = [[r + 7 for r in own] for own in rewards]
    for ours, theirs in zip(process_returns(rollouts, rewards), process_returns(rollouts, moved), strict=True):
        assert ours == pytest.approx(theirs)
