"""From scored rollouts to GRPO's batch and to preference pairs."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch

from posttrain.credit import group_advantages, groups, grpo, pairs
from posttrain.credit.batch import by_rollout
from posttrain.losses import policy_gradient, reduce, reduce_tokens
from posttrain.records import Example, Rollout, Score

PROMPTS = {0: tuple(range(10, 22)), 1: tuple(range(30, 39))}


def rollout(group: int, *ids: int) -> Rollout:
    logps = tuple(-0.1 * i for i in ids)
    return Rollout(Example(f"e:{group}"), group, PROMPTS[group], ids, logps, "", "stop", "w")


def scored(*values: float | None) -> list[Score]:
    return [Score(v, "error" if v is None else "wrong") for v in values]


ROLLOUTS = [rollout(0, 1, 2, 3), rollout(0, 4), rollout(1, 5, 6), rollout(1, 7), rollout(1, 8, 9)]


def test_every_token_carries_its_completions_advantage():
    """Group 0: rewards 1, 0; group 1: 0, 0.5, 1. Mean-centred, without division."""
    batch = grpo(ROLLOUTS, scored(1.0, 0.0, 0.0, 0.5, 1.0), std="none")
    assert [batch.ids_T[a:b].tolist() for a, b in batch.spans] == [[1, 2, 3], [4], [5, 6], [8, 9]]
    assert [batch.weights_T[a:b].tolist() for a, b in batch.spans] == [[0.5] * 3, [-0.5], [-0.5] * 2, [0.5] * 2]
    behaviour = [batch.behaviour_logps_T[a:b].tolist() for a, b in batch.spans]
    assert behaviour == [pytest.approx([-0.1 * i for i in ids]) for ids in ([1, 2, 3], [4], [5, 6], [8, 9])]
    assert batch.target_T.sum() == 8
    assert batch.weights_T[~batch.target_T].eq(0).all()


def test_zero_advantage_counts_and_unscored_does_not():
    """The completion at the mean, 7, is a token of the denominator; the unscored one, 5 6, is none."""
    assert grpo(ROLLOUTS, scored(1.0, 0.0, 0.0, 0.5, 1.0)).counts.tokens == 9
    assert grpo(ROLLOUTS, scored(1.0, 0.0, 0.0, 0.5, 1.0)).counts.sequences == 5
    batch = grpo(ROLLOUTS, scored(1.0, 0.0, None, 0.5, 0.5))
    assert (batch.counts.tokens, batch.counts.sequences) == (7, 4)
    assert len(batch.spans) == 2


def test_groups_of_one_size_are_group_advantages():
    rollouts = [rollout(g, i + 1) for g in (0, 1) for i in range(3)]
    values = [0.0, 1.0, 0.25, 1.0, 1.0, 0.5]
    for std in ("group", "batch", "none"):
        expected_PG = group_advantages(torch.tensor(values, dtype=torch.float64).view(2, 3), std=std, eps=0.01)
        compare = partial(group_advantages, std=std, eps=0.01)
        assert by_rollout(rollouts, scored(*values), compare) == expected_PG.flatten().tolist()


def test_a_group_stands_for_itself_whatever_its_neighbours_size():
    first = by_rollout(ROLLOUTS[:2], scored(1.0, 0.0), group_advantages)
    alone = first + by_rollout(ROLLOUTS[2:], scored(0.0, None, 1.0), group_advantages)
    whole = by_rollout(ROLLOUTS, scored(1.0, 0.0, 0.0, None, 1.0), group_advantages)
    assert whole == pytest.approx(alone)
    assert alone[3] is None


def test_rollouts_of_several_calls_may_follow_one_another():
    """The second call's group 0 is of another prompt, the first call's has ended before it."""
    other = Rollout(Example("f"), 0, (1, 2), (3,), (0.0,), "", "stop", "w")
    assert groups([rollout(0, 1), rollout(0, 2), other, other]) == [[0, 1], [2, 3]]
    assert groups([]) == []


@pytest.mark.parametrize("values", [(1.0, 1.0, 0.0, 0.0, 0.0), (None,) * 5])
def test_without_signal_the_forest_is_empty_and_the_loss_zero(values):
    batch = grpo(ROLLOUTS, scored(*values))
    assert len(batch) == 0
    logps_T = torch.zeros(0, requires_grad=True)
    for how in ("token", "sequence"):
        loss_T = policy_gradient(
            logps_T, batch.behaviour_logps_T, batch.weights_T, batch.target_T, batch.sequence_T, level=how
        )
        loss = reduce(loss_T, batch, how=how)
        loss.backward()
        assert loss.item() == 0


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
def test_reduce_takes_what_the_batch_knows(how):
    batch = grpo(ROLLOUTS, scored(1.0, 0.0, 0.0, 0.5, 1.0))
    loss_T = torch.arange(len(batch), dtype=torch.float64)
    expected = reduce_tokens(loss_T, batch.target_T, batch.counts, how=how, sequence_T=batch.sequence_T, constant=7.0)
    assert reduce(loss_T, batch, how=how, constant=7.0) == expected > 0


def test_pairs_are_the_best_and_the_worst_of_each_prompt_that_has_them():
    assert pairs(ROLLOUTS, scored(1.0, 0.0, 0.2, 0.1, 0.9), random.Random(0)) == [(0, 1), (4, 3)]
    assert pairs(ROLLOUTS, scored(1.0, 1.0, None, 0.1, 0.9), random.Random(0)) == [(4, 3)]
    assert pairs(ROLLOUTS, scored(1.0, None, 0.5, 0.5, 0.5), random.Random(0)) == []
