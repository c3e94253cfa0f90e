"""Counts from a config against the weights of real modules, and against FLOPs that PyTorch counts."""

from __future__ import annotations

import pytest
import torch
from tiny import ARCHS, tiny_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from posttrain.models.cost import forward_flops_per_token, parameters, training_flops_per_token


@pytest.mark.parametrize("arch", ARCHS)
def test_split_equals_the_modules(arch):
    model = tiny_model(arch)
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    size = parameters(model.config)
    assert size.layers == size.active == sum(m.weight.numel() for m in linear)
    assert size.head == head.weight.numel()
    assert size.embedding == sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert size.total == sum(p.numel() for p in model.parameters()) - vectors


def test_mixture_counts_all_experts_and_passes_through_the_chosen():
    common = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("mixtral", **common, **heads, num_local_experts=4, num_experts_per_tok=2)
    model = AutoModelForCausalLM.from_config(config)
    size = parameters(config)
    router = 2 * 32 * 4
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert size.total == matrices - router
    assert size.layers - size.active == 2 * 2 * 3 * 32 * 48


def test_default_model_has_its_published_size():
    config = AutoConfig.for_model(
        "llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    assert parameters(config).total + 61 * 576 == 134_515_008


@pytest.mark.parametrize("arch", ["llama", "gpt_neox", "gpt2", "phi3"])
def test_flops_equal_what_pytorch_counts(arch):
    length = 24
    model = tiny_model(arch, attn_implementation="eager")
    ids_1T = torch.randint(3, 300, (1, length))
    with FlopCounterMode(display=False) as counter:
        logits_1TV = model(ids_1T, use_cache=False).logits
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        logits_1TV.sum().backward()
    both = forward + counter.get_total_flops()
    # PyTorch's dense attention computes all T x T scores; ours counts the (T + 1) / 2 that the mask leaves.
    c = model.config
    hidden_part = 4 * c.hidden_size * c.num_hidden_layers * (length - (length + 1) / 2) * length
    rotary = 2 * (c.hidden_size // c.num_attention_heads // 2) * length  # angles, once for all layers
    assert forward - hidden_part == pytest.approx(length * forward_flops_per_token(c, length), abs=rotary)
    assert both - 3 * hidden_part == pytest.approx(length * training_flops_per_token(c, False, length), abs=rotary)


def test_sliding_window_bounds_attention_and_a_short_context_does_not_meet_it():
    slides = tiny_model("mistral").config
    full = tiny_model("mistral", sliding_window=None).config
    assert forward_flops_per_token(slides, 8) == forward_flops_per_token(full, 8)
    visible = sum(min(i + 1, 8) for i in range(100)) / 100
    gap = 4 * 32 * 2 * (101 / 2 - visible)
    assert forward_flops_per_token(full, 100) - forward_flops_per_token(slides, 100) == pytest.approx(gap)


def test_adapter_saves_the_frozen_weights_gradient_and_targets_scale_the_head():
    config = tiny_model("llama").config
    size = parameters(config)
    full, lora = (training_flops_per_token(config, lora, 16) for lora in (False, True))
    assert full - lora == 2 * (size.active + size.head)
    spared = forward_flops_per_token(config, 16) - forward_flops_per_token(config, 16, targets=0.25)
    assert spared == pytest.approx(2 * size.head * 0.75)
