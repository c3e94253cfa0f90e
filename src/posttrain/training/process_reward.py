"""Process reward modelling: the chance that a solution is right so far, read where each of its steps ends."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posttrain.data.chat import Rendered, Renderer
from posttrain.data.prepare import Prepared, schedule
from posttrain.data.steps import at_steps, solution_row
from posttrain.forest import Forest
from posttrain.forest.logprobs import States
from posttrain.losses import process_reward, reduce_tokens
from posttrain.models.disk import read_rows, write_rows
from posttrain.models.reward import marked, read
from posttrain.recipe.scoring import ProcessRewardModel
from posttrain.records import Example, Ledger, UserError, derive
from posttrain.rewards.process import label_steps
from posttrain.rewards.protocol import Scorer
from posttrain.sampling.protocol import Sampler
from posttrain.training.batch import Batch, asked, chosen, draws, singly


class ProcessRewardMethod:
    """Cross-entropy with the labels of the steps, a mean over all labelled steps of the optimiser step.

    The targets of a row are the last tokens of its labelled steps. What the head gives there is the log-odds that the
    step is good (Lightman et al., 2305.20050, whose model predicts a token `positive` or `negative` in its place).
    """

    period = 1

    def __init__(self, stage: ProcessRewardModel, data: Prepared, seed: int) -> None:
        self.stage, self.data = stage, data
        self.order = draws(stage, data.rows, data.weights, seed)

    def batch(self, step: int) -> Batch:
        size = self.stage.batch_size
        now = [self.data.rows[s][i] for s, i in self.order[step * size : (step + 1) * size]]
        self.labels = [_per_token(solution) for solution in now]
        return singly([*map(chosen, now)], samples=tuple(map(_sample, now[:1])))

    def forward(self, model: torch.nn.Module, forest: Forest, states: States) -> Tensor:
        return marked(model, forest, states)

    def loss(
        self, batch: Batch, rows: Sequence[int], forest: Forest, outputs: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        labels_T = forest.spread([self.labels[i] for i in rows]).to(outputs.dtype)
        loss_T = process_reward(outputs, labels_T, forest.target_T)
        chance_T = outputs.detach().sigmoid()
        shares = {
            "accuracy": ((chance_T > 0.5) == (labels_T > 0.5)).to(outputs.dtype),
            "good": labels_T,
            "said_good": chance_T,
        }
        return reduce_tokens(loss_T, forest.target_T, batch.counts), {
            name: reduce_tokens(value_T, forest.target_T, batch.counts).item() for name, value_T in shares.items()
        }


def labels(solution: Rendered) -> list[float]:
    """The chance that each labelled step is good, in their order; fewer than were given where the row was cut."""
    given = [float(label) for label in solution.example.step_labels if label is not None]
    return given[: sum(solution.completion_target)]


def _labels(data: Prepared) -> list[float]:
    return [label for part in data.rows for row in part for label in labels(row)]


def one_label(data: Prepared) -> str:
    """Why the solutions have nothing to tell apart; empty where they have."""
    given = _labels(data)
    if not given:
        return "no step could be labelled"
    return f"all {len(given)} steps have the label {given[0]:g}" if min(given) == max(given) else ""


class StepVerdict(NamedTuple):
    """On one labelled step."""

    solution: int
    """Index of the solution it stands in."""
    good: bool
    right: bool
    """Whether the model says so too."""


def verdicts(model: torch.nn.Module, solutions: Sequence[Rendered], budget: int) -> list[StepVerdict]:
    """What the model says of each labelled step; a chance of exactly one half is no."""
    found = read(partial(marked, model), [chosen(solution) for solution in solutions], budget)
    return [
        StepVerdict(s, label > 0.5, (logit > 0) == (label > 0.5))
        for s, (logits, solution) in enumerate(zip(found, solutions, strict=True))
        for logit, label in zip(logits, labels(solution), strict=True)
    ]


def _per_token(solution: Rendered) -> list[float]:
    """Labels at the tokens they are of, 0 elsewhere."""
    left = iter(labels(solution))
    return [next(left) if target else 0.0 for target in solution.completion_target]


def _sample(solution: Rendered) -> dict[str, Any]:
    """How it looks to a reader."""
    said = zip(solution.example.completion, solution.example.step_labels, strict=True)
    marks = [f"{turn['content']} [{'?' if label is None else f'{label:g}'}]" for turn, label in said]
    return {"prompt": asked(solution.example), "text": "\n".join(marks)}


# Solutions that the stage samples itself


def labelled_solutions(
    stage: ProcessRewardModel, data: Prepared, sampler: Sampler, scorer: Scorer, renderer: Renderer, seed: int
) -> tuple[Prepared, Ledger, dict[str, float]]:
    """Solutions by the stage's starting model to the prompts of `data`, their steps labelled by `label_steps`.

    Token ids are kept as sampled. A solution without a step, or of which none could be labelled, is left out.

    Raises:
        UserError: no solution is left, or all steps have one label.
    """
    how = stage.rollouts
    assert how is not None
    sizes = [len(rows) for rows in data.rows]
    order = schedule(sizes, data.weights, how.prompts, derive(seed, stage.id, "prompts"))
    prompts = [data.rows[s][i].example for s, i in order]
    solutions, first = sampler(prompts, how.solutions, how, derive(seed, stage.id, "solutions"))
    examples, after = label_steps(
        solutions,
        sampler,
        scorer,
        renderer,
        n=how.n,
        sampling=how,
        seed=derive(seed, stage.id, "labels"),
        separator=stage.separator,
        hard=how.labels == "hard",
    )
    rows: list[list[Rendered]] = [[] for _ in data.rows]
    for one, example in zip(solutions, examples, strict=True):
        row = at_steps(example, one.prompt_ids, one.ids, renderer.decode, stage.separator)
        if row is not None and any(row.completion_target):
            rows[order[one.group][0]].append(row)
    some = [s for s, part in enumerate(rows) if part]  # a source without any leaves the mixture
    kept = Prepared(tuple(tuple(rows[s]) for s in some), tuple(data.weights[s] for s in some), data.report)
    if why := one_label(kept):
        raise UserError(
            f"stage {stage.id!r}: {why} after {how.prompts} prompts, so there is nothing to tell apart; raise "
            "rollouts.prompts, solutions or temperature, or choose a task that the model solves sometimes"
        )
    given = _labels(kept)
    return kept, first + after, {"prompts": how.prompts, "steps": len(given), "good": sum(given) / len(given)}


def write_solutions(path: Path, data: Prepared) -> None:
    """Keep labelled solutions, so that a continued run does not sample them again."""
    lines = [
        {
            "source": source,
            "weight": data.weights[source],
            "id": row.example.id,
            **solution_row(row.example),
            "ids": [row.prompt_ids, row.completion_ids, row.completion_target],
        }
        for source, part in enumerate(data.rows)
        for row in part
    ]
    write_rows(path, lines)


def read_solutions(path: Path, report: dict[str, Any]) -> Prepared:
    """What `write_solutions` kept; `report` is of the data that the prompts came from."""
    rows: dict[int, list[Rendered]] = {}
    weights: dict[int, float] = {}
    for kept in read_rows(path):
        completion = tuple({"role": "assistant", "content": step} for step in kept["completions"])
        example = Example(kept["id"], tuple(kept["prompt"]), completion, step_labels=tuple(kept["labels"]))
        prompt_ids, ids, target = map(tuple, kept["ids"])
        rows.setdefault(kept["source"], []).append(Rendered(example, prompt_ids, ids, target))
        weights[kept["source"]] = kept["weight"]
    return Prepared(tuple(map(tuple, rows.values())), tuple(weights.values()), report)
