"""A run folder's records as one self-contained HTML page. Renders what was recorded; measures nothing itself."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, PackageLoader
from markupsafe import Markup

from posttrain.records import Ledger, UserError
from posttrain.report import charts, text

Row = dict[str, Any]

SAMPLES_SHOWN = 6
ITEMS_SHOWN = {"trained": 8, "neighbour": 4}
LONGEST_ANSWER = 800  # characters; what is cut is said

KINDS = {
    "continued_pretraining": "continued pre-training",
    "sft": "supervised fine-tuning",
    "distill": "distillation",
    "constitutional": "learning its own revisions by written principles",
    "preference": "preference optimisation",
    "reward_model": "reward model",
    "process_reward_model": "process reward model",
    "rejection_sampling": "learning from its own right answers",
    "online_preference": "preferences between answers sampled on the way",
    "self_rewarding": "preferences between its own answers by its own judgement",
    "grpo": "reinforcement learning on groups of answers",
    "ppo": "reinforcement learning with a critic",
}

SERIES = {
    "loss": "training loss of the step",
    "nll": "of the tokens on which the student is compared with its teacher, nats a token",
    "reward": "mean reward of the step's completions",
    "signal": "share of groups whose completions differ in reward",
    "kept": "share of the round's completions that are learned",
    "solved": "share of the round's prompts of which an answer is learned",
    "rationalised": "share of the other prompts that were answered rightly with a hint",
    "examples": "answers that the round learns from",
    "learned": "share of prompts whose answers are learned from",
    "process_loss": "cross-entropy of the process reward model with the outcomes",
    "process_accuracy": "share of answers whose outcome the process reward model tells, before it learns from them",
    "unread": "share of the model's judgements of its own answers that could not be read",
    "pairs": "pairs of answers that the round learns from",
    "judgement_pairs": "pairs of judgements that the round learns from",
    "turned": "share of compared judgements whose winner turned with their order",
    "shown_first": "share of the compared judgements that were won by the one shown first",
    "preferred": "chance that the model's answers are preferred to those of its mixture with the reference",
    "draws": "times that prompts were drawn for the step",
    "margin": "score of chosen above rejected, times beta",
    "accuracy": "share of pairs in which chosen is preferred",
    "chosen_reward": "mean reward of the chosen answers",
    "rejected_reward": "mean reward of the rejected answers",
    "good": "share of steps that are labelled good",
    "said_good": "mean chance of being good that the model gives a step",
    "chosen_logp": "log-probability of the chosen answer, nats",
    "rejected_logp": "log-probability of the rejected answer, nats",
    "chosen_ratio": "log-ratio of the chosen answer to the reference, nats",
    "length": "mean completion length, tokens",
    "length_reward": "correlation of reward with length, within the completions of a prompt",
    "entropy": "of the next token, nats",
    "kl": "from the stage's starting model, nats per token",
    "kl_weight": "weight of the KL penalty",
    "value_loss": "loss of the critic",
    "explained": "share of the returns' variance that the critic explains",
    "ratio_min": "lowest importance ratio of the step",
    "ratio_max": "highest importance ratio of the step",
    "clipped": "share of tokens whose ratio was clipped",
    "mismatch_min": "lowest ratio of the trainer's to the sampler's probability of a token",
    "mismatch_max": "highest ratio of the trainer's to the sampler's probability of a token",
    "unscored": "share of completions that the reward could not score",
    "unparsed": "share of completions that no answer could be read from",
    "truncated": "share of completions cut at the longest length",
    "grad_norm": "gradient norm before clipping",
    "lr": "learning rate",
    "tokens_per_second": "training and sampling together",
    "tokens": "tokens of the step",
    "seconds": "of the step",
}
"""What the step metrics mean, in the order of their charts; keys not listed are charted after them."""
TOGETHER: dict[tuple[str, ...], str] = {
    ("chosen_logp", "rejected_logp"): "log-probability of the answers, nats",
    ("chosen_reward", "rejected_reward"): "mean reward of the answers",
    ("ratio_min", "ratio_max"): "lowest and highest importance ratio of the step",
    ("mismatch_min", "mismatch_max"): "lowest and highest ratio of the trainer's to the sampler's probability",
}
"""Series that are read against each other share a panel."""
COUNTS = {
    "ratio_counts": "importance ratios of the stage, share of tokens",
    "mismatch_counts": "ratios of the trainer's to the sampler's probability, share of tokens",
    "length_counts": "lengths in tokens, share of completions",
}
"""Metrics that are counts by name, with what they count."""

LEDGER = {
    "prompt_tokens": "prompt tokens computed by the sampler",
    "cached_tokens": "prompt tokens shared between completions, not computed again",
    "generated_tokens": "tokens sampled",
    "reward_tokens": "tokens that models read, and judges wrote, to say what answers are worth",
    "trained_tokens": "tokens put through forward and backward",
    "shared_tokens": "tokens that one-by-one training would have computed again",
    "target_tokens": "tokens that carried loss",
}

EXPECTED = {
    "recipe.yaml": "the recipe as written",
    "environment.json": "machine and package versions",
    "evals.json": "all measurements",
    "monitors.json": "alarms",
    "decisions.json": "gates",
}
"""Files that a finished run may hold, with what the page cannot show without them."""


@dataclass
class Records:
    """Reads a run folder; whatever is absent or unreadable is noted, never replaced by a default value."""

    folder: Path
    absent: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def text(self, name: str) -> str | None:
        try:
            return (self.folder / name).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            self.absent.append(name)
        except OSError as error:
            self.unreadable.append(f"{name}: {error.strerror}")
        return None

    def object(self, name: str) -> Row | None:
        content = self.text(name)
        if content is None:
            return None
        try:
            value = json.loads(content)
        except ValueError as error:
            self.unreadable.append(f"{name}: {error}")
            return None
        if not isinstance(value, dict):
            self.unreadable.append(f"{name}: holds no JSON object")
            return None
        return value

    def rows(self, name: str) -> list[Row]:
        """The objects of a JSON Lines file; a line that is none (a run may be writing it) is noted and left out."""
        good = []
        for line_number, line in enumerate((self.text(name) or "").splitlines(), 1):
            try:
                row = json.loads(line) if line.strip() else {}
            except ValueError:
                row = None
            if isinstance(row, dict):
                good += [row] if row else []
            else:
                self.unreadable.append(f"{name}:{line_number}: not a JSON object")
        return good


def render(folder: Path) -> Path:
    """Write `report.html` into the run folder from the records there, and return its path.

    Raises `UserError` where the folder holds no run or cannot be written to.
    """
    folder = Path(folder)
    records = Records(folder)
    resolved = records.object("resolved.json")
    if resolved is None:
        why = "; ".join(records.unreadable) or "resolved.json is missing"
        raise UserError(f"{folder}: no run to report on ({why}). Give the folder that `posttrain run` wrote.")
    page = environment().get_template("template.html.j2").render(view(records, resolved))

    out = folder / "report.html"
    part = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        part.write_text(page, encoding="utf-8")
        part.replace(out)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{out}: cannot write the report ({error.strerror}). Make the folder writable.") from error
    return out


@functools.cache
def environment() -> Environment:
    env = Environment(
        loader=PackageLoader("posttrain.report", ""),
        autoescape=True,
        finalize=text.shown,
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("number", "plain", "percent", "bare_percent", "points", "p_value", "duration", "moment", "scaled"):
        env.filters[name] = getattr(text, name)
    env.filters["span"] = lambda interval, name="number": text.span(interval, env.filters[name])
    env.filters["short"] = lambda digest: text.shown(digest).removeprefix("sha256:")[:12]
    return env


def view(records: Records, resolved: Row) -> Row:
    """Everything the template shows."""
    whole = {name: records.object(name) or {} for name in EXPECTED if name.endswith(".json")}
    recipe = records.text("recipe.yaml")
    stages = [_stage(records, spec, before) for spec, before in _chain(resolved)]
    evals = whole["evals.json"]
    suites = _suites(resolved, evals, stages)
    answers = [_answers(records, suite, stages) for suite in suites]
    retention = _by(evals.get("retention"), "stage")
    measured = [s["id"] for s in stages if any(s["id"] in suite["scores"] for suite in suites) or s["id"] in retention]
    last = measured[-1] if measured else None
    return {
        "run": resolved,
        "recipe": recipe,
        "resolved": json.dumps(resolved, indent=2, ensure_ascii=False),
        "environment": whole["environment.json"],
        "stages": stages,
        "finished": sum(s["state"] == "finished" for s in stages),
        "kinds": KINDS,
        "evals": evals,
        "last": last,
        "suites": suites,
        "claims": [_claim(suite, last) for suite in suites if last],
        "answers": answers,
        "retention": retention,
        "retention_chart": _retention_chart(retention, stages),
        "gates": whole["decisions.json"].get("gates"),
        "monitors": whole["monitors.json"].get("rows"),
        "alarms": _alarms(whole["monitors.json"].get("rows")),
        "ledger_fields": LEDGER,
        "compute": _compute(stages, evals),
        "absent": [(n, EXPECTED[n]) for n in records.absent if n in EXPECTED],
        "unreadable": records.unreadable,
    }


def _chain(resolved: Row) -> Iterable[tuple[Row, str]]:
    """Each stage as resolved, with the id of what it starts from."""
    before = "base"
    for spec in resolved.get("stages") or []:
        yield spec, spec.get("from") or before
        before = spec.get("id", "")


def _by(rows: Any, key: str) -> dict[str, Row]:
    return {row[key]: row for row in rows or [] if key in row}


def _pair(interval: Any) -> tuple[float, float] | None:
    """An interval as numbers, or None where it holds none."""
    if isinstance(interval, list) and len(interval) == 2 and all(map(text.is_number, interval)):
        return interval[0], interval[1]
    return None


def _stage(records: Records, spec: Row, start: str) -> Row:
    folder = f"stages/{spec.get('id')}"
    record = records.object(f"{folder}/stage.json")
    metrics = records.rows(f"{folder}/metrics.jsonl")
    state = "finished" if (record or {}).get("finished") else "running" if record or metrics else "pending"
    samples = records.rows(f"{folder}/samples.jsonl")
    return {
        "id": spec.get("id"),
        "kind": spec.get("kind"),
        "start": start,
        "steps": spec.get("steps"),
        "reached": metrics[-1].get("step") if metrics else None,
        "state": state,
        "record": record or {},
        "panels": _panels(metrics),
        "samples": [{**row, **_cut(row)} for row in _spread(samples, SAMPLES_SHOWN)],
        "samples_of": len(samples),
    }


def _spread(rows: Sequence[Row], count: int) -> list[Row]:
    """At most `count` rows, evenly from first to last."""
    if len(rows) <= count:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (count - 1))] for i in range(count)]


def _cut(row: Row) -> Row:
    answer = text.shown(row.get("text"))
    return {"text": answer[:LONGEST_ANSWER], "cut": max(0, len(answer) - LONGEST_ANSWER)}


def _panels(metrics: Sequence[Row]) -> list[Row]:
    series: dict[str, list[charts.Point]] = {}
    for row in metrics:
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                series.setdefault(key, []).append((row.get("step", len(series.get(key, ())) + 1), value))
    ordered = sorted(series, key=lambda key: list(SERIES).index(key) if key in SERIES else len(SERIES))
    panels = []
    for key in ordered:
        names = next((group for group in TOGETHER if key in group), (key,))
        shown = {name: series[name] for name in names if name in series}
        if key != next(iter(shown)):
            continue
        title = " and ".join(shown)
        ends = [{"name": n, "first": points[0][1], "last": points[-1][1]} for n, points in shown.items()]
        about = TOGETHER.get(tuple(shown)) or SERIES.get(key)
        panels.append({"title": title, "about": about, "ends": ends, "svg": charts.curve(title, shown)})
    return panels + _bars(metrics)


def _bars(metrics: Sequence[Row]) -> list[Row]:
    """What was counted in all steps of a stage together, and the mean reward of completions by their length."""
    counts = {key: _added(metrics, key) for key in (*COUNTS, "length_rewards")}
    shown = {
        key: ({label: count / sum(counts[key].values()) for label, count in counts[key].items()}, text.percent)
        for key in COUNTS
        if sum(counts[key].values()) > 0
    }
    panels = [
        {
            "title": key.replace("_counts", " in bins"),
            "about": COUNTS[key],
            "svg": charts.bars(COUNTS[key], values, write),
        }
        for key, (values, write) in shown.items()
    ]
    rewards = {label: counts["length_rewards"].get(label, 0) / n for label, n in counts["length_counts"].items() if n}
    if rewards:
        about = "mean reward by length in tokens"
        panels.append({"title": "reward by length", "about": about, "svg": charts.bars(about, rewards, text.number)})
    return panels


def _added(metrics: Sequence[Row], key: str) -> dict[str, float]:
    total: dict[str, float] = {}
    for row in metrics:
        for label, count in row[key].items() if isinstance(row.get(key), dict) else ():
            total[label] = total.get(label, 0) + (count if text.is_number(count) else 0)
    return total


def _suites(resolved: Row, evals: Row, stages: Sequence[Row]) -> list[Row]:
    """Per suite: scores by stage, comparisons by (stage, against), and their charts."""
    rows = evals.get("suites") or []
    planned = [s.get("id") for s in (resolved.get("evals") or {}).get("suites") or []]
    names = [*dict.fromkeys([*planned, *(row.get("suite") for row in rows)])]
    comparisons = evals.get("comparisons") or []
    ends = [abs(end) for row in comparisons for end in _pair(row.get("interval")) or ()]
    limit = max(ends, default=0.0)
    suites = []
    for name in names:
        scores = _by([row for row in rows if row.get("suite") == name], "stage")
        if not scores:
            continue
        about = next(iter(scores.values()))
        compared = {(c.get("stage"), c.get("against")): c for c in comparisons if c.get("suite") == name}
        for (stage, against), row in compared.items():
            compared[stage, against] = {**row, **_verdict(row), "svg": _difference(row, limit)}
        marks = _marks(scores, "score", stages, 100)
        suites.append(
            {
                "id": name,
                "role": about.get("role"),
                "version": about.get("version"),
                "n": about.get("n"),
                "scores": scores,
                "compared": compared,
                "svg": charts.by_stage(f"{name}: accuracy by stage", marks, (0, 25, 50, 75, 100), "{:.1f}".format),
            }
        )
    return sorted(suites, key=lambda suite: suite["role"] != "trained")


def _marks(measured: Mapping[str, Row], key: str, stages: Sequence[Row], unit: float = 1) -> list[charts.Mark]:
    """The base and every stage, measured or not; values times `unit`."""
    ids = ["base", *(stage["id"] for stage in stages)]
    parents = [None, *(ids.index(s["start"]) if s["start"] in ids else None for s in stages)]
    marks = []
    for name, parent in zip(ids, parents, strict=True):
        row = measured.get(name, {})
        value, interval = row.get(key), _pair(row.get("interval"))
        marks.append(
            charts.Mark(
                name,
                unit * value if text.is_number(value) else None,
                (unit * interval[0], unit * interval[1]) if interval else None,
                parent,
            )
        )
    return marks


def _verdict(row: Row) -> Row:
    """What a comparison's interval says: better, worse, or unclear where it holds zero."""
    interval = _pair(row.get("interval"))
    if interval is None:
        return {"verdict": "unknown"}
    return {"verdict": "better" if interval[0] > 0 else "worse" if interval[1] < 0 else "unclear"}


