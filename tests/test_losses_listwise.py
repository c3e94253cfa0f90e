"""Losses over ranked completions against arithmetic done by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from posttrain.losses import lipo, logistic, pro, rrhf

LISTWISE = [rrhf, pro, lipo]
NAN = math.nan


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_rrhf_by_hand():
    """Rewards 3 > 2 > 1, scores 1, 3, 2: the best is 2 below the second and 1 below the third; these are in order."""
    assert rrhf(rows([1, 3, 2]), rows([3, 2, 1])).tolist() == [3.0]
    assert rrhf(rows([3, 2, 1]), rows([3, 2, 1])).tolist() == [0.0]


def test_pro_by_hand():
    """Chances log of 1/2, 1/3, 1/6 as scores: -log(1/2) for the best of all, -log(2/3) for the second of the rest."""
    scores_PK = rows([0.5, 1 / 3, 1 / 6]).log()
    assert pro(scores_PK, rows([3, 2, 1])).item() == pytest.approx(math.log(2) + math.log(1.5), abs=1e-12)
    assert pro(2 * scores_PK, rows([3, 2, 1]), temperature=2.0).item() == pytest.approx(math.log(3), abs=1e-12)
    # Two that are equally good stand each against the third alone.
    assert pro(scores_PK, rows([2, 2, 1])).item() == pytest.approx(math.log(4 / 3) + math.log(1.5), abs=1e-12)


def test_pro_is_a_distribution_over_rankings():
    """Plackett and Luce: e^-loss over all rankings of three sums to 1."""
    scores_PK = rows([0.3, -1.0, 2.0])
    chances = [math.exp(-pro(scores_PK, rows(list(ranking))).item()) for ranking in itertools.permutations([1, 2, 3])]
    assert sum(chances) == pytest.approx(1, abs=1e-12)


def test_lipo_by_hand():
    """Scores 2, 0, 1 rank 1, 3, 2; rewards 0, 1, 0.5, and 1 / log(1 + rank) = 1.4427, 0.7213, 0.9102."""
    discount = [1 / math.log(2), 1 / math.log(4), 1 / math.log(3)]
    gain = [1, 2, math.sqrt(2)]
    expected = sum(
        (gain[i] - gain[j]) * abs(discount[i] - discount[j]) * math.log1p(math.exp(-(s_i - s_j)))
        for i, j, s_i, s_j in [(1, 0, 0, 2), (1, 2, 0, 1), (2, 0, 1, 2)]
    )
    assert lipo(rows([2, 0, 1]), rows([0, 1, 0.5])).item() == pytest.approx(expected, abs=1e-12)


def test_lipo_can_leave_the_reference():
    """There all scores are 0. Were equal scores of equal rank, no pair would have a weight, and nothing a gradient."""
    scores_PK = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    lipo(scores_PK, rows([0, 1, 0.5])).sum().backward()
    assert scores_PK.grad[0, 0] > 0 > scores_PK.grad[0, 1]


def test_two_completions_are_a_pair():
    scores_PK, rewards_PK = rows([0.3, 1.7], [-1.0, -4.0]), rows([1, 0], [0, 1])
    chosen_P, rejected_P = rows([0.3, -4.0])[0], rows([1.7, -1.0])[0]
    logistic_P = logistic(chosen_P, rejected_P, beta=1.0)
    torch.testing.assert_close(pro(scores_PK, rewards_PK), logistic_P)
    torch.testing.assert_close(lipo(scores_PK, rewards_PK), logistic_P * (1 / math.log(2) - 1 / math.log(3)))
    torch.testing.assert_close(rrhf(scores_PK, rewards_PK), (rejected_P - chosen_P).relu())


@pytest.mark.parametrize("loss", LISTWISE)
@pytest.mark.parametrize("garbage", [NAN, math.inf, -math.inf, 1e30])
def test_an_empty_place_is_not_there(loss, garbage):
    full_PK = rows([0.3, 1.7, -1.0]).requires_grad_()
    wide_PK = rows([0.3, garbage, 1.7, -1.0]).requires_grad_()
    full_P, wide_P = loss(full_PK, rows([1, 0, 0.5])), loss(wide_PK, rows([1, NAN, 0, 0.5]))
    (full_P.sum() + wide_P.sum()).backward()
    torch.testing.assert_close(wide_P, full_P)
    torch.testing.assert_close(wide_PK.grad[:, [0, 2, 3]], full_PK.grad)
    assert wide_PK.grad[0, 1] == 0


@pytest.mark.parametrize("loss", LISTWISE)
@pytest.mark.parametrize("rewards", [[0.5] * 3, [NAN] * 3, [NAN, 1.0, NAN]])
def test_without_a_preference_there_is_no_loss(loss, rewards):
    scores_PK = rows([0.3, 1.7, -1.0]).requires_grad_()
    loss_P = loss(scores_PK, rows(rewards))
    loss_P.sum().backward()
    assert loss_P.tolist() == [0.0]
    assert (scores_PK.grad == 0).all()


@pytest.mark.parametrize("loss", LISTWISE)
def test_the_order_of_the_list_does_not_matter(loss):
    scores_PK, rewards_PK = rows([0.3, 1.7, -1.0, 2.5]), rows([1, 0, 0.5, 0.2])
    order = [2, 0, 3, 1]
    torch.testing.assert_close(loss(scores_PK[:, order], rewards_PK[:, order]), loss(scores_PK, rewards_PK))
