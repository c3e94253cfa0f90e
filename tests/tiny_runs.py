"""Small data sets, stages and runs of every method over a tiny model, for the tests of training."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_policy, tiny_tokenizer

from posttrain.data.chat import Rendered, Renderer
from posttrain.data.prepare import Prepared
from posttrain.data.steps import solution
from posttrain.models.policy import Policy
from posttrain.models.reward import reward_model
from posttrain.recipe.blocks import Lora
from posttrain.recipe.objectives import OBJECTIVES
from posttrain.recipe.preference import OnlinePreference, Preference, SelfRewarding
from posttrain.recipe.rl import Grpo, Ppo, RejectionSampling
from posttrain.recipe.scoring import ProcessRewardModel, RewardModel, ScoringStage
from posttrain.recipe.stage import StageBase
from posttrain.recipe.supervised import Distill, Sft
from posttrain.records import Example, Ledger, Rollout, Score, derive
from posttrain.sampling.local import LocalSampler
from posttrain.training.batch import Batch, Method
from posttrain.training.distill import DistillMethod
from posttrain.training.grpo import GrpoMethod
from posttrain.training.loop import train
from posttrain.training.online import OnlineMethod
from posttrain.training.ppo import PpoMethod
from posttrain.training.preference import (
    PreferenceMethod,
    judged_from_data,
    judged_on_policy,
    read_judged,
    referred,
    write_judged,
)
from posttrain.training.process_reward import ProcessRewardMethod
from posttrain.training.rejection import RejectionMethod
from posttrain.training.reward import RewardMethod, ends
from posttrain.training.self_rewarding import SelfRewardingMethod
from posttrain.training.sft import SftMethod
from posttrain.training.world import ALONE, World

SEED = 3
TIMES = ("seconds", "tokens_per_second")
"""Metrics that a repeated run does not repeat."""
QUESTIONS = (
    "What is 12 and 30?",
    "Is it far?",
    "The quick brown fox",
    "Two hours",
    "If a train leaves at 9, when?",
    "A",
)
ANSWERS = (
    "42.",
    "No, it is not far at all.",
    "jumps over the lazy dog\u2028and \x85 sleeps ü.",
    "Yes",
    "At 11.",
    "b c",
)
RENDERER = Renderer(tiny_tokenizer())


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def prepared(examples: Sequence[Example], *more: Sequence[Example]) -> Prepared:
    """Rendered without checks; each sequence of examples is a source of weight 1."""
    sources = (examples, *more)
    rows = tuple(tuple(row for e in source for row in _rendered(e)) for source in sources)
    return Prepared(rows, (1.0,) * len(sources), {})


def _rendered(example: Example) -> tuple[Rendered, ...]:
    if example.completion or example.text is not None:
        return RENDERER.render(example)
    return (Rendered(example, RENDERER.prompt_ids(example)),)


def asked() -> list[Example]:
    return [Example(f"q:{i}", (turn("user", q),), task="toy") for i, q in enumerate(QUESTIONS)]


def answered() -> list[Example]:
    """Ragged: short and long answers, a conversation with context between its answers, and raw text."""
    plain = [
        Example(f"a:{i}", (turn("user", q),), (turn("assistant", a),))
        for i, (q, a) in enumerate(zip(QUESTIONS, ANSWERS, strict=True))
    ]
    turns = (turn("assistant", "Two."), turn("user", "And of 1, 2 and 3?"), turn("assistant", "Six, it is six."))
    return [*plain, Example("a:turns", (turn("user", "The sum of 1 and 1?"),), turns), Example("a:text", text="A fox.")]


def paired() -> list[Example]:
    return [
        Example(f"p:{i}", (turn("user", q),), (turn("assistant", a),), (turn("assistant", ANSWERS[i - 1][::-1]),))
        for i, (q, a) in enumerate(zip(QUESTIONS, ANSWERS, strict=True))
    ]


def labelled() -> list[Example]:
    """Every third answer is bad."""
    return [
        Example(f"l:{i}", (turn("user", q),), (turn("assistant", a),), label=i % 3 > 0)
        for i, (q, a) in enumerate(zip(QUESTIONS, ANSWERS, strict=True))
    ]


def solved() -> Prepared:
    """Solutions of one to three steps with labels of every sort."""
    marks: tuple[tuple[float | None, ...], ...] = ((True, None, 0.25), (False, 0.75), (1.0,))
    rows = []
    for i, question in enumerate(QUESTIONS):
        steps = tuple(turn("assistant", ANSWERS[i - k]) for k in range(len(marks[i % 3])))
        rows += solution(Example(f"s:{i}", (turn("user", question),), steps, step_labels=marks[i % 3]), RENDERER)
    return Prepared((tuple(rows),), (1.0,), {})


def lengths(example: Example, text: str) -> Score:
    """A toy reward that even a random model's answers differ in."""
    value = len(text) % 3 / 2
    return Score(value, "correct" if value == 1 else "wrong")


