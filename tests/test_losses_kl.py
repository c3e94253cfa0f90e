"""KL estimators against exact enumeration over a toy vocabulary."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.losses import kl

V = 7
ALL = torch.ones(V, dtype=torch.bool)


@pytest.fixture
def logits_V() -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


@pytest.fixture
def ref_V() -> torch.Tensor:
    return torch.log_softmax(torch.randn(V, generator=torch.Generator().manual_seed(1), dtype=torch.float64), dim=-1)


def divergence(p_V: torch.Tensor, q_V: torch.Tensor) -> torch.Tensor:
    return (p_V.exp() * (p_V - q_V)).sum()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(logits_V, ref_V, estimator):
    logps_V = torch.log_softmax(logits_V, dim=-1)
    expectation = (logps_V.exp() * kl(logps_V, ref_V, ALL, estimator)).sum()
    torch.testing.assert_close(expectation, divergence(logps_V, ref_V))


def test_k2_is_half_the_second_moment_and_not_the_divergence(logits_V, ref_V):
    logps_V = torch.log_softmax(logits_V, dim=-1)
    expectation = (logps_V.exp() * kl(logps_V, ref_V, ALL, "k2")).sum()
    torch.testing.assert_close(expectation, (logps_V.exp() * (logps_V - ref_V) ** 2).sum() / 2)
    assert abs(expectation.item() / divergence(logps_V, ref_V).item() - 1) > 0.01


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_expected_gradient(logits_V, ref_V, estimator):
    """Sampling from pi fixes the weights pi(v); only the loss at each sampled token is differentiated.

    k1: sum pi d log pi = d sum pi = 0. k2: sum pi (log pi - log ref) d log pi = d KL(pi, ref).
    k3: sum pi (1 - ref / pi) d log pi = -sum ref d log pi = d KL(ref, pi).
    """
    logps_V = torch.log_softmax(logits_V, dim=-1)
    loss = (logps_V.exp().detach() * kl(logps_V, ref_V, ALL, estimator)).sum()
    (gradient_V,) = torch.autograd.grad(loss, logits_V, retain_graph=True)
    exact = {"k1": 0 * logps_V.sum(), "k2": divergence(logps_V, ref_V), "k3": divergence(ref_V, logps_V)}
    (exact_V,) = torch.autograd.grad(exact[estimator], logits_V)
    torch.testing.assert_close(gradient_V, exact_V, rtol=1e-12, atol=1e-15)


def test_k3_is_never_negative_even_in_float32():
    """e^-r - 1 computed as such would be off by 6e-8 either way; the true value at r = 1e-6 is 5e-13."""
    rng = torch.Generator().manual_seed(2)
    r_T = torch.randn(100_000, generator=rng) * 10.0 ** torch.randint(-8, 3, (100_000,), generator=rng)
    estimate_T = kl(r_T, torch.zeros(100_000), torch.ones(100_000, dtype=torch.bool), "k3")
    assert estimate_T.dtype == torch.float32
    assert (estimate_T >= 0).all()
    assert estimate_T.isfinite().all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_at_the_reference_value_and_gradient_are_zero(logits_V, estimator):
    logps_V = torch.log_softmax(logits_V, dim=-1)
    estimate_V = kl(logps_V, logps_V, ALL, estimator)
    assert (estimate_V == 0).all()
    if estimator != "k1":
        assert (torch.autograd.grad(estimate_V.sum(), logits_V)[0] == 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_what_stands_at_other_tokens_reaches_neither_value_nor_gradient(estimator, garbage):
    logps_T = torch.tensor([-1.0, garbage, -2.0], requires_grad=True)
    ref_T = torch.tensor([-1.5, -garbage, -1.0])
    estimate_T = kl(logps_T, ref_T, torch.tensor([True, False, True]), estimator)
    estimate_T.sum().backward()
    alone_T = torch.tensor([-1.0, -2.0], requires_grad=True)
    expected_T = kl(alone_T, torch.tensor([-1.5, -1.0]), torch.ones(2, dtype=torch.bool), estimator)
    expected_T.sum().backward()
    assert estimate_T.tolist() == [expected_T[0].item(), 0.0, expected_T[1].item()]
    assert logps_T.grad.tolist() == [alone_T.grad[0].item(), 0.0, alone_T.grad[1].item()]


def test_k3_does_not_overflow_and_nan_is_not_hidden():
    logps_T = torch.tensor([-1000.0, math.nan], requires_grad=True)
    estimate_T = kl(logps_T, torch.zeros(2), torch.ones(2, dtype=torch.bool), "k3")
    estimate_T[0].backward()
    assert estimate_T[0].isfinite()
    assert logps_T.grad[0] == 0
    assert estimate_T[1].isnan()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradients_agree_with_finite_differences(logits_V, ref_V, estimator):
    assert torch.autograd.gradcheck(lambda x: kl(torch.log_softmax(x, dim=-1), ref_V, ALL, estimator), (logits_V,))


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="k4"):
        kl(torch.zeros(1), torch.zeros(1), torch.ones(1, dtype=torch.bool), "k4")
