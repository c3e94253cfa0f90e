"""Divergences between student and teacher against arithmetic done by hand, and their limits."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.losses import jsd, kl_divergence

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_by_hand():
    """p = (1/2, 1/2) and q = (1/4, 3/4), so M of 1/2 is (3/8, 5/8). Logits are log-probs, plus any constant."""
    p, q, m = (0.5, 0.5), (0.25, 0.75), (0.375, 0.625)

    def divergence(a: tuple[float, ...], b: tuple[float, ...]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    student_NV, teacher_NV = (torch.tensor([x], dtype=torch.float64).log() + c for x, c in ((p, 3.0), (q, -5.0)))
    expected = {
        0.0: divergence(q, p),
        1.0: divergence(p, q),
        0.5: 0.5 * divergence(q, m) + 0.5 * divergence(p, m),
    }
    for beta, value in expected.items():
        assert jsd(student_NV, teacher_NV, beta=beta).item() == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_of_a_distribution_with_itself_value_and_gradient_are_zero(beta):
    student_NV = draw(0, 3, 7).requires_grad_()
    loss_N = jsd(student_NV, student_NV, beta=beta)
    loss_N.sum().backward()
    torch.testing.assert_close(loss_N, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(student_NV.grad, torch.zeros(3, 7, dtype=torch.float64), rtol=0, atol=1e-15)


def test_symmetric_at_one_half_and_bounded_by_log_2():
    student_NV, teacher_NV = 5 * draw(0, 50, 7), 5 * draw(1, 50, 7)
    there_N, back_N = jsd(student_NV, teacher_NV), jsd(teacher_NV, student_NV)
    torch.testing.assert_close(there_N, back_N)
    assert (there_N > 0).all()
    assert (there_N < math.log(2)).all()
    apart = torch.tensor([[0.0, -1e4]]), torch.tensor([[-1e4, 0.0]])
    assert jsd(*apart).item() == pytest.approx(math.log(2))


def test_limits_are_the_two_divergences():
    """Near 0 it goes as beta KL(q || p), near 1 as (1 - beta) KL(p || q)."""
    student_NV, teacher_NV, small = draw(0, 3, 7), draw(1, 3, 7), 1e-6
    forward_N = jsd(student_NV, teacher_NV, beta=small) / small
    reverse_N = jsd(student_NV, teacher_NV, beta=1 - small) / small
    torch.testing.assert_close(forward_N, jsd(student_NV, teacher_NV, beta=0.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(reverse_N, jsd(student_NV, teacher_NV, beta=1.0), rtol=1e-4, atol=0)
    p_NV, q_NV = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    torch.testing.assert_close(jsd(student_NV, teacher_NV, beta=0.0), kl_divergence(q_NV, p_NV))
    torch.testing.assert_close(jsd(student_NV, teacher_NV, beta=1.0), kl_divergence(p_NV, q_NV))


def test_forward_kl_gradient_is_that_of_the_teachers_cross_entropy():
    """d KL(q || p) / d logits = p - q."""
    student_NV, teacher_NV = draw(0, 3, 7).requires_grad_(), draw(1, 3, 7).requires_grad_()
    jsd(student_NV, teacher_NV, beta=0.0).sum().backward()
    torch.testing.assert_close(student_NV.grad, (student_NV.softmax(-1) - teacher_NV.softmax(-1)).detach())
    assert teacher_NV.grad is None


@pytest.mark.parametrize("beta", BETAS)
def test_temperature_divides_both(beta):
    student_NV, teacher_NV = draw(0, 3, 7), draw(1, 3, 7)
    warm_N = jsd(student_NV, teacher_NV, beta=beta, temperature=2.0)
    torch.testing.assert_close(warm_N, jsd(student_NV / 2, teacher_NV / 2, beta=beta))


@pytest.mark.parametrize("beta", BETAS)
def test_a_token_that_neither_can_say_is_not_there(beta):
    student_NV, teacher_NV = draw(0, 3, 7), draw(1, 3, 7)
    wide = [torch.cat([z, torch.full((3, 1), -math.inf, dtype=z.dtype)], 1) for z in (student_NV, teacher_NV)]
    wide[0].requires_grad_()
    student_NV.requires_grad_()
    full_N, wide_N = jsd(student_NV, teacher_NV, beta=beta), jsd(*wide, beta=beta)
    (full_N.sum() + wide_N.sum()).backward()
    torch.testing.assert_close(wide_N, full_N)
    torch.testing.assert_close(wide[0].grad[:, :7], student_NV.grad)


@pytest.mark.parametrize("beta", BETAS)
def test_gradient_agrees_with_finite_differences(beta):
    student_NV, teacher_NV = draw(0, 2, 4).requires_grad_(), draw(1, 2, 4)
    assert torch.autograd.gradcheck(lambda x: jsd(x, teacher_NV, beta=beta, temperature=1.3), (student_NV,))


@pytest.mark.parametrize("beta", [-0.1, 1.1])
def test_beta_is_a_share(beta):
    with pytest.raises(ValueError, match="beta"):
        jsd(draw(0, 1, 2), draw(1, 1, 2), beta=beta)
