"""Tiny random models and a tiny tokenizer, built from configs in milliseconds: nothing is downloaded."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from posttrain.machine import tune
from posttrain.models.policy import Policy, attach
from posttrain.recipe.blocks import Lora

tune()  # as `load` would: runs that must agree to the bit, in whatever process, need the same matrix products

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LINES = (
    "What is the sum of 12 and 30? The answer is 42.",
    "system user assistant: you are a helpful assistant, answer in one short sentence.",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "If a train leaves at 9 and arrives at 11, how long did it travel? Two hours.",
)
_KV = {"num_key_value_heads": 2}
ARCHS: dict[str, dict[str, Any]] = {
    "llama": {**_KV, "tie_word_embeddings": True},
    "qwen2": _KV,
    "qwen3": {**_KV, "head_dim": 8},
    "mistral": {**_KV, "sliding_window": 8, "head_dim": 8},
    "gemma2": {**_KV, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_KV, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi3": _KV,
    "olmo2": _KV,
    "gpt_neox": {},
    "smollm3": {**_KV, "no_rope_layers": [1, 0]},
    "gpt2": {"n_inner": 64},
}
"""What each architecture's config needs beyond the common sizes. Mistral and both Gemmas slide over 8 tokens."""


@cache
def _bpe() -> str:
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet)
    )
    return bpe.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over about 300 tokens (any text round-trips), ChatML, eos = pad = <|im_end|>."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe()),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(
    arch: str = "llama", seed: int = 0, vocab: int = 320, dtype: torch.dtype = torch.float32, **config: Any
) -> PreTrainedModel:
    """A random 2-layer model in eval mode: hidden 32, 4 heads (2 for keys and values), 256 positions.

    `vocab` is above the tokenizer's size, as in many released models. `config` overrides config keys. The
    global random state is left as it was.
    """
    settings: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "initializer_range": 0.2,  # spread logits and scores: at the usual 0.02 a wrong mask hardly shows
        **ARCHS[arch],
        **config,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **settings), dtype=dtype)
    return model.eval()


def tiny_policy(
    arch: str = "llama",
    adapter: Lora | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Policy:
    """A `Policy` around `tiny_model`: every weight trainable, or only those of `adapter`."""
    model = tiny_model(arch, seed=seed, dtype=dtype, **config)
    return attach(model, tiny_tokenizer(), source=f"tiny/{arch}", base_digest=f"tiny-{arch}-{seed}", adapter=adapter)