def _difference(row: Row, limit: float) -> Markup | None:
    interval = _pair(row.get("interval"))
    if interval is None or not text.is_number(row.get("diff")):
        return None
    title = f"{row.get('stage')} against {row.get('against')}: {text.points(row['diff'])} points"
    return charts.difference(title, row["diff"], interval, limit, _verdict(row)["verdict"])


def _claim(suite: Row, last: str) -> Row:
    """A suite at the last measured stage against the base; `lenient` is the same with prose counted."""
    before, after = suite["scores"].get("base", {}), suite["scores"].get(last, {})
    compared = suite["compared"].get((last, "base"), {"verdict": "unknown"})
    lenient = compared.get("lenient")
    return {
        "suite": suite["id"],
        "role": suite["role"],
        "before": before.get("score"),
        "after": after.get("score"),
        **compared,
        "lenient": {**lenient, **_verdict(lenient), "before": before.get("lenient"), "after": after.get("lenient")}
        if isinstance(lenient, dict)
        else None,
    }


def _alarms(rows: Any) -> dict[str, list[Row]]:
    """What warned or halted, by name: one alarm over several stages is one line."""
    alarms: dict[str, list[Row]] = {}
    for row in rows or []:
        if row.get("level") in ("warn", "halt"):
            alarms.setdefault(str(row.get("name")), []).append(row)
    return alarms


