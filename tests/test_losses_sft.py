"""Supervised losses against arithmetic done by hand."""

from __future__ import annotations

import math

import torch

from posttrain.losses import dft, nll


def test_nll_of_a_uniform_choice_is_the_log_of_the_vocabulary():
    logps_T = torch.log_softmax(torch.zeros(3, 7, dtype=torch.float64), dim=-1)[:, 2]
    torch.testing.assert_close(nll(logps_T), torch.full((3,), math.log(7), dtype=torch.float64))


def test_dft_by_hand():
    """p = 1/2 and 1/8: -p log p = log 2 / 2 and 3 log 2 / 8. Its gradient is that of -p, which is -p per nat."""
    logps_T = torch.tensor([0.5, 0.125], dtype=torch.float64).log().requires_grad_()
    loss_T = dft(logps_T)
    torch.testing.assert_close(loss_T.detach(), math.log(2) * torch.tensor([0.5, 0.375], dtype=torch.float64))
    (gradient_T,) = torch.autograd.grad(loss_T.sum(), logps_T, retain_graph=True)
    (expected_T,) = torch.autograd.grad(-logps_T.exp().sum(), logps_T)
    torch.testing.assert_close(gradient_T, expected_T)


def test_dft_at_a_token_without_loss_is_zero():
    """Such a token has log-prob 0 (`Policy.logprobs`)."""
    assert dft(torch.zeros(1)).item() == 0
