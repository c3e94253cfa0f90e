"""Recomputed activations give the same gradient; a pass counted without values is the pass that runs."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_policy

from posttrain.forest import Row, pack, token_logprobs
from posttrain.models.memory import Meter, measure_forward, measure_pass, recomputing
from posttrain.models.policy import Policy
from posttrain.recipe.blocks import Lora

ROWS = [
    Row(tuple(range(3, 20)), (7, 8, 9, 10), (True,) * 4),
    Row(tuple(range(3, 20)), (30, 31), (True, True)),
    Row((40, 41, 42), tuple(range(60, 90)), (True,) * 30),
]
ADAPTERS = [None, Lora(r=4)]


def gradient(policy: Policy, recompute: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    with policy.adapter_dropout(), recomputing(policy.model, recompute):
        token_logprobs(policy.model, pack(ROWS)).sum().backward()
    found = {name: p.grad for name, p in policy.parameters().items() if p.grad is not None}
    for p in policy.parameters().values():
        p.grad = None
    return found


@pytest.mark.parametrize("adapter", [*ADAPTERS, Lora(r=4, dropout=0.5)])
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt_neox", "gpt2", "qwen3"])
def test_recomputing_leaves_the_gradient_as_it_was(arch: str, adapter: Lora | None) -> None:
    policy = tiny_policy(arch, adapter=adapter)
    if adapter is not None:
        with torch.no_grad():  # B = 0 would hide what the rest of the adapter does
            for p in policy.parameters().values():
                p.normal_(std=0.1)
    kept, recomputed = gradient(policy, False), gradient(policy, True)
    assert kept.keys() == recomputed.keys()
    for name in kept:
        assert torch.equal(kept[name], recomputed[name]), name


def test_recomputing_leaves_the_model_as_it_was() -> None:
    policy = tiny_policy()
    before = [(name, dict(vars(module))) for name, module in policy.model.named_modules()]
    with pytest.raises(ZeroDivisionError), recomputing(policy.model):
        1 / 0  # noqa: B018
    assert [name for name, _ in before] == [name for name, _ in policy.model.named_modules()]
    for (_, then), module in zip(before, policy.model.modules(), strict=True):
        assert then.keys() == vars(module).keys()
    assert not policy.model.training


def really(policy: Policy, recompute: bool) -> int:
    """The peak of the real pass, every tensor that PyTorch makes in it counted."""
    with Meter([*policy.model.parameters(), *policy.model.buffers()]) as meter, recomputing(policy.model, recompute):
        token_logprobs(policy.model, pack(ROWS)).sum().backward()
    for p in policy.parameters().values():
        p.grad = None
    return meter.peak


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("layers", [2, 3, 7])
def test_counted_without_values_is_counted_with_them(layers: int, adapter: Lora | None, recompute: bool) -> None:
    policy = tiny_policy(adapter=adapter, num_hidden_layers=layers)
    weights = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    counted = measure_pass(policy.model, lambda m: token_logprobs(m, pack(ROWS)), recompute, again=False)
    assert counted.peak == pytest.approx(really(policy, recompute), rel=0.02)
    assert all(torch.equal(weights[name], p) and p.grad is None for name, p in policy.model.named_parameters())


def test_earlier_gradients_stand_beside_the_activations() -> None:
    policy = tiny_policy(num_hidden_layers=5)
    first, again = (
        measure_pass(policy.model, lambda m: token_logprobs(m, pack(ROWS)), False, again=a) for a in (False, True)
    )
    trained = sum(p.nbytes for p in policy.parameters().values())
    assert again.gradients == trained
    assert again.peak > first.peak
    assert again.peak <= first.peak + 2 * trained


def test_recomputing_keeps_one_hidden_state_a_layer() -> None:
    policy = tiny_policy(adapter=Lora(r=1, targets=("q_proj",)), num_hidden_layers=9, vocab=4096)
    kept, recomputed = (
        measure_pass(policy.model, lambda m: token_logprobs(m, pack(ROWS)), recompute, again=False)
        for recompute in (False, True)
    )
    hidden = len(pack(ROWS)) * 32 * 4
    assert 9 * hidden <= recomputed.activations < kept.activations / 3


def test_a_pass_without_gradient_keeps_nothing_of_a_layer() -> None:
    shallow, deep = (tiny_policy(num_hidden_layers=layers) for layers in (3, 9))
    counted = [measure_forward(p.model, lambda m: token_logprobs(m, pack(ROWS))) for p in (shallow, deep)]
    assert counted[0] == counted[1] > 0
