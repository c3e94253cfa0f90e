"""PPO's critic: kept beside the model, taken up by a later stage, and the same on every worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sharded import Here
from test_bad_input import here, home, refused, write
from test_pipeline_rewards import LENGTH, recipe
from tiny import tiny_policy
from tiny_runs import RENDERER, SEED, ppo, rows_of, run, same, stage_of
from torch import Tensor
from workers import together

from posttrain.cli import main
from posttrain.cluster.sharded import shard
from posttrain.recipe.blocks import Lora
from posttrain.records import UserError
from posttrain.training.batch import Batch
from posttrain.training.loop import train
from posttrain.training.ppo import CRITIC
from posttrain.training.world import Distributed

__all__ = ["here", "home"]


def test_a_critic_is_taken_up_as_it_was_left(tmp_path: Path) -> None:
    method = ppo(tiny_policy(), stage_of("ppo"))
    with torch.no_grad():
        method.critic.weight.normal_(generator=torch.Generator().manual_seed(1))
        method.critic.bias.fill_(0.5)
    method.save(tmp_path)
    later = ppo(tiny_policy(seed=1), stage_of("ppo"))
    later.take(tmp_path)
    assert same(later.critic.state_dict(), method.critic.state_dict())
    other = ppo(tiny_policy(hidden_size=48), stage_of("ppo"))
    with pytest.raises(UserError, match=r"(?s)critic\.safetensors: is no critic of this model.*leave `critic` out"):
        other.take(tmp_path)
    with pytest.raises(UserError, match="is no critic of this model"):
        other.take(tmp_path / "nowhere")


def two(**second: Any) -> dict[str, Any]:
    """A recipe of two ppo stages."""
    given = recipe([LENGTH], kind="ppo", n=2, iterations=1)
    (first,) = given["stages"]
    given["stages"] = [first, {**first, "id": "again", **second}]
    return given


def test_a_stage_goes_on_with_the_critic_of_another(here: Path) -> None:
    """At a learning rate of almost nothing it ends where it began: at the first stage's critic, or at 0."""
    still = {"optim": {"lr": 1e-12}}
    assert main(write(two(critic="stage:rl", **still))) == 0
    first, again = (load_file(here / f"out/stages/{id}" / CRITIC) for id in ("rl", "again"))
    assert first["weight"].abs().max() > 1e-6
    assert first["weight"].shape == (1, 32)
    for name, weight in first.items():
        torch.testing.assert_close(again[name], weight, rtol=0, atol=1e-9)
    assert not (here / "out/stages/rl/artifact" / CRITIC).exists()  # the model loads anywhere without it


def test_a_critic_of_no_earlier_ppo_stage_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(write(two(critic="stage:again")), capsys)
    assert "'again' is no earlier stage of kind ppo (there are: rl)" in message


# On several workers


def worked(folder: Path, adapter: Lora | None, dies: int | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The policy and the critic that this worker ends with; all workers stop as step `dies` begins."""
    world = Distributed()
    policy = shard(tiny_policy(adapter=adapter), world)
    stage = stage_of("ppo", optim={"lr": 1e-3}, checkpoint_every=1)
    method = ppo(policy, stage, sampler=Here(policy, tiny_policy(adapter=adapter), RENDERER))
    method.world = world
    inner = method.batch

    def batch(step: int) -> Batch:
        if step == dies:
            raise KeyboardInterrupt
        return inner(step)

    method.batch = batch  # type: ignore[method-assign]
    try:
        train(policy, method, stage, folder, SEED, world=world)
    except KeyboardInterrupt:
        return {}, {}
    return policy.weights(), {name: weight.detach() for name, weight in method.critic.state_dict().items()}


@pytest.mark.parametrize("adapter", [None, Lora(r=3, alpha=6)], ids=["full", "lora"])
def test_every_worker_has_the_critic_of_one(tmp_path: Path, adapter: Lora | None) -> None:
    """Its gradient is added up over the workers; a run that both left goes on bit for bit."""
    (weights, critic), (others, other) = together(2, worked, tmp_path / "two", adapter)
    assert same(critic, other)
    assert same(weights, others)
    found: dict[str, Any] = {}
    alone, _ = run(
        "ppo", tmp_path / "one", adapter, change=lambda method, _: found.update(method=method), optim={"lr": 1e-3}
    )
    for name, weight in found["method"].critic.state_dict().items():
        assert weight.abs().max() > 1e-4
        torch.testing.assert_close(critic[name], weight, rtol=1e-3, atol=1e-5)
    for name, weight in alone.weights().items():
        assert torch.allclose(weights[name], weight, atol=2e-5), name

    together(2, worked, tmp_path / "left", adapter, 5)
    assert len(rows_of(tmp_path / "left/metrics.jsonl")) == 5
    (again, kept), _ = together(2, worked, tmp_path / "left", adapter)
    assert same(again, weights)
    assert same(kept, critic)
    assert rows_of(tmp_path / "left/metrics.jsonl") == rows_of(tmp_path / "two/metrics.jsonl")
    assert json.loads((tmp_path / "left/oracle.json").read_text())["rows"] > 0
