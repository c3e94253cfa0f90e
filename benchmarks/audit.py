"""Let the verifier of every generated task prove itself: docs/measured/tasks.json says which hold, and why others not.

    python benchmarks/audit.py [--items 32] [TASK ...]

Items are those of seed 5 with the generator's own settings. A task is generated and scored in a process of its own, so
that one which hangs or dies is recorded like the others.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from posttrain.data import tasks
from posttrain.records import Example, Score, UserError
from posttrain.rewards.protocol import judged
from posttrain.rewards.prove import prove
from posttrain.rewards.verifier import EVALUATED, RULE

OUT = Path(__file__).resolve().parent.parent / "docs" / "measured" / "tasks.json"
SEED = 5
LIMIT_S = 120
SLOW_S = 1.0
"""Seconds for one answer, above which a task's scorer is too slow to train with."""


def audit(name: str, items: int) -> dict[str, Any]:
    """Whether the verifier of task `name` holds on so many items, and the kinds of its failures; to be slow is one."""
    slowest = 0.0

    def timed(example: Example, text: str) -> Score:
        nonlocal slowest
        began = time.perf_counter()
        score = judged(RULE, example, text)
        slowest = max(slowest, time.perf_counter() - began)
        return score

    try:
        examples = tasks.load(name, items, SEED, {})
        judged(RULE, examples[0], "x")  # some read their word lists now
        failures = prove(RULE, examples, timed)
    except UserError as error:
        failures = [f"{name}: {error}"]
    if slowest > SLOW_S:
        failures.append(f"{name}: one answer took {slowest:.1f} s")
    return {"task": name, "holds": not failures, "why": cause(failures), "items": items}


def cause(failures: list[str]) -> str:
    """The kinds of failures, the most frequent first, without the items they were met in."""
    kinds = Counter(
        re.sub(r"^\S+#\d+: |: ['\"].*$", "", re.sub(r"\d+%", "too many", failure), flags=re.DOTALL).strip()
        for failure in failures
    )
    return "; ".join(kind for kind, _ in kinds.most_common(3))


def _into(pipe: Any, name: str, items: int) -> None:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        pipe.send(audit(name, items))


def audited(name: str, items: int) -> dict[str, Any]:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_into, args=(theirs, name, items), daemon=True)
    process.start()
    theirs.close()
    try:
        if ours.poll(LIMIT_S):
            found: dict[str, Any] = ours.recv()
            return found
        why = f"making or scoring {items} items took longer than {LIMIT_S} s"
    except EOFError:
        why = "its process died"
    finally:
        process.kill()
        process.join()
    return {"task": name, "holds": False, "why": why, "items": items}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK")
    parser.add_argument("--items", type=int, default=32)
    given = parser.parse_args()
    rows = []
    for name in given.tasks or tasks.names():
        rows.append(audited(name, given.items))
        print(f"{name}: {'holds' if rows[-1]['holds'] else rows[-1]['why']}", flush=True)
    if not given.tasks:
        made = {
            "command": f"python benchmarks/audit.py --items {given.items}",
            "reasoning_gym": version("reasoning_gym"),
        }
        OUT.write_text(json.dumps({**made, "screened": sorted(EVALUATED), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
