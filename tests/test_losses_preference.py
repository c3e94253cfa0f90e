"""SFT, DPO and Bradley-Terry against arithmetic done by hand."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.losses import bradley_terry, dpo, nll


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_nll_of_a_uniform_choice_is_the_log_of_the_vocabulary():
    logps_T = torch.log_softmax(torch.zeros(3, 7, dtype=torch.float64), dim=-1)[:, 2]
    torch.testing.assert_close(nll(logps_T), torch.full((3,), math.log(7), dtype=torch.float64))


def test_dpo_by_hand():
    """Ratios chosen -10 + 12 = 2 and rejected -9 + 8 = -1, so d = 0.5 (2 - -1) = 1.5.

    -log s(1.5) = log(1 + e^-1.5) = 0.2014132779827524; a flipped label costs log(1 + e^1.5) = 1.7014132779827524.
    Smoothing 0.2: 0.8 * 0.20141... + 0.2 * 1.70141... = 0.5014132779827524.
    """
    logps = tensor(-10.0), tensor(-9.0), tensor(-12.0), tensor(-8.0)
    assert dpo(*logps, beta=0.5).item() == pytest.approx(0.2014132779827524, abs=1e-12)
    assert dpo(*logps, beta=0.5, label_smoothing=0.2).item() == pytest.approx(0.5014132779827524, abs=1e-12)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.49])
def test_dpo_at_the_reference_is_log_2_and_pushes_by_half_beta(label_smoothing):
    """d = 0: both terms are log 2. d loss / d chosen = -beta ((1 - e) s(0) - e s(0)) = -beta (1 - 2e) / 2."""
    chosen_P = tensor(-3.0, -70.0).requires_grad_()
    rejected_P = tensor(-5.0, -1.0).requires_grad_()
    loss_P = dpo(chosen_P, rejected_P, chosen_P, rejected_P, beta=0.3, label_smoothing=label_smoothing)
    loss_P.sum().backward()
    torch.testing.assert_close(loss_P.detach(), torch.full((2,), math.log(2), dtype=torch.float64))
    push = 0.3 * (1 - 2 * label_smoothing) / 2
    torch.testing.assert_close(chosen_P.grad, torch.full((2,), -push, dtype=torch.float64))
    torch.testing.assert_close(rejected_P.grad, torch.full((2,), push, dtype=torch.float64))


def test_label_smoothing_is_least_at_its_own_odds():
    """With a share e of flipped labels the best d is log((1 - e) / e): the model's odds equal those of the labels."""
    margin = math.log(0.9 / 0.1)
    chosen_P = tensor(margin / 0.1).requires_grad_()
    dpo(chosen_P, tensor(0.0), tensor(0.0), tensor(0.0), beta=0.1, label_smoothing=0.1).sum().backward()
    assert chosen_P.grad.item() == pytest.approx(0, abs=1e-15)


def test_dpo_stays_finite_far_from_the_reference():
    chosen_P = torch.tensor([-5000.0, -1.0], requires_grad=True)
    loss_P = dpo(chosen_P, torch.tensor([-1.0, -5000.0]), torch.zeros(2), torch.zeros(2), beta=1.0)
    loss_P.sum().backward()
    assert loss_P.dtype == torch.float32
    assert loss_P.tolist() == [4999.0, 0.0]
    assert chosen_P.grad.tolist() == [-1.0, 0.0]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_gradients_agree_with_finite_differences(label_smoothing):
    rng = torch.Generator().manual_seed(0)
    chosen, rejected, ref_chosen, ref_rejected = torch.randn(4, 5, generator=rng, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda c, r: dpo(c, r, ref_chosen, ref_rejected, beta=0.7, label_smoothing=label_smoothing),
        (chosen.requires_grad_(), rejected.requires_grad_()),
    )
    assert torch.autograd.gradcheck(nll, (torch.randn(4, dtype=torch.float64, requires_grad=True),))


def test_bradley_terry_by_hand():
    """Rewards 1 and -0.5, margin 0.5: -log s(1) = log(1 + e^-1) = 0.31326168751822286; 0.1 (1 - 0.5)^2 = 0.025."""
    loss_P = bradley_terry(tensor(1.0), tensor(-0.5), margin_P=tensor(0.5), centring=0.1)
    assert loss_P.item() == pytest.approx(0.31326168751822286 + 0.025, abs=1e-12)
    assert bradley_terry(tensor(2.0), tensor(2.0)).item() == pytest.approx(math.log(2), abs=1e-15)


@pytest.mark.parametrize("centring", [0.0, 0.01, 1.0])
def test_bradley_terry_gradient_is_that_of_finite_differences(centring):
    chosen_P, rejected_P = tensor(0.3, -2.0, 5.0).requires_grad_(), tensor(1.0, -2.0, -4.0).requires_grad_()
    margin_P = tensor(0.0, 0.7, -0.2)
    assert torch.autograd.gradcheck(
        lambda c, r: bradley_terry(c, r, margin_P=margin_P, centring=centring), (chosen_P, rejected_P), eps=1e-6
    )


def test_only_centring_sees_where_the_rewards_lie():
    """Without it a common shift changes nothing; with it the best rewards have a mean of 0."""
    chosen_P, rejected_P = tensor(1.0, 3.0), tensor(0.5, 4.0)
    torch.testing.assert_close(bradley_terry(chosen_P + 7, rejected_P + 7), bradley_terry(chosen_P, rejected_P))
    shift = tensor(0.0).requires_grad_()
    bradley_terry(tensor(1.0) + shift, tensor(-1.0) + shift, centring=0.3).backward()
    assert shift.grad.item() == pytest.approx(0, abs=1e-15)


def test_bradley_terry_stays_finite_far_out():
    chosen_P = torch.tensor([-5000.0, 5000.0], requires_grad=True)
    loss_P = bradley_terry(chosen_P, torch.zeros(2))
    loss_P.sum().backward()
    assert loss_P.tolist() == [5000.0, 0.0]
    assert chosen_P.grad.tolist() == [-1.0, 0.0]
