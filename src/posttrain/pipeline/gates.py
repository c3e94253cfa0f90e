"""Gates: what the recipe says must hold of the last stage's model."""

from __future__ import annotations

from typing import Any

from posttrain.recipe.schema import Gate, Recipe


def decide(recipe: Recipe, evals: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each gate. What was not measured is not met: a gate fails closed."""
    last = recipe.stages[-1].id
    return [_decide(gate, evals, last) for gate in recipe.gates]


def _decide(gate: Gate, evals: dict[str, Any], stage: str) -> dict[str, Any]:
    value, interval = _measured(gate, evals, stage)
    low, high = interval if gate.sure and interval else (value, value)
    met = value is not None and (not gate.sure or interval is not None)
    met = met and (gate.at_least is None or low >= gate.at_least) and (gate.at_most is None or high <= gate.at_most)
    return {**gate.model_dump(), "stage": stage, "value": value, "interval": interval, "met": bool(met)}


def _measured(gate: Gate, evals: dict[str, Any], stage: str) -> tuple[Any, Any]:
    """The estimate and its interval; None where there is none."""
    if gate.measure == "gain":
        rows = [r for r in evals["comparisons"] if r["against"] == "base"]
        key = "diff"
    elif gate.measure == "kl":
        rows, key = evals["retention"], "kl"
    else:
        rows, key = evals["suites"], gate.measure
    for row in rows:
        if row["stage"] == stage and row.get("suite", "retention") == gate.suite:
            return row[key], None if key == "unparsed" else row["interval"]
    return None, None