def scorer(score: Callable[[Example, str], Score]) -> Callable[[Sequence[Rollout]], list[Score]]:
    """One answer at a time, as what scores a whole batch."""
    return lambda rollouts: [score(rollout.example, rollout.text) for rollout in rollouts]


ENDS = tuple("aeiou")
"""Stop strings by which many answers of a random model come to an end."""
OPTIM = {"lr": 1e-2, "schedule": "cosine", "weight_decay": 0.1}
STAGES: dict[str, tuple[type[StageBase], dict[str, Any]]] = {
    "sft": (Sft, {"kind": "sft"}),
    "dpo": (Preference, {"kind": "preference"}),
    "dpo on-policy": (Preference, {"kind": "preference", "on_policy": {"n": 4, "prompts": 6, "max_new_tokens": 6}}),
    "aot": (Preference, {"kind": "preference", "loss": "aot"}),
    "bco_unpaired": (Preference, {"kind": "preference", "loss": "bco_unpaired"}),
    "distill": (Distill, {"kind": "distill", "teacher": {"source": "unused"}}),
    "reward_model": (RewardModel, {"kind": "reward_model", "centring": 0.01}),
    "process_reward_model": (ProcessRewardModel, {"kind": "process_reward_model"}),
    "rejection_sampling": (
        RejectionSampling,
        {
            "kind": "rejection_sampling",
            "prompts": 6,
            "n": 4,
            "rounds": 2,
            "at_least": 0.5,
            "sampling": {"max_new_tokens": 6, "stop": ENDS},
        },
    ),
    "online_preference": (OnlinePreference, {"kind": "online_preference", "n": 4, "sampling": {"max_new_tokens": 6}}),
    "self_rewarding": (
        SelfRewarding,
        {
            "kind": "self_rewarding",
            "prompts": 6,
            "n": 3,
            "rounds": 2,
            "sampling": {"max_new_tokens": 6},
            "meta_judge": True,
            "length_control": 0.2,
        },
    ),
    "grpo": (Grpo, {"kind": "grpo", "n": 4, "sampling": {"max_new_tokens": 6}, "kl_weight": 0.1}),
    "grpo twice": (Grpo, {"kind": "grpo", "n": 4, "sampling": {"max_new_tokens": 6}, "iterations": 2}),
    "grpo prime": (
        Grpo,
        {
            "kind": "grpo",
            "n": 4,
            "sampling": {"max_new_tokens": 6},
            "advantage": "leave_one_out",
            "prime": {"lr": 1e-3, "gamma": 0.9},
        },
    ),
    "grpo all": (
        Grpo,
        {
            "kind": "grpo",
            "n": 4,
            "sampling": {"max_new_tokens": 6},
            "advantage": "leave_one_out",
            "aggregate": "sum",
            "kl_weight": 0.1,
            "kl_in": "reward",
            "kl_estimator": "k1",
            "reference_reset": 4,
            "curriculum": 2,
            "max_draws": 3,
            "entropy_weight": 0.01,
            "iterations": 1,
            "minibatches": 2,
        },
    ),
    "ppo": (
        Ppo,
        {
            "kind": "ppo",
            "sampling": {"max_new_tokens": 6},
            "iterations": 2,
            "minibatches": 2,
            "batch_size": 6,
            "kl_target": 0.5,
            "missing_eos_penalty": 0.1,
        },
    ),
}


