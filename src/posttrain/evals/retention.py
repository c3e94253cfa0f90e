"""How far a model has moved from its base where nobody asked it to: on general prompts, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.credit.batch import as_row
from posttrain.evals.stats import mean_interval
from posttrain.forest import Row, pack, split
from posttrain.forest.logprobs import head, hidden_states
from posttrain.losses import kl_divergence
from posttrain.models.policy import Policy
from posttrain.recipe.blocks import Sampling
from posttrain.recipe.schema import Retention
from posttrain.records import Example, UserError
from posttrain.sampling.protocol import Sampler

POSITIONS = 256
"""Positions whose full distributions, two of [V], are held at one time."""


def prompts(retention: Retention) -> list[Example]:
    """The first `rows` prompts, one a line of the file."""
    if retention.prompts == "builtin":
        name, text = "builtin", (files("posttrain.evals") / "prompts.txt").read_text(encoding="utf-8")
    else:
        name = retention.prompts
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"evals.retention.prompts: {name}: cannot be read ({error})") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) < retention.rows:
        raise UserError(
            f"evals.retention: {name} holds {len(lines)} prompts, {retention.rows} are asked for; lower `rows`"
        )
    return [Example(f"{name}:{i + 1}", ({"role": "user", "content": line},)) for i, line in enumerate(lines)][
        : retention.rows
    ]


def continuations(sampler: Sampler, retention: Retention) -> list[Row]:
    """What the sampler's model says to the prompts, greedily."""
    greedy = Sampling(temperature=0, max_new_tokens=retention.max_new_tokens)
    rollouts, _ = sampler(prompts(retention), 1, greedy, 0)
    return [as_row(rollout) for rollout in rollouts]


@torch.no_grad()
def drift(policy: Policy, base: Mapping[str, Tensor], said: Sequence[Row], now: Sequence[Row]) -> dict[str, Any]:
    """KL(base || policy) in nats per token over the base's continuations `said`, full vocabulary, mean over prompts.

    Args:
        base: the base's weights, as `Policy.snapshot` gives them.
        now: the policy's own continuations; `same` is the share that are the base's, token for token.
    """
    kl_R = [0.0] * len(said)
    for units in split(said, [(i,) for i in range(len(said))], POSITIONS):
        forest = pack([said[i] for i in units])
        with policy.swapped(base):
            base_ND = hidden_states(policy.model, forest)[forest.predicting_N]
            base_NV = head(policy.model, base_ND).float().log_softmax(-1)
        logps_NV = head(policy.model, hidden_states(policy.model, forest)[forest.predicting_N]).float().log_softmax(-1)
        kl_N = kl_divergence(base_NV, logps_NV).to(forest.ids_T.device)
        kl_T = torch.zeros(len(forest)).masked_scatter(forest.target_T, kl_N)
        for i, (start, stop) in zip(units, forest.spans, strict=True):
            kl_R[i] = kl_T[start:stop].mean().item()
    return {
        "kl": sum(kl_R) / len(kl_R),
        "interval": list(mean_interval(kl_R)),
        "same": sum(a == b for a, b in zip(said, now, strict=True)) / len(said),
        "n": len(said),
    }
