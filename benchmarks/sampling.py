"""Sampling, the local engine against `transformers.generate`: the same model, prompts and tokens.

    python benchmarks/sampling.py [--runs 3] [--out docs/measured/engine.json]

Greedy, so that both must write the same. The two run in turn in one process; ratios are taken within each pair.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from measured import keep, row, show
from transformers import GenerationConfig
from workload import MODEL, text

from posttrain.data.chat import Renderer
from posttrain.models.policy import Policy, load
from posttrain.recipe.schema import Sampling
from posttrain.records import Example
from posttrain.sampling.local import LocalSampler

PROMPTS, COMPLETIONS, NEW_TOKENS = 8, 8, 64
WORDS = (110, 140)
"""Of a prompt: about 180 tokens once rendered."""

Completions = list[tuple[int, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    policy = load(MODEL)
    renderer = Renderer(policy.tokenizer)
    rng = random.Random(0)
    prompts = [Example(str(i), ({"role": "user", "content": text(rng, WORDS)},)) for i in range(PROMPTS)]
    ids = [renderer.prompt_ids(prompt) for prompt in prompts]
    print(f"prompts of {min(map(len, ids))} to {max(map(len, ids))} tokens")
    sampler = LocalSampler(policy, renderer)

    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(args.runs):
        began = time.perf_counter()
        rollouts, _ = sampler(prompts, COMPLETIONS, Sampling(temperature=0, max_new_tokens=NEW_TOKENS), 0)
        middle = time.perf_counter()
        generated = _generate(policy, ids)
        ended = time.perf_counter()
        written = [r.ids for r in rollouts]
        same = sum(a == b for a, b in zip(written, generated, strict=True))
        print(f"{same} of {len(written)} completions are the same token for token")
        ours.append(sum(map(len, written)) / (middle - began))
        theirs.append(sum(map(len, generated)) / (ended - middle))
    rows = [
        row(
            "sampling: speed against generate's",
            "times",
            [a / b for a, b in zip(ours, theirs, strict=True)],
            at_least=1.0,
        ),
        row("sampling: posttrain, new tokens", "tokens/s", ours),
        row("sampling: generate, new tokens", "tokens/s", theirs),
    ]
    show(rows)
    if args.out:
        keep(args.out, rows)


@torch.no_grad()
def _generate(policy: Policy, ids: list[tuple[int, ...]]) -> Completions:
    longest = max(map(len, ids))
    padded = [[0] * (longest - len(row)) + list(row) for row in ids for _ in range(COMPLETIONS)]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in ids for _ in range(COMPLETIONS)]
    eos = sorted(policy.eos_ids)
    config = GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=eos, pad_token_id=eos[0])
    out = policy.model.generate(torch.tensor(padded), attention_mask=torch.tensor(mask), generation_config=config)
    return [_until_end(row[longest:].tolist(), eos) for row in out]


def _until_end(ids: list[int], eos: list[int]) -> tuple[int, ...]:
    end = next((i + 1 for i, token in enumerate(ids) if token in eos), len(ids))
    return tuple(ids[:end])


if __name__ == "__main__":
    main()