def _retention_chart(retention: Mapping[str, Row], stages: Sequence[Row]) -> Markup | None:
    marks = [mark for mark in _marks(retention, "kl", stages) if mark.label != "base"]
    marks = [mark._replace(parent=mark.parent - 1 if mark.parent else None) for mark in marks]
    tops = [end for mark in marks if mark.value is not None for end in (mark.value, *(mark.interval or ()))]
    if not tops:
        return None
    return charts.by_stage("Drift from the base, nats per token", marks, charts.ticks(0, max(tops)), text.number)


def _answers(records: Records, suite: Row, stages: Sequence[Row]) -> Row:
    """The same items at the base and after each stage; which ones is decided by `choose`."""
    names = [name for name in ("base", *(s["id"] for s in stages)) if name in suite["scores"]]
    files = {name: records.rows(f"evals/{name}.jsonl") for name in names}
    by_item = {
        name: {str(row.get("item")): row for row in rows if row.get("suite") == suite["id"]}
        for name, rows in files.items()
    }
    by_item = {name: rows for name, rows in by_item.items() if rows}
    if len(by_item) < 2:
        return {"suite": suite["id"], "items": [], "counts": {}}
    first, *_, final = by_item
    groups = sort_items(by_item[first], by_item[final])
    items = []
    for change, item in choose(groups, ITEMS_SHOWN.get(suite["role"], 4)):
        answers = [{"stage": n, **rows[item], **_cut(rows[item])} for n, rows in by_item.items() if item in rows]
        items.append({"item": item, "change": change, **{k: answers[0].get(k) for k in ("prompt", "answer")}})
        items[-1]["answers"] = answers
    counts = {change: len(members) for change, members in groups.items()}
    return {"suite": suite["id"], "role": suite["role"], "items": items, "counts": counts, "final": final}


