"""Fused layers are those of PEFT and Transformers, in values and gradients, and step aside where they cannot be."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from posttrain.models.fused import FusedGatedMlp, FusedLora, FusedNorm, _Gated, _Norm, folded, fuse


class Two(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 10, bias), nn.Linear(10, 4, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(dtype: torch.dtype = torch.float64, bias: bool = True, **settings):
    """Twice the same model, PEFT's and the fused one; B is not zero."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["first", "second"], r=3, lora_alpha=5, **settings)
    theirs = get_peft_model(Two(bias).to(dtype), config)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p)
    ours = copy.deepcopy(theirs)
    fuse(ours)
    return theirs, ours


def gradients(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    x = x.clone().requires_grad_()
    out = model(x)
    (out * torch.arange(out.numel()).view_as(out)).sum().backward()
    return out, {"x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 6), (1, 5, 6), (2, 3, 4, 6)])
def test_values_and_gradients_are_pefts(shape, bias):
    theirs, ours = adapted(bias=bias)
    assert sum(type(m) is FusedLora for m in ours.modules()) == 2
    x = torch.randn(shape, dtype=torch.float64)
    (want, want_by), (got, got_by) = gradients(theirs, x), gradients(ours, x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert got_by.keys() == want_by.keys()
    for name, gradient in want_by.items():
        torch.testing.assert_close(got_by[name], gradient, rtol=1e-11, atol=1e-11)


def test_gradients_by_finite_differences():
    _, ours = adapted()
    layer = ours.base_model.model.first
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("how", ["disabled", "merged", "dropout", "dora", "float32 adapter", "trained base"])
def test_where_more_is_asked_pefts_own_forward_runs(how):
    settings = {"dropout": {"lora_dropout": 0.5}, "dora": {"use_dora": True}}.get(how, {})
    models = adapted(**settings)
    x = torch.randn(5, 6, dtype=torch.float64)
    for model in models:
        if how == "disabled":
            model.base_model.disable_adapter_layers()
        elif how == "merged":
            model.merge_adapter()
        elif how == "dropout":
            model.train()
        elif how == "trained base":
            model.requires_grad_(True)
        elif how == "float32 adapter":
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.data = p.data.float()
    results = []
    for model in models:
        torch.manual_seed(1)
        results.append(gradients(model, x))
    (want, want_by), (got, got_by) = results
    assert torch.equal(got, want)
    assert all(torch.equal(got_by[name], gradient) for name, gradient in want_by.items())


def test_it_stays_pefts_layer():
    theirs, ours = adapted()
    layer = ours.base_model.model.first
    assert isinstance(layer, Linear)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(2, 6, dtype=torch.float64)
    torch.testing.assert_close(copy.deepcopy(ours).merge_and_unload()(x), ours(x))


def llama(**settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes, **settings)).eval()
    for name, p in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(p)
    return model


@pytest.mark.parametrize("frozen", [False, True])
def test_norms_and_gated_layers_are_transformers(frozen):
    theirs = llama()
    for name, p in theirs.named_parameters():
        p.requires_grad_(not frozen or "gate_proj" in name)
    ours = copy.deepcopy(theirs)
    fuse(ours)
    kinds = [type(m) for m in ours.modules()]
    assert (kinds.count(FusedNorm), kinds.count(FusedGatedMlp)) == (5, 2)
    ids = torch.arange(11)[None]
    found = []
    for model in (theirs, ours):
        loss = model(ids, labels=ids).loss
        loss.backward()
        found.append((loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    with torch.no_grad():  # as the sampler computes: the same bits, so that a policy agrees with itself
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_norm_and_gate_by_finite_differences():
    x, weight = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    torch.autograd.gradcheck(lambda x, w: _Norm.apply(x, w, 1e-2), (x.requires_grad_(), weight.requires_grad_()))
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(_Gated.apply, (gate, up))


def test_what_autograd_keeps_shrinks():
    def kept(model: nn.Module) -> int:
        seen: dict[int, int] = {}
        weights = {p.data_ptr() for p in model.parameters()}

        def pack(t: torch.Tensor) -> torch.Tensor:
            if t.data_ptr() not in weights:
                seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = model(torch.ones(1, 64, dtype=torch.long), use_cache=False).logits
        assert out.requires_grad
        return sum(seen.values())

    plain = llama()
    fused = copy.deepcopy(plain)
    fuse(fused)
    assert kept(plain) - kept(fused) == 4 * 64 * (2 * 20 + 5 * 12)  # silu(g) of two layers, x / rms(x) of five norms


def test_another_norm_or_activation_stays_as_it_is():
    gelu = llama(hidden_act="gelu")
    gemma = Gemma2ForCausalLM(
        Gemma2Config(vocab_size=11, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2)
    )
    for model in (gelu, gemma):
        fuse(model)
        assert FusedGatedMlp not in map(type, model.modules())
    assert FusedNorm in map(type, gelu.modules())  # its norm is the same
    assert FusedNorm not in map(type, gemma.modules())  # its norm multiplies by 1 + w


def test_folded_is_the_same_function_and_leaves_no_trace():
    _, ours = adapted(torch.float32)
    x = torch.randn(7, 6)
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    places = [p.data_ptr() for p in ours.parameters()]
    with torch.no_grad():
        want = ours(x)
        with contextlib.suppress(KeyError), folded(ours):
            torch.testing.assert_close(ours(x), want, rtol=1e-5, atol=1e-5)
            changed = [name for name, p in ours.named_parameters() if not torch.equal(p, before[name])]
            assert len(changed) == 2  # both base weights
            raise KeyError
        assert torch.equal(ours(x), want)
    assert [p.data_ptr() for p in ours.parameters()] == places
    assert all(torch.equal(p, before[name]) for name, p in ours.named_parameters())


@pytest.mark.parametrize("why", ["precision", "disabled", "dropout"])
def test_what_cannot_be_folded_stays_as_it_is(why):
    _, ours = adapted(torch.float64 if why == "precision" else torch.float32, lora_dropout=0.5)
    ours.eval()
    if why == "disabled":
        ours.base_model.disable_adapter_layers()
    if why == "dropout":
        ours.train()
    before = [p.detach().clone() for p in ours.parameters()]
    with folded(ours):
        assert all(map(torch.equal, ours.parameters(), before))
