"""What a model costs, counted from its config: weights and floating-point operations. No torch.

Counted are matrix products, 2 operations for each multiply-add, as in Kaplan et al. (2001.08361) and PaLM's
appendix B (2204.02311), with two departures: attention counts the tokens that a causal or sliding mask leaves, and
the head only the tokens whose logits are computed. Norms, biases and element-wise work are left out, below 1 % of
any model in use, as are the adapter's own products and a mixture's shared experts and router.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

UNGATED = frozenset(
    {"gpt2", "gpt_neox", "gptj", "codegen", "opt", "bloom", "falcon", "phi", "gpt_bigcode", "starcoder2"}
)
"""Model types whose MLP has two matrices; the others' have a gate as well."""
LEARNED_POSITIONS = frozenset({"gpt2", "gpt_bigcode"})


@dataclass(frozen=True, slots=True)
class Size:
    """Number of weights."""

    embedding: int
    layers: int
    """In the linear layers of all blocks."""
    head: int
    """Of the output head's matrix, which a tied model shares with the embedding."""
    tied: bool
    active: int
    """Those of `layers` that one token passes through: fewer only in a mixture of experts."""

    @property
    def total(self) -> int:
        return self.embedding + self.layers + (0 if self.tied else self.head)


def parameters(config: Any) -> Size:
    """Weights of the model that a Transformers `config` describes."""
    c = config.get_text_config()
    hidden, queries, keys = c.hidden_size, *_widths(c)
    attention = 2 * hidden * queries + 2 * hidden * keys
    experts = getattr(c, "num_local_experts", None) or getattr(c, "num_experts", None) or 1
    chosen = (getattr(c, "num_experts_per_tok", None) or 1) if experts > 1 else 1
    inner = (getattr(c, "moe_intermediate_size", None) if experts > 1 else None) or _inner(c)
    mlp = (2 if c.model_type in UNGATED else 3) * hidden * inner
    positions = c.max_position_embeddings if c.model_type in LEARNED_POSITIONS else 0
    return Size(
        embedding=(c.vocab_size + positions) * hidden,
        layers=c.num_hidden_layers * (attention + experts * mlp),
        head=c.vocab_size * hidden,
        tied=bool(c.tie_word_embeddings),
        active=c.num_hidden_layers * (attention + chosen * mlp),
    )


def forward_flops_per_token(config: Any, context: int, targets: float = 1.0) -> float:
    """Operations of one forward pass, per token of a sequence of `context` tokens.

    `targets` is the share of tokens whose logits are computed.
    """
    size = parameters(config)
    return 2 * size.active + 2 * size.head * targets + _attention_flops(config, context)


def training_flops_per_token(config: Any, lora: bool, context: int, targets: float = 1.0) -> float:
    """Operations of forward and backward, per token of a sequence of `context` tokens.

    Backward costs two forward passes: the gradient of the inputs and that of the weights. The second is not
    computed for the frozen matrices under an adapter; attention has no weights and always pays both.
    """
    size = parameters(config)
    products = 2 * size.active + 2 * size.head * targets
    return (2 if lora else 3) * products + 3 * _attention_flops(config, context)


def _attention_flops(config: Any, context: int) -> float:
    """Scores and their weighted sum: each 2 operations per query channel and visible token."""
    c = config.get_text_config()
    window = getattr(c, "sliding_window", None)
    kinds = getattr(c, "layer_types", None) or c.num_hidden_layers * (
        "sliding_attention" if window else "full_attention",
    )
    visible = sum(_visible(context, window if kind == "sliding_attention" else None) for kind in kinds)
    return 4 * _widths(c)[0] * visible


def _visible(context: int, window: int | None) -> float:
    """Mean number of tokens that a token of a causal sequence attends to, itself included."""
    seen = min(window or context, context)
    return seen - seen * (seen - 1) / (2 * context)


def _widths(c: Any) -> tuple[int, int]:
    """Channels of all query heads, and of all key heads."""
    heads = c.num_attention_heads
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // heads
    return heads * head_dim, (getattr(c, "num_key_value_heads", None) or heads) * head_dim


def _inner(c: Any) -> int:
    if hasattr(c, "n_inner"):  # GPT-2 and its kin, where None stands for the usual 4
        return c.n_inner or 4 * c.hidden_size
    return c.intermediate_size
