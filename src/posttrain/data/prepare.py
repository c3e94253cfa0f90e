"""From a recipe's data block to token ids: checked, deduplicated, cut to length, reported and mixed."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from posttrain.data.chat import Rendered, Renderer
from posttrain.data.shapes import BadRow, Malformed
from posttrain.data.sources import LISTED, Loaded, read
from posttrain.recipe.blocks import Data
from posttrain.records import Example, UserError

Need = Literal["text", "completion", "label", "pair"] | Callable[[Example, Renderer], tuple[Rendered, ...]]


class Prepared(NamedTuple):
    rows: tuple[tuple[Rendered, ...], ...]
    """One inner tuple per source, in the recipe's order."""
    weights: tuple[float, ...]
    report: dict[str, Any]
    """JSON-able; `digest` names the rendered ids of all rows."""


def prepare(
    data: Data, renderer: Renderer, *, need: Need, held_out: frozenset[str] = frozenset(), context: int | None = None
) -> Prepared:
    """Read and render every source of `data`.

    need: what a row must offer: raw text, an answer to learn, one with a label, or a better and a worse one; or a
        function that renders a row, and raises Malformed where it has not what is needed. Text that is too long is
        cut into pieces.
    held_out: `prompt_key`s of evaluation items; rows with one of them are dropped and counted.
    context: the model's context length in tokens; never exceeded, whatever `data.max_length` says.
    Raises UserError for too many bad rows, for a too long row under `too_long: error`, and for nothing left.
    """
    limit = data.max_length if context is None else min(data.max_length, context)
    seen: set[bytes] = set()
    rows, reports = [], []
    for source in data.sources:
        kept, report = _source(read(source), data, renderer, need, held_out, limit, seen)
        rows.append(tuple(kept))
        reports.append(report)
    everything = [row for source_rows in rows for row in source_rows]
    report = {
        "sources": reports,
        "limit": limit,
        "rows": len(everything),
        "tokens": sum(map(_length, everything)),
        "target_tokens": sum(r["target_tokens"] for r in reports),
        "digest": _digest(everything).hex(),
        "notes": list(renderer.notes),
    }
    return Prepared(tuple(rows), tuple(s.weight for s in data.sources), report)


def prompt_key(example: Example) -> str:
    """sha256 of what is asked, whatever its spacing, case or system prompt: equal keys are the same item."""
    asked = [f"{m['role']}:{m.get('content') or ''}" for m in example.prompt if m["role"] != "system"]
    text = "\x1e".join(asked) if example.text is None else example.text
    return hashlib.sha256(" ".join(unicodedata.normalize("NFKC", text).casefold().split()).encode()).hexdigest()


def prompted(
    example: Example,
    renderer: Renderer,
    lacks: Callable[[Example], str],
    own: bool = False,
    asked: Callable[[Example], Example] = lambda example: example,
) -> tuple[Rendered, ...]:
    """Its prompt, to be answered by a model, alone or with its `own` answer. `lacks` says why no answer could be
    scored, or nothing. `asked` gives the example as the model is asked it, with an environment's tools, say.

    Raises:
        Malformed: so it says, there is no prompt, or no answer.
    """
    if why := lacks(example) or ("" if example.prompt else "it has no prompt"):
        raise Malformed(why)
    if own:
        if not example.completion:
            raise Malformed("it holds no answer of its own, to be learned beside the sampled ones")
        rows = renderer.render(dataclasses.replace(example, rejected=()))
        if len(rows) > 1:
            raise Malformed("the chat template rewrites earlier turns, so its own answer cannot be kept whole")
        return rows
    return (Rendered(example, renderer.prompt_ids(asked(example))),)


def with_answers(data: Prepared, answers: Iterable[tuple[int, int, Sequence[int]]]) -> Prepared:
    """`data` with these answers, each with its source, its row there and its token ids, which are all to be learned;
    without the rows that have none."""
    rows: list[list[Rendered]] = [[] for _ in data.rows]
    for source, i, ids in answers:
        row = data.rows[source][i]
        rows[source].append(Rendered(row.example, row.prompt_ids, tuple(ids), (True,) * len(ids)))
    some = [s for s, part in enumerate(rows) if part]  # a source without any leaves the mixture
    return Prepared(tuple(tuple(rows[s]) for s in some), tuple(data.weights[s] for s in some), data.report)


def schedule(sizes: Sequence[int], weights: Sequence[float], slots: int, seed: int) -> list[tuple[int, int]]:
    """Which (source, row) fills each slot of a mixture.

    After any number of slots each source has had its share to within one row (two sources) or a few; every
    source goes through all its rows, in a fresh order each epoch, before one comes again. The first n slots
    do not depend on `slots`, so a run can be made longer without changing its beginning.
    """
    total = math.fsum(weights)
    given = [0] * len(sizes)
    orders: list[list[int]] = [[] for _ in sizes]
    filled = []
    for slot in range(1, slots + 1):
        source = max(range(len(sizes)), key=lambda i: slot * weights[i] / total - given[i])
        epoch, at = divmod(given[source], sizes[source])
        if at == 0:
            orders[source] = list(range(sizes[source]))
            random.Random(f"{seed}:{source}:{epoch}").shuffle(orders[source])
        filled.append((source, orders[source][at]))
        given[source] += 1
    return filled


# One source


