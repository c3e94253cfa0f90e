"""Direct preference optimisation, on pairs from a file or pairs the policy makes itself."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.credit.batch import as_row
from posttrain.credit.pairs import pairs
from posttrain.data.chat import Rendered
from posttrain.data.prepare import Prepared, schedule
from posttrain.forest import Forest, Row
from posttrain.losses import Counts, dpo, nll, reduce_pairs, reduce_tokens, segment_sum
from posttrain.models.disk import write_text
from posttrain.models.policy import Policy
from posttrain.recipe.schema import Dpo
from posttrain.records import Example, Ledger, Score, UserError, derive
from posttrain.sampling.protocol import Sampler
from posttrain.training.batch import Batch, LogProbs, asked, chosen, draws, frozen_logprobs, pair_sample, rejected
from posttrain.training.world import ALONE, World


@dataclass(frozen=True)
class Pair:
    chosen: Row
    rejected: Row
    reference: tuple[float, float]
    """Summed log-probabilities of both under the stage's starting weights."""
    sample: dict[str, Any]
    """How the pair looks to a reader."""


class DpoMethod(LogProbs):
    """The starting weights are the reference; their log-probabilities are taken once, before the first step."""

    period = 1

    def __init__(self, stage: Dpo, data: Prepared, seed: int, pairs: list[list[Pair]]) -> None:
        some = [s for s, part in enumerate(pairs) if part]  # a source that gave no pair leaves the mixture
        self.stage, self.pairs = stage, [pairs[s] for s in some]
        self.order = draws(stage, self.pairs, [data.weights[s] for s in some], seed)

    def batch(self, step: int) -> Batch:
        size = self.stage.batch_size
        self.now = [self.pairs[s][i] for s, i in self.order[step * size : (step + 1) * size]]
        rows = tuple(row for pair in self.now for row in (pair.chosen, pair.rejected))
        counts = Counts(
            tokens=sum(sum(pair.chosen.target) for pair in self.now), sequences=len(rows), pairs=len(self.now)
        )
        units = tuple((2 * p, 2 * p + 1) for p in range(len(self.now)))
        return Batch(rows, units, counts, samples=tuple(pair.sample for pair in self.now[:1]))

    def loss(
        self, batch: Batch, rows: Sequence[int], forest: Forest, logps_T: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        # Rows come in units, chosen before rejected.
        sums_R = segment_sum(logps_T[forest.target_T], forest.sequence_T[forest.target_T], len(rows))
        chosen_P, rejected_P = sums_R[0::2], sums_R[1::2]
        reference_P2 = torch.tensor([self.now[r // 2].reference for r in rows[0::2]], dtype=sums_R.dtype)
        loss_P = dpo(
            chosen_P,
            rejected_P,
            reference_P2[:, 0],
            reference_P2[:, 1],
            beta=self.stage.beta,
            label_smoothing=self.stage.label_smoothing,
        )
        loss = reduce_pairs(loss_P, batch.counts)
        if self.stage.nll_weight:
            is_chosen_T = forest.target_T & (forest.sequence_T % 2 == 0)
            loss = loss + self.stage.nll_weight * reduce_tokens(nll(logps_T), is_chosen_T, batch.counts)
        margin_P = self.stage.beta * (sums_R[0::2] - sums_R[1::2] - reference_P2[:, 0] + reference_P2[:, 1]).detach()
        shares = {
            "margin": margin_P,
            "accuracy": (margin_P > 0).to(margin_P.dtype),
            "chosen_logp": chosen_P.detach(),
            "rejected_logp": rejected_P.detach(),
        }
        return loss, {name: reduce_pairs(value_P, batch.counts).item() for name, value_P in shares.items()}


def pairs_from_data(policy: Policy, stage: Dpo, data: Prepared, seed: int, world: World = ALONE) -> list[list[Pair]]:
    """Pairs as they stand in the data, one list a source.

    Of a large file only as many as the stage's steps come to, drawn at random: each costs a forward pass here.
    """

    def sides(r: Rendered) -> tuple[Row, Row, dict[str, Any]]:
        return chosen(r), rejected(r), pair_sample(r.example)

    sizes, slots = [len(rows) for rows in data.rows], stage.steps * stage.batch_size
    used = sorted(set(schedule(sizes, data.weights, slots, derive(seed, stage.id, "rows"))))
    return [
        _referenced(policy, stage, [sides(rows[i]) for source, i in used if source == s], world)
        for s, rows in enumerate(data.rows)
    ]


def pairs_on_policy(
    policy: Policy,
    stage: Dpo,
    data: Prepared,
    sampler: Sampler,
    score: Callable[[Example, str], Score],
    seed: int,
    world: World = ALONE,
) -> tuple[list[list[Pair]], Ledger, dict[str, float]]:
    """Pairs the policy writes itself: for each prompt, one of its best answers against one of its worst.

    Token ids are kept as sampled. A prompt whose answers all score alike gives no pair.

    Raises:
        UserError: no prompt gives a pair.
    """
    how = stage.on_policy
    assert how is not None
    order = schedule(
        [len(rows) for rows in data.rows], data.weights, how.prompts, derive(seed, stage.id, "pair prompts")
    )
    prompts = [data.rows[s][i].example for s, i in order]
    rollouts, ledger = sampler(prompts, how.n, how, derive(seed, stage.id, "pairs"))
    rng = random.Random(derive(seed, stage.id, "ties"))
    made: list[list[tuple[Row, Row, dict[str, Any]]]] = [[] for _ in data.rows]
    scores = [score(r.example, r.text) for r in rollouts]
    for best, worst in pairs(rollouts, scores, rng):
        sample = {
            "prompt": asked(rollouts[best].example),
            "text": rollouts[best].text,
            "score": scores[best].value,
            "outcome": scores[best].outcome,
            "rejected": rollouts[worst].text,
        }
        source = order[rollouts[best].group][0]
        made[source].append((as_row(rollouts[best]), as_row(rollouts[worst]), sample))
    if not any(made):
        raise UserError(
            f"stage {stage.id!r}: none of {how.prompts} prompts gave answers of different score, so there is no pair "
            "to learn from; raise on_policy.n or temperature, or choose a task that the model solves sometimes"
        )
    facts = {
        "prompts": how.prompts,
        "pairs": sum(map(len, made)),
        "correct": sum(s.outcome == "correct" for s in scores) / len(scores),
    }
    return [_referenced(policy, stage, part, world) for part in made], ledger, facts


def write_pairs(path: Path, kept: list[list[Pair]]) -> None:
    """Keep the pairs with their reference values, so that a continued run does not sample them again."""
    lines = [
        json.dumps(
            {
                "source": source,
                "prompt_ids": pair.chosen.context,
                "chosen": [pair.chosen.completion, pair.chosen.target],
                "rejected": [pair.rejected.completion, pair.rejected.target],
                "reference": pair.reference,
                "sample": pair.sample,
            }
        )
        for source, part in enumerate(kept)
        for pair in part
    ]
    write_text(path, "\n".join(lines) + "\n")


def read_pairs(path: Path, sources: int) -> list[list[Pair]]:
    found: list[list[Pair]] = [[] for _ in range(sources)]
    for line in path.read_text(encoding="utf-8").splitlines():
        kept = json.loads(line)
        context = tuple(kept["prompt_ids"])
        sides = [Row(context, *(tuple(x) for x in kept[side])) for side in ("chosen", "rejected")]
        found[kept["source"]].append(Pair(sides[0], sides[1], tuple(kept["reference"]), kept["sample"]))
    return found


def _referenced(policy: Policy, stage: Dpo, sides: list[tuple[Row, Row, dict[str, Any]]], world: World) -> list[Pair]:
    rows = [row for a, b, _ in sides for row in (a, b)]
    sums = [sum(logps) for logps in frozen_logprobs(policy, rows, stage.tokens_per_forward, world=world)]
    return [Pair(a, b, (sums[2 * i], sums[2 * i + 1]), sample) for i, (a, b, sample) in enumerate(sides)]
