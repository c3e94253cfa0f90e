"""What goes wrong in public and can be seen in a run's numbers: drift, forgetting, dead groups, length, mismatch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]

DRIFT = 0.5
"""Nats per token of KL, from the base on general prompts or from a stage's reference on what it learned from. Above it
a reader should look."""
UNPARSED = 0.02
SIGNAL = 0.2
"""Share of groups with signal, or of prompts that are learned from, below which most sampling is wasted."""
MISMATCH = 1.05
"""Ratio of trainer's to sampler's probability of a token, either way up."""
LENGTH = 1.5
"""Growth of the mean completion, last fifth of the steps against the first."""
FOLLOWS = 0.5
"""Correlation of reward with length, within the completions of a prompt."""
FALL = -1.0
"""Nats by which the chosen answers may become less likely."""
COMPARING = ("online_preference", "self_rewarding", "grpo", "ppo")
"""Kinds of stage that learn from answers of one prompt being worth more than others."""


def watch_stage(stage: str, kind: str, metrics: Sequence[Row]) -> list[Row]:
    """What one stage's `metrics.jsonl` shows."""
    found = []
    if skipped := sum(m.get("skipped", 0) for m in metrics):
        found.append(
            _row("skipped steps", stage, skipped, 0, skipped <= 0, "Steps whose loss or gradient was not finite")
        )
    if kind == "preference" and _values(metrics, "chosen_logp"):
        fall = _end(metrics, "chosen_logp") - _start(metrics, "chosen_logp")
        text = "Change of the chosen answers' log-probability; the loss may lower both sides (nll_weight guards it)"
        found.append(_row("chosen log-probability", stage, fall, FALL, fall >= FALL, text))
    if _values(metrics, "chosen_ratio"):
        ratio = _end(metrics, "chosen_ratio")
        text = "Log-ratio of the chosen answers to the reference at the end, nats; the loss may lower both sides"
        found.append(_row("chosen log-ratio", stage, ratio, FALL, ratio >= FALL, text))
    if kind == "distill" and _values(metrics, "loss"):
        apart = _end(metrics, "loss") - _start(metrics, "loss")
        text = "Change of the distance from the teacher, as the loss measures it; it should fall"
        found.append(_row("distance from the teacher", stage, apart, 0, apart <= 0, text))
    if learned := _values(metrics, "learned") or _values(metrics, "solved"):
        share = float(np.mean(learned))
        text = "Mean share of prompts of which an answer, or a pair of them, was learned; the others were asked in vain"
        found.append(_row("prompts learned from", stage, share, SIGNAL, share >= SIGNAL, text))
    if kind in COMPARING and (signals := _values(metrics, "signal")):
        signal = float(np.mean(signals))
        text = "Mean share of groups whose answers scored differently; the others teach nothing"
        found.append(_row("groups with signal", stage, signal, SIGNAL, signal >= SIGNAL, text))
    if _values(metrics, "kl"):
        drift = _end(metrics, "kl")
        text = "KL from the stage's reference at the end, nats per token of its own answers"
        found.append(_row("distance from the reference", stage, drift, DRIFT, drift <= DRIFT, text))
    return found + _watch_answers(stage, metrics)


def _watch_answers(stage: str, metrics: Sequence[Row]) -> list[Row]:
    """What the answers show that a stage sampled."""
    found = []
    apart = [*_values(metrics, "mismatch_max"), *(1 / v for v in _values(metrics, "mismatch_min"))]
    if apart:
        text = "Largest ratio between trainer's and sampler's probability of a token"
        found.append(_row("sampler mismatch", stage, max(apart), MISMATCH, max(apart) <= MISMATCH, text))
    if _values(metrics, "length"):
        growth = _end(metrics, "length") / _start(metrics, "length")
        text = "Mean completion length at the end over that at the start; growth is easily read as quality"
        found.append(_row("length growth", stage, growth, LENGTH, growth <= LENGTH, text))
    if _values(metrics, "length_reward"):
        follows = _end(metrics, "length_reward")
        text = "Correlation of reward with length at the end, within the completions of a prompt"
        found.append(_row("reward follows length", stage, follows, FOLLOWS, follows <= FOLLOWS, text))
    if (gain := equal_length_gain(metrics)) is not None:
        whole, matched = gain
        text = f"Rise of the mean reward among completions of equal length; in all it rose by {whole:.3f}"
        fine = whole <= 0 or matched >= whole / 2
        found.append(_row("gain at equal length", stage, matched, whole / 2, fine, text))
    if any(unscored := _values(metrics, "unscored")):
        text = "Share of answers that had no score"
        found.append(_row("unscored completions", stage, float(np.mean(unscored)), 0, False, text))
    return found


