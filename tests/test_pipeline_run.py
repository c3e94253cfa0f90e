"""A whole run on a tiny model: what it leaves behind, that it continues, and that kills change nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from tiny import tiny_policy
from tiny_runs import rows_of

from posttrain.cli import main
from posttrain.pipeline.run import run
from posttrain.recipe.load import load
from posttrain.records import UserError

SUMS = {
    "source": "reasoning_gym/chain_sum",
    "config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
}


def recipe_of(model: Path, adapter: bool = False) -> dict:
    def data(seed: int) -> dict:
        return {"sources": [{**SUMS, "rows": 150, "seed": seed}]}

    return {
        "schema": 1,
        "name": "tiny",
        "model": {"source": str(model), **({"adapter": {"r": 4, "alpha": 8}} if adapter else {})},
        "stages": [
            {
                "id": "sft",
                "kind": "sft",
                "data": data(1),
                "steps": 25,
                "batch_size": 8,
                "checkpoint_every": 3,
                "optim": {"lr": 0.02},
            },
            {
                "id": "dpo",
                "kind": "preference",
                "data": data(2),
                "steps": 5,
                "batch_size": 4,
                "checkpoint_every": 2,
                "on_policy": {"prompts": 24, "n": 8, "max_new_tokens": 4},
            },
            {
                "id": "grpo",
                "kind": "grpo",
                "data": data(3),
                "steps": 6,
                "batch_size": 4,
                "iterations": 2,
                "kl_weight": 0.01,
                "checkpoint_every": 2,
                "sampling": {"max_new_tokens": 4},
            },
        ],
        "evals": {
            "max_new_tokens": 6,
            "suites": [{"id": "sums", "role": "trained", "source": {**SUMS, "rows": 20, "seed": 9}}],
            "retention": {"rows": 4, "max_new_tokens": 6},
        },
        "gates": [{"suite": "sums", "measure": "score", "at_least": 0.0}],
    }


@pytest.fixture(scope="module", params=[False, True], ids=["full", "adapter"])
def tiny_run(request, tmp_path_factory) -> tuple[Path, Path]:
    """A recipe file and the folder of its uninterrupted run."""
    home = tmp_path_factory.mktemp("run")
    tiny_policy("llama").save(home / "model")
    if request.param:  # an adapter on random weights learns nothing: give it a base that can write digits
        only_sft = {**recipe_of(home / "model"), "evals": {}, "gates": []}
        only_sft["stages"] = only_sft["stages"][:1]
        (home / "base.yaml").write_text(yaml.safe_dump(only_sft))
        run(home / "base.yaml", out=home / "base")
        shutil.rmtree(home / "model")
        (home / "base/stages/sft/artifact").rename(home / "model")
    recipe = home / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(home / "model", adapter=request.param)))
    result = run(recipe, out=home / "out")
    assert result.ok
    return recipe, home / "out"


def weights(folder: Path) -> dict:
    return {
        stage.name: load_file(next((stage / "artifact").glob("*model.safetensors")))
        for stage in sorted((folder / "stages").iterdir())
    }


def assert_same_run(a: Path, b: Path) -> None:
    for stage, tensors in weights(a).items():
        other = weights(b)[stage]
        assert tensors.keys() == other.keys()
        assert all((t == other[name]).all() for name, t in tensors.items()), stage
        for name in ("metrics.jsonl", "samples.jsonl"):
            rows, others = (rows_of(folder / "stages" / stage / name) for folder in (a, b))
            assert rows == others, (stage, name)
    for name in ("suites", "comparisons", "retention"):
        assert json.loads((a / "evals.json").read_text())[name] == json.loads((b / "evals.json").read_text())[name]


def test_what_a_run_leaves(tiny_run):
    _, out = tiny_run
    assert {p.name for p in out.iterdir()} >= {
        "recipe.yaml", "resolved.json", "environment.json", "stages", "evals", "evals.json", "monitors.json",
        "decisions.json", "report.html",
    }  # fmt: skip
    evals = json.loads((out / "evals.json").read_text())
    assert [row["stage"] for row in evals["suites"]] == ["base", "sft", "dpo", "grpo"]
    assert {(c["stage"], c["against"]) for c in evals["comparisons"]} == {
        ("sft", "base"), ("dpo", "base"), ("dpo", "sft"), ("grpo", "base"), ("grpo", "dpo"),
    }  # fmt: skip
    assert evals["retention"][0]["kl"] == 0
    assert all(row["kl"] > 0 for row in evals["retention"][1:])
    for stage in ("sft", "dpo", "grpo"):
        record = json.loads((out / "stages" / stage / "stage.json").read_text())
        assert record["artifact"]["digest"] == next(r["model"] for r in evals["suites"] if r["stage"] == stage)
        assert record["ledger"]["trained_tokens"] > 0
        assert record["ledger"]["flops"] > 0
        assert not (out / "stages" / stage / "checkpoints").exists()
    assert json.loads((out / "stages/dpo/stage.json").read_text())["facts"]["pairs"] > 0


def test_training_never_sees_an_evaluation_prompt(tiny_run):
    _, out = tiny_run
    exam = {json.loads(line)["prompt"] for line in (out / "evals/base.jsonl").read_text().splitlines()}
    for stage in ("dpo", "grpo"):
        seen = {
            json.loads(line)["prompt"] for line in (out / "stages" / stage / "samples.jsonl").read_text().splitlines()
        }
        assert seen
        assert not seen & exam
    report = json.loads((out / "stages/sft/stage.json").read_text())["data"]["sources"][0]
    assert report["held_out"] > 0


def test_the_same_command_again_does_nothing(tiny_run):
    recipe, out = tiny_run
    before = {p: p.stat().st_mtime_ns for p in (out / "stages").rglob("*") if p.is_file()}
    run(recipe, out=out)
    assert {p: p.stat().st_mtime_ns for p in (out / "stages").rglob("*") if p.is_file()} == before


def test_a_changed_recipe_is_refused_and_a_longer_one_is_not(tiny_run):
    recipe, out = tiny_run
    with pytest.raises(UserError, match=r"sft.*changed: config.*--out"):
        run(recipe, ["stages.sft.steps=3"], out)
    assert load(recipe).stages[0].steps == 25


def _run(recipe: Path, out: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    run(recipe, out=out)


def test_twenty_kills_change_nothing(tiny_run, tmp_path):
    """kill -9 at 20 random moments, the same command after each: the weights of the run nobody touched."""
    recipe, whole = tiny_run
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["posttrain.pipeline.run"])
    rng, out, kills, longest = random.Random(0), tmp_path / "out", 0, 3.0
    while kills < 20:
        child = context.Process(target=_run, args=(recipe, out))
        child.start()
        child.join(rng.uniform(0.05, longest))
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            kills += 1
        else:
            assert child.exitcode == 0
            assert_same_run(whole, out)
            shutil.rmtree(out)
            longest *= 0.8
    child = context.Process(target=_run, args=(recipe, out))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert_same_run(whole, out)


def test_two_runs_do_not_share_a_folder(tiny_run, tmp_path):
    recipe, _ = tiny_run
    context = multiprocessing.get_context("forkserver")
    child = context.Process(target=_run, args=(recipe, tmp_path / "out"))
    child.start()
    while not (tmp_path / "out" / "evals").exists():
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGSTOP)
    try:
        with pytest.raises(UserError, match="another run is writing"):
            run(recipe, out=tmp_path / "out")
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.join()


def test_a_gate_that_is_not_met_fails_after_the_report(tiny_run, tmp_path, capsys):
    recipe, out = tiny_run
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    code = main(["run", str(recipe), "--out", str(copy), "--set", "gates.0.at_least=1.0", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert code == 1
    assert not answer["ok"]
    assert Path(answer["report"]).is_file()


def test_artifacts_load_in_plain_transformers(tiny_run):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe, out = tiny_run
    folder = out / "stages/grpo/artifact"
    base = yaml.safe_load(recipe.read_text())["model"]["source"]
    AutoTokenizer.from_pretrained(folder)
    if (folder / "adapter_config.json").is_file():
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
    else:
        AutoModelForCausalLM.from_pretrained(folder)


def test_the_report_tells_the_numbers(tiny_run):
    _, out = tiny_run
    page = (out / "report.html").read_text()
    assert not re.search(r"https?://(?!www\.w3\.org)", page)
    last = json.loads((out / "evals.json").read_text())["suites"][-1]
    assert f"{last['score']:.1%}".rstrip("%").rstrip("0").rstrip(".") in page
