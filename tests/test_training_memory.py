"""Memory that ends: for real, in a process that may not grow further, and at each place where it can."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_policy
from tiny_runs import SEED, method_of, stage_of

from posttrain.training.loop import train
from posttrain.training.oom import ONEDNN, OutOfMemory, halving

PROGRAM = """
import json, resource, sys
from pathlib import Path
import torch
from tiny import tiny_policy
from tiny_runs import prepared, sft, stage_of, turn
from posttrain.models.policy import weights_digest
from posttrain.records import Example, Failure
from posttrain.training.loop import train

folder, budget, limit, precision = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
onednn = torch.backends.mkldnn
onednn.matmul.fp32_precision = precision
words = "the quick brown fox jumps over the lazy dog and does not mind ".split()
data = prepared([
    Example(f"e:{i}", (turn("user", f"{i}?"),), (turn("assistant", " ".join(words[(i + j) % 12] for j in range(i))),))
    for i in range(1, 49)
])

def trained(folder, budget, **settings):
    policy, said = tiny_policy(intermediate_size=2048), []
    stage = stage_of("sft", tokens_per_forward=budget, checkpoint_every=100, check_first_step=False, **settings)
    train(policy, sft(stage, data), stage, folder, 0, warn=said.append)
    row = json.loads((folder / "metrics.jsonl").read_text())
    found = [row["loss"], row["grad_norm"]]
    return {"digest": weights_digest(policy.weights()), "said": said, "found": found, "onednn": onednn.enabled}

trained(folder / "warm", 64, steps=1, batch_size=1)
if limit:
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + limit, now + limit))
try:
    print(json.dumps(trained(folder / "run", budget, steps=1, batch_size=48)))
except Failure as error:
    print(json.dumps({"failure": str(error)}))
"""
REAL = pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")


def ran(folder: Path, budget: int, limit: int = 0, precision: str = "none") -> Any:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(budget), str(limit), precision],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@REAL
@pytest.mark.parametrize("precision", ["none", "bf16"])  # PyTorch's own products, and oneDNN's, which `tune` chooses
def test_a_step_that_does_not_fit_is_taken_in_smaller_passes(tmp_path: Path, precision: str) -> None:
    tight = ran(tmp_path / "tight", 8192, 280_000_000, precision)
    assert all("out of memory" in text for text in tight["said"])
    passes = re.findall(r"passes of (\d+)", " ".join(tight["said"]))
    assert passes
    wide = ran(tmp_path / "wide", int(passes[-1]), precision=precision)
    assert wide["said"] == []
    assert wide["found"] == pytest.approx(tight["found"], rel=1e-4)
    if tight["onednn"]:  # it did not fail on the way
        assert wide["digest"] == tight["digest"]


@REAL
def test_where_one_row_does_not_fit_the_run_says_so(tmp_path: Path) -> None:
    found = ran(tmp_path, 8192, 1_000_000)
    assert "out of memory" in found["failure"]
    assert "activation_checkpointing" in found["failure"]


@pytest.fixture
def onednn() -> Iterator[None]:
    yield
    torch.backends.mkldnn.enabled = True


@pytest.mark.usefixtures("onednn")
def test_without_memory_for_onednn_the_same_is_tried_without_it() -> None:
    tried, said = [], []

    def run(tokens: int) -> str:
        tried.append((tokens, torch.backends.mkldnn.enabled))
        if torch.backends.mkldnn.enabled:
            raise RuntimeError(ONEDNN)
        if tokens > 64:
            raise MemoryError
        return "done"

    assert halving(run, 128, 100, "a step", "", said.append) == ("done", 64)
    assert tried == [(128, True), (128, False), (64, False)]
    assert "without oneDNN" in said[0]


@pytest.mark.parametrize(("smallest", "tried"), [(20, [128, 64, 32, 16]), (None, [128])])
def test_halving_ends_below_the_smallest_unit(smallest: int | None, tried: list[int]) -> None:
    seen = []

    def run(tokens: int) -> None:
        seen.append(tokens)
        raise MemoryError

    with pytest.raises(OutOfMemory, match=rf"in a step, in passes of {tried[-1]} tokens.*Do so"):
        halving(run, 128, smallest, "a step", "Do so", lambda text: None)
    assert seen == tried


def test_another_error_is_not_taken_for_it() -> None:
    def run(tokens: int) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        halving(run, 128, 1, "a step", "", lambda text: None)


def short(monkeypatch: pytest.MonkeyPatch, place: str, above: int) -> None:
    """No memory for a packed row of more than `above` tokens in that place."""
    inner = sys.modules[place].pack

    def pack(rows: Any) -> Any:
        forest = inner(rows)
        if len(forest) > above:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return forest

    monkeypatch.setattr(f"{place}.pack", pack)


def test_the_first_steps_check_looks_at_fewer_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, stage, said = tiny_policy(), stage_of("sft", batch_size=8, steps=1), []
    short(monkeypatch, "posttrain.training.oracle", above=100)
    train(policy, method_of("sft", policy, stage), stage, tmp_path, SEED, warn=said.append)
    assert said[-1] == "out of memory in the first step's check: again in passes of 64 tokens"
    assert json.loads((tmp_path / "oracle.json").read_text())["tokens"] <= 64


def test_a_check_that_does_not_fit_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, stage = tiny_policy(), stage_of("sft")
    short(monkeypatch, "posttrain.training.oracle", above=1)
    with pytest.raises(OutOfMemory, match=r"first step's check.*check_first_step: false"):
        train(policy, method_of("sft", policy, stage), stage, tmp_path, SEED)


def test_sampling_that_does_not_fit_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, stage = tiny_policy(), stage_of("grpo")
    method = method_of("grpo", policy, stage)
    short(monkeypatch, "posttrain.sampling.local", above=1)
    with pytest.raises(OutOfMemory, match=r"rows of step 0.*Lower max_new_tokens, n or batch_size"):
        train(policy, method, stage, tmp_path, SEED)
