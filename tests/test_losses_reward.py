"""Losses of reward models and critics against arithmetic done by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from posttrain.losses import bradley_terry, process_reward, value

EVERY = torch.ones(3, dtype=torch.bool)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


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


def test_process_reward_by_hand():
    """Log-odds log 3, so s = 3/4: a good step costs log(4/3), a bad one log 4, one that is good half the time the mean.
    The same as cross-entropy of two classes whose logits differ by it."""
    logits_T = tensor(*[math.log(3)] * 3).requires_grad_()
    labels_T = tensor(1.0, 0.0, 0.5)
    good, bad = math.log(4 / 3), math.log(4)
    assert process_reward(logits_T, labels_T, EVERY).tolist() == pytest.approx([good, bad, (good + bad) / 2])
    classes_T2 = torch.stack([torch.zeros(3, dtype=torch.float64), logits_T.detach()], 1)
    expected = F.cross_entropy(classes_T2[:2], torch.tensor([1, 0]), reduction="none")
    torch.testing.assert_close(process_reward(logits_T.detach(), labels_T, EVERY)[:2], expected)
    assert torch.autograd.gradcheck(lambda x: process_reward(x, labels_T, EVERY), (logits_T,))


@pytest.mark.parametrize(
    ("value_now", "loss", "slope"),
    [
        # Before 1, return 3, clip 0.2. Inside: (v - 3)^2 / 2. Above 1.2 it is held there, where that is worse.
        (1.1, 1.9**2 / 2, -1.9),
        (2.0, 1.8**2 / 2, 0.0),
        (0.0, 3.0**2 / 2, -3.0),  # away from the return: the value itself is worse than the held 0.8
        (6.0, 3.0**2 / 2, 3.0),  # beyond the return: likewise
    ],
)
def test_value_by_hand(value_now, loss, slope):
    values_T = tensor(value_now).requires_grad_()
    loss_T = value(values_T, tensor(1.0), tensor(3.0), EVERY[:1], clip=0.2)
    loss_T.sum().backward()
    assert loss_T.item() == pytest.approx(loss, abs=1e-12)
    assert values_T.grad.item() == pytest.approx(slope, abs=1e-12)


def test_value_without_clip_is_half_the_squared_error():
    found_T = value(tensor(2.0, 5.0, 3.0), tensor(9.0, 9.0, 9.0), tensor(3.0, 3.0, 3.0), EVERY, clip=None)
    assert found_T.tolist() == [0.5, 2.0, 0.0]
