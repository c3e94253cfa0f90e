"""Losses over samples of now against arithmetic done by hand."""

from __future__ import annotations

import pytest
import torch

from posttrain.losses import logistic, nash_md, xpo


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_nash_md_by_hand():
    """beta 0.5, log-ratios 1 and -2, P = 0.9: weights 0.5 - 0.4 and -1 - 0.4 on log-probs -1 and -3; the last token
    carries no loss. They are its gradient too."""
    logps_T = tensor(-1.0, -3.0, -7.0).requires_grad_()
    target_T = torch.tensor([True, True, False])
    loss_T = nash_md(logps_T, tensor(-2.0, -1.0, 5.0), tensor(0.9, 0.9, 0.9), target_T, beta=0.5)
    loss_T.sum().backward()
    assert loss_T.tolist() == pytest.approx([-0.1, 4.2, 0.0], abs=1e-12)
    assert logps_T.grad.tolist() == pytest.approx([0.1, -1.4, 0.0], abs=1e-12)


def test_nash_md_rests_at_the_reference_when_no_answer_is_preferred():
    logps_T = tensor(-1.0, -3.0).requires_grad_()
    nash_md(logps_T, logps_T, tensor(0.5, 0.5), torch.ones(2, dtype=torch.bool)).sum().backward()
    assert logps_T.grad.tolist() == [0.0, 0.0]


def test_xpo_is_dpo_that_leaves_what_the_reference_says():
    chosen_P, rejected_P, explored_P = tensor(2.0, 0.0), tensor(-1.0, 3.0), tensor(-10.0, -20.0).requires_grad_()
    dpo_P = logistic(chosen_P, rejected_P)
    torch.testing.assert_close(xpo(chosen_P, rejected_P, explored_P, alpha=0.0), dpo_P)
    loss_P = xpo(chosen_P, rejected_P, explored_P, alpha=0.01)
    torch.testing.assert_close(loss_P, dpo_P - tensor(0.1, 0.2))
    loss_P.sum().backward()
    assert explored_P.grad.tolist() == [0.01, 0.01]
