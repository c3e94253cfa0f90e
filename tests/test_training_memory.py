"""Memory that ends, for real: a process that may not grow further takes its step in smaller passes, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import json, resource, sys
from pathlib import Path
import torch
from tiny import tiny_policy
from tiny_runs import prepared, sft, stage_of, turn
from posttrain.models.policy import weights_digest
from posttrain.records import Example, Failure
from posttrain.training.loop import train

# PyTorch's default products: with oneDNN's the digests below differ, and why is not known yet.
torch.backends.mkldnn.matmul.fp32_precision = "none"
folder, budget, limit = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
words = "the quick brown fox jumps over the lazy dog and does not mind ".split()
data = prepared([
    Example(f"e:{i}", (turn("user", f"{i}?"),), (turn("assistant", " ".join(words[(i + j) % 12] for j in range(i))),))
    for i in range(1, 49)
])

def trained(folder, budget, **settings):
    policy, said = tiny_policy(intermediate_size=2048), []
    stage = stage_of("sft", tokens_per_forward=budget, checkpoint_every=100, check_first_step=False, **settings)
    train(policy, sft(stage, data), stage, folder, 0, warn=said.append)
    return weights_digest(policy.weights()), said

trained(folder / "warm", 64, steps=1, batch_size=1)
if limit:
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + limit, now + limit))
try:
    digest, said = trained(folder / "run", budget, steps=1, batch_size=48)
    print(json.dumps({"digest": digest, "said": said}))
except Failure as error:
    print(json.dumps({"failure": str(error)}))
"""


def ran(folder: Path, budget: int, limit: int = 0) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(budget), str(limit)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")
def test_a_step_that_does_not_fit_is_taken_in_smaller_passes(tmp_path: Path) -> None:
    tight = ran(tmp_path / "tight", budget=8192, limit=200_000_000)
    assert tight["said"]
    assert "out of memory" in tight["said"][0]
    small = int(tight["said"][-1].split("passes of ")[1].split()[0])
    assert small < 8192
    wide = ran(tmp_path / "wide", budget=small)
    assert wide == {"digest": tight["digest"], "said": []}


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")
def test_where_one_row_does_not_fit_the_run_says_so(tmp_path: Path) -> None:
    found = ran(tmp_path, budget=8192, limit=1_000_000)
    assert "out of memory" in found["failure"]
    assert "activation_checkpointing" in found["failure"]
