"""Ratios, clipping and importance weights against arithmetic done by hand."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from posttrain.losses import (
    Counts,
    cispo,
    clipped_share,
    entropy_bonus,
    gmpo,
    importance,
    policy_gradient,
    ratio,
    reduce_tokens,
    sapo,
    vespo,
)

LEVELS = ["token", "sequence", "sequence_token", "product"]
POLICIES = {level: partial(policy_gradient, level=level) for level in LEVELS}
POLICIES |= {"cispo": cispo, "sapo": sapo, "gmpo": gmpo, "vespo": vespo}


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def every(T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`target_T, sequence_T` of one sequence of which every token carries loss."""
    return torch.ones(T, dtype=torch.bool), torch.zeros(T, dtype=torch.long)


def test_ratio_by_hand():
    """Token ratios 2, 8 | 3. Sequence 0: sqrt(2 * 8) = 4, and 16 in all; sequence 1: 3. Without loss one reads 1."""
    logps_T = tensor(2, 8, 5, 3).log()
    target_T = torch.tensor([True, True, False, True])
    sequence_T = torch.tensor([0, 0, -1, 1])
    expected = {
        "token": (2, 8, 1, 3),
        "sequence": (4, 4, 1, 3),
        "sequence_token": (4, 4, 1, 3),
        "product": (16, 16, 1, 3),
    }
    for level, values in expected.items():
        found_T = ratio(logps_T, torch.zeros_like(logps_T), target_T, sequence_T, level)
        torch.testing.assert_close(found_T, tensor(*values))


@pytest.mark.parametrize(
    ("w", "advantage", "options", "loss", "slope"),
    [
        # -min(w A, clip(w, 0.8, 1.2) A); d loss / d log w is -A w where w carries gradient, and 0 where it is cut.
        (1.1, 2.0, {}, -2.2, -2.2),
        (1.5, 2.0, {}, -2.4, 0.0),
        (0.5, 2.0, {}, -1.0, -1.0),  # a good token that became unlikely is still pulled up
        (0.5, -2.0, {}, 1.6, 0.0),
        (1.5, -2.0, {}, 3.0, 3.0),  # a bad token that became likely is still pushed down
        (1.25, 2.0, {"clip_high": 0.28}, -2.5, -2.5),  # clip-higher
        (5.0, -2.0, {"ratio_cap": 3.0}, 6.0, 0.0),  # dual clip
        (5.0, 2.0, {"clip_high": None, "ratio_cap": 3.0}, -10.0, -10.0),  # ... which leaves A > 0 alone
        (5.0, 2.0, {"clip_low": None, "clip_high": None}, -10.0, -10.0),
        (0.1, -2.0, {"clip_low": None, "clip_high": None}, 0.2, 0.2),
        (7.0, 0.0, {}, 0.0, 0.0),
    ],
)
def test_clipping_by_hand(w, advantage, options, loss, slope):
    logps_T = tensor(math.log(w)).requires_grad_()
    loss_T = policy_gradient(logps_T, tensor(0), tensor(advantage), *every(1), **options)
    loss_T.sum().backward()
    assert loss_T.item() == pytest.approx(loss, abs=1e-12)
    assert logps_T.grad.item() == pytest.approx(slope, abs=1e-12)
    cut = clipped_share(logps_T, tensor(0), tensor(advantage), *every(1), Counts(tokens=1), **options)
    assert cut.item() == float(slope == 0 and advantage != 0)


def test_one_clamp_is_the_minimum_of_the_papers():
    """PPO's min and the dual clip's max, as the papers write them, over random ratios and advantages."""
    rng = torch.Generator().manual_seed(0)
    logps_T, advantages_T = torch.randn(2, 1000, generator=rng, dtype=torch.float64)
    w_T = logps_T.exp()
    surrogate_T = torch.minimum(w_T * advantages_T, w_T.clamp(0.7, 1.3) * advantages_T)
    dual_T = torch.where(advantages_T < 0, torch.maximum(surrogate_T, 2 * advantages_T), surrogate_T)
    options = {"clip_low": 0.3, "clip_high": 0.3, "ratio_cap": 2.0}
    loss_T = policy_gradient(logps_T, torch.zeros_like(logps_T), advantages_T, *every(1000), **options)
    torch.testing.assert_close(loss_T, -dual_T)


