"""A run on two Ray nodes of this machine goes on after a worker, a rollout actor and a whole node were killed."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from ray.cluster_utils import Cluster
from safetensors.torch import load_file
from sharded import Here
from tiny import tiny_policy
from tiny_runs import rows_of
from workers import together

from posttrain.cli import main
from posttrain.cluster.sharded import shard
from posttrain.data.chat import Renderer
from posttrain.models.policy import load
from posttrain.pipeline.stages import Job, Say, learn, stage_data
from posttrain.recipe.load import load as load_recipe
from posttrain.records import derive
from posttrain.training.world import Distributed

pytestmark = pytest.mark.cluster

SUMS = {
    "source": "reasoning_gym/chain_sum",
    "config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "rows": 100,
}
HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
"""Ray notices a dead node in seconds; as it comes it takes about twenty."""
STORE = 100 * 2**20


@pytest.fixture
def nodes() -> Iterator[Any]:
    """Two nodes: the first has room for a worker and the rollout actor, the second for a worker only."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    head = {"num_cpus": 3, "object_store_memory": STORE, "include_dashboard": False, "_system_config": HEALTH}
    made = Cluster(initialize_head=True, head_node_args=head)
    made.add_node(num_cpus=1, object_store_memory=STORE)
    try:
        yield made
    finally:
        made.shutdown()


def recipe_of(model: Path) -> dict[str, Any]:
    common = {"batch_size": 2, "checkpoint_every": 4, "optim": {"lr": 1e-3}}
    return {
        "schema": 1,
        "name": "faults",
        "model": {"source": str(model), "adapter": {"r": 3, "alpha": 6}},
        "stages": [
            {"id": "sft", "kind": "sft", "steps": 60, "data": {"sources": [{**SUMS, "seed": 1}]}, **common},
            {
                "id": "grpo", "kind": "grpo", "steps": 80, "n": 4, "staleness": 1, "kl_weight": 0.1,
                "sampling": {"max_new_tokens": 8}, "data": {"sources": [{**SUMS, "seed": 2}]}, **common,
            },
        ],
    }  # fmt: skip


def test_killed_worker_actor_and_node(tmp_path, nodes):
    tiny_policy().save(tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(tmp_path / "model")))
    together(2, _undisturbed, recipe, tmp_path / "whole")

    out = tmp_path / "out"
    command = ["run", str(recipe), "--out", str(out)]
    command += ["--cluster", nodes.address, "--workers", "2", "--rollout-actors", "1", "--rollout-cpus", "2"]
    code = "import sys; from posttrain.cli import main; sys.exit(main(sys.argv[1:]))"
    with open(tmp_path / "log", "w") as log:
        child = subprocess.Popen([sys.executable, "-c", code, *command], stderr=log, stdout=log)
    (second,) = nodes.worker_nodes
    try:
        _when(child, out / "stages/sft/metrics.jsonl", 7)
        _kill(nodes, "RayTrainWorker")
        _when(child, out / "stages/grpo/metrics.jsonl", 7)
        _kill(nodes, "RolloutActor")
        _when(child, out / "stages/grpo/metrics.jsonl", 20)
        nodes.remove_node(second, allow_graceful=False)
        nodes.add_node(num_cpus=1, object_store_memory=STORE)
        assert child.wait(120) == 0, (tmp_path / "log").read_text()
    finally:
        child.kill()
    for stage in ("sft", "grpo"):
        ours, theirs = (folder / stage for folder in (out / "stages", tmp_path / "whole"))
        assert rows_of(ours / "metrics.jsonl") == rows_of(theirs / "metrics.jsonl")
        assert (ours / "samples.jsonl").read_bytes() == (theirs / "samples.jsonl").read_bytes()
        spent = {**json.loads((ours / "stage.json").read_text())["ledger"], "seconds": 0}
        assert spent == json.loads((theirs / "ledger.json").read_text())
        trained = load_file(ours / "artifact/adapter_model.safetensors")
        whole = load_file(theirs / "artifact/adapter_model.safetensors")
        assert trained.keys() == whole.keys()
        assert all(torch.equal(weight, whole[name]) for name, weight in trained.items())


def _when(child: subprocess.Popen[bytes], rows: Path, step: int) -> None:
    """Wait until the run has written this step's row."""
    for _ in range(4800):
        if rows.exists() and rows.read_bytes().count(b"\n") > step:
            return
        assert child.poll() is None, "the run ended before it could be disturbed"
        time.sleep(0.05)
    raise AssertionError(f"{rows} did not get to step {step}")


def _kill(nodes: Any, name: str) -> None:
    """`kill -9` for one actor process of this class."""
    for node in (nodes.head_node, *nodes.worker_nodes):
        raylet = node.all_processes["raylet"][0].process.pid
        for process in psutil.Process(raylet).children():
            if process.cmdline()[0].startswith(f"ray::{name}"):
                process.kill()
                return
    raise AssertionError(f"no {name} runs")


def _undisturbed(recipe_path: Path, out: Path) -> None:
    """The same stages on two workers without Ray."""
    world, recipe = Distributed(), load_recipe(recipe_path)
    adapter = recipe.model.adapter
    start = partial(load, recipe.model.source, adapter=adapter, seed=derive(recipe.seed, "adapter"))
    for stage in recipe.stages:
        folder, whole = out / stage.id, start()
        policy = shard(start(), world)
        job = Job(stage, start, stage_data(stage, whole, frozenset()), folder, recipe.seed)
        sampler = Here(policy, whole, Renderer(whole.tokenizer))
        ledger, _ = learn(job, policy, Say(lambda line: None, lambda stage, row: None), sampler, world)
        sampler.take()
        if world.rank == 0:
            whole.save(folder / "artifact")
            (folder / "ledger.json").write_text(json.dumps({**dataclasses.asdict(ledger), "seconds": 0}))
        world.gather(None)
        start = partial(load, str(folder / "artifact"), adapter=adapter)


def test_more_than_the_cluster_has_is_a_users_mistake(tmp_path, nodes, capsys):
    tiny_policy().save(tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(tmp_path / "model")))
    assert main(["run", str(recipe), "--cluster", nodes.address, "--workers", "4"]) == 2
    assert "need 4.5 CPUs, and it has 4; ask for fewer or add nodes" in capsys.readouterr().err
