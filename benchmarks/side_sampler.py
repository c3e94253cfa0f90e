"""Our side of `sampling.py`: one answer to all prompts a turn."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from workload import Turn

from posttrain.data.chat import Renderer
from posttrain.machine import tune
from posttrain.models.policy import load
from posttrain.recipe.blocks import Sampling
from posttrain.records import Example
from posttrain.sampling.local import LocalSampler


def main() -> None:
    job = json.loads(Path(sys.argv[1], "job.json").read_text())
    turn = Turn()
    tune()
    policy = load(job["model"])
    sampler = LocalSampler(policy, Renderer(policy.tokenizer))
    asked = [Example(str(i), ({"role": "user", "content": text},)) for i, text in enumerate(job["texts"])]
    sampler(asked[:1], 2, Sampling(temperature=0, max_new_tokens=2), 0)
    turn(written=0)
    while True:
        rollouts, _ = sampler(asked, job["n"], Sampling(temperature=0, max_new_tokens=job["new_tokens"]), 0)
        turn(written=sum(len(r.ids) for r in rollouts), ids=[r.ids for r in rollouts])


if __name__ == "__main__":
    main()