def _source(
    loaded: Loaded, data: Data, renderer: Renderer, need: Need, held_out: frozenset[str], limit: int, seen: set[bytes]
) -> tuple[list[Rendered], dict[str, Any]]:
    kept: list[Rendered] = []
    counts: Counter[str] = Counter()
    bad = list(loaded.report.bad_rows)
    too_long: list[str] = []
    for example in loaded.examples:
        if held_out and prompt_key(example) in held_out:
            counts["held_out"] += 1
            continue
        try:
            rendered = _rendered(example, renderer, need)
        except Malformed as error:
            counts["bad"] += 1
            bad.append(BadRow(example.id, str(error)))
            continue
        for row in _pieces(rendered[0], limit) if need == "text" else rendered:
            key = _digest([row])
            if key in seen:
                counts["duplicates"] += 1
                continue
            seen.add(key)
            if _length(row) <= limit:
                kept.append(row)
                continue
            cut = _truncated(row, limit) if data.too_long == "truncate" else None
            if cut is None:
                counts["too_long"] += 1
                too_long.append(f"{example.id} ({_length(row)} tokens)")
            else:
                counts["truncated"] += 1
                kept.append(cut)
    report = loaded.report
    counts["bad"] += report.bad
    bad_share = counts["bad"] / report.rows
    if bad_share > data.max_bad_rows:
        raise UserError(
            f"{report.source}: {counts['bad']} of {report.rows} rows are bad, more than max_bad_rows "
            f"({data.max_bad_rows:.0%}) allows. Read as {report.shape} ({report.reason}). {_listed(map(str, bad))}"
        )
    if too_long and data.too_long == "error":
        raise UserError(
            f"{report.source}: {len(too_long)} rows are longer than {limit} tokens. Raise max_length, or set too_long "
            f"to drop or truncate. {_listed(too_long)}"
        )
    if not kept:
        why = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items() if n)
        if too_long:
            why += f". A row may have {limit} tokens here: raise max_length, or take a model with a longer context. "
            why += _listed(too_long)
        raise UserError(f"{report.source}: empty data set, none of its {report.rows} rows is left: {why}")
    lengths = [_length(row) for row in kept]
    p50, p95 = (int(q) for q in np.percentile(lengths, [50, 95], method="inverted_cdf"))
    return kept, {
        "source": report.source,
        "shape": report.shape,
        "reason": report.reason,
        "read": report.rows,
        "used": len(kept),
        **{name: counts[name] for name in ("bad", "too_long", "truncated", "held_out", "duplicates")},
        "bad_rows": [str(b) for b in bad[:LISTED]],
        "length": {"p50": p50, "p95": p95, "max": max(lengths)},
        "target_tokens": sum(sum(r.completion_target) + sum(r.rejected_target) for r in kept),
    }


def _rendered(example: Example, renderer: Renderer, need: Need) -> tuple[Rendered, ...]:
    """`example` rendered for `need`; Malformed where it cannot serve it."""
    if callable(need):
        return need(example, renderer)
    if need == "text":
        if example.text is None:
            raise Malformed("it is no raw text: answers are learned by a stage of kind sft")
    elif example.text is not None:
        raise Malformed("it is raw text, without an answer: a stage of kind continued_pretraining learns from that")
    elif need == "pair":
        if not (example.completion and example.rejected):
            raise Malformed("it holds no pair of a better and a worse answer")
    else:
        if need == "label" and example.label is None:
            raise Malformed("it bears no label that says whether the answer is good or bad")
        if need == "completion" and example.label is False:
            raise Malformed("it is labelled bad: not an answer to imitate")
        example = dataclasses.replace(example, rejected=())
    rows = renderer.render(example)
    if any(not any(row.completion_target) for row in rows):
        raise Malformed("no token of it can be trained on")
    if need == "pair" and rows[0].completion_ids == rows[0].rejected_ids:
        raise Malformed("chosen and rejected are the same once rendered")
    return rows


def _pieces(document: Rendered, limit: int) -> Iterator[Rendered]:
    """`document` in pieces of at most `limit` tokens. Each begins with the last token of the one before, as what its
    first target follows: so every token but the document's first is a target once."""
    ids = (*document.prompt_ids, *document.completion_ids)
    for start in range(0, len(ids) - 1, limit - 1):
        learned = ids[start + 1 : start + limit]
        yield Rendered(document.example, ids[start : start + 1], learned, (True,) * len(learned))


def _length(row: Rendered) -> int:
    return len(row.prompt_ids) + max(len(row.completion_ids), len(row.rejected_ids))


def _truncated(row: Rendered, limit: int) -> Rendered | None:
    """`row` with the end of its answers cut; None where nothing to learn, or no difference, would be left."""
    room = limit - len(row.prompt_ids)
    if room <= 0:
        return None
    cut = dataclasses.replace(
        row,
        completion_ids=row.completion_ids[:room],
        completion_target=row.completion_target[:room],
        rejected_ids=row.rejected_ids[:room],
        rejected_target=row.rejected_target[:room],
    )
    learned = any(cut.completion_target) and (not row.rejected_ids or any(cut.rejected_target))
    return cut if learned and cut.completion_ids != cut.rejected_ids else None


def _digest(rows: Iterable[Rendered]) -> bytes:
    """Names what training sees of `rows`: ids, targets, labels, and what answers are scored by."""
    sha = hashlib.sha256()
    for row in rows:
        example = row.example
        ids = (row.prompt_ids, row.completion_ids, row.completion_target, row.rejected_ids, row.rejected_target)
        for part in ids:
            sha.update(len(part).to_bytes(8, "little") + np.asarray(part, "<i4").tobytes())
        sha.update(repr((example.label, example.margin, example.step_labels, example.task, example.answer)).encode())
        sha.update(repr([example.meta.get(key) for key in ("tests", "instructions")]).encode())
    return sha.digest()


def _listed(items: Iterable[str]) -> str:
    items = list(items)
    return "\n  ".join(["The first of them:", *items[:10]])