def stage_of(name: str, **settings: Any) -> Any:
    kind, own = STAGES[name]
    common = {"id": "toy", "data": {"sources": [{"source": "unused.jsonl"}]}, "steps": 8, "batch_size": 2}
    optim = {**OPTIM, **settings.pop("optim", {})}
    return kind.model_validate({**common, "tokens_per_forward": 64, "optim": optim, **own, **settings})


def sft(stage: Sft, data: Prepared | None = None) -> SftMethod:
    return SftMethod(stage, data or prepared(answered()), SEED)


def preference(
    policy: Policy,
    stage: Preference,
    folder: Path | None = None,
    data: Prepared | None = None,
    world: World = ALONE,
) -> PreferenceMethod:
    """Pairs or labelled answers from the data; what is sampled is kept in `folder`, and read from it the next time."""
    if stage.on_policy is None:
        data = data or prepared(labelled() if OBJECTIVES[stage.loss].of == "answers" else paired())
        judged, _ = referred(policy, stage, judged_from_data(policy, stage, data, SEED), world)
        return PreferenceMethod(stage, data, SEED, judged, policy, world)
    assert folder is not None
    data = data or prepared(answered()[:6] if stage.loss == "tpo" else asked())
    path = folder / "judged.jsonl"
    if not path.exists():
        judged, _, _ = judged_on_policy(policy, stage, data, LocalSampler(policy, RENDERER), scorer(lengths), SEED)
        write_judged(path, referred(policy, stage, judged)[0])
    return PreferenceMethod(stage, data, SEED, read_judged(path, len(data.rows)), policy)


def grpo(
    policy: Policy,
    stage: Grpo,
    score: Callable[[Example, str], Score] = lengths,
    sampler: Any = None,
    data: Prepared | None = None,
) -> GrpoMethod:
    sampler = sampler or LocalSampler(policy, RENDERER)
    return GrpoMethod(stage, data or prepared(asked()), policy, sampler, scorer(score), SEED)


def ppo(policy: Policy, stage: Ppo, score: Callable[[Example, str], Score] = lengths, sampler: Any = None) -> PpoMethod:
    sampler = sampler or LocalSampler(policy, RENDERER)
    return PpoMethod(stage, prepared(asked()), policy, sampler, scorer(score), SEED)


def online(
    policy: Policy,
    stage: OnlinePreference,
    score: Callable[[Example, str], Score] = lengths,
    sampler: Any = None,
    data: Prepared | None = None,
) -> OnlineMethod:
    sampler = sampler or LocalSampler(policy, RENDERER)
    return OnlineMethod(stage, data or prepared(asked()), policy, sampler, scorer(score), SEED)


def rejection(
    policy: Policy,
    stage: RejectionSampling,
    folder: Path,
    score: Callable[[Example, str], Score] = lengths,
    sampler: Any = None,
    data: Prepared | None = None,
) -> RejectionMethod:
    sampler = sampler or LocalSampler(policy, RENDERER)
    return RejectionMethod(stage, data or prepared(asked()), policy, sampler, scorer(score), folder, SEED)


