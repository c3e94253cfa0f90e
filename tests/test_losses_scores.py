"""What preference losses compare, against arithmetic done by hand and in many digits."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch

from posttrain.losses import alpha_length, desensitised, divergence, ipo, log_odds, logistic, segment_sum, wpo_weight


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "options", "at_log_2", "slope"),
    [
        # f'(2), and d f'(e^r) / dr at r = 0
        ("reverse_kl", {}, math.log(2), 1.0),
        ("forward_kl", {}, 0.5, 1.0),  # 1 - 1/2
        ("js", {}, math.log(4 / 3), 0.5),  # log(2 * 2/3); the slope is s(0)
        ("alpha", {"alpha": 3.0}, 1.5, 1.0),  # (2^2 - 1) / 2
        ("alpha", {"alpha": 0.5}, 2 * (1 - math.sqrt(0.5)), 1.0),
        ("alpha", {"alpha": 1.0}, math.log(2), 1.0),
    ],
)
def test_divergence_by_hand(kind, options, at_log_2, slope):
    ratios_P = tensor(0.0, math.log(2)).requires_grad_()
    scores_P = divergence(ratios_P, kind, **options)
    scores_P[0].backward()
    assert scores_P.tolist() == pytest.approx([0.0, at_log_2], abs=1e-12)
    assert ratios_P.grad[0].item() == pytest.approx(slope, abs=1e-12)


def test_divergences_meet():
    """alpha = 0 is the forward KL, alpha near 1 the reverse one."""
    ratios_P = tensor(-3.0, -0.1, 0.0, 0.2, 4.0)
    torch.testing.assert_close(divergence(ratios_P, "alpha", alpha=0.0), divergence(ratios_P, "forward_kl"))
    torch.testing.assert_close(divergence(ratios_P, "alpha", alpha=1 + 1e-9), ratios_P, rtol=1e-7, atol=0)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "js", "alpha"])
@pytest.mark.parametrize("loss", [logistic, ipo])
def test_divergences_far_out_stay_finite(kind, loss):
    chosen_P = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss_P = loss(divergence(chosen_P, kind), divergence(-chosen_P.detach(), kind))
    loss_P.sum().backward()
    assert loss_P.isfinite().all()
    assert chosen_P.grad.isfinite().all()


def exact_log_odds(x: float) -> float:
    with localcontext() as context:
        context.prec = 80
        p = Decimal(x).exp()
        return float(p.ln() - (1 - p).ln())


@pytest.mark.parametrize("x", [-1e-30, -1e-12, -1e-3, -0.5, -0.6931, -math.log(2), -0.6932, -1.0, -5.0, -40.0, -100.0])
def test_log_odds_in_many_digits(x):
    """Near 0 the naive log(p / (1 - p)) would divide by 0, far from it it is fine."""
    assert log_odds(tensor(x)).item() == pytest.approx(exact_log_odds(x), rel=1e-14, abs=1e-15)
    single = torch.tensor([x], dtype=torch.float32)
    assert log_odds(single).item() == pytest.approx(exact_log_odds(single.item()), rel=1e-6, abs=1e-6)
    if -30 < x < -1e-3:
        assert log_odds(tensor(x)).item() == pytest.approx(math.log(math.exp(x) / (1 - math.exp(x))), rel=1e-12)


def test_log_odds_gradient():
    """d log(p / (1 - p)) / d log p = 1 / (1 - p), on either side of the branch, and never NaN."""
    means_P = tensor(-0.1, -0.69, -0.7, -3.0).requires_grad_()
    log_odds(means_P).sum().backward()
    torch.testing.assert_close(means_P.grad, 1 / (1 - means_P.detach().exp()))
    assert torch.autograd.gradcheck(log_odds, (means_P,))
    edge_P = torch.tensor([0.0, -1e-30, -1e4], requires_grad=True)
    odds_P = log_odds(edge_P)
    odds_P.sum().backward()
    assert odds_P.isfinite().all()
    assert edge_P.grad.isfinite().all()
    assert edge_P.grad[0] == 0


def test_alpha_length_by_hand():
    """p = 1/4: 1 - 4 for alpha 1, (1 - 2) / 0.5 for 1/2, (1 - 1/4) / -1 for -1, log p for 0 and near it."""
    means_P = tensor(math.log(0.25))
    found = {alpha: alpha_length(means_P, alpha=alpha).item() for alpha in (1.0, 0.5, -1.0, 0.0, 1e-9)}
    expected = {1.0: -3.0, 0.5: -2.0, -1.0: -0.75, 0.0: math.log(0.25), 1e-9: math.log(0.25)}
    assert found == pytest.approx(expected, rel=1e-8)


TARGET_T = torch.tensor([0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1], dtype=torch.bool)
SEQUENCE_T = torch.tensor([9, 0, 0, 0, 9, 1, 2, 2, 9, 3, 3, 3])
LOGPS_T = tensor(math.nan, -1, -2, -3, math.inf, -5, -7, -6, math.nan, -1, -1, -4)


def test_desensitised_by_hand():
    """Pair 0 has 3 and 1 tokens: -1 + a (-2 - 3) and -5. Pair 1 has 2 and 3: -7 - 6 and -1 - 1 + a (-4)."""
    logps_T = LOGPS_T.clone().requires_grad_()
    for alpha in (0.0, 0.5, 1.0):
        expected = [-1 - 5 * alpha, -5, -13, -2 - 4 * alpha]
        found_S = desensitised(logps_T, TARGET_T, SEQUENCE_T, alpha=alpha)
        assert found_S.tolist() == pytest.approx(expected, abs=1e-15)
    desensitised(logps_T, TARGET_T, SEQUENCE_T, alpha=0.5).sum().backward()
    assert logps_T.grad[TARGET_T].tolist() == [1, 0.5, 0.5, 1, 1, 1, 1, 1, 0.5]
    assert (logps_T.grad[~TARGET_T] == 0).all()


def test_desensitised_of_1_is_the_sum():
    target_T, sequence_T = torch.ones(7, dtype=torch.bool), torch.tensor([0, 0, 0, 1, 2, 3, 3])
    logps_T = -torch.arange(1.0, 8.0, dtype=torch.float64)
    found_S = desensitised(logps_T, target_T, sequence_T, alpha=1.0)
    torch.testing.assert_close(found_S, segment_sum(logps_T, sequence_T, 4))


def test_wpo_weight_by_hand():
    """Two tokens of chance 1/2 and 1/8, sum of squares 1/4 and 1/2: sqrt(2 * 1/4). A sequence without tokens: 1."""
    weight_S = wpo_weight(
        tensor(0.5, math.nan, 0.125).log().requires_grad_(),
        tensor(0.25, 7.0, 0.5).log(),
        torch.tensor([True, False, True]),
        torch.tensor([0, 5, 0]),
        2,
    )
    assert weight_S.tolist() == pytest.approx([math.sqrt(0.5), 1.0], abs=1e-15)
    assert not weight_S.requires_grad


def test_wpo_weight_of_a_uniform_policy_is_1():
    """Then p(v) = sum of squares = 1 / V: every sequence is as typical as any."""
    logps_T = torch.full((4,), -math.log(7), dtype=torch.float64)
    sequence_T = torch.tensor([0, 0, 1, 1])
    weight_S = wpo_weight(logps_T, logps_T, torch.ones(4, dtype=torch.bool), sequence_T, 2)
    assert weight_S.tolist() == [1.0, 1.0]
