"""Reward modelling: one number for an answer, learned from pairs of a better and a worse one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from posttrain.data.chat import Rendered
from posttrain.data.prepare import Prepared, prompt_key
from posttrain.forest import Forest, Row, hidden_states
from posttrain.forest.logprobs import States
from posttrain.losses import Counts, bradley_terry, reduce_pairs
from posttrain.models.reward import head, marked, read
from posttrain.recipe.scoring import RewardModel, ScoringStage
from posttrain.records import UserError
from posttrain.training.batch import Batch, draws, pair_sample


class RewardMethod:
    """Bradley-Terry on the rewards read at the last tokens of the two answers, whose prompt is computed once."""

    period = 1

    def __init__(self, stage: RewardModel, data: Prepared, seed: int) -> None:
        self.stage, self.data = stage, data
        self.order = draws(stage, data.rows, data.weights, seed)

    def batch(self, step: int) -> Batch:
        size = self.stage.batch_size
        now = [self.data.rows[s][i] for s, i in self.order[step * size : (step + 1) * size]]
        self.margins = [pair.example.margin or 0.0 for pair in now]
        rows = tuple(row for pair in now for row in answers(pair))
        counts = Counts(tokens=len(rows), sequences=len(rows), pairs=len(now))
        units = tuple((2 * p, 2 * p + 1) for p in range(len(now)))
        return Batch(rows, units, counts, samples=tuple(pair_sample(pair.example) for pair in now[:1]))

    def forward(self, model: torch.nn.Module, forest: Forest, states: States) -> Tensor:
        return rewards(model, forest, states)

    def loss(
        self, batch: Batch, rows: Sequence[int], forest: Forest, outputs: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        chosen_P, rejected_P = outputs[0::2], outputs[1::2]  # rows come in units, chosen before rejected
        margin_P = torch.tensor([self.margins[r // 2] for r in rows[0::2]], dtype=outputs.dtype)
        loss_P = bradley_terry(chosen_P, rejected_P, margin_P=margin_P, centring=self.stage.centring)
        shares = {
            "margin": chosen_P - rejected_P,
            "accuracy": (chosen_P > rejected_P).to(outputs.dtype),
            "chosen_reward": chosen_P,
            "rejected_reward": rejected_P,
        }
        return reduce_pairs(loss_P, batch.counts), {
            name: reduce_pairs(value_P.detach(), batch.counts).item() for name, value_P in shares.items()
        }


def rewards(model: torch.nn.Module, forest: Forest, states: States = hidden_states) -> Tensor:
    """[R] float32 (float64 for a float64 model): the reward of each row of the forest, read at its last token."""
    last_R = torch.tensor([stop - 1 for _, stop in forest.spans])
    return head(model, states(model, forest)[last_R]).to(forest.ids_T.device)


def answers(pair: Rendered) -> tuple[Row, Row]:
    """Both answers as rows, chosen first; the one target of each is its last token, where the reward is read."""
    return _row(pair.prompt_ids, pair.completion_ids), _row(pair.prompt_ids, pair.rejected_ids)


def _row(prompt: tuple[int, ...], answer: tuple[int, ...]) -> Row:
    return Row(prompt, answer, (*[False] * (len(answer) - 1), True))


def ends(data: Prepared) -> set[int]:
    """The tokens that the sequences to be scored end with."""
    sides = (side for rows in data.rows for row in rows for side in (row.completion_ids, row.rejected_ids))
    return {side[-1] for side in sides if side}


def hold_out(stage: ScoringStage, data: Prepared) -> tuple[Prepared, list[Rendered]]:
    """The rows to learn from, and those kept out to measure on: `holdout` of all, to the prompt that reaches it.

    Rows of one prompt stay on one side. Which prompts are kept out is decided by a hash of their text alone, so it
    is the same whatever the seed, the order of the rows and the other sources.

    Raises:
        UserError: a side is left with too little.
    """
    everything = [row for rows in data.rows for row in rows]
    if not stage.holdout:
        return data, []
    by_prompt: dict[str, list[Rendered]] = {}
    for row in everything:
        by_prompt.setdefault(prompt_key(row.example), []).append(row)
    kept: dict[str, list[Rendered]] = {}
    for key in sorted(by_prompt, key=lambda key: hashlib.sha256(f"held out {key}".encode()).digest()):
        if sum(map(len, kept.values())) >= stage.holdout * len(everything):
            break
        kept[key] = by_prompt[key]
    held = [row for rows in kept.values() for row in rows]
    rows = tuple(tuple(row for row in part if prompt_key(row.example) not in kept) for part in data.rows)
    if len(held) < 2 or not all(rows):
        raise UserError(
            f"stage {stage.id!r}: holdout {stage.holdout:g} of {len(everything)} rows over {len(by_prompt)} prompts "
            f"leaves {len(everything) - len(held)} to learn from and {len(held)} to measure on; each source needs one "
            "of the former, and the latter must be at least 2: change holdout (0 measures nothing) or give more rows"
        )
    return data._replace(rows=rows), held


def preferred(model: torch.nn.Module, pairs: Sequence[Rendered], budget: int) -> list[bool]:
    """For each pair whether the model gives the chosen answer the higher reward; a tie is no."""
    found = read(partial(marked, model), [row for pair in pairs for row in answers(pair)], budget)
    return [better > worse for better, worse in zip(found[0::2], found[1::2], strict=True)]
