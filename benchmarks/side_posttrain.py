"""Our side of `train.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workload import ALPHA, BETA, RANK, Turn, Workload, code, now, side

from posttrain.data.chat import Rendered, Renderer
from posttrain.data.prepare import Prepared, prepare
from posttrain.machine import tune
from posttrain.models.policy import Policy, load
from posttrain.models.reward import reward_model
from posttrain.recipe.blocks import Data, Lora, Optim, Sampling, Source
from posttrain.recipe.preference import Preference
from posttrain.recipe.rl import Grpo
from posttrain.recipe.scoring import RewardModel
from posttrain.recipe.supervised import Sft
from posttrain.records import Example, Ledger, Rollout, Score
from posttrain.sampling.local import LocalSampler
from posttrain.training.batch import Method, frozen_logprobs
from posttrain.training.grpo import GrpoMethod
from posttrain.training.loop import train
from posttrain.training.preference import PreferenceMethod, judged_from_data, referred
from posttrain.training.reward import RewardMethod, ends
from posttrain.training.sft import SftMethod

ANSWERS = {"dpo": "chosen_logp", "reward": "chosen_reward"}
"""A metric that a step of the right loss on the wrong rows would not reproduce."""


def run(work: Workload, folder: Path, turn: Turn) -> None:
    tune()
    policy = load(str(folder.parent / ("adapter" if work.lora else "model")))
    policy, method, stage, tokens = method_of(work, policy, folder)
    before = reference_seconds(policy, method, stage) / work.steps
    # In the order of the file, as the other side reads it.
    method.order = [(0, row) for row in range(work.steps * work.batch)]  # type: ignore[attr-defined]

    def on_step(row: dict[str, Any]) -> None:
        answers = row[ANSWERS.get(work.kind, "loss")]
        turn(
            before=before,
            loss=row["loss"],
            norm=row["grad_norm"],
            answers=answers,
            tokens=tokens[row["step"]],
            signal=row.get("signal", 1.0),
        )

    train(policy, method, stage, folder / "posttrain", 0, on_step)


def reference_seconds(policy: Policy, method: Method, stage: Any) -> float:
    """Of DPO's reference values: one pass over the data pays for them once, each step for its share.

    They are there already; they are taken again, for a first step of each side is not counted either.
    """
    if not isinstance(method, PreferenceMethod):
        return 0.0
    rows = [row for part in method.judged for pair in part for row in pair.rows]
    began = now()
    frozen_logprobs(policy, rows, stage.tokens_per_forward)
    return now().wall - began.wall


def policy_of(model: str, lora: bool) -> Policy:
    return load(model, adapter=Lora(r=RANK, alpha=ALPHA) if lora else None)


def method_of(work: Workload, policy: Policy, folder: Path) -> tuple[Policy, Method, Any, list[int]]:
    """Also the tokens of each step, every sequence counted whole; of GRPO's those that are sampled."""
    common: dict[str, Any] = {
        "id": work.kind,
        "data": Data(sources=(Source(source=str(folder / "rows.jsonl")),)),
        "steps": work.steps,
        "batch_size": work.batch,
        "optim": Optim(lr=work.lr, schedule="constant", warmup=0.0),
        "checkpoint_every": 2 * work.steps,
        "check_first_step": False,
    }
    renderer = Renderer(policy.tokenizer)
    if work.kind == "grpo":
        lines = (folder / "rows.jsonl").read_text().splitlines()
        asked = [Example(str(i), ({"role": "user", "content": json.loads(x)["prompt"]},)) for i, x in enumerate(lines)]
        data = Prepared((tuple(Rendered(e, renderer.prompt_ids(e)) for e in asked),), (1.0,), {})
        grpo = Grpo(kind="grpo", n=work.group, sampling=Sampling(max_new_tokens=work.new_tokens), **common)
        vars(policy)["eos_ids"] = frozenset()  # nothing ends a completion before its last token
        method = GrpoMethod(grpo, data, policy, _kept(LocalSampler(policy, renderer), folder), _score, 0)
        return policy, method, grpo, [work.batch * work.group * work.new_tokens] * work.steps
    data = prepare(common["data"], renderer, need="completion" if work.kind == "sft" else "pair")
    if work.kind == "sft":
        sft = Sft(kind="sft", **common)
        return policy, SftMethod(sft, data, 0), sft, _tokens(work, data)
    if work.kind == "reward":
        model = RewardModel(kind="reward_model", holdout=0.0, **common)
        return reward_model(policy, ends(data), 0), RewardMethod(model, data, 0), model, _tokens(work, data)
    dpo = Preference(kind="preference", beta=BETA, **common)
    pairs, _ = referred(policy, dpo, judged_from_data(policy, dpo, data, 0))
    return policy, PreferenceMethod(dpo, data, 0, pairs, policy), dpo, _tokens(work, data)


def _tokens(work: Workload, data: Prepared) -> list[int]:
    def both(row: Rendered) -> int:
        sides = [ids for ids in (row.completion_ids, row.rejected_ids) if ids]
        return sum(len(row.prompt_ids) + len(ids) for ids in sides)

    lengths = [both(row) for row in data.rows[0]]
    return [sum(lengths[at : at + work.batch]) for at in range(0, len(lengths), work.batch)]


def _kept(sampler: LocalSampler, folder: Path) -> Any:
    """The sampler; what it writes first is kept, for the other side to begin with the same."""

    def sample(prompts: Sequence[Example], n: int, sampling: Sampling, seed: int) -> tuple[list[Rollout], Ledger]:
        rollouts, ledger = sampler(prompts, n, sampling, seed)
        path = folder / "completions.json"
        if not path.exists():
            path.write_text(json.dumps([rollout.ids for rollout in rollouts]))
        return rollouts, ledger

    return sample


def _score(rollouts: Sequence[Rollout]) -> list[Score]:
    return [Score(code(rollout.text), "correct") for rollout in rollouts]


if __name__ == "__main__":
    side(run)
