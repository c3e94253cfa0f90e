"""Preference losses against arithmetic done by hand: what they are at the reference, far from it, and to one another.

By hand throughout: chosen 2, rejected -1, beta 0.5, so beta times them is 1 and -0.5, and u = beta d = 1.5.
"""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.losses import (
    aot,
    apo_down,
    apo_zero,
    bco,
    discopop,
    exo,
    hinge,
    ipo,
    logistic,
    nca,
    robust,
    sppo,
)

OF_MARGINS = [logistic, hinge, ipo, exo, robust, aot, discopop]
"""Those that see only chosen - rejected."""


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def minus_log_s(x: float) -> float:
    """-log s(x) = log(1 + e^-x)."""
    return math.log1p(math.exp(-x))


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("loss", "options", "expected"),
    [
        (logistic, {}, 0.2014132779827524),  # log(1 + e^-1.5)
        (logistic, {"label_smoothing": 0.2}, 0.5014132779827524),  # 0.8 * 0.20141... + 0.2 * log(1 + e^1.5)
        (logistic, {"gamma": 1.5}, math.log(2)),
        (hinge, {"beta": 0.2}, 0.4),  # 1 - 0.2 * 3
        (hinge, {}, 0.0),
        (ipo, {}, 4.0),  # (3 - 1)^2
        (exo, {"label_smoothing": 0.1}, s(1.5) * math.log(s(1.5) / 0.9) + s(-1.5) * math.log(s(-1.5) / 0.1)),
        (nca, {}, minus_log_s(1) + 0.5 * minus_log_s(-1) + 0.5 * minus_log_s(0.5)),
        (robust, {"label_smoothing": 0.2}, (0.8 * 0.2014132779827524 - 0.2 * 1.7014132779827524) / 0.6),
        (bco, {}, minus_log_s(1) + minus_log_s(0.5)),
        (bco, {"shift": 1.0}, math.log(2) + minus_log_s(1.5)),
        (sppo, {}, 1.0),  # (2 - 1)^2 + (-1 + 1)^2
        (apo_zero, {}, 0.6464820901681405),  # 1 - 0.7310585786300049 + 0.3775406687981454
        (apo_down, {}, 0.9134841024363612),  # 0.7310585786300049 + 1 - 0.8175744761936437
        (discopop, {"tau": 0.5}, (1 - s(3)) * minus_log_s(1.5) + s(3) * math.exp(-1.5)),
    ],
)
def test_by_hand(loss, options, expected):
    found_P = loss(tensor(2.0, 2.0), tensor(-1.0, -1.0), **{"beta": 0.5} | options)
    assert found_P.tolist() == pytest.approx([expected, expected], abs=1e-12)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (logistic, math.log(2)),
        (hinge, 1.0),
        (ipo, 1 / (4 * 0.3**2)),
        (exo, 0.5 * math.log(0.5 / 0.999) + 0.5 * math.log(0.5 / 0.001)),
        (nca, 2 * math.log(2)),
        (robust, math.log(2)),
        (bco, 2 * math.log(2)),
        (sppo, 2 / (4 * 0.3**2)),
        (aot, math.log(2)),
        (apo_zero, 1.0),
        (apo_down, 1.0),
        (discopop, 0.5 * math.log(2) + 0.5),
    ],
)
def test_at_the_reference(loss, expected):
    """Both scores 0. All but two losses then raise the chosen and lower the rejected one, as gradients go.

    apo_down leaves the chosen where it is, beta / 4 - beta / 4. DiscoPOP has a bump there, which its paper remarks on:
    d loss / du = s'(0) / tau (1 - log 2) - 1/4 - 1/2, above 0 for tau = 0.05.
    """
    chosen_P, rejected_P = tensor(0.0, 0.0).requires_grad_(), tensor(0.0, 0.0).requires_grad_()
    loss_P = loss(chosen_P, rejected_P, beta=0.3)
    loss_P.sum().backward()
    assert loss_P.tolist() == pytest.approx([expected, expected], abs=1e-12)
    push = {apo_down: 0.0, discopop: 0.3 * ((1 - math.log(2)) / 0.2 - 0.75)}.get(loss)
    if push is None:
        assert (chosen_P.grad < 0).all()
    else:
        assert chosen_P.grad.tolist() == pytest.approx([push, push], abs=1e-12)
    if loss is not discopop:
        assert (rejected_P.grad > 0).all()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.49])
