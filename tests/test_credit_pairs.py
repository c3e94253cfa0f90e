"""The choice of a preference pair."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.credit.pairs import best_and_worst, pairs, rankings
from posttrain.records import Example, Rollout, Score


@pytest.mark.parametrize(
    "scores", [[], [1.0], [None, 1.0], [None, None], [0.5, 0.5], [0.5, None, 0.5], [math.nan, 1.0]]
)
def test_nothing_to_prefer(scores):
    assert best_and_worst(scores, random.Random(0)) is None


@given(st.lists(st.none() | st.integers(0, 3).map(float), max_size=8), st.integers())
def test_best_beats_all_and_worst_loses_to_all(scores, seed):
    scored = [s for s in scores if s is not None]
    pair = best_and_worst(scores, random.Random(seed))
    assert (pair is None) == (len(set(scored)) < 2)
    if pair is not None:
        assert scores[pair[0]] == max(scored)
        assert scores[pair[1]] == min(scored)
        assert pair == best_and_worst(scores, random.Random(seed))


def test_ties_are_broken_evenly():
    """Two best and two worst: each of the four pairs a quarter of the time (4000 draws, five deviations = 137)."""
    rng = random.Random(0)
    drawn = Counter(best_and_worst([1.0, 0.0, None, 1.0, 0.0], rng) for _ in range(4000))
    assert set(drawn) == {(0, 1), (0, 4), (3, 1), (3, 4)}
    assert all(abs(n - 1000) < 137 for n in drawn.values())


@pytest.mark.parametrize(
    ("near", "pair"),
    [
        (0.0, (0, 3)),  # whatever their length
        (0.1, (1, 3)),  # 0.9 is as good as 1, and its answer shorter; 0.2 is not as bad as 0
        (0.2, (1, 2)),  # now it is, and longer
    ],
)
def test_near_scores_are_told_apart_by_length(near, pair):
    assert best_and_worst([1.0, 0.9, 0.2, 0.0, None], random.Random(0), [9, 3, 7, 2, 1], near) == pair


@given(st.lists(st.none() | st.integers(0, 9).map(float), max_size=8), st.floats(0, 0.49), st.integers(0, 9))
def test_length_control_never_turns_a_pair_round(scores, near, seed):
    """Below one half no answer is both near the best and near the worst."""
    lengths = [random.Random(seed + i).randrange(4) for i in range(len(scores))]
    pair = best_and_worst(scores, random.Random(seed), lengths, near)
    plain = best_and_worst(scores, random.Random(seed))
    assert (pair is None) == (plain is None)
    if pair is not None:
        assert scores[pair[0]] > scores[pair[1]]


def test_pairs_know_the_lengths_of_their_completions():
    """Of one prompt: 3 tokens score 1, 2 tokens 0.9, 1 token 0. Tokens that were not sampled do not count."""
    ids = [(5, 6, 7), (5, 6), (5,)]
    rollouts = [Rollout(Example("e"), 0, (1,), i, (0.0,) * len(i), "", "stop", "") for i in ids]
    rollouts.append(Rollout(Example("e"), 0, (1,), (5, 6, 7), (0.0,) * 3, "", "stop", "", (True, False, False)))
    scores = [Score(value, "wrong") for value in (1.0, 0.9, 0.0, 0.95)]
    assert pairs(rollouts, scores, random.Random(0)) == [(0, 2)]
    assert pairs(rollouts, scores, random.Random(0), near=0.1) == [(3, 2)]


def test_a_ranking_has_the_best_first_and_the_unscored_last():
    """Three prompts of four answers; the second one's all score alike, so that there is nothing to rank."""
    values = [0.5, None, 1.0, 0.5, 1.0, 1.0, None, 1.0, 0.0, 2.0, math.nan, 1.0]
    rollouts = [Rollout(Example("e"), i // 4, (i // 4,), (i,), (0.0,), "", "stop", "") for i in range(12)]
    scores = [Score(value, "wrong") for value in values]
    assert rankings(rollouts, scores) == [[2, 0, 3, 1], [9, 11, 8, 10]]