def test_clipped_share_adds_up_over_micro_batches():
    """Of four tokens with ratio 2 the two with a positive advantage are cut: 1/2, as 1/4 from each half."""
    logps_T = torch.full((4,), math.log(2), dtype=torch.float64)
    advantages_T = tensor(1, -1, 1, -1)
    halves = [
        clipped_share(logps_T[h], torch.zeros(2), advantages_T[h], *every(2), Counts(tokens=4)).item()
        for h in (slice(0, 2), slice(2, 4))
    ]
    assert halves == [0.25, 0.25]


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
@pytest.mark.parametrize("name", POLICIES)
def test_on_policy_gradient_is_that_of_reinforce(name, how):
    """With w = 1, d w = d log pi, so the gradient is that of -A log pi; an advantage is one number per sequence.

    With one ratio per sequence each token carries the mean of the sequence's d log pi; summed over the sequence
    that is the same, under every reduction that weighs a sequence's tokens alike. A product carries their sum, which
    is the sequence's length times as much.
    """
    logps_T = tensor(-1, -2, -3, -0.5, -4).requires_grad_()
    advantages_T = tensor(2, 2, 2, -1, -1)
    target_T, sequence_T = torch.ones(5, dtype=torch.bool), torch.tensor([0, 0, 0, 1, 1])

    def gradient(loss_T: torch.Tensor) -> torch.Tensor:
        counts = Counts(tokens=5, sequences=2)
        loss = reduce_tokens(loss_T, target_T, counts, how=how, sequence_T=sequence_T, constant=6.0)
        return torch.autograd.grad(loss, logps_T)[0]

    loss_T = POLICIES[name](logps_T, logps_T, advantages_T, target_T, sequence_T)
    if name in (*LEVELS, "gmpo"):
        torch.testing.assert_close(loss_T, -advantages_T)
    length_T = tensor(3, 3, 3, 2, 2) if name == "product" else 1
    torch.testing.assert_close(gradient(loss_T), length_T * gradient(-advantages_T * logps_T))


