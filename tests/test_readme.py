"""The pages say what is so: every command and every Python block in them runs, and every table equals its source."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from short import SETTINGS, settings
from tiny import tiny_policy

from posttrain.cli import main
from posttrain.recipe.document import Document
from posttrain.recipe.load import parse
from posttrain.records import UserError

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORTER = {"steps=100": "steps=1", "steps=50": "steps=1", "rows=100": "rows=2", "max_new_tokens=32": "max_new_tokens=4"}
"""In Python blocks: the same, sooner."""
LOOP = ["steps=1", "batch_size=2", "held_out=2"]
"""For the flat scripts; of an argument given twice the last counts."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def by_path(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Commands and code


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a reader has before them: the recipes, and a file of their own."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "mine.jsonl").write_text((ROOT / "recipes/data/notes.jsonl").read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def do(command: list[str], shop: Path) -> int:
    """Run a command as the page has it, cut short where it would take minutes."""
    program, *words = command
    if program == "make":
        return subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True).returncode
    if program == "python":
        return subprocess.run([sys.executable, *words, *LOOP], cwd=shop, capture_output=True).returncode
    assert program == "posttrain"
    if words[0] == "run" and "--dry-run" not in words:
        words += settings(Path(words[1]).name)
    if words[0] == "eval":
        words += ["--rows", "2"]
    if words[0] == "sample":
        words += ["--max-new-tokens", "4"]
    return main(words)


@pytest.mark.model
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_everything_on_the_page_runs(page: Path, shop: Path) -> None:
    """Shell and Python blocks in the order of the page; Python blocks share their names."""
    text = page.read_text(encoding="utf-8")
    names: dict[str, Any] = {"SHORT": [f"{key}={value}" for key, value in SETTINGS["sft.yaml"].items()]}
    for language, block in re.findall(r"^```(sh|python)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if language == "python":
            for long, short in SHORTER.items():
                block = re.sub(rf"\b{long}\b", short, block)
            exec(
                compile(block.replace('["stages.sft.steps=40"]', '["stages.sft.steps=40", *SHORT]'), page, "exec"),
                names,
            )
            continue
        for line in block.replace("$PWD", str(shop)).splitlines():
            if command := shlex.split(line, comments=True):
                assert do(command, shop) == 0, line


def test_the_first_screen_has_the_two_commands() -> None:
    assert [block.strip() for block in blocks(PAGES[0], "sh")[:2]] == ["make demo", "make test"]


def test_the_recipe_in_the_readme_is_one() -> None:
    [text] = blocks(PAGES[0], "yaml")
    assert len(text.splitlines()) <= 20
    assert parse(text, "README.md").gates[0].suite == "sums"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, heading in re.findall(r"\]\(([^)#:]*)(?:#([\w-]+))?\)", page.read_text(encoding="utf-8")):
        there = page.parent / target if target else page
        assert there.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], target


# Pieces of recipes


def pieces(page: Path) -> list[dict[str, Any]]:
    """The stages in the page's YAML, and those that a table of names has the keys of."""
    text, found = page.read_text(encoding="utf-8"), []
    for block in blocks(page, "yaml"):
        value = Document(str).read(re.sub(r"\*(?=\w)", "", textwrap.dedent(block)))  # aliases of a block before it
        if isinstance(value, dict) and "stages" not in value:
            value = [{"kind": "grpo" if "rewards" in value else "preference", **value}]
        found += value["stages"] if isinstance(value, dict) else value
    for kind, lines in re.findall(r"^\| name \| keys of `kind: (\w+)` \|\n\|-+\|-+\|\n((?:\|.*\n)+)", text, re.M):
        for line in lines.splitlines():
            keys = [Document(str).read(key) for key in re.findall(r"`(\w+: [^`]+)`", line)]
            found.append({"kind": kind} | {name: value for key in keys for name, value in key.items()})
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if pieces(page)], ids=lambda path: path.name)
def test_pieces_of_recipes_are_what_a_recipe_may_hold(page: Path) -> None:
    for piece in pieces(page):
        needed = {"id": "a", "steps": 6, "data": {"sources": [{"source": "x.jsonl"}]}}
        needed |= {"prompts": 4} if piece["kind"] == "rejection_sampling" else {}
        recipe = {"schema": 1, "name": "x", "model": {"source": "m"}, "stages": [needed | piece]}
        assert parse(json.dumps(recipe), page.name).stages[0].kind == piece["kind"]


# Tables


def test_tables_equal_their_sources() -> None:
    render = by_path("docs/render.py")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert render.rendered(text) == text, f"{page.name}: run `python docs/render.py`"
    assert "<!-- measured:main -->" in PAGES[0].read_text(encoding="utf-8")


def test_every_measured_row_stands_in_the_readme() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    for row in json.loads((ROOT / "docs/measured/main.json").read_text(encoding="utf-8")):
        [line] = [line for line in text.splitlines() if line.startswith(f"| {row['what']} |")]
        number = f"{row['value']:.1%}"[:-1] if row["unit"] == "share" else ""
        assert number in line


