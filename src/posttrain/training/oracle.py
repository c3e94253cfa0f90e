"""The check that every run begins with: the packed pass against the plain one, on a few rows of its first batch."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from posttrain.forest import Forest, hidden_states, pack, unrolled_hidden_states
from posttrain.forest.logprobs import States
from posttrain.models.policy import Policy
from posttrain.records import Failure
from posttrain.training.batch import Batch, Method
from posttrain.training.optim import norm_of

TOKENS = 512
"""Rows are taken up to so many tokens, at least one unit."""
VALUE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.3}
"""Largest difference allowed in an output, by the precision of the weights: nats for log-probabilities. Transformers
takes norms and rotations in float32 whatever that is."""
GRADIENT = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest relative one in the gradient of the outputs' sum, as the 2-norm of all of it."""


def compare(policy: Policy, method: Method, batch: Batch, tokens: int = TOKENS) -> dict[str, float]:
    """What it compared, how far apart they were, and what that cost in seconds. Leaves no gradient behind.

    Raises:
        Failure: they differ by more than rounding explains; nothing that is trained so can be trusted.
    """
    began = time.perf_counter()
    rows = list(batch.units[0])
    for unit in batch.units[1:]:
        if sum(len(batch.rows[i]) for i in (*rows, *unit)) > tokens:
            break
        rows += unit
    forest = pack([batch.rows[i] for i in rows])
    packed, packed_gradient = _outputs_and_gradient(policy, method, forest, hidden_states)
    plain, plain_gradient = _outputs_and_gradient(policy, method, forest, unrolled_hidden_states)
    value = float((packed - plain).abs().max())
    apart = norm_of([a - b for a, b in zip(packed_gradient, plain_gradient, strict=True)])
    norm = norm_of(plain_gradient)
    gradient = float(apart / norm) if norm else float(apart)
    dtype = next(policy.model.parameters()).dtype
    if not (value <= VALUE[dtype] and gradient <= GRADIENT[dtype]):
        raise Failure(
            f"the packed pass disagrees with the plain one on the first batch: by {value:.2g} in its outputs (allowed: "
            f"{VALUE[dtype]:.2g}) and {gradient:.2g} of the gradient ({GRADIENT[dtype]:.2g}). This model may attend in "
            "a way that posttrain does not know; please report it. `check_first_step: false` goes on regardless"
        )
    seconds = time.perf_counter() - began
    return {"tokens": len(forest), "rows": len(rows), "value": value, "gradient": gradient, "seconds": seconds}


def _outputs_and_gradient(
    policy: Policy, method: Method, forest: Forest, states: States
) -> tuple[Tensor, list[Tensor]]:
    for p in policy.parameters().values():
        p.grad = None
    outputs = policy.run(method.forward, forest, states)
    outputs.sum().backward()
    gradient = []
    for p in policy.parameters().values():
        gradient.append(torch.zeros_like(p) if p.grad is None else p.grad)
        p.grad = None
    return outputs.detach(), gradient