def test_gspo_token_is_gspo_where_a_sequence_has_one_advantage():
    """In value at each token, and in gradient once the tokens are summed; clipped sequences among them."""
    logps, old = 0.4 * torch.randn(2, 40, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    target_T, sequence_T = torch.arange(40) % 7 != 0, torch.arange(40) // 4
    advantages_T = tensor(1, 1, 2, -3, 0.5, 1, 1, -1, -1, 2)[sequence_T]
    found = {}
    for level in ("sequence", "sequence_token"):
        leaf_T = logps.clone().requires_grad_()
        loss_T = policy_gradient(leaf_T, old, advantages_T, target_T, sequence_T, level=level)
        counts = Counts(sequences=10)
        reduce_tokens(loss_T, target_T, counts, how="sequence", sequence_T=sequence_T).backward()
        found[level] = loss_T.detach(), leaf_T.grad
    for whole, by_token in zip(*found.values(), strict=True):
        torch.testing.assert_close(by_token, whole)
    cut = clipped_share(logps, old, advantages_T, target_T, sequence_T, Counts(tokens=40), level="sequence_token")
    assert 0 < cut < 1


def test_gspo_token_keeps_the_tokens_apart():
    """Ratios 2 and 8, so 4 for both; advantages 1 and -3. Each token's slope is its own -A w."""
    logps_T = tensor(2, 8).log().requires_grad_()
    options = {"clip_low": None, "clip_high": None, "level": "sequence_token"}
    loss_T = policy_gradient(logps_T, tensor(0, 0), tensor(1, -3), *every(2), **options)
    loss_T.sum().backward()
    torch.testing.assert_close(loss_T.detach(), tensor(-4, 12))
    torch.testing.assert_close(logps_T.grad, tensor(-4, 12))


@pytest.mark.parametrize(
    ("w", "cap", "weight"), [(2.0, 1.28, 1.28), (0.5, 1.28, 0.5), (2.0, 5.0, 2.0), (9.0, 5.0, 5.0)]
)
def test_cispo_by_hand(w, cap, weight):
    """-min(w, cap) A log pi, the weight constant: by the paper cap = 1 + epsilon_high, by ScaleRL epsilon_max."""
    logps_T = tensor(-0.7).requires_grad_()
    loss_T = cispo(logps_T, tensor(-0.7 - math.log(w)), tensor(3), *every(1), cap=cap)
    loss_T.sum().backward()
    assert loss_T.item() == pytest.approx(weight * 3 * 0.7, abs=1e-12)
    assert logps_T.grad.item() == pytest.approx(-weight * 3, abs=1e-12)


@pytest.mark.parametrize(("advantage", "tau"), [(2.0, 1.0), (-2.0, 1.05), (-2.0, 3.0)])
def test_sapo_by_hand(advantage, tau):
    """-(4 / tau) s(tau (w - 1)) A at w = 2; its slope in log w is -4 s (1 - s) w A."""
    logps_T = tensor(math.log(2)).requires_grad_()
    loss_T = sapo(logps_T, tensor(0), tensor(advantage), *every(1), tau_negative=tau)
    loss_T.sum().backward()
    s = 1 / (1 + math.exp(-tau))
    assert loss_T.item() == pytest.approx(-4 / tau * s * advantage, abs=1e-12)
    assert logps_T.grad.item() == pytest.approx(-4 * s * (1 - s) * 2 * advantage, abs=1e-12)


@pytest.mark.parametrize(
    ("logs", "advantage", "mean", "slopes"),
    [
        # A > 0: held above, 0.6 at 0.4; A < 0: held below, -0.6 at -0.4. What is held has no gradient.
        ((0.6, 0.1), 2.0, 0.25, (0, 0.5)),
        ((-0.6, 0.1), 2.0, -0.25, (0.5, 0.5)),
        ((-0.6, 0.1), -2.0, -0.15, (0, 0.5)),
        ((0.6, 0.1), -2.0, 0.35, (0.5, 0.5)),
    ],
)
def test_gmpo_by_hand(logs, advantage, mean, slopes):
    logps_T = tensor(*logs).requires_grad_()
    loss_T = gmpo(logps_T, tensor(0, 0), tensor(advantage, advantage), *every(2), clip=0.4)
    loss_T[0].backward()
    whole = -advantage * math.exp(mean)
    assert loss_T.tolist() == pytest.approx([whole, whole], abs=1e-12)
    assert logps_T.grad.tolist() == pytest.approx([whole * slope for slope in slopes], abs=1e-12)


@pytest.mark.parametrize(("advantage", "phi"), [(1.0, 4 * math.exp(-3)), (-1.0, 8 * math.exp(-2))])
def test_vespo_by_hand(advantage, phi):
    """Ratios 4 and 1/2, so w = 2: w^2 e^(3 - 3w) = 4 e^-3 for A > 0, w^3 e^(2 - 2w) = 8 e^-2 for A < 0."""
    logps_T = tensor(-1, -2).requires_grad_()
    old_T = logps_T.detach() - tensor(4, 0.5).log()
    loss_T = vespo(logps_T, old_T, tensor(advantage, advantage), *every(2))
    loss_T.sum().backward()
    assert loss_T.tolist() == pytest.approx([phi * advantage, 2 * phi * advantage], abs=1e-12)
    assert logps_T.grad.tolist() == pytest.approx([-phi * advantage] * 2, abs=1e-12)


def test_vespo_weight_is_1_at_1_largest_at_k_over_b_and_0_far_out():
    logs = [-50.0, math.log(2 / 3) - 0.1, math.log(2 / 3), math.log(2 / 3) + 0.1, 0.0, 50.0]
    low, before, peak, after, one, high = (
        vespo(tensor(log - 1), tensor(-1), tensor(1), *every(1)).item() / (1 - log) for log in logs
    )
    assert one == pytest.approx(1, abs=1e-12)
    assert peak > before > one
    assert peak > after > one
    assert abs(low) < 1e-12
    assert high == 0


def test_entropy_bonus_is_minus_the_entropy_at_target_tokens():
    entropies_T = tensor(0.3, math.nan, 2.0).requires_grad_()
    loss_T = entropy_bonus(entropies_T, torch.tensor([True, False, True]))
    loss_T.sum().backward()
    assert loss_T.tolist() == [-0.3, 0.0, -2.0]
    assert entropies_T.grad.tolist() == [-1.0, 0.0, -1.0]


@pytest.mark.parametrize("name", POLICIES)
def test_zero_advantages_give_a_zero_gradient(name):
    logps_T = torch.randn(6, dtype=torch.float64, requires_grad=True)
    POLICIES[name](logps_T, torch.zeros(6), torch.zeros(6), *every(6)).sum().backward()
    assert (logps_T.grad == 0).all()


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("log_w", [-1000.0, 1000.0])
def test_an_absurd_ratio_does_not_overflow(name, advantage, log_w):
    """e^1000 is inf in float32, and inf times the 0 slope of the clip would be NaN."""
    logps_T = torch.tensor([log_w], requires_grad=True)
    loss_T = POLICIES[name](logps_T, torch.zeros(1), torch.tensor([advantage]), *every(1))
    loss_T.sum().backward()
    assert loss_T.isfinite().all()
    # CISPO holds its weight, and the token still teaches.
    expected = -5 * advantage if name == "cispo" and log_w > 0 else 0
    assert logps_T.grad.item() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("name", POLICIES)
def test_a_nan_at_a_target_is_not_hidden(name):
    """Masking must not swallow what the non-finite guard has to see."""
    logps_T = torch.tensor([math.nan, -1.0])
    assert POLICIES[name](logps_T, torch.zeros(2), torch.ones(2), *every(2))[0].isnan()
    assert importance(logps_T, torch.zeros(2), every(2)[0])[0].isnan()


def test_importance_by_hand():
    """The trainer finds the tokens 0.5, 1.5 and 3 times as likely as the sampler did; cap 2."""
    logps_T = tensor(0.5, 1.5, 3, 9).log()
    target_T = torch.tensor([True, True, True, False])
    sampler_T = tensor(0, 0, 0, math.nan)  # nobody reads what stands where there is no loss
    expected = {"truncate": (0.5, 1.5, 2, 1), "mask": (0.5, 1.5, 0, 1), "none": (1, 1, 1, 1)}
    for how, weights in expected.items():
        torch.testing.assert_close(importance(logps_T, sampler_T, target_T, how=how), tensor(*weights))
    assert not importance(logps_T.requires_grad_(), sampler_T, target_T).requires_grad


def test_importance_weights_make_an_off_policy_average_exact():
    """E over the sampler's q of (p / q) f = E over p of f, as long as no weight is above the cap."""
    rng = torch.Generator().manual_seed(2)
    p_V, q_V = torch.log_softmax(0.2 * torch.randn(2, 6, generator=rng, dtype=torch.float64), dim=-1)
    f_V = torch.randn(6, generator=rng, dtype=torch.float64)
    weight_V = importance(p_V, q_V, every(6)[0], cap=10)
    torch.testing.assert_close((q_V.exp() * weight_V * f_V).sum(), (p_V.exp() * f_V).sum())


@pytest.mark.parametrize(
    "loss",
    [partial(policy_gradient, ratio_cap=1.5), partial(sapo, level="sequence")],
)
def test_gradients_agree_with_finite_differences(loss):
    """Of forms that stand in no line of the table; tests/test_losses_table.py has those."""
    rng = torch.Generator().manual_seed(3)
    logps, old, advantages = 0.5 * torch.randn(3, 8, generator=rng, dtype=torch.float64)
    target_T = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
    sequence_T = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2])
    assert torch.autograd.gradcheck(lambda x: loss(x, old, advantages, target_T, sequence_T), (logps.requires_grad_(),))


def test_float32_stays_float32_and_half_is_widened():
    for dtype in (torch.float32, torch.bfloat16):
        logps_T = torch.tensor([-1.0, -2.0], dtype=dtype)
        assert policy_gradient(logps_T, logps_T, logps_T, *every(2)).dtype == torch.float32


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="batch"):
        ratio(torch.zeros(1), torch.zeros(1), *every(1), level="batch")
    with pytest.raises(ValueError, match="clip"):
        importance(torch.zeros(1), torch.zeros(1), every(1)[0], how="clip")