def test_table_says_what_was_required_and_missed() -> None:
    origin = {"command": "make demo", "machine": "m"}
    rows = [
        {
            "what": "a",
            "value": 0.5,
            "interval": [0.4, 0.6],
            "unit": "difference",
            "at_least": 0.3,
            "met": True,
            **origin,
        },
        {"what": "b", "value": 1500.4, "unit": "s", "at_most": 1200, "met": False, **origin},
    ]
    table = by_path("docs/render.py").measured_table(rows).splitlines()
    assert table[2] == "| a | +50.0 points | +40.0 to +60.0 points | at least 30.0 points | yes |"
    assert table[3] == "| b | 1,500 s |  | at most 1,200 s | **no** |"
    assert table[-1] == "Measured by `make demo` on m."


def test_how_rows_came_about_is_said_once_for_a_machine() -> None:
    row = {"what": "a", "value": 1, "unit": "s"}
    rows = [{**row, "command": command, "machine": machine} for command, machine in ("am", "bm", "cm", "an", "am")]
    table = by_path("docs/render.py").measured_table
    assert table(rows).split("\n\n")[1:] == ["Measured by `a`, `b` and `c` on m.", "Measured by `a` on n.\n"]
    assert table(rows[:3], "all of it").split("\n\n")[1:] == ["Measured by all of it on m.\n"]


# The measurement


@pytest.fixture(scope="module")
def tiny_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the demo's three parts of a record, on a tiny model: two stages, a suite of each role, retention."""
    home = tmp_path_factory.mktemp("demo")
    tiny_policy("llama").save(home / "model")
    sums = {
        "source": "reasoning_gym/chain_sum",
        "rows": 40,
        "config": {"min_terms": 2, "max_terms": 2, "max_digits": 1},
    }

    def suite(name: str, role: str, seed: int) -> dict[str, Any]:
        return {"id": name, "role": role, "source": {**sums, "seed": seed, "rows": 10}}

    recipe = {
        "schema": 1,
        "name": "demo",
        "model": {"source": "model"},
        "stages": [
            {"id": name, "kind": "sft", "steps": 2, "data": {"sources": [{**sums, "seed": seed}]}}
            for seed, name in ((1, "sft"), (2, "more"))
        ],
        "evals": {
            "max_new_tokens": 4,
            "suites": [suite("sums", "trained", 8), suite("near", "neighbour", 9)],
            "retention": {"rows": 2, "max_new_tokens": 4},
        },
    }
    (home / "demo.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["run", str(home / "demo.yaml"), "--out", str(home / "out")]) == 0
    return home / "out"


def test_measured_rows_are_the_run_s_records(tiny_demo: Path) -> None:
    rows = by_path("benchmarks/demo.py").measured(tiny_demo)
    found = {row["what"]: row for row in rows}
    assert len(found) == len(rows)
    evals = json.loads((tiny_demo / "evals.json").read_text())
    [whole] = [r for r in evals["comparisons"] if (r["suite"], r["stage"], r["against"]) == ("sums", "more", "base")]
    gain = found["sums: more against base"]
    assert (gain["value"], gain["interval"], gain["at_least"]) == (whole["diff"], whole["interval"], 0.3)
    assert gain["met"] is (whole["diff"] >= 0.3 and whole["interval"][0] > 0)
    assert {"sums: sft against base", "sums: more against sft", "near: more against base"} <= found.keys()
    assert "near: more against sft" not in found
    for row in evals["suites"]:
        if row["suite"] == "sums":
            assert found[f"sums: accuracy, {row['stage']} (10 items)"]["value"] == row["score"]
            assert found[f"sums: accuracy, {row['stage']}, lenient reading"]["value"] == row["lenient"]
    assert "at_least" not in found["near: more against base"]
    lenient = found["sums: more against base, lenient reading"]
    assert (lenient["value"], lenient["interval"]) == (whole["lenient"]["diff"], whole["lenient"]["interval"])
    assert found["retention: KL from the base, more (2 general prompts)"]["value"] == evals["retention"][-1]["kl"]
    stages = [json.loads((tiny_demo / f"stages/{name}/stage.json").read_text()) for name in ("sft", "more")]
    wall = found["wall time, first measurement to last"]
    assert sum(s["seconds"] for s in stages) < wall["value"] < wall["at_most"]
    assert found["peak memory"]["value"] == max(s["peak_rss_bytes"] for s in stages) / 1e9
    assert 0 < found["training tokens not computed twice"]["value"] < 1
    assert {row["command"].partition(",")[0] for row in rows} == {"make demo"}
    assert all("keys of its recipe changed" in row["command"] for row in rows)
    table = by_path("docs/render.py").measured_table(rows)
    assert table.count("\n| ") == len(rows) + 1


def test_an_unfinished_run_is_not_measured(tiny_demo: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evals\.json: not there, or not finished; run `make demo`"):
        by_path("benchmarks/demo.py").measured(tmp_path)