def equal_length_gain(metrics: Sequence[Row]) -> tuple[float, float] | None:
    """How much the mean reward rose from the first fifth of the steps to the last: in all, and at equal length.

    The latter is the mean over bins of length, each weighed by as many completions as both ends have in it; None where
    they have none.
    """
    rows = [m for m in metrics if m.get("length_counts")]
    fifth = max(1, len(rows) // 5)
    first, last = (_by_length(part) for part in (rows[:fifth], rows[-fifth:]))
    weights = {label: min(first[label][0], last[label][0]) for label in first.keys() & last.keys()}
    if not weights:
        return None
    whole = _mean_reward(last.values()) - _mean_reward(first.values())
    rises = {label: _mean_reward([last[label]]) - _mean_reward([first[label]]) for label in weights}
    return whole, sum(weights[label] * rises[label] for label in weights) / sum(weights.values())


def _by_length(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Of each bin of length that is not empty, how many completions and the sum of their rewards."""
    labels = dict.fromkeys(label for row in rows for label, count in row["length_counts"].items() if count)
    return {
        label: (
            sum(row["length_counts"].get(label, 0) for row in rows),
            sum(row["length_rewards"].get(label, 0) for row in rows),
        )
        for label in labels
    }


def _mean_reward(bins: Collection[tuple[float, float]]) -> float:
    return sum(rewards for _, rewards in bins) / sum(count for count, _ in bins)


def watch_held_out(stage: str, measured: Mapping[str, Any]) -> Row:
    """What the rows show that a scoring model was not trained on."""
    what = {
        "pairs": "Share of held-out pairs whose better answer has the higher reward",
        "steps": "Share of held-out steps that are told good from bad",
    }[measured["of"]]
    text = f"{what}; an interval that holds the limit is no better than knowing nothing"
    chance, accuracy, low = measured["chance"], measured["accuracy"], measured["interval"][0]
    return _row(f"held-out {measured['of']}", stage, accuracy, chance, low > chance, text)


def watch_evals(evals: Mapping[str, Any]) -> list[Row]:
    """What `evals.json` shows of forgetting and of answers that could not be read."""
    found = []
    for row in evals["retention"]:
        text = "KL from the base on general prompts, nats per token"
        found.append(_row("drift", row["stage"], row["kl"], DRIFT, row["kl"] <= DRIFT, text))
    for row in evals["suites"]:
        if row["stage"] != "base":
            text = f"Share of answers in {row['suite']} that could not be read"
            found.append(
                _row(
                    f"unparsed, {row['suite']}",
                    row["stage"],
                    row["unparsed"],
                    UNPARSED,
                    row["unparsed"] <= UNPARSED,
                    text,
                )
            )
    for row in evals["comparisons"]:
        if row["against"] == "base":
            lenient = row["lenient"]
            fell = lenient["interval"][1] < 0
            text = f"Right answers in {row['suite']}, prose counted too, against the base; all below 0 is forgetting"
            found.append(_row(f"forgetting, {row['suite']}", row["stage"], lenient["diff"], 0, not fell, text))
    return found


def _row(name: str, stage: str, value: float, limit: float, fine: bool, text: str) -> Row:
    return {
        "name": name,
        "stage": stage,
        "level": "ok" if fine else "warn",
        "value": float(value),
        "limit": float(limit),
        "text": text,
    }


def _values(metrics: Sequence[Row], name: str) -> list[float]:
    return [m[name] for m in metrics if m.get(name) is not None]


def _start(metrics: Sequence[Row], name: str) -> float:
    values = _values(metrics, name)
    return float(np.mean(values[: max(1, len(values) // 5)]))


def _end(metrics: Sequence[Row], name: str) -> float:
    values = _values(metrics, name)
    return float(np.mean(values[-max(1, len(values) // 5) :]))
