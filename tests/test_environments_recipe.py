"""A stage in an environment: episodes from the recipe to what is learned, with every method that samples so."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scoring import END, Scripted, question
from test_bad_input import here, home, refused, write
from test_environments import ASK
from test_pipeline_rewards import LENGTH, recipe
from test_recipe_rl import grpo as grpo_stage
from tiny import tiny_policy
from tiny_runs import RENDERER, grpo, ppo, stage_of

from posttrain.cli import main
from posttrain.credit.batch import as_row
from posttrain.environments import make
from posttrain.environments.episodes import EpisodeSampler
from posttrain.environments.protocol import Budget
from posttrain.forest import hidden_states, pack
from posttrain.recipe.blocks import Sampling
from posttrain.records import Example, Failure, Score
from posttrain.training.batch import frozen_logprobs

__all__ = ["here", "home"]
TOOLS = {"tools": ["calculator", "python"], "plain": True, "tokens": 400}


def test_a_recipe_s_environment_has_its_tools_and_its_length() -> None:
    stage = grpo_stage(environment=TOOLS, sampling={"max_new_tokens": 32})
    assert stage.environment is not None
    environment: Any = make(stage.environment)()
    assert [tool.name for tool in environment.tools] == ["calculator", "python"]
    assert (stage.sampling.max_new_tokens, stage.whole.max_new_tokens) == (32, 400)
    assert grpo_stage().whole == grpo_stage().sampling


class Turned:
    """A call, then an answer that says how long the episode was before it; with the policy's own log-probabilities."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    def __call__(self, prompts: Any, n: int, sampling: Sampling, seed: int) -> Any:
        def line(example: Example, k: int) -> str:
            return f"It is {len(example.begun)}." if example.begun else ASK + "!" * k

        rollouts, ledger = Scripted(line)(prompts, n, sampling, seed)
        logps = frozen_logprobs(self.policy, [as_row(r) for r in rollouts], 4096, sampling.temperature)
        digest = self.policy.digest()
        return [replace(r, logps=tuple(p), weights=digest) for r, p in zip(rollouts, logps, strict=True)], ledger


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_step_learns_from_what_was_sampled_alone(name: str) -> None:
    """The first ratio is 1 on episodes too, in value and by the check of sampler against trainer."""
    policy = tiny_policy(max_position_embeddings=2048)
    stage = stage_of(
        name, batch_size=2, n=4, iterations=1, minibatches=1, sampling={"max_new_tokens": 200}, environment=TOOLS
    )
    sampler = EpisodeSampler(make(stage.environment), Turned(policy), RENDERER, Budget(400, context=policy.context))
    method: Any = (grpo if name == "grpo" else ppo)(
        policy, stage, lambda example, text: Score(float(text.removeprefix("It is ")), "correct"), sampler
    )
    batch = method.batch(0)
    assert len(batch.rows) > 1
    for row in batch.rows:
        assert not all(row.target)
        assert row.completion[row.target.index(False) - 1] == END  # the model's own end stays its own
    forest = pack(batch.rows)
    outputs = policy.run(method.forward, forest, hidden_states)
    loss, stats = method.loss(batch, range(len(batch.rows)), forest, outputs)
    assert math.isfinite(loss.item())
    assert stats["mismatch_min"] == pytest.approx(1, abs=1e-4)
    assert stats["mismatch_max"] == pytest.approx(1, abs=1e-4)
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in policy.parameters().values())
    assert {len(worth) for worth in method.advantages} == {len(r) for r in method.behaviour}


def test_an_environment_that_breaks_down_stops_the_run() -> None:
    class Broken:
        def reset(self, example: Example) -> Example:
            return example

        def step(self, messages: Any) -> Any:
            raise RuntimeError("no door")

        def reward(self, episode: Any) -> Any: ...

    sampler = EpisodeSampler(Broken, Scripted(lambda *_: "a"), RENDERER, Budget(100))
    with pytest.raises(Failure, match="broke down: RuntimeError: no door"):
        sampler([question()], 1, Sampling(), 0)


def test_a_run_in_an_environment(here: Path) -> None:
    """The random model calls no tool: what it does is answer, in its first turn, below the tools' description."""
    given = recipe([LENGTH], environment={**TOOLS, "tokens": 40})
    assert main(write_long(given)) == 0
    rows = [json.loads(line) for line in (here / "out/stages/rl/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all(math.isfinite(row["loss"]) for row in rows)


def write_long(given: dict[str, Any]) -> list[str]:
    tiny_policy(max_position_embeddings=2048).save(Path("long"))
    given["model"] = {"source": "long"}
    return write(given)


def test_a_tool_that_is_not_there_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(write(recipe([LENGTH], environment={"tools": ["abacus"]})), capsys)
    assert "calculator" in message


def test_a_template_that_shows_no_tools_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is sampled, by a dry run too."""
    command = write_long(recipe([LENGTH], environment={**TOOLS, "plain": False}))
    for argv in (command, [*command, "--dry-run"]):
        assert "stage 'rl': environment: the chat template leaves the tools out" in refused(argv, capsys)


def test_what_the_tools_take_of_the_context_counts_before_anything_is_sampled(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The usual tiny model has 256 positions, and the tools alone are described in more."""
    command = write(recipe([LENGTH], environment=TOOLS))
    for argv in (command, [*command, "--dry-run"]):
        assert "12 too long. A row may have 256 tokens here" in refused(argv, capsys)
