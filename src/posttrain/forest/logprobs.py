"""Log-probabilities of a forest's target tokens: each token computed once, logits only where they are wanted."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from posttrain.forest.attention import NAME, Layout, Tree, attending, decoder, unsupported
from posttrain.forest.flex import Flex
from posttrain.forest.tree import Forest
from posttrain.records import UserError

CHUNK = 256
"""Target tokens whose [chunk, V] logits exist at one time."""

States = Callable[[torch.nn.Module, Forest], Tensor]
"""`hidden_states`, or `unrolled_hidden_states` where a slow and simple oracle is wanted."""
Logits = Callable[[Tensor], Tensor]
"""From hidden states [C, D] to logits [C, V], float32 or float64."""
Measure = Callable[[Logits, Tensor, Tensor], Tensor]
"""Of a chunk: its logits, hidden states [C, D] and target ids [C] to [C] or [1 + K, C]."""


def token_logprobs(
    model: torch.nn.Module, forest: Forest, temperature: float = 1.0, states: States | None = None
) -> Tensor:
    """[T] float32 (float64 for a float64 model): log pi(token | its path before it) in nats at the target tokens,
    0 elsewhere. Logits are divided by `temperature` first.

    The model may be on another device than the forest; the numbers come back to the forest's, so that all that is
    made of them, a few numbers a token, need not know of devices.
    """
    hidden_TD = (states or hidden_states)(model, forest)
    return _gather(model, hidden_TD[forest.predicting_N], forest, temperature)


Statistic = Literal["entropy", "collision"]


def token_statistics(
    model: torch.nn.Module,
    forest: Forest,
    *names: Statistic,
    temperature: float = 1.0,
    states: States | None = None,
) -> Tensor:
    """[1 + K, T]: the log-probabilities of `token_logprobs`, and of the distribution that each target token is drawn
    from what the K `names` ask for, 0 elsewhere.

    `entropy`: -sum_v p(v) log p(v), nats, with its gradient. `collision`: log sum_v p(v)^2, a constant. No more than
    one chunk of logits exists at a time, in the backward pass too, where they are computed again.
    """
    hidden_TD = (states or hidden_states)(model, forest)
    return _gather(model, hidden_TD[forest.predicting_N], forest, temperature, names)


def unrolled_logprobs(model: torch.nn.Module, forest: Forest, temperature: float = 1.0) -> Tensor:
    """The same numbers, the plain way: the oracle of `token_logprobs`."""
    return token_logprobs(model, forest, temperature, unrolled_hidden_states)


def hidden_states(model: torch.nn.Module, forest: Forest, layout: Callable[[Forest], Layout] | None = None) -> Tensor:
    """[T, D]: the decoder's last hidden state at every token, on the model's device.

    `layout` is `Flex` on CUDA and `Tree` elsewhere, where none is given. A model that cannot attend over a forest is
    computed one sequence at a time instead, and a warning says so.
    """
    why = unsupported(model)
    if why is not None:
        warnings.warn(f"one sequence at a time, without sharing: {why}", stacklevel=3)
        return unrolled_hidden_states(model, forest)
    forest = forest.to(decoder(model).device)
    layout = layout or (Flex if forest.ids_T.is_cuda else Tree)
    with attending(model, NAME):
        return (
            decoder(model)
            .get_decoder()(
                input_ids=forest.ids_T[None],
                position_ids=forest.position_T[None],
                use_cache=False,
                layout=layout(forest),
            )
            .last_hidden_state[0]
        )


def unrolled_hidden_states(model: torch.nn.Module, forest: Forest) -> Tensor:
    """What `hidden_states` gives, from one forward pass for each leaf with the model's own attention.

    A shared token's state is the mean over the leaves that share it: in value the same as any one's, and its gradient
    reaches all of them.
    """
    forest = forest.to(decoder(model).device)
    inner = {s.parent for s in forest.segments}
    states, slots = [], []
    for leaf in set(range(len(forest.segments))) - inner:
        path = [forest.segments[i] for i in forest.path(leaf)]
        at_L = torch.cat([torch.arange(s.start, s.stop, device=forest.ids_T.device) for s in path])
        states.append(
            decoder(model).get_decoder()(input_ids=forest.ids_T[at_L][None], use_cache=False).last_hidden_state[0]
        )
        slots.append(at_L)
    states_ND, slots_N = torch.cat(states), torch.cat(slots)
    uses_T = torch.zeros_like(forest.ids_T).index_add(0, slots_N, torch.ones_like(slots_N))
    weighed_ND = states_ND / uses_T[slots_N, None]
    return states_ND.new_zeros(len(forest), states_ND.shape[1]).index_add(0, slots_N, weighed_ND)


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
    ids = torch.tensor([[0, 1]], device=base.device)
    with torch.no_grad():
        theirs = base(input_ids=ids, use_cache=False).logits[0]
        ours = head(model, base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0])
    if not torch.allclose(theirs.float(), ours.float(), atol=1e-3, rtol=1e-3):
        raise UserError(
            f"{type(base).__name__} changes its logits after the output layer in a way posttrain does not know; "
            "its log-probabilities would be wrong. Use another model, or add the change to forest/logprobs.py: head()"
        )


def _gather(
    model: torch.nn.Module, hidden_ND: Tensor, forest: Forest, temperature: float, names: Sequence[Statistic] = ()
) -> Tensor:
    def logits(hidden_CD: Tensor) -> Tensor:
        logits_CV = head(model, hidden_CD)
        logits_CV = logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()
        return logits_CV if temperature == 1.0 else logits_CV / temperature

    measure: Measure = partial(_measured, names) if names else _chosen
    if not torch.is_grad_enabled():
        chosen = measure
    elif names or any(p.requires_grad for p in decoder(model).get_output_embeddings().parameters()):
        chosen = partial(checkpoint, measure, use_reentrant=False)
    else:
        chosen = _FrozenHead.apply
    at_N = forest.target_T.nonzero().squeeze(1)
    ids_N = forest.ids_T[at_N].to(hidden_ND.device)
    found = torch.cat(
        [
            chosen(logits, hidden_CD, ids_C)
            for hidden_CD, ids_C in zip(hidden_ND.split(CHUNK), ids_N.split(CHUNK), strict=True)
        ],
        dim=-1,
    ).to(at_N.device)
    return found.new_zeros(*found.shape[:-1], len(forest)).index_copy(-1, at_N, found)


def _chosen(logits: Logits, hidden_CD: Tensor, ids_C: Tensor) -> Tensor:
    logits_CV = logits(hidden_CD)
    return logits_CV.gather(1, ids_C[:, None]).squeeze(1) - logits_CV.logsumexp(1)


def _measured(names: Sequence[Statistic], logits: Logits, hidden_CD: Tensor, ids_C: Tensor) -> Tensor:
    logps_CV = logits(hidden_CD).log_softmax(1)
    found = {
        "entropy": lambda: -(logps_CV.exp() * logps_CV).sum(1),
        "collision": lambda: (2 * logps_CV.detach()).logsumexp(1),
    }
    return torch.stack([logps_CV.gather(1, ids_C[:, None]).squeeze(1), *(found[name]() for name in names)])


class _FrozenHead(torch.autograd.Function):
    """`_chosen` for a head that is not trained, with its gradient made while the logits are there.

    A token's log-probability depends on its own hidden state only, so its derivative can be kept, [C, D], before
    anyone asks for it: no logits are kept for the backward pass, and none are computed twice.
    """

    @staticmethod
    def forward(ctx: Any, logits: Logits, hidden_CD: Tensor, ids_C: Tensor) -> Tensor:
        with torch.enable_grad():
            hidden_CD = hidden_CD.detach().requires_grad_()
            graph_CV = logits(hidden_CD)
        logits_CV = graph_CV.detach()
        lse_C = logits_CV.logsumexp(1)
        p_CV = (logits_CV - lse_C[:, None]).exp_()
        p_CV[torch.arange(len(ids_C), device=ids_C.device), ids_C] -= 1  # minus the derivative by the logits
        ctx.save_for_backward(*torch.autograd.grad(graph_CV, hidden_CD, p_CV))
        return logits_CV.gather(1, ids_C[:, None]).squeeze(1) - lse_C

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_C: Tensor) -> tuple[None, Tensor, None]:
        (minus_CD,) = ctx.saved_tensors
        return None, minus_CD * -grad_C[:, None].to(minus_CD.dtype), None
