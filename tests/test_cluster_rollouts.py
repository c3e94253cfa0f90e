"""Rollout actors give what one sampler gives, with the weights that were asked for; asking ahead survives kills."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from tiny import tiny_policy
from tiny_runs import RENDERER, asked, rows_of, run, same, stage_of

from posttrain.cli import main
from posttrain.cluster.rollouts import Pool, RolloutActor, cuts, pack_weights, unpack_weights
from posttrain.models.policy import Policy, load
from posttrain.recipe.blocks import Lora, Sampling
from posttrain.sampling.local import LocalSampler
from posttrain.training.rollouts import sampled_at
from posttrain.training.world import ALONE

HOW = Sampling(max_new_tokens=6)


def test_cuts_are_even_and_whole():
    assert cuts(7, 3) == [(0, 2), (2, 4), (4, 7)]
    assert cuts(1, 3) == [(0, 0), (0, 0), (0, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_arrive_bit_by_bit(dtype):
    one, two = tiny_policy(seed=1, dtype=dtype), tiny_policy(seed=2, dtype=dtype)
    unpack_weights(pack_weights(one.weights()), two)
    assert same(dict(one.weights()), dict(two.weights()))


def test_weights_of_another_model_are_refused():
    with pytest.raises(KeyError):
        unpack_weights(pack_weights(tiny_policy(adapter=Lora(r=2)).weights()), tiny_policy())


# Asking ahead, in one process


def test_who_samples_what():
    stage = stage_of("grpo", staleness=2, checkpoint_every=5)  # a checkpoint every 4 steps
    assert [sampled_at(stage, step) for step in range(9)] == [0, 0, 0, 1, 4, 4, 4, 5, 8]
    twice = stage_of("grpo twice", staleness=1, checkpoint_every=8)  # every 6, a batch every 2
    assert [sampled_at(twice, step) for step in range(0, 14, 2)] == [0, 0, 2, 6, 6, 8, 12]


def test_rollouts_are_as_old_as_the_recipe_says(tmp_path):
    made: list[tuple[int, str]] = []
    digests: list[str] = []

    def change(method: Any, policy: Policy) -> None:
        own = method.sampler
        inner, batch = own.sampler, method.batch

        def sampler(*question: Any) -> Any:
            made.append((question[3], policy.digest()))
            return inner(*question)

        def noted(step: int) -> Any:
            digests.append(policy.digest())
            return batch(step)

        own.sampler, method.batch = sampler, noted

    run("grpo", tmp_path, change=change, staleness=1, checkpoint_every=5)
    assert len(set(digests)) == 8
    assert [digests.index(weights) for _, weights in made] == [0, 0, 1, 2, 4, 4, 5, 6]
    assert len({seed for seed, _ in made}) == 8


class Killed(BaseException):
    pass


@pytest.mark.parametrize("name", ["grpo", "grpo twice"])
def test_killed_while_asking_ahead_it_ends_as_if_it_never_was(tmp_path, name):
    settings: dict[str, Any] = {"staleness": 2, "checkpoint_every": 5}
    whole, ledger = run(name, tmp_path / "whole", **settings)

    def killed_at(step: int) -> Any:
        def on_step(row: dict[str, Any]) -> None:
            if row["step"] == step:
                raise Killed

        return on_step

    for step in (1, 5, 6):
        with pytest.raises(Killed):
            run(name, tmp_path / "killed", on_step=killed_at(step), **settings)
    policy, again = run(name, tmp_path / "killed", **settings)
    assert same(policy.snapshot(), whole.snapshot())
    assert rows_of(tmp_path / "killed/metrics.jsonl") == rows_of(tmp_path / "whole/metrics.jsonl")
    assert dataclasses.replace(again, seconds=0) == dataclasses.replace(ledger, seconds=0)


def test_old_rollouts_are_corrected_for(tmp_path):
    run("grpo", tmp_path, staleness=1, checkpoint_every=5)
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert rows[0]["mismatch_max"] == pytest.approx(1, abs=1e-4)
    assert max(row["mismatch_max"] for row in rows) > 1.01


# On Ray


@pytest.fixture(scope="module")
def actors(tmp_path_factory) -> Iterator[tuple[Path, list[Any]]]:
    model = tmp_path_factory.mktemp("pool") / "model"
    tiny_policy().save(model)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    made = [RolloutActor.options(num_cpus=0.5).remote(partial(load, str(model)), None) for _ in range(2)]
    yield model, made
    ray.shutdown()


def changed(policy: Policy) -> Policy:
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.mul_(1.01)
    return policy


@pytest.mark.cluster
def test_two_actors_are_one_sampler(actors):
    model, made = actors
    policy = load(str(model))
    pool = Pool(made, policy, ALONE)
    for _ in range(2):  # with the weights they came with, then with others
        rollouts, ledger = pool(asked(), 3, HOW, 5)
        theirs, cost = LocalSampler(policy, RENDERER)(asked(), 3, HOW, 5)
        assert [(r.example, r.group, r.ids, r.weights) for r in rollouts] == [
            (r.example, r.group, r.ids, r.weights) for r in theirs
        ]
        assert ledger.generated_tokens == cost.generated_tokens
        changed(policy)


@pytest.mark.cluster
def test_what_is_asked_ahead_is_sampled_with_the_weights_of_then(actors):
    model, made = actors
    policy = load(str(model))
    pool, before = Pool(made, policy, ALONE), policy.digest()
    first = pool.request(asked(), 2, HOW, 5)
    second = Pool(made, changed(policy), ALONE).request(asked(), 2, HOW, 5)
    assert {r.weights for r in first()[0]} == {before}
    assert {r.weights for r in second()[0]} == {policy.digest()}


@pytest.mark.cluster
def test_an_actor_that_died_has_the_weights_again(actors):
    model, made = actors
    policy = changed(load(str(model)))
    pool = Pool(made, policy, ALONE)
    expected, _ = pool(asked(), 2, HOW, 5)
    ray.kill(made[0], no_restart=False)
    again, _ = pool(asked(), 2, HOW, 5)
    assert [(r.ids, r.weights) for r in again] == [(r.ids, r.weights) for r in expected]


def test_no_cluster_is_a_users_mistake(tmp_path, capsys):
    tiny_policy().save(tmp_path / "model")
    (tmp_path / "r.yaml").write_text(
        f"{{schema: 1, name: x, model: {{source: {tmp_path}/model}}, stages: [{{id: a, kind: sft, steps: 1, "
        "data: {sources: [{source: reasoning_gym/chain_sum, rows: 4}]}}]}"
    )
    for address in ("nowhere", "127.0.0.1:1", "localhost:port"):
        assert main(["run", str(tmp_path / "r.yaml"), "--cluster", address]) == 2
        assert "no Ray cluster is there" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "r.yaml"), "--cluster", "local", "--workers", "4096"]) == 2
    assert "4096 workers of 1 processors are more than" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("last", "what"),
    [
        ("environment: {tools: [calculator]}", "stage 'b': episodes are played in one process"),
        ("endpoint: {url: 'http://x', engine: sglang}", "stage 'b': on a cluster rollouts come from its actors"),
    ],
)
def test_what_a_cluster_cannot_train_is_told_before_the_first_stage(tmp_path, capsys, last, what):
    """And before the cluster is asked for: there is none here."""
    data = "data: {sources: [{source: reasoning_gym/chain_sum, rows: 4}]}"
    (tmp_path / "r.yaml").write_text(
        f"{{schema: 1, name: x, model: {{source: {tmp_path}/model}}, stages: [{{id: a, kind: sft, steps: 1, {data}}}, "
        f"{{id: b, kind: grpo, steps: 1, {data}, {last}}}]}}"
    )
    assert main(["run", str(tmp_path / "r.yaml"), "--cluster", "nowhere"]) == 2
    assert what in capsys.readouterr().err
