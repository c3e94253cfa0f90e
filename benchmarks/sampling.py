"""Sampling, the local engine against what others decode with: the same model, prompts and numbers of tokens.

    python benchmarks/sampling.py [--runs 5] [--only short|long] [--llama] [--out docs/measured/engine.json]

8 completions each of 8 prompts, 64 new tokens. Greedy, so that all must write the same. The peers are
`transformers.generate` on the padded batch, the same under our float32 products, Transformers' continuous batching,
and, with --llama, llama.cpp on 4-bit weights: a limit, not a like for like. It has no wheel; put it there first with
`.venv-peers/bin/pip install llama-cpp-python`, which compiles for ten minutes.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import peak
import peers
from measured import Row, parser, report, row
from turns import Found, take_turns
from workload import text

from posttrain.data.chat import Renderer
from posttrain.machine import tune
from posttrain.models.cost import forward_flops_per_token
from posttrain.models.policy import Policy, outline
from posttrain.models.source import resolve
from posttrain.records import Example

HERE = Path(__file__).resolve().parent
PROMPTS, COMPLETIONS, NEW_TOKENS = 8, 8, 64
WORDS = {"short": (110, 140), "long": (500, 530)}
"""Of a prompt: about 180 and 600 tokens once rendered."""
GOALS = {"short": 3.0, "long": 5.0}
ONCE = {"onednn": "generate with our matrix products", "continuous": "Transformers' continuous batching"}
"""Run once beside the short prompts: no goal is set against them."""
LLAMA = {"llama": "llama.cpp, 4-bit weights"}


def main() -> None:
    options = parser(__doc__, "--runs", "--model", "--quick", "--out")
    options.add_argument("--only", choices=WORDS)
    options.add_argument("--llama", action="store_true")
    args = options.parse_args()
    tune()
    policy = outline(args.model)
    compute, bandwidth = peak.matmul(), peak.bandwidth()
    for length in [args.only] if args.only else WORDS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            job = _job(policy, args.model, length, args.quick)
            if args.llama:
                job["gguf"] = str(peers.gguf())
            (folder / "job.json").write_text(json.dumps(job))
            lengths = [len(ids) for ids in job["prompts"]]
            title = f"sampling, prompts of {min(lengths)} to {max(lengths)} tokens"
            runs = take_turns(_commands(folder, ["generate"]), 2 if args.quick else 1 + args.runs, folder)[1:]
            others = {**(ONCE if length == "short" else {}), **(LLAMA if args.llama else {})}
            once = take_turns(_commands(folder, list(others)), 2, folder)[1] if others else {}
        rows = compared(title, GOALS[length], runs)
        bound = _bound(policy, job, compute, bandwidth)
        shares = [bound / run["posttrain"]["seconds"] for run in runs]
        rows.append(row(f"{title}: share of the machine's bound", "share", shares))
        for how, what in others.items():
            rows.append(row(f"{title}: {what}", "tokens/s", [_speed(once[how])]))
        report(rows, args.out)


def _job(policy: Policy, source: str, length: str, quick: bool) -> dict[str, Any]:
    rng = random.Random(0)
    count, n, words = (2, 2, (4, 8)) if quick else (PROMPTS, COMPLETIONS, WORDS[length])
    texts = [text(rng, words) for _ in range(count)]
    renderer = Renderer(policy.tokenizer)
    ids = [renderer.prompt_ids(Example("", ({"role": "user", "content": asked},))) for asked in texts]
    return {
        "model": str(resolve(source)),
        "texts": texts,
        "n": n,
        "prompts": [list(row) for row in ids for _ in range(n)],
        "new_tokens": 4 if quick else NEW_TOKENS,
        "eos": sorted(policy.eos_ids),
    }


def _commands(folder: Path, others: list[str]) -> dict[str, list[str]]:
    python = str(peers.python())
    ours = {"posttrain": [sys.executable, str(HERE / "side_sampler.py"), str(folder)]}
    return ours | {how: [python, str(HERE / "side_generate.py"), str(folder), how] for how in others}


def compared(title: str, goal: float, runs: list[dict[str, Found]]) -> list[Row]:
    pairs = [(run["posttrain"], run["generate"]) for run in runs]
    same = [a == b for ours, theirs in pairs for a, b in zip(ours["ids"], theirs["ids"], strict=True)]
    memory = pairs[-1][0]["memory"] / pairs[-1][1]["memory"]
    return [
        row(f"{title}: speed against generate's", "times", [_speed(a) / _speed(b) for a, b in pairs], at_least=goal),
        row(f"{title}: peak memory against generate's", "share", [memory]),
        row(f"{title}: completions the same token for token", "share", [sum(same) / len(same)]),
        row(f"{title}: posttrain", "tokens/s", [_speed(a) for a, _ in pairs]),
        row(f"{title}: generate", "tokens/s", [_speed(b) for _, b in pairs]),
    ]


def _speed(found: Found) -> float:
    return found["written"] / found["seconds"]


def _bound(policy: Policy, job: dict[str, Any], compute: float, bandwidth: float) -> float:
    """Seconds that this work cannot be done below: each prompt once, then a step for each new token, which must read
    the weights and the keys and values it sees, and multiply. No completion ends early here but by its own end."""
    config, rows = policy.model.config, len(job["prompts"])
    distinct = {tuple(ids) for ids in job["prompts"]}
    seconds = sum(forward_flops_per_token(config, len(ids), 1 / len(ids)) * len(ids) for ids in distinct) / compute
    weights = 4 * policy.parameters_total
    heads = 2 * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    for step in range(1, job["new_tokens"]):
        held = sum(map(len, distinct)) + rows * step
        seen = sum(map(len, job["prompts"])) / rows + step
        # A token that sees n others costs what the tokens of a sequence of 2 n cost on average.
        flops = rows * forward_flops_per_token(config, 2 * round(seen))
        seconds += max((weights + 4 * config.num_hidden_layers * heads * held) / bandwidth, flops / compute)
    return seconds


if __name__ == "__main__":
    main()
