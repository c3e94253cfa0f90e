"""The flat scripts take the steps of the configured path, and run as scripts."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import tiny_policy

import posttrain as pt
from posttrain.data.chat import Renderer
from posttrain.data.prepare import Prepared, prepare, schedule
from posttrain.models import policy as models
from posttrain.recipe.blocks import Data, Optim, Sampling, Source
from posttrain.recipe.preference import PairSampling, Preference
from posttrain.recipe.rl import Grpo
from posttrain.recipe.supervised import Sft
from posttrain.sampling.local import LocalSampler
from posttrain.training.grpo import GrpoMethod
from posttrain.training.loop import train
from posttrain.training.preference import PreferenceMethod, judged_on_policy, referred
from posttrain.training.sft import SftMethod

SEED, LR, STEPS = 7, 3e-3, 4
CONFIG = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
COMMON: dict[str, Any] = {
    "data": Data(sources=(Source(source="reasoning_gym/chain_sum", rows=10, config=CONFIG),)),
    "steps": STEPS,
    "batch_size": 3,
    "tokens_per_forward": 200,  # a step takes several passes here and one in the script
    "optim": Optim(lr=LR, schedule="constant", warmup=0.0),
}


def script(root: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"loop_{name}", root / "recipes" / "loops" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=[None, pt.Lora(r=4)], ids=["full", "lora"])
def fresh(request: pytest.FixtureRequest) -> Callable[[], models.Policy]:
    """Makes the same policy again and again; float64, so that 1e-6 is about the algorithm and not about rounding."""

    def make() -> models.Policy:
        policy = tiny_policy(adapter=request.param, dtype=torch.float64)
        policy.model.generation_config.eos_token_id = list(range(40))  # answers of different length
        return policy

    return make


def by_letters(example: pt.Example, text: str) -> pt.Score:
    """A reward that a random model's answers earn unequally."""
    return pt.Score(len(set(text)) % 5 / 4, "wrong")


class Letters:
    """The task as the scripts see it, with that reward."""

    def score(self, rollouts: list[pt.Rollout]) -> list[pt.Score]:
        return [by_letters(r.example, r.text) for r in rollouts]


def assert_same(
    configured: models.Policy, method: Any, stage: Any, folder: Path, flat: models.Policy, losses: list[float]
) -> None:
    """The losses of each step agree, and so do the weights at the end; and something was learned at all."""
    rows: list[dict[str, Any]] = []
    before = configured.snapshot()
    train(configured, method, stage, folder, SEED, rows.append)
    assert losses == pytest.approx([row["loss"] for row in rows], abs=1e-6)
    assert len({round(loss, 4) for loss in losses}) == STEPS
    for name, weight in configured.parameters().items():
        torch.testing.assert_close(flat.parameters()[name], weight, atol=1e-5, rtol=0)
    assert max((w - before[name]).abs().max().item() for name, w in configured.parameters().items()) > LR


def ordered(order: list[tuple[int, int]], rows: Any) -> list[list[Any]]:
    """What the configured path takes in each step."""
    size = COMMON["batch_size"]
    return [[rows[s][i] for s, i in order[k * size : (k + 1) * size]] for k in range(STEPS)]


def prepared(policy: models.Policy, need: Any) -> tuple[Renderer, Prepared]:
    renderer = Renderer(policy.tokenizer)
    return renderer, prepare(COMMON["data"], renderer, need=need)


def test_sft(repo_root, tmp_path, fresh):
    configured, flat = fresh(), pt.Policy.of(fresh())
    stage = Sft(id="sft", kind="sft", **COMMON)
    method = SftMethod(stage, prepared(configured, "completion")[1], SEED)
    batches = [[r.example for r in batch] for batch in ordered(method.order, method.data.rows)]
    losses = list(script(repo_root, "sft").train(flat, batches, LR))
    assert losses[-1] < losses[0]
    assert_same(configured, method, stage, tmp_path, flat, losses)


def test_dpo(repo_root, tmp_path, fresh):
    configured, flat = fresh(), pt.Policy.of(fresh())
    loop = script(repo_root, "dpo")
    how = PairSampling(n=4, prompts=8, max_new_tokens=12)
    stage = Preference(id="dpo", kind="preference", on_policy=how, beta=0.2, **COMMON)
    renderer, data = prepared(configured, "prompt")
    sampled, _, _ = judged_on_policy(configured, stage, data, LocalSampler(configured, renderer), Letters().score, SEED)
    pairs, _ = referred(configured, stage, sampled)

    asked = schedule([len(data.rows[0])], [1.0], how.prompts, pt.derive(SEED, "dpo", "pair prompts"))
    written = loop.write_pairs(flat, Letters(), [data.rows[s][i].example for s, i in asked], how.n, SEED)
    assert written == [pair.rows for pair in pairs[0]]

    method = PreferenceMethod(stage, data, SEED, pairs, configured)
    losses = list(loop.train(flat, ordered(method.order, [written]), LR, stage.beta))
    assert losses[0] == pytest.approx(0.693147, abs=1e-6)  # log 2: policy and reference are one
    assert losses[-1] < losses[0]
    assert_same(configured, method, stage, tmp_path, flat, losses)


def test_grpo(repo_root, tmp_path, fresh):
    configured, flat = fresh(), pt.Policy.of(fresh())
    stage = Grpo(id="grpo", kind="grpo", n=4, sampling=Sampling(max_new_tokens=12), clip_high=0.28, **COMMON)
    renderer, data = prepared(configured, "prompt")
    method = GrpoMethod(stage, data, configured, LocalSampler(configured, renderer), Letters().score, SEED)
    batches = [[r.example for r in batch] for batch in ordered(method.order, data.rows)]
    steps = list(script(repo_root, "grpo").train(flat, Letters(), batches, stage.n, LR, SEED))
    assert_same(configured, method, stage, tmp_path, flat, [loss for loss, _ in steps])


def test_grpo_without_signal_changes_nothing(repo_root):
    class Equal:
        def score(self, rollouts: list[pt.Rollout]) -> list[pt.Score]:
            return [pt.Score(1.0, "correct") for _ in rollouts]

    policy = pt.Policy.of(tiny_policy())
    before = policy.digest()
    examples = pt.task("reasoning_gym/chain_sum").examples(2)
    assert list(script(repo_root, "grpo").train(policy, Equal(), [examples], 3, LR, SEED)) == [(0.0, 1.0)]
    assert policy.digest() == before


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_a_wrong_argument_is_told_with_what_there_is(repo_root, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "step=2"])
    with pytest.raises(SystemExit, match="2"):
        pt.script(script(repo_root, name).main)
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("step=2: not an argument")
    assert "steps=" in error


@pytest.mark.model
def test_the_scripts_run_one_after_the_other(repo_root, tmp_path):
    sft, few = tmp_path / "sft", ("batch_size=2", "held_out=2", "steps=2")
    for name, *arguments in (
        ("sft", "batch_size=8", "held_out=2", "steps=4", f"save={sft}"),
        ("dpo", *few, "prompts=16", f"model={sft}", f"save={tmp_path / 'dpo'}"),
        ("grpo", *few, f"model={sft}", f"save={tmp_path / 'grpo'}"),
    ):
        command = [sys.executable, str(repo_root / "recipes" / "loops" / f"{name}.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "accuracy after" in done.stdout
        assert done.stdout.count("loss ") == (4 if name == "sft" else 2)
        assert (tmp_path / name / "adapter_model.safetensors").is_file()
