"""The loop: killed and continued it is the run that was not, and what goes wrong is told and never kept."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_policy
from tiny_runs import STAGES, bad_loss, rows_of, run, same, sft, stage_of

from posttrain.models.policy import Policy
from posttrain.recipe.blocks import Lora
from posttrain.records import Failure, UserError
from posttrain.training import checkpoint
from posttrain.training.batch import Batch, Method
from posttrain.training.loop import NonFinite, train

DROPOUT = Lora(r=2, alpha=4, dropout=0.3)
RUNS = [*((name, None, every) for name in STAGES for every in (1, 2, 3)), *((name, DROPOUT, 2) for name in STAGES)]


class Killed(BaseException):
    """Ends the run where it stands: no handler for errors runs."""


def killed_at(step: int) -> Callable[[dict[str, Any]], None]:
    def on_step(row: dict[str, Any]) -> None:
        if row["step"] == step:
            raise Killed

    return on_step


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Callable[..., tuple[dict[str, torch.Tensor], Path, Any]]:
    """Weights, folder and ledger of the run that nothing interrupts, one for each method and adapter."""
    done: dict[Any, Any] = {}

    def get(name: str, adapter: Lora | None):
        if (name, adapter) not in done:
            folder = tmp_path_factory.mktemp("whole")
            policy, ledger = run(name, folder, adapter)
            done[name, adapter] = policy.snapshot(), folder, dataclasses.replace(ledger, seconds=0)
        return done[name, adapter]

    return get


@pytest.mark.parametrize(("name", "adapter", "every"), RUNS, ids=lambda v: "lora" if isinstance(v, Lora) else str(v))
def test_killed_at_every_step_it_ends_as_if_it_never_was(tmp_path, whole, name, adapter, every):
    weights, folder, ledger = whole(name, adapter)
    for step in range(8):
        with pytest.raises(Killed):
            run(name, tmp_path, adapter, killed_at(step), checkpoint_every=every)
    policy, again = run(name, tmp_path, adapter, checkpoint_every=every)
    assert same(policy.snapshot(), weights)
    assert rows_of(tmp_path / "metrics.jsonl") == rows_of(folder / "metrics.jsonl")
    assert (tmp_path / "samples.jsonl").read_bytes() == (folder / "samples.jsonl").read_bytes()
    assert dataclasses.replace(again, seconds=0) == ledger


@pytest.mark.parametrize("name", STAGES)
def test_a_run_learns_something_at_every_step(whole, name):
    """Else the tests here would compare runs that do nothing."""
    weights, folder, _ = whole(name, None)
    start = tiny_policy().snapshot()
    assert not any(torch.equal(weights[n], start[n]) for n in weights.keys() & start.keys())
    assert all(row["grad_norm"] > 0 for row in rows_of(folder / "metrics.jsonl"))


@pytest.mark.parametrize("name", STAGES)
def test_every_step_has_one_row_of_plain_json(whole, name):
    rows = rows_of(whole(name, None)[1] / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(8))
    assert all(row["skipped"] == 0 and row["tokens"] > 0 and math.isfinite(row["loss"]) for row in rows)


def test_a_sample_is_one_line_to_every_reader(whole):
    """Answers here hold U+2028 and U+0085, at which Python's text splits lines."""
    path = whole("dpo", None)[1] / "samples.jsonl"
    assert any("\u2028" in row["text"] for row in rows_of(path))
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows_of(path)


def test_the_ledger_adds_up_to_the_rows(whole):
    _, folder, ledger = whole("grpo", None)
    rows = rows_of(folder / "metrics.jsonl")
    assert ledger.generated_tokens == sum(round(row["length"] * 8) for row in rows)
    assert ledger.trained_tokens + ledger.generated_tokens == sum(row["tokens"] for row in rows)
    assert ledger.shared_tokens > 0
    assert ledger.flops > 0


CHILD = """
import os, signal, sys
from pathlib import Path
from tiny_runs import run

def on_step(row):
    if row["step"] == 5:
        os.kill(os.getpid(), signal.SIGKILL)

run("grpo", Path(sys.argv[1]), on_step=on_step, checkpoint_every=2)
"""


def test_a_killed_process_is_continued(tmp_path, whole):
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    child = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], env={**os.environ, "PYTHONPATH": path})
    assert child.returncode == -signal.SIGKILL
    assert rows_of(tmp_path / "metrics.jsonl")[-1]["step"] == 5
    weights, folder, _ = whole("grpo", None)
    steps: list[int] = []
    policy, _ = run("grpo", tmp_path, on_step=lambda row: steps.append(row["step"]), checkpoint_every=2)
    assert steps == [4, 5, 6, 7]
    assert same(policy.snapshot(), weights)
    assert rows_of(tmp_path / "metrics.jsonl") == rows_of(folder / "metrics.jsonl")


