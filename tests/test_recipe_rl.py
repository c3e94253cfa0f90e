"""Keys of RL stages that are right by themselves and wrong together."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from posttrain.recipe.rl import READ, Grpo, Ppo

BASE: dict[str, Any] = {"id": "a", "steps": 4, "data": {"sources": [{"source": "x.jsonl"}]}}


def grpo(**keys: Any) -> Grpo:
    return Grpo.model_validate({**BASE, "kind": "grpo", **keys})


def ppo(**keys: Any) -> Ppo:
    return Ppo.model_validate({**BASE, "kind": "ppo", **keys})


OTHER: dict[str, Any] = {
    "ratio": "sequence",
    "clip_low": 0.1,
    "clip_high": 0.3,
    "ratio_cap": 3.0,
    "cispo_cap": 2.0,
    "sapo_tau": [1.0, 2.0],
    "gmpo_clip": 0.3,
    "vespo_positive": [1.0, 1.0],
    "vespo_negative": [1.0, 1.0],
    "baseline_std": "none",
    "std_eps": 1e-3,
    "kl_corrected": True,
}
"""For each key that not every choice reads, a value that is not its default."""


@pytest.mark.parametrize("key", READ)
def test_only_what_a_choice_reads_is_accepted(key):
    table = READ[key]
    for choice, mine in table.items():
        for other in {name for names in table.values() for name in names}:
            if other in mine:
                assert getattr(grpo(**{key: choice, other: OTHER[other]}), other) is not None
            else:
                with pytest.raises(ValidationError, match=f"{key}: {choice} does not read it"):
                    grpo(**{key: choice, other: OTHER[other]})


def test_a_resolved_stage_with_all_its_defaults_is_a_stage():
    for objective in READ["objective"]:
        stage = grpo(objective=objective)
        assert Grpo.model_validate(stage.model_dump(by_alias=True)) == stage


def test_the_message_says_what_is_read():
    with pytest.raises(ValidationError, match="objective: cispo does not read it; it reads ratio, cispo_cap"):
        grpo(objective="cispo", clip_low=0.1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"n": 1}, "nothing to be compared with"),
        ({"n": 1, "advantage": "whitened", "max_draws": 2}, "nothing to be compared with"),
        ({"environment": {"tools": ["python", "python"]}}, "names one tool twice"),
        ({"max_draws": 2, "staleness": 1}, "asked ahead"),
        ({"objective": "sapo", "sapo_tau": [0.0, 1.0]}, "each must be above 0"),
        ({"kl_weight": 0.1, "kl_estimator": "k1"}, "pulls nowhere"),
        ({"kl_weight": 0.1, "kl_estimator": "k2", "kl_corrected": True}, "as it stands"),
        ({"reference_reset": 3, "iterations": 2}, "take a multiple"),
        ({"sampling": {"temperature": 0}}, "must be above 0"),
    ],
)
def test_what_cannot_be_is_told(keys, message):
    with pytest.raises(ValidationError, match=message):
        grpo(**keys)


def test_what_can_be():
    assert grpo(n=1, advantage="whitened").n == 1
    assert grpo(kl_weight=0.1, kl_estimator="k1", kl_in="reward").kl_in == "reward"
    assert grpo(kl_weight=0.1, kl_estimator="k1", kl_corrected=True).kl_corrected
    assert grpo(kl_estimator="k1").kl_weight == 0  # nothing is asked of it
    assert grpo(iterations=2, minibatches=3, reference_reset=12).period == 6
    assert ppo().period == 4


@pytest.mark.parametrize("reward", [{"kind": "majority"}, {"kind": "judge", "source": "j", "compare": True}])
def test_a_reward_that_compares_answers_needs_two(reward):
    for stage, keys in ((ppo, {}), (grpo, {"n": 1, "advantage": "whitened"})):
        with pytest.raises(ValidationError, match="compares the answers to a prompt with each other, and n is 1"):
            stage(**keys, rewards=[reward])
        assert stage(**keys | {"n": 2}, rewards=[reward]).n == 2
    assert ppo(rewards=[{"kind": "judge", "source": "j"}]).n == 1


def test_an_empty_rubric_is_not_the_general_one():
    with pytest.raises(ValidationError, match="at least 1 character"):
        ppo(rewards=[{"kind": "judge", "source": "j", "rubric": ""}])


def test_a_weight_that_is_steered_starts_somewhere():
    with pytest.raises(ValidationError, match="where kl_target steers it"):
        ppo(kl_weight=0, kl_target=6)
    assert ppo(kl_target=6).kl_weight == 0.05
