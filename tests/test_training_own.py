"""What is learned as the policy's own answer is that: of its weights, and of the probabilities that it gives itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_training_methods import moved
from tiny import tiny_policy
from tiny_runs import (
    RENDERER,
    SEED,
    SelfJudge,
    asked,
    grpo,
    lengths,
    online,
    ppo,
    prepared,
    rejection,
    scorer,
    self_rewarding,
    stage_of,
)

from posttrain.models.policy import Policy
from posttrain.recipe.blocks import Sampling
from posttrain.records import Example, Failure, Ledger, Rollout
from posttrain.sampling.local import LocalSampler
from posttrain.sampling.protocol import Answer
from posttrain.training.distill import DistillMethod
from posttrain.training.own import Own
from posttrain.training.preference import judged_on_policy

SETTINGS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "ppo": {},
    "online_preference": {},
    "rejection_sampling": {},
    "self_rewarding": {},
    "distill": {"mode": "on_policy", "student_share": 1.0, "sampling": {"max_new_tokens": 6}},
    "dpo on-policy": {},
}


def begin(kind: str, policy: Policy, sampler: Any, folder: Path, **settings: Any) -> None:
    """As far as it samples first."""
    stage = stage_of(kind, **SETTINGS[kind], **settings)
    match kind:
        case "grpo":
            grpo(policy, stage, sampler=sampler).batch(0)
        case "ppo":
            ppo(policy, stage, sampler=sampler).batch(0)
        case "online_preference":
            online(policy, stage, sampler=sampler).batch(0)
        case "rejection_sampling":
            rejection(policy, stage, folder, sampler=sampler).batch(0)
        case "self_rewarding":
            self_rewarding(policy, stage, folder, SelfJudge(policy, sampler)).batch(0)
        case "distill":
            DistillMethod(stage, prepared(asked()), policy, tiny_policy(seed=7), sampler, SEED).batch(0)
        case _:
            judged_on_policy(policy, stage, prepared(asked()), sampler, scorer(lengths), SEED)


class Shifted(LocalSampler):
    """Tells the log-probabilities of the token before."""

    def __call__(self, *question: Any, **more: Any) -> tuple[list[Rollout], Ledger]:
        rollouts, ledger = super().__call__(*question, **more)
        return [dataclasses.replace(r, logps=(r.logps[-1], *r.logps[:-1])) for r in rollouts], ledger


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_sampler_that_computes_something_else_is_found_at_once(kind: str, tmp_path: Path) -> None:
    policy = tiny_policy()
    with pytest.raises(Failure, match=r"stage 'toy': .* nats a token from the trainer's.*check_first_step: false"):
        begin(kind, policy, Shifted(policy, RENDERER), tmp_path)
    begin(kind, policy, Shifted(policy, RENDERER), tmp_path, check_first_step=False)


class Foreign(LocalSampler):
    """Has other weights."""

    def __call__(self, *question: Any, **more: Any) -> tuple[list[Rollout], Ledger]:
        with self.policy.swapped(tiny_policy(seed=1).snapshot()):
            return super().__call__(*question, **more)


@pytest.mark.parametrize("kind", SETTINGS)
def test_answers_of_other_weights_are_refused(kind: str, tmp_path: Path) -> None:
    policy = tiny_policy()
    with pytest.raises(Failure, match="the sampler did not get the policy's weights"):
        begin(kind, policy, Foreign(policy, RENDERER), tmp_path, check_first_step=False)


class JudgedElsewhere(SelfJudge):
    def __call__(self, prompts: Sequence[Example], *how: Any) -> tuple[list[Rollout], Ledger]:
        if prompts[0].id.startswith("judge:"):
            with self.policy.swapped(tiny_policy(seed=1).snapshot()):
                return super().__call__(prompts, *how)
        return super().__call__(prompts, *how)


def test_so_are_judgements_of_other_weights(tmp_path: Path) -> None:
    policy = tiny_policy()
    with pytest.raises(Failure, match=r"judge:.* the sampler did not get the policy's weights"):
        self_rewarding(policy, stage_of("self_rewarding"), tmp_path, JudgedElsewhere(policy)).batch(0)


class Late(Shifted):
    """Answers later, with the weights that it was asked with."""

    def request(self, *question: Any) -> Answer:
        found = self(*question)
        return lambda: found


def test_what_was_asked_ahead_is_of_the_weights_of_then_and_compared_once_they_are_those_of_now() -> None:
    policy = tiny_policy()
    own = Own(Late(policy, RENDERER), policy, stage_of("grpo"))
    how = asked(), 1, Sampling(max_new_tokens=6), SEED
    answer = own.request(*how)
    moved(policy, 0.1)
    rollouts, _ = answer()
    assert {r.weights for r in rollouts} != {policy.digest()}
    with pytest.raises(Failure, match="nats a token"):
        own(*how)


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"temperature": 0.6, "top_p": 0.7}], ids=["greedy", "cut"])
def test_it_is_the_temperature_that_counts(how: dict[str, float]) -> None:
    """The greedy sampler tells log-probabilities at 1, and cuts come after them."""
    policy = tiny_policy()
    own = Own(LocalSampler(policy, RENDERER), policy, stage_of("grpo"))
    rollouts, _ = own(asked(), 1, Sampling.model_validate({"max_new_tokens": 6, **how}), SEED)
    assert (len(rollouts), own.unchecked) == (6, False)