@pytest.mark.parametrize(
    "torn", [b'{"step": 4, "loss": 1.', b'{"step": 4, "text": "\xc3', b'{"step": 4}', b"\x00\x00\n"]
)
def test_a_line_that_was_cut_short_is_written_again(tmp_path, whole, torn):
    with pytest.raises(Killed):
        run("dpo", tmp_path, on_step=killed_at(4), checkpoint_every=2)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(tmp_path / name, "ab") as file:
            file.write(torn)
    run("dpo", tmp_path, checkpoint_every=2)
    folder = whole("dpo", None)[1]
    assert rows_of(tmp_path / "metrics.jsonl") == rows_of(folder / "metrics.jsonl")
    assert (tmp_path / "samples.jsonl").read_bytes() == (folder / "samples.jsonl").read_bytes()


def test_a_finished_run_runs_its_last_steps_again_to_the_same_end(tmp_path, whole):
    """The trained model is the caller's to save; killed before it did, it asks again."""
    run("sft", tmp_path, checkpoint_every=3)
    policy, _ = run("sft", tmp_path, on_step=lambda row: None, checkpoint_every=3)
    assert same(policy.snapshot(), whole("sft", None)[0])
    assert len(rows_of(tmp_path / "metrics.jsonl")) == 8


def test_checkpoints_come_as_often_after_a_kill(tmp_path):
    with pytest.raises(Killed):
        run("sft", tmp_path, on_step=killed_at(4), checkpoint_every=3)
    with pytest.raises(Killed):
        run("sft", tmp_path, on_step=killed_at(5), checkpoint_every=3)
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-000003"]


def test_checkpoints_come_only_where_a_batch_is_used_up(tmp_path):
    with pytest.raises(Killed):
        run("grpo twice", tmp_path, on_step=killed_at(5), checkpoint_every=1)
    assert {path.name for path in (tmp_path / "checkpoints").glob("step-*")} == {"step-000002", "step-000004"}


@pytest.mark.parametrize("adapter", [Lora(r=4), Lora(r=2, targets=("q_proj",)), None])
def test_a_checkpoint_of_another_model_is_refused(tmp_path, adapter):
    with pytest.raises(Killed):
        run("sft", tmp_path, Lora(r=2), killed_at(3), checkpoint_every=1)
    with pytest.raises(UserError, match=r"another model or adapter; choose another --out"):
        run("sft", tmp_path, adapter, checkpoint_every=1)


def test_dropout_thins_the_gradient_and_nothing_else(tmp_path):
    """What is sampled is the policy itself: the trainer's log-probs differ from the sampler's by dropout alone."""
    seen: list[bool] = []

    def watch(method: Method, policy: Policy) -> None:
        inner_batch, inner_loss = method.batch, method.loss
        drops = [
            m for n, m in policy.model.named_modules() if ".lora_dropout." in n and isinstance(m, torch.nn.Dropout)
        ]

        def batch(step: int) -> Batch:
            assert drops
            assert not any(m.training for m in drops)
            return inner_batch(step)

        def loss(*args: Any) -> Any:
            seen.append(all(m.training for m in drops))
            return inner_loss(*args)

        method.batch, method.loss = batch, loss  # type: ignore[method-assign]

    policy, _ = run("grpo", tmp_path, DROPOUT, change=watch)
    assert seen
    assert all(seen)
    assert not any(m.training for m in policy.model.modules())


# What is not finite


def finite(stored: checkpoint.Stored) -> bool:
    return all(bool(stored.read(name).isfinite().all()) for name in stored.forms)


