"""Losses over single completions against arithmetic done by hand."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.losses import apo_zero, apo_zero_unpaired, bco, bco_unpaired, kto, kto_kl, running_mean

DESIRABLE_S = torch.tensor([True, False])


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_kto_by_hand():
    """Log-ratios 2, z = 1, beta 0.5: good 1 - s(0.5) = 0.3775406687981454, bad 1 - s(-0.5) = 0.6224593312018546."""
    found_S = kto(tensor(2.0, 2.0), DESIRABLE_S, tensor(1.0)[0], beta=0.5)
    assert found_S.tolist() == pytest.approx([0.3775406687981454, 0.6224593312018546], abs=1e-15)
    weighed_S = kto(tensor(2.0, 2.0), DESIRABLE_S, 1.0, beta=0.5, desirable_weight=0.3, undesirable_weight=1.1)
    torch.testing.assert_close(weighed_S, found_S * tensor(0.3, 1.1), rtol=1e-15, atol=0)


def test_kto_pulls_each_its_way_and_most_at_z():
    """The slope of s(beta (r - z)) is beta / 4 at r = z, and less on either side."""
    ratios_S = tensor(1.0, 1.0, 3.0, -1.0).requires_grad_()
    desirable_S = torch.tensor([True, False, True, True])
    kto(ratios_S, desirable_S, 1.0, beta=0.4).sum().backward()
    assert ratios_S.grad[:2].tolist() == pytest.approx([-0.1, 0.1], abs=1e-15)
    assert ratios_S.grad[2].item() == pytest.approx(ratios_S.grad[3].item(), abs=1e-15)
    assert -0.1 < ratios_S.grad[2] < 0


def test_kto_at_z_0_is_anchored_and_a_good_and_a_bad_one_are_a_pair():
    ratios_S, every = tensor(2.0, -3.0), (tensor(2.0), tensor(-3.0))
    torch.testing.assert_close(kto(ratios_S, DESIRABLE_S, 0.0), apo_zero_unpaired(ratios_S, DESIRABLE_S))
    torch.testing.assert_close(apo_zero_unpaired(ratios_S, DESIRABLE_S).sum(), apo_zero(*every)[0])
    torch.testing.assert_close(bco_unpaired(ratios_S, DESIRABLE_S, 0.7).sum(), bco(*every, shift=0.7)[0])


def test_bco_unpaired_by_hand():
    """beta r - shift = 1 - 0.5: good log(1 + e^-0.5), bad log(1 + e^0.5)."""
    found_S = bco_unpaired(tensor(2.0, 2.0), DESIRABLE_S, 0.5, beta=0.5)
    assert found_S.tolist() == pytest.approx([math.log1p(math.exp(-0.5)), math.log1p(math.exp(0.5))], abs=1e-15)


def test_kto_kl_is_a_mean_and_never_negative():
    mismatched_S = tensor(3.0, -1.0).requires_grad_()
    assert kto_kl(mismatched_S).item() == 1.0
    assert kto_kl(-mismatched_S).item() == 0.0
    assert not kto_kl(mismatched_S).requires_grad


def test_running_mean_is_the_mean_of_all():
    mean, count = running_mean(0.0, 0, tensor(1.0, 2.0, 6.0))
    assert (mean, count) == (3.0, 3)
    assert running_mean(mean, count, tensor(7.0).requires_grad_()) == (4.0, 4)
    assert running_mean(mean, count, tensor()) == (3.0, 3)
