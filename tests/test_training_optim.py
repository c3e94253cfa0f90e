"""AdamW's groups and exact state, the learning rate by hand, clipping."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from tiny import tiny_policy

from posttrain.recipe.blocks import Lora, Optim
from posttrain.records import UserError
from posttrain.training.optim import adamw, clip, learning_rate, load_state, state_tensors, zero_state


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3)).to(dtype)


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    dtype = next(net.parameters()).dtype
    for step in steps:
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step), dtype=dtype)
        net(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_learning_rate_by_hand():
    """10 steps, warm-up 0.2 = 2 steps: 1/3, 2/3, then the peak at step 2; 8 steps from there to zero at step 10."""
    linear = Optim(lr=3.0, warmup=0.2, schedule="linear")
    assert [learning_rate(s, 10, linear) for s in (0, 1, 2, 3, 9)] == pytest.approx([1, 2, 3, 3 * 7 / 8, 3 / 8])
    cosine = Optim(lr=3.0, warmup=0.2, schedule="cosine")
    assert learning_rate(6, 10, cosine) == pytest.approx(1.5)
    assert learning_rate(9, 10, cosine) == pytest.approx(1.5 * (1 + math.cos(7 * math.pi / 8)))
    constant = Optim(lr=3.0, warmup=0.2, schedule="constant")
    assert [learning_rate(s, 10, constant) for s in (0, 2, 9)] == pytest.approx([1, 3, 3])


@given(
    steps=st.integers(1, 60),
    warmup=st.floats(0, 0.99),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
)
def test_the_rate_rises_to_the_peak_then_falls_and_is_never_zero(steps, warmup, schedule):
    optim = Optim(lr=2.0, warmup=warmup, schedule=schedule)
    rates = [learning_rate(step, steps, optim) for step in range(steps)]
    peak = rates.index(max(rates))
    assert rates[peak] == 2.0
    assert min(rates) > 0
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_a_step_outside_the_run_is_refused():
    with pytest.raises(ValueError, match="step 5"):
        learning_rate(5, 5, Optim())


def test_decay_shrinks_matrices_and_leaves_norms_and_biases():
    """With zero gradients AdamW only decays: p (1 - lr wd) for matrices, p for the rest."""
    net = model()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = adamw(net.named_parameters(), Optim(lr=0.1, weight_decay=0.5))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.ndim >= 2 else 1.0))


def test_the_first_step_moves_every_weight_by_the_rate():
    """After one step m / sqrt(v), both without bias, is the gradient's sign."""
    net = model()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = adamw(net.named_parameters(), Optim(lr=0.01, eps=1e-12))
    for p in net.parameters():
        p.grad = torch.where(p >= 0, 3.0, -2.0)
    optimizer.step()
    for p, was in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), was - 0.01 * torch.where(was >= 0, 1.0, -1.0))


def test_only_what_requires_a_gradient_is_trained():
    net = model()
    net[0].requires_grad_(False)
    optimizer = adamw(net.named_parameters(), Optim())
    train(net, optimizer, range(1))
    assert {name.rpartition("/")[0] for name in state_tensors(optimizer)} == {
        "1.weight",
        "1.bias",
        "2.weight",
        "2.bias",
    }
    with pytest.raises(UserError, match="frozen"):
        adamw(net.requires_grad_(False).named_parameters(), Optim())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_through_safetensors_bit_for_bit_and_training_goes_on_the_same(dtype):
    optim = Optim(lr=0.01, weight_decay=0.1)
    straight = model(dtype=dtype)
    optimizer = adamw(straight.named_parameters(), optim)
    train(straight, optimizer, range(5))
    weights = {name: p.detach().clone() for name, p in straight.state_dict().items()}
    stored = load(save(state_tensors(optimizer)))
    train(straight, optimizer, range(5, 9))

    resumed = model(seed=1, dtype=dtype)
    resumed.load_state_dict(weights)
    optimizer = adamw(resumed.named_parameters(), optim)
    load_state(optimizer, stored)
    again = state_tensors(optimizer)
    assert again.keys() == stored.keys()
    kinds = 3 if dtype == torch.float32 else 4  # step, exp_avg, exp_avg_sq; a master where the weight is coarser
    assert len(stored) == kinds * len(weights)
    assert {t.dtype for t in stored.values()} == {torch.float32}
    assert all(torch.equal(again[k], stored[k]) and again[k].dtype == stored[k].dtype for k in stored)
    assert all(again[f"{name}/step"] == 5 for name in weights)
    train(resumed, optimizer, range(5, 9))
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_fresh_optimiser_has_no_state_and_takes_none():
    optimizer = adamw(model().named_parameters(), Optim())
    assert state_tensors(optimizer) == {}
    load_state(optimizer, {})
    assert state_tensors(optimizer) == {}


