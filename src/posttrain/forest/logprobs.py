"""Log-probabilities of a forest's target tokens: each token computed once, logits only where they are wanted."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from posttrain.forest.attention import NAME, Layout, Tree, attending, decoder, unsupported
from posttrain.forest.tree import Forest
from posttrain.records import UserError

CHUNK = 512
"""Target tokens whose [chunk, V] logits exist at one time; they are computed again for the gradient."""


def token_logprobs(model: torch.nn.Module, forest: Forest, temperature: float = 1.0) -> Tensor:
    """[T] float32 (float64 for a float64 model): log pi(token | its path before it) in nats at the target tokens,
    0 elsewhere. Logits are divided by `temperature` first.

    A model that cannot attend over a forest is computed one sequence at a time instead, and a warning says so.
    """
    why = unsupported(model)
    if why is not None:
        warnings.warn(f"one sequence at a time, without sharing: {why}", stacklevel=2)
        return unrolled_logprobs(model, forest, temperature)
    at_N = forest.target_T.nonzero().squeeze(1)
    hidden_ND = hidden_states(model, forest)
    return _scatter(_gather(model, hidden_ND, forest.ids_T[at_N], temperature), at_N, len(forest))


def hidden_states(model: torch.nn.Module, forest: Forest, layout: Layout | None = None) -> Tensor:
    """[N, D]: for each of the forest's N target tokens the last hidden state of the token before it."""
    with attending(model, NAME):
        out_TD = (
            decoder(model)
            .get_decoder()(
                input_ids=forest.ids_T[None],
                position_ids=forest.position_T[None],
                use_cache=False,
                layout=layout or Tree(forest),
            )
            .last_hidden_state[0]
        )
    return out_TD[forest.previous_T[forest.target_T]]


def head(model: torch.nn.Module, hidden_ND: Tensor) -> Tensor:
    """[N, V] logits, as the model's own forward would give them (bounded or scaled where its config says so)."""
    base = decoder(model)
    config = base.config
    logits_NV = base.get_output_embeddings()(hidden_ND)
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits_NV = logits_NV * scale
    if (scaling := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits_NV = logits_NV / scaling
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma 2
        logits_NV = cap * torch.tanh(logits_NV / cap)
    return logits_NV


def check_head(model: torch.nn.Module) -> None:
    """Refuse an architecture whose logits are made in a way that `head` does not know."""
    base = decoder(model)
    ids = torch.tensor([[0, 1]])
    with torch.no_grad():
        theirs = base(input_ids=ids, use_cache=False).logits[0]
        ours = head(model, base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0])
    if not torch.allclose(theirs.float(), ours.float(), atol=1e-3, rtol=1e-3):
        raise UserError(
            f"{type(base).__name__} changes its logits after the output layer in a way posttrain does not know; "
            "its log-probabilities would be wrong. Use another model, or add the change to forest/logprobs.py: head()"
        )


def unrolled_logprobs(model: torch.nn.Module, forest: Forest, temperature: float = 1.0) -> Tensor:
    """The same numbers, the plain way: one forward pass for each leaf, with the model's own attention.

    The oracle of `token_logprobs`, and what runs for models that cannot attend over a forest.
    """
    parents = {s.parent for s in forest.segments}
    logps_T = None
    done_T = ~forest.target_T
    for leaf in range(len(forest.segments)):
        if leaf in parents:
            continue
        path = [forest.segments[i] for i in forest.path(leaf)]
        at_L = torch.cat([torch.arange(s.start, s.stop) for s in path])
        new_L = ~done_T[at_L]
        new_L[0] = False
        done_T[at_L] = True
        hidden_LD = (
            decoder(model).get_decoder()(input_ids=forest.ids_T[at_L][None], use_cache=False).last_hidden_state[0]
        )
        at_N = at_L[new_L]
        before_N = new_L.nonzero().squeeze(1) - 1
        part_T = _scatter(_gather(model, hidden_LD[before_N], forest.ids_T[at_N], temperature), at_N, len(forest))
        logps_T = part_T if logps_T is None else logps_T + part_T
    assert logps_T is not None
    return logps_T


def _gather(model: torch.nn.Module, hidden_ND: Tensor, ids_N: Tensor, temperature: float) -> Tensor:
    def chunk(hidden_CD: Tensor, ids_C: Tensor) -> Tensor:
        logits_CV = head(model, hidden_CD)
        logits_CV = logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()
        if temperature != 1.0:
            logits_CV = logits_CV / temperature
        return logits_CV.gather(1, ids_C[:, None]).squeeze(1) - logits_CV.logsumexp(1)

    parts = [
        checkpoint(chunk, hidden, ids, use_reentrant=False) if torch.is_grad_enabled() else chunk(hidden, ids)
        for hidden, ids in zip(hidden_ND.split(CHUNK), ids_N.split(CHUNK), strict=True)
    ]
    return torch.cat(parts) if parts else hidden_ND.sum(1).float()


def _scatter(logps_N: Tensor, at_N: Tensor, length: int) -> Tensor:
    return torch.zeros(length, dtype=logps_N.dtype).index_copy(0, at_N, logps_N)
