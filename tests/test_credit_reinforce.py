"""REINFORCE++'s rewards at tokens and whitening against arithmetic done by hand."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch

from posttrain.credit import reinforce, whiten
from posttrain.credit.reinforce import returns, token_rewards
from posttrain.records import Example, Rollout, Score, UserError


def rollouts(*completions: tuple[int, ...]) -> list[Rollout]:
    return [
        Rollout(Example(f"e:{i}"), i, (10 + i, 11), ids, (-0.5,) * len(ids), "", "stop", "w")
        for i, ids in enumerate(completions)
    ]


def scored(*values: float | None) -> list[Score]:
    return [Score(v, "error" if v is None else "wrong") for v in values]


def test_the_score_is_earned_by_the_last_token():
    assert token_rewards(2.0, [0.5, 0.25]) == [-0.5, 1.75]
    assert token_rewards(2.0, [0.5]) == [1.5]


def test_whiten_by_hand():
    """0 and 2 have mean 1 and unbiased variance 2."""
    scale = math.sqrt(2 + 1e-8)
    assert whiten([[0.0], [2.0]]) == [[pytest.approx(-1 / scale)], [pytest.approx(1 / scale)]]
    assert whiten([]) == []


def test_whitened_tokens_have_mean_0_and_variance_1_and_do_not_see_shift_or_scale():
    values = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    parts = [values[:1], values[1:40], [], values[40:]]
    white = list(itertools.chain.from_iterable(whiten(parts)))
    assert [len(part) for part in whiten(parts)] == [1, 39, 0, 60]
    assert statistics.fmean(white) == pytest.approx(0, abs=1e-12)
    assert statistics.variance(white) == pytest.approx(1, abs=1e-6)
    moved = whiten([[7 * v - 3 for v in part] for part in parts])
    assert list(itertools.chain.from_iterable(moved)) == pytest.approx(white, abs=1e-6)


@pytest.mark.parametrize("values", [[[0.1, 0.1], [0.1]], [[5.0]], [[1e30] * 3]])
def test_equal_values_are_exactly_zero(values):
    """Three 0.1 have a rounded mean that is not 0.1, and a variance near 0 that would blow the difference up."""
    assert whiten(values) == [[0.0] * len(part) for part in values]


def test_returns_by_hand():
    """Penalties 1, 0.5 and 0.25; scores 2 and 0. Still to be earned: 0.5, 1.5 and -0.25; mean 0.58333..."""
    found = returns(rollouts((1, 2), (3,)), scored(2.0, 0.0), [[1.0, 0.5], [0.25]])
    earned = [0.5, 1.5, -0.25]
    centre, scale = statistics.fmean(earned), math.sqrt(statistics.variance(earned) + 1e-8)
    assert found[0] == pytest.approx([(earned[0] - centre) / scale, (earned[1] - centre) / scale])
    assert found[1] == pytest.approx([(earned[2] - centre) / scale])


def test_unscored_counts_nowhere():
    three, two = rollouts((1, 2), (3,), (4,)), rollouts((1, 2), (4,))
    found = returns(three, scored(2.0, None, 0.0))
    assert found[1] is None
    assert [found[0], found[2]] == returns(two, scored(2.0, 0.0))
    batch = reinforce(three, scored(2.0, None, 0.0))
    assert (batch.counts.tokens, batch.counts.sequences) == (3, 2)


def test_identical_rewards_teach_nothing():
    assert returns(rollouts((1, 2), (3,)), scored(0.1, 0.1)) == [[0.0, 0.0], [0.0]]
    assert len(reinforce(rollouts((1, 2), (3,)), scored(0.1, 0.1))) == 0


def test_an_infinite_reward_is_named():
    with pytest.raises(UserError, match="infinite reward"):
        returns(rollouts((1,), (2,)), scored(math.inf, 0.0))