@pytest.mark.parametrize("name", STAGES)
def test_stop_names_step_and_batch_and_keeps_what_was_before(tmp_path, whole, name):
    with pytest.raises(NonFinite, match=r"stage 'toy', step 5: loss nan") as caught:
        run(name, tmp_path, change=bad_loss(5), checkpoint_every=2)
    kept = tmp_path / "nonfinite-step-5.json"
    assert str(kept) in str(caught.value)
    rows = json.loads(kept.read_text())["rows"]
    assert rows
    assert all(len(row["completion"]) == len(row["target"]) for row in rows)
    assert [row["step"] for row in rows_of(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    found = checkpoint.load(tmp_path / "checkpoints", warn=pytest.fail)
    assert found is not None
    assert found[0] == 4
    assert finite(found[1])
    # With the cause gone, the same command goes on from there to the same end.
    policy, _ = run(name, tmp_path, checkpoint_every=2)
    assert same(policy.snapshot(), whole(name, None)[0])


@pytest.mark.parametrize("name", STAGES)
def test_skip_leaves_the_step_out_and_counts_it(tmp_path, name):
    weights: list[dict[str, torch.Tensor]] = []
    policies: list[Policy] = []

    def change(method: Method, policy: Policy) -> None:
        policies.append(policy)
        bad_loss(4)(method, policy)

    def on_step(row: dict[str, Any]) -> None:
        weights.append(policies[0].snapshot())

    run(name, tmp_path, on_step=on_step, change=change, nonfinite="skip", checkpoint_every=1)
    assert [same(a, b) for a, b in itertools.pairwise(weights)] == [step == 3 for step in range(7)]
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 0, 0, 0, 1, 0, 0, 0]
    assert rows[4]["loss"] is None
    assert rows[4]["grad_norm"] is None
    found = checkpoint.load(tmp_path / "checkpoints", warn=pytest.fail)
    assert found is not None
    assert finite(found[1])


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_a_poisoned_weight_is_found_at_once(tmp_path, name, nonfinite):
    """NaN in one weight at step 5: no update comes of it, and no checkpoint after it."""

    def change(method: Method, policy: Policy) -> None:
        inner = method.batch

        def batch(step: int) -> Batch:
            if step == 5:
                with torch.no_grad():
                    next(iter(policy.parameters().values()))[7, 3] = math.nan
            return inner(step)

        method.batch = batch  # type: ignore[method-assign]

    # GRPO meets it where it samples, the others in the step.
    with pytest.raises(Failure, match=r"logits are NaN|step 5"):
        run(name, tmp_path, change=change, nonfinite=nonfinite, checkpoint_every=1)
    found = checkpoint.load(tmp_path / "checkpoints", warn=pytest.fail)
    assert found is not None
    assert finite(found[1])


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_an_update_that_overflows_is_not_kept(tmp_path, nonfinite):
    with pytest.raises(NonFinite, match=r"step 0: weights are NaN or infinite after it"):
        run(
            "sft",
            tmp_path,
            nonfinite=nonfinite,
            checkpoint_every=1,
            optim={"lr": 1e38, "weight_decay": 1e9, "warmup": 0},
        )
    assert not (tmp_path / "checkpoints").exists()


# What the disk refuses


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written"):
        run("sft", tmp_path / "file" / "out")


def test_a_folder_that_is_a_file_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written"):
        run("sft", tmp_path / "file")


def test_a_read_only_folder_is_told(read_only_folder):
    folder, locked = read_only_folder
    with locked(), pytest.raises(UserError, match=r"cannot be written"):
        run("sft", folder)


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_a_disk_that_fills_up_is_told_and_the_run_continues_when_there_is_room(tmp_path, whole, name):
    """A limit on the size of files stands in for the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step(row: dict[str, Any]) -> None:
        if row["step"] == 5:
            room = max((tmp_path / f).stat().st_size for f in ("metrics.jsonl", "samples.jsonl")) + 40
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))

    try:
        with pytest.raises(UserError, match=r"cannot be written \(File too large\).*checkpoints are intact") as caught:
            run(name, tmp_path, on_step=on_step, checkpoint_every=5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path) in str(caught.value)
    policy, _ = run(name, tmp_path, checkpoint_every=5)
    assert same(policy.snapshot(), whole(name, None)[0])
    assert rows_of(tmp_path / "metrics.jsonl") == rows_of(whole(name, None)[1] / "metrics.jsonl")


def test_a_checkpoint_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="cannot write the checkpoint of step 2"):
        run("sft", tmp_path, checkpoint_every=2)


def test_the_batch_of_a_stopped_step_is_lost_without_hiding_why(tmp_path):
    (tmp_path / "nonfinite-step-1.json").mkdir()
    with pytest.raises(NonFinite, match=r"step 1: loss nan.*its batch is lost"):
        run("sft", tmp_path, change=bad_loss(1))


def test_a_model_with_nothing_to_train_is_refused(tmp_path):
    policy = tiny_policy()
    policy.model.requires_grad_(False)
    stage = stage_of("sft")
    with pytest.raises(UserError, match="no parameter requires a gradient"):
        train(policy, sft(stage), stage, tmp_path, 0)