def sort_items(before: Mapping[str, Row], after: Mapping[str, Row]) -> dict[str, list[str]]:
    """Items of both, by what happened to their score: gained, lost, right both times, not right both times."""
    groups: dict[str, list[str]] = {"gained": [], "lost": [], "still right": [], "still not right": []}
    for item in before.keys() & after.keys():
        old, new = before[item].get("score"), after[item].get("score")
        if not (text.is_number(old) and text.is_number(new)):
            continue  # an engine error is no answer to compare
        right = after[item].get("outcome") == "correct"
        same = "still right" if right else "still not right"
        groups["gained" if new > old else "lost" if new < old else same].append(item)
    return {change: members for change, members in groups.items() if members}


def choose(groups: Mapping[str, Sequence[str]], count: int) -> list[tuple[str, str]]:
    """About `count` (group, item), each group in proportion to its size and with one at least.

    Within a group the items with the lowest SHA-256 of their name: the same every time, and picked by no one.
    """
    total = sum(map(len, groups.values()))
    chosen = []
    for change, members in groups.items():
        share = min(len(members), max(1, round(count * len(members) / total)))
        ranked = sorted(members, key=lambda item: hashlib.sha256(item.encode(errors="replace")).digest())
        chosen += [(change, item) for item in ranked[:share]]
    return chosen


