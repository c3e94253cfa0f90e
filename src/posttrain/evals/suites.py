"""Verifiable suites: the same items at every stage, answered greedily, scored, compared item by item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.data.sources import read
from posttrain.evals.stats import holm, paired, wilson
from posttrain.recipe.blocks import Sampling
from posttrain.recipe.schema import Evals, Suite
from posttrain.records import Example, Ledger, UserError
from posttrain.rewards.protocol import Scorer
from posttrain.sampling.protocol import Sampler

Row = dict[str, Any]


def items(suite: Suite) -> list[Example]:
    """The suite's items; an error if something in it has no verifier."""
    examples = read(suite.source).examples
    bare = [e.id for e in examples if e.task is None]
    if bare or len(examples) < 2:
        why = f"{bare[0]} has no verifier" if bare else f"{len(examples)} items are too few to say anything"
        raise UserError(
            f"suite {suite.id!r}: {suite.source.source}: {why}; use a generated task with `rows` of 2 or more"
        )
    return examples


def answer(
    suites: Mapping[str, Sequence[Example]],
    evals: Evals,
    sampler: Sampler,
    score: Scorer,
    seed: int,
) -> tuple[list[Row], Ledger]:
    """One row for each item of each suite: what was asked, said, read out of it, and how it scored."""
    examples = [example for part in suites.values() for example in part]
    names = [name for name, part in suites.items() for _ in part]
    greedy = Sampling(temperature=0, max_new_tokens=evals.max_new_tokens)
    rollouts, ledger = sampler(examples, 1, greedy, seed)
    rows = []
    for name, example, rollout, found in zip(names, examples, rollouts, score(rollouts), strict=True):
        rows.append(
            {
                "suite": name,
                "item": example.id,
                "prompt": str(example.prompt[-1]["content"]),
                "text": rollout.text,
                "answer": example.answer,
                "extracted": found.extracted,
                "outcome": found.outcome,
                "score": found.value,
                "why": found.why,
            }
        )
    return rows, ledger


def summarise(rows: Sequence[Row], evals: Evals, stage: str, model: str) -> list[Row]:
    """Accuracy by suite with its Wilson interval. Items that the scorer failed on count in `errors`, not in `n`.

    `lenient` is the share of right answers when an answer is also looked for in prose; see rewards/verifier.py.
    """
    summary = []
    for suite in evals.suites:
        mine = [r for r in rows if r["suite"] == suite.id]
        scored = [r for r in mine if r["score"] is not None]
        right = sum(r["score"] == 1 for r in scored)
        summary.append(
            {
                "suite": suite.id,
                "role": suite.role,
                "version": suite.version,
                "stage": stage,
                "model": model,
                "n": len(scored),
                "errors": len(mine) - len(scored),
                "score": right / len(scored) if scored else None,
                "interval": list(wilson(right, len(scored))) if len(scored) > 1 else None,
                "unparsed": sum(r["outcome"] == "unparsed" for r in mine) / len(mine),
                "lenient": sum(map(_lenient, mine)) / len(mine),
            }
        )
    return summary


def compare(rows: Mapping[str, Sequence[Row]], evals: Evals, stage: str, against: Sequence[str]) -> list[Row]:
    """`stage` against each of `against` on the items both were scored on; p is Holm-corrected across the suites.

    `lenient` compares what was right when prose counts too: a base that answers in sentences knows more than its
    strict score says, and a model that lost that must not look as if it had gained.
    """
    comparisons = []
    for other in dict.fromkeys(against):
        found = []
        for suite in evals.suites:
            before, after = (
                {r["item"]: r for r in rows[s] if r["suite"] == suite.id and r["score"] is not None}
                for s in (other, stage)
            )
            both = sorted(before.keys() & after.keys())
            if len(both) > 1:
                strict = paired([before[i]["score"] for i in both], [after[i]["score"] for i in both])
                lenient = paired([_lenient(before[i]) for i in both], [_lenient(after[i]) for i in both])
                found.append((suite.id, strict, lenient))
        for (suite_id, p, lenient), corrected in zip(found, holm([p.p for _, p, _ in found]), strict=True):
            comparisons.append(
                {
                    "suite": suite_id,
                    "stage": stage,
                    "against": other,
                    "diff": p.diff,
                    "interval": list(p.interval),
                    "p": corrected,
                    "mde": p.mde,
                    "gained": p.gained,
                    "lost": p.lost,
                    "n": p.n,
                    "lenient": {"diff": lenient.diff, "interval": list(lenient.interval)},
                }
            )
    return comparisons


def _lenient(row: Row) -> float:
    return float(row["score"] == 1 or (row["extracted"] is not None and row["extracted"] == row["answer"]))
