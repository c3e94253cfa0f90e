"""Training, posttrain against TRL: the same model, rows, batches, first weights and losses.

    python benchmarks/train.py [--only NAME] [--runs 5] [--out docs/measured/engine.json]

The two sides take turns, step by step, each in a process of its own; ratios are taken within each pair of steps, and
a first step of each is not counted. Both train in float32, without gradient checkpointing, TRL otherwise with its
defaults. Losses must agree in every step and the gradient's norm in the first one. GRPO samples as it goes, so there
only the first step can be compared: TRL takes it on our completions. Of 32 completions TRL trains on two halves, for
all at once would not fit in 25 GB.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import peers
from measured import Row, parser, report, row
from side_posttrain import policy_of
from turns import Found, take_turns
from workload import Workload, write

from posttrain.models.reward import reward_model
from posttrain.models.source import resolve

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-3
"""Relative, between the losses and the like of the two sides."""


class Goal(NamedTuple):
    speed: float
    """Times TRL's."""
    memory: float | None
    """Share of TRL's peak."""
    unit: str
    """What is counted a second; s: a step is what is measured."""


LONG = {"prompt_words": (160, 240), "completion_words": (40, 60)}
"""Prompts of four times the completion."""
WORKLOADS = {
    Workload("sft", "sft", batch=8, lr=2e-4): Goal(3.0, 0.5, "tokens/s"),
    Workload("sft-full", "sft", batch=8, lr=2e-5, lora=False): Goal(2.75, 0.5, "tokens/s"),
    Workload("dpo", "dpo", batch=3, lr=5e-5): Goal(4.0, 0.5, "pairs/s"),
    Workload("dpo-long", "dpo", batch=2, lr=5e-5, **LONG): Goal(5.0, 0.5, "pairs/s"),  # type: ignore[arg-type]
    Workload("grpo", "grpo", batch=2, lr=1e-5, group=8): Goal(4.0, 1 / 3, "s"),
    Workload("grpo-16", "grpo", batch=2, lr=1e-5, group=16, accumulate=2): Goal(6.0, 1 / 3, "s"),
    Workload("reward", "reward", batch=3, lr=1e-4): Goal(2.0, None, "pairs/s"),
}
TITLES = {
    "sft": "SFT, LoRA",
    "sft-full": "SFT, all weights",
    "dpo": "DPO",
    "dpo-long": "DPO, prompt of 4 completions",
    "grpo": "GRPO, 8 a prompt",
    "grpo-16": "GRPO, 16 a prompt",
    "reward": "reward model",
}
ALSO_ONEDNN = {"sft"}
"""Where TRL is also run with the float32 products that posttrain takes."""
QUICK = {"batch": 2, "prompt_words": (8, 12), "completion_words": (3, 6), "new_tokens": 8}


def main() -> None:
    options = parser(__doc__, "--runs", "--model", "--quick", "--out")
    options.add_argument("--only", choices=[work.name for work in WORKLOADS])
    args = options.parse_args()
    python = str(peers.python())
    with tempfile.TemporaryDirectory() as shared:
        Path(shared, "model").symlink_to(resolve(args.model))
        policy = policy_of(args.model, lora=True)
        policy.save(Path(shared, "adapter"))
        reward_model(policy, policy.eos_ids, 0).save(Path(shared, "classifier"))
        for work, goal in WORKLOADS.items():
            if args.only not in (None, work.name):
                continue
            work = work._replace(steps=1 + (1 if args.quick else args.runs), **(QUICK if args.quick else {}))
            folder = Path(shared, work.name)
            folder.mkdir()
            write(folder, work)
            commands = {
                "posttrain": [sys.executable, str(HERE / "side_posttrain.py"), str(folder)],
                "trl": [python, str(HERE / "side_trl.py"), str(folder)],
            }
            if work.name in ALSO_ONEDNN:
                commands["trl-onednn"] = [*commands["trl"], "onednn"]
            steps = take_turns(commands, work.steps, folder)
            check(work, steps)
            rows = compared(work, goal, steps)
            report(rows, args.out)


def check(work: Workload, steps: list[dict[str, Found]]) -> None:
    """Refuse to compare what does not compute the same."""
    for number, step in enumerate(steps):
        ours, theirs = step["posttrain"], step["trl"]
        if ours["tokens"] != theirs["tokens"]:
            sys.exit(f"{work.name}: the sides count different tokens: {ours['tokens']} and {theirs['tokens']}")
        if ours["signal"] != 1.0:
            sys.exit(f"{work.name}: a group had no signal and was not computed; the comparison would flatter us")
        # TRL logs the reward model's loss and no reward; GRPO's loss is 0 at first, and then of other completions.
        keys = {"sft": ("loss",), "dpo": ("loss", "answers"), "reward": ("loss",), "grpo": ()}[work.kind]
        for key in (*keys, *(("norm",) if number == 0 else ())):
            if abs(ours[key] - theirs[key]) > TOLERANCE * max(1, abs(theirs[key])):
                sys.exit(
                    f"{work.name}: the sides compute different things: in step {number} {key} is {ours[key]} here "
                    f"and {theirs[key]} there"
                )


def compared(work: Workload, goal: Goal, steps: list[dict[str, Found]]) -> list[Row]:
    title = TITLES[work.name]
    timed = [{name: _spent(found) for name, found in step.items()} for step in steps[1:]]
    last = steps[-1]  # peaks only grow

    def rate(name: str) -> list[float]:
        if goal.unit == "s":
            return [step[name] for step in timed]
        counts = [step[name]["tokens"] if goal.unit == "tokens/s" else work.batch for step in steps[1:]]
        return [count / step[name] for count, step in zip(counts, timed, strict=True)]

    def memory(name: str) -> float:
        return last[name]["memory"] / 1e9

    def times(name: str) -> list[float]:
        return [step[name] / step["posttrain"] for step in timed]

    cpu = [step["posttrain"]["cpu_seconds"] / step["trl"]["cpu_seconds"] for step in steps[1:]]
    what = "a step" if goal.unit == "s" else "speed"
    rows = [
        row(f"{title}: speed against TRL's", "times", times("trl"), at_least=goal.speed),
        row(f"{title}: peak memory against TRL's", "share", [memory("posttrain") / memory("trl")], at_most=goal.memory),
        row(f"{title}: processor time against TRL's", "share", cpu),
        row(f"{title}: posttrain, {what}", goal.unit, rate("posttrain")),
        row(f"{title}: TRL, {what}", goal.unit, rate("trl")),
        row(f"{title}: posttrain, peak memory", "GB", [memory("posttrain")]),
        row(f"{title}: TRL, peak memory", "GB", [memory("trl")]),
    ]
    if "trl-onednn" in last:
        rows.insert(1, row(f"{title}: speed against TRL's with our matrix products", "times", times("trl-onednn")))
    return rows


def _spent(found: dict[str, Any]) -> float:
    return found["seconds"] + found.get("before", 0.0)


if __name__ == "__main__":
    main()
