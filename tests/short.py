"""The shipped recipes cut short: two steps of each stage, in seconds rather than minutes."""

from __future__ import annotations

EASY = "{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}"
"""Sums that two steps of SFT teach well enough for some answers to differ: DPO and GRPO need that."""

SETTINGS: dict[str, dict[str, str]] = {
    "quickstart.yaml": {
        **{f"stages.{id}.steps": "2" for id in ("sft", "dpo", "grpo")},
        **{f"stages.{id}.data.sources.0.config": EASY for id in ("sft", "dpo", "grpo")},
        **{f"stages.{id}.data.sources.0.rows": "80" for id in ("sft", "dpo", "grpo")},
        "stages.sft.batch_size": "16",
        "stages.sft.optim": "{lr: 3e-3, schedule: constant, warmup: 0}",
        "stages.dpo.batch_size": "2",
        "stages.dpo.on_policy.prompts": "24",
        "stages.grpo.batch_size": "4",
        **{f"evals.suites.{id}.source.rows": "4" for id in ("sums", "longer-sums", "products")},
        "evals.max_new_tokens": "8",
        "evals.retention": "{rows: 2, max_new_tokens: 4}",
        "gates": "[]",
    },
    "sft.yaml": {
        "stages.sft.steps": "2",
        "stages.sft.batch_size": "2",
        "evals.retention": "{rows: 2, max_new_tokens: 4}",
    },
    "constitutional.yaml": {
        **{f"stages.{id}.steps": "2" for id in ("revise", "prefer")},
        "stages.revise.batch_size": "2",
        "stages.prefer.batch_size": "1",
        "stages.prefer.on_policy.prompts": "8",
        "evals.retention": "{rows: 2, max_new_tokens: 4}",
    },
    "reward.yaml": {"stages.reward.steps": "2", "stages.reward.batch_size": "1"},
    "process.yaml": {"stages.process.steps": "2", "stages.process.batch_size": "1"},
    "dpo.yaml": {
        "stages.dpo.steps": "2",
        "stages.dpo.batch_size": "1",
        "evals.retention": "{rows: 2, max_new_tokens: 4}",
    },
}


def settings(recipe: str, **more: str) -> list[str]:
    """The `--set` arguments that cut the recipe of this file name short."""
    return [word for key, value in (SETTINGS[recipe] | more).items() for word in ("--set", f"{key}={value}")]