class SelfJudge:
    """Samples from the policy, but says itself what a judge is asked for, which no random model would say readably: the
    grade of an answer by chance, and of two judgements the one whose words come first in the alphabet.

    The prompt is cut short, as a tiny model's context is.
    """

    def __init__(self, policy: Policy, sampler: Any = None) -> None:
        self.policy, self.sampler = policy, sampler or LocalSampler(policy, RENDERER)

    def __call__(self, prompts: Sequence[Example], n: int, sampling: Any, seed: int) -> tuple[list[Rollout], Ledger]:
        if not prompts[0].id.startswith("judge:"):
            return self.sampler(prompts, n, sampling, seed)
        weights, rollouts = self.policy.digest(), []
        for p, example in enumerate(prompts):
            for k in range(n):
                text = self.say(str(example.prompt[-1]["content"]), derive(seed, p, k))
                ids, asked = (*RENDERER.tokenizer.encode(text), 2), RENDERER.prompt_ids(example)[-24:]
                rollouts.append(Rollout(example, p, asked, ids, (-1.0,) * len(ids), text, "stop", weights))
        return rollouts, Ledger(generated_tokens=sum(len(r.ids) for r in rollouts))

    def say(self, question: str, chance: int) -> str:
        if question.startswith("Grade"):
            return f"{'so ' * (chance % 3)}<grade>{chance % 6}</grade>"
        one, other = re.findall(r"^<answer [AB] \w+>\n(.*?)\n</answer [AB] ", question, re.DOTALL | re.MULTILINE)
        return f"<better>{'tie' if one == other else 'A' if one < other else 'B'}</better>"


def self_rewarding(
    policy: Policy, stage: SelfRewarding, folder: Path, sampler: Any = None, data: Prepared | None = None
) -> SelfRewardingMethod:
    sampler = sampler or SelfJudge(policy)
    return SelfRewardingMethod(stage, data or prepared(asked()), policy, sampler, folder, SEED)


def method_of(name: str, policy: Policy, stage: Any, folder: Path | None = None) -> Method:
    if name == "sft":
        return sft(stage)
    if isinstance(stage, Distill):
        teacher = tiny_policy(seed=7, hidden_size=48)
        return DistillMethod(stage, prepared(answered()), policy, teacher, LocalSampler(policy, RENDERER), SEED)
    if name == "reward_model":
        return RewardMethod(stage, prepared(paired()), SEED)
    if name == "process_reward_model":
        return ProcessRewardMethod(stage, solved(), SEED)
    if isinstance(stage, OnlinePreference):
        return online(policy, stage)
    if isinstance(stage, RejectionSampling):
        assert folder is not None
        return rejection(policy, stage, folder)
    if isinstance(stage, SelfRewarding):
        assert folder is not None
        return self_rewarding(policy, stage, folder)
    if isinstance(stage, Ppo):
        return ppo(policy, stage)
    return preference(policy, stage, folder) if isinstance(stage, Preference) else grpo(policy, stage)


def run(
    name: str,
    folder: Path,
    adapter: Lora | None = None,
    on_step: Callable[[dict[str, Any]], None] = lambda row: None,
    change: Callable[[Method, Policy], None] = lambda method, policy: None,
    **settings: Any,
) -> tuple[Policy, Ledger]:
    """Everything built anew, as a command would, and trained; `change` may tamper before the first step."""
    policy = tiny_policy(adapter=adapter)
    stage = stage_of(name, **settings)
    if isinstance(stage, ScoringStage):
        policy = reward_model(policy, ends(prepared(paired())), SEED)
    method = method_of(name, policy, stage, folder)
    change(method, policy)
    return policy, train(policy, method, stage, folder, SEED, on_step)


def bad_loss(at: int, bad: float = math.nan) -> Callable[[Method, Policy], None]:
    """A `change` after which the loss of step `at` is multiplied by `bad`."""

    def change(method: Method, policy: Policy) -> None:
        inner_batch, inner_loss = method.batch, method.loss
        now = 0

        def batch(step: int) -> Batch:
            nonlocal now
            now = step
            return inner_batch(step)

        def loss(*args: Any) -> Any:
            value, stats = inner_loss(*args)
            return (value * bad if now == at else value), stats

        method.batch, method.loss = batch, loss  # type: ignore[method-assign]

    return change


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file without what a clock says; JSON has no NaN, so none is taken."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in path.read_bytes().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
