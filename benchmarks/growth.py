"""How the cost of a gradient grows, packed and shared against padded: one axis at a time, the others fixed.

    python benchmarks/growth.py [--out docs/measured/growth.json]

Both in this process, on a random model, under the same float32 products: what differs is the layout alone. The other
side is what the libraries do: every row whole, padded to the longest, logits at every position. One call to warm up
and the best of two for each point. The curve over workers is the one of `cluster.py`.
"""

from __future__ import annotations

import functools
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from measured import parser
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.forest import Row, pack, split, token_logprobs
from posttrain.machine import tune

VOCAB = 4096
TOKENS = 1024
"""Of one forward pass of ours."""
SIZES = {"1M": (128, 4), "5M": (256, 6), "20M": (448, 9), "60M": (704, 11), "150M": (960, 14), "500M": (1536, 18)}
"""Hidden size and layers; an MLP of 8/3 the hidden size makes about 12 hidden^2 weights a layer."""
USUAL = "5M"


class Point(NamedTuple):
    """A batch: so many prompts with so many completions each, lengths in tokens."""

    prompts: int = 4
    group: int = 1
    prompt: int = 64
    completion: int = 64
    size: str = USUAL


CURVES: dict[str, tuple[str, dict[Any, Point]]] = {
    "length": (
        "tokens of a sequence, half of it prompt",
        {n: Point(prompt=n // 2, completion=n // 2) for n in (64, 128, 256, 512, 1024)},
    ),
    "group": ("completions per prompt", {g: Point(2, g, 128, 32) for g in (1, 2, 4, 8, 16)}),
    "ratio": (
        "prompt over completion, 8 completions a prompt",
        {r: Point(1, 8, 32 * r, 32) for r in (1, 2, 4, 8, 16)},
    ),
    "batch": ("rows in a batch of uneven lengths", {b: Point(b) for b in (1, 2, 4, 8, 16, 32)}),
    "size": ("weights of the model, in millions", {int(s[:-1]): Point(2, 2, 64, 32, s) for s in SIZES}),
}


def main() -> None:
    options = parser(__doc__, "--quick", "--out")
    options.add_argument("--only", choices=CURVES)
    args = options.parse_args()
    tune()
    found = {name: curve(name, args.quick) for name in ([args.only] if args.only else CURVES)}
    if args.out:
        before = json.loads(args.out.read_text()) if args.out.exists() else {}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(before | found, indent=2) + "\n")


def curve(name: str, quick: bool) -> dict[str, Any]:
    axis, points = CURVES[name]
    found = []
    for x, point in list(points.items())[: 2 if quick else None]:
        model, rows = made(point.size), list(batch(point))
        ours, theirs = (_seconds(functools.partial(step, model, rows)) for step in (packed, padded))
        found.append({"x": x, "posttrain": ours, "padded": theirs})
        print(f"{name:7} {x:>5}: {ours:7.3f} s packed, {theirs:7.3f} s padded, {theirs / ours:5.2f} times", flush=True)
    return {"axis": axis, "unit": "seconds a step", "points": found}


@functools.lru_cache(1)
def made(size: str) -> LlamaForCausalLM:
    hidden, layers = SIZES[size]
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def batch(point: Point) -> Iterator[Row]:
    """Rows of random tokens. Lengths lie between half of the named one and one and a half, prompts of a group alike."""
    rng = random.Random(0)

    def ids(about: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCAB) for _ in range(rng.randint(about // 2, about * 3 // 2)))

    for _ in range(point.prompts):
        prompt = ids(point.prompt)
        for _ in range(point.group):
            completion = ids(point.completion)
            yield Row(prompt, completion, (True,) * len(completion))


def packed(model: LlamaForCausalLM, rows: Sequence[Row]) -> torch.Tensor:
    """The gradient of the summed log-probabilities, as the training loop takes it; returns the sum."""
    total = torch.zeros(())
    for units in split(rows, [(i,) for i in range(len(rows))], TOKENS):
        part = token_logprobs(model, pack([rows[i] for i in units])).sum()
        part.backward()
        total += part.detach()
    return total


def padded(model: LlamaForCausalLM, rows: Sequence[Row]) -> torch.Tensor:
    """The same, the usual way."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row.context, *row.completion, *[0] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    wanted = torch.tensor(
        [[0] * len(row.context) + [1] * len(row.completion) + [0] * (longest - len(row)) for row in rows]
    )
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    total = (logps * wanted[:, 1:]).sum()
    total.backward()
    return total.detach()


def _seconds(step: Callable[[], torch.Tensor]) -> float:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
        if times[0] > 10:
            break
    return min(times[1:] or times)


if __name__ == "__main__":
    main()