def _compute(stages: Sequence[Row], evals: Row) -> Row:
    """The stages' ledgers, their sum, and each one's share of the time."""
    known = {f.name for f in fields(Ledger)}
    parts = []
    for stage in stages:
        recorded = stage["record"].get("ledger") or {}
        if recorded:
            counts: Row = {k: v for k, v in recorded.items() if k in known and text.is_number(v)}
            ledger = Ledger(**counts)
            parts.append({"stage": stage["id"], "ledger": ledger, "recorded": recorded, "record": stage["record"]})
    total = sum((part["ledger"] for part in parts), Ledger())
    measuring = evals.get("seconds")
    seconds = total.seconds + (measuring if text.is_number(measuring) else 0.0)

    def share(spent: float, name: str) -> Row:
        portion = spent / seconds if seconds and math.isfinite(seconds) else 0.0
        return {"share": portion, "svg": charts.bar(f"{name}: {text.percent(portion)} of the time", portion)}

    for part in parts:
        part |= share(part["ledger"].seconds, part["stage"])
    evaluation = {"seconds": measuring, **share(measuring, "evaluation")} if text.is_number(measuring) else None
    computed = total.trained_tokens + total.shared_tokens
    saved = total.shared_tokens / computed if computed else None
    return {"parts": parts, "total": total, "seconds": seconds, "evaluation": evaluation, "saved": saved}