def test_dpo_pushes_by_half_beta_at_the_reference(label_smoothing):
    """d loss / d chosen = -beta ((1 - e) s(0) - e s(0)) = -beta (1 - 2e) / 2."""
    chosen_P, rejected_P = tensor(-3.0, -70.0).requires_grad_(), tensor(-3.0, -70.0).requires_grad_()
    logistic(chosen_P, rejected_P, beta=0.3, label_smoothing=label_smoothing).sum().backward()
    push = 0.3 * (1 - 2 * label_smoothing) / 2
    torch.testing.assert_close(chosen_P.grad, tensor(-push, -push))
    torch.testing.assert_close(rejected_P.grad, tensor(push, push))


@pytest.mark.parametrize("loss", OF_MARGINS)
def test_losses_of_margins_do_not_see_a_common_shift(loss):
    chosen_P, rejected_P = tensor(1.0, -4.0, 2.0), tensor(0.5, 3.0, -7.0)
    torch.testing.assert_close(loss(chosen_P + 11, rejected_P + 11), loss(chosen_P, rejected_P))


def test_label_smoothing_is_least_at_its_own_odds():
    """With a share e of flipped labels the best u is log((1 - e) / e): the model's odds equal those of the labels.
    There EXO's divergence is 0, for it is one."""
    odds = math.log(0.9 / 0.1)
    chosen_P = tensor(odds / 0.1).requires_grad_()
    logistic(chosen_P, tensor(0.0), beta=0.1, label_smoothing=0.1).sum().backward()
    assert chosen_P.grad.item() == pytest.approx(0, abs=1e-15)
    assert exo(chosen_P, tensor(0.0), beta=0.1, label_smoothing=0.1).item() == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("e", [0.0, 0.1, 0.4])
def test_robust_is_unbiased(e):
    """Over labels of which a share e is flipped, its mean is DPO's loss on the right ones."""
    chosen_P, rejected_P = tensor(1.0, -4.0, 2.0), tensor(0.5, 3.0, -7.0)
    right_P = robust(chosen_P, rejected_P, label_smoothing=e)
    flipped_P = robust(rejected_P, chosen_P, label_smoothing=e)
    torch.testing.assert_close((1 - e) * right_P + e * flipped_P, logistic(chosen_P, rejected_P))


def test_aot_sorts_each_side_by_itself():
    """1, 3 against 0, 2: each is 1 above, whatever stood together; so a permutation of one side changes nothing."""
    found_P = aot(tensor(3.0, 1.0), tensor(0.0, 2.0), beta=1.0)
    assert found_P.tolist() == pytest.approx([minus_log_s(1)] * 2, abs=1e-15)
    torch.testing.assert_close(aot(tensor(1.0, 3.0), tensor(0.0, 2.0), beta=1.0), found_P)
    one = tensor(0.3), tensor(-0.2)
    torch.testing.assert_close(aot(*one, label_smoothing=0.1), logistic(*one, label_smoothing=0.1))


def test_discopop_turns_from_logistic_to_exponential():
    chosen_P, nothing_P = tensor(-4.0, 4.0), tensor(0.0, 0.0)
    found = discopop(chosen_P, nothing_P, beta=1.0, tau=0.05).tolist()
    assert found == pytest.approx([minus_log_s(-4), math.exp(-4)], abs=1e-12)


def test_logistic_stays_exact_far_from_the_reference():
    chosen_P = torch.tensor([-5000.0, -1.0], requires_grad=True)
    loss_P = logistic(chosen_P, torch.tensor([-1.0, -5000.0]), beta=1.0)
    loss_P.sum().backward()
    assert loss_P.dtype == torch.float32
    assert loss_P.tolist() == [4999.0, 0.0]
    assert chosen_P.grad.tolist() == [-1.0, 0.0]


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (exo, {"label_smoothing": 0.0}),
        (exo, {"label_smoothing": 0.5}),
        (robust, {"label_smoothing": 0.5}),
        (discopop, {"tau": 0.0}),
        (discopop, {"tau": 1.1}),
    ],
)
def test_what_cannot_be_computed_is_refused(loss, options):
    with pytest.raises(ValueError, match=f"{loss.__name__}: {next(iter(options))}"):
        loss(tensor(1.0), tensor(0.0), **options)