@pytest.mark.parametrize("name", ["9.weight/exp_avg", "0.weight/exp_avg"])
def test_state_of_another_model_is_refused(name):
    with pytest.raises(UserError, match="does not fit the model"):
        load_state(adamw(model().named_parameters(), Optim()), {name: torch.zeros(2, 2)})


def gradients(*values: list[float]) -> list[torch.nn.Parameter]:
    parameters = [torch.nn.Parameter(torch.zeros(len(v))) for v in values]
    for p, v in zip(parameters, values, strict=True):
        p.grad = torch.tensor(v)
    return parameters


@pytest.mark.parametrize(("max_norm", "after"), [(6.5, 0.5), (13.0, 1.0), (20.0, 1.0), (None, 1.0)])
def test_clip_by_hand(max_norm, after):
    """|(3, 4)| = 5 and |12| = 12 make 13; a bound of 6.5 halves every gradient."""
    parameters = gradients([3.0, 4.0], [12.0])
    without = torch.nn.Parameter(torch.zeros(1))
    assert clip([*parameters, without], max_norm).item() == pytest.approx(13)
    assert parameters[0].grad.tolist() == pytest.approx([3 * after, 4 * after])
    assert parameters[1].grad.tolist() == pytest.approx([12 * after])
    assert without.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_clip_shows_what_is_not_finite_and_touches_nothing(bad):
    parameters = gradients([3.0, bad], [12.0])
    assert not clip(parameters, 1.0).isfinite()
    assert parameters[0].grad[0] == 3
    assert not parameters[0].grad[1].isfinite()
    assert parameters[1].grad.tolist() == [12.0]


def test_clip_of_half_precision_measures_in_float32():
    """256 gradients of 1 in each of two tensors: sqrt(512) = 22.627..., which bfloat16 would round to 22.625."""
    parameters = [torch.nn.Parameter(torch.zeros(256, dtype=torch.bfloat16)) for _ in range(2)]
    for p in parameters:
        p.grad = torch.ones_like(p)
    assert clip(parameters, None).item() == pytest.approx(math.sqrt(512), rel=1e-6)


def test_clip_without_gradients_is_zero():
    assert clip([torch.nn.Parameter(torch.zeros(1))], 1.0).item() == 0


def test_steps_too_small_for_bfloat16_are_not_lost():
    """The gradient is constant, so Adam moves by lr a step: 400 x 1e-4 from 1.0 is 0.96, and bfloat16's next number
    below 1.0 is 0.996, 39 such steps away. The float32 run of the same gradients is the oracle."""
    settings = Optim(lr=1e-4, weight_decay=0.01)
    weights = {dtype: torch.nn.Parameter(torch.ones(2, 2, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)}
    optimizers = {dtype: adamw([("w", w)], settings) for dtype, w in weights.items()}
    plain = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    lossy = torch.optim.AdamW([plain], lr=1e-4, weight_decay=0.01)
    for _ in range(400):
        for weight, optimizer in ((weights[d], optimizers[d]) for d in weights):
            weight.grad = torch.full_like(weight, 0.25)
            optimizer.step()
            optimizer.zero_grad()
            assert weight.grad is None
        plain.grad = torch.full_like(plain, 0.25)
        lossy.step()
    assert (plain == 1).all()  # what would have happened
    exact = weights[torch.float32].detach()
    assert exact[0, 0].item() == pytest.approx(0.96, abs=1e-3)
    assert torch.equal(state_tensors(optimizers[torch.bfloat16])["w/master"], exact)
    assert torch.equal(weights[torch.bfloat16].detach(), exact.bfloat16())


def test_float32_and_its_adapters_have_no_masters():
    assert not any(name.endswith("/master") for name in state_tensors(adamw(model().named_parameters(), Optim())))
    policy = tiny_policy(adapter=Lora(r=2), dtype=torch.bfloat16)  # an adapter is float32 over a bfloat16 base
    assert {p.dtype for p in policy.parameters().values()} == {torch.float32}
    assert not adamw(policy.parameters().items(), Optim()).rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_state_of_zeros_is_what_the_first_step_begins_with(dtype):
    """The same names before it as after, and the same weights, bit for bit."""
    nets = [model(dtype=dtype) for _ in range(2)]
    optimizers = [adamw(net.named_parameters(), Optim(lr=1e-2)) for net in nets]
    zero_state(optimizers[0])
    before = {name: t.shape for name, t in state_tensors(optimizers[0]).items()}
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, range(3))
    ours, theirs = (state_tensors(optimizer) for optimizer in optimizers)
    assert before == {name: t.shape for name, t in theirs.items()}
    assert all(torch.equal(t, theirs[name]) for name, t in ours.items())
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
