"""What must survive: kills, damage, full disks, numbers that are none. Rows as in docs/reliability.md.

`POSTTRAIN_RELIABILITY=full` (as `make test-reliability` sets it) takes the numbers stated there; otherwise fewer.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_checkpoint import names, put, step_of
from test_training_loop import DROPOUT, Killed, finite, killed_at
from tiny_runs import bad_loss, lengths, rows_of, run, same

from posttrain.models.policy import Policy
from posttrain.records import Rollout, Score, UserError
from posttrain.training import checkpoint
from posttrain.training.batch import Batch, Method
from posttrain.training.checkpoint import LATEST
from posttrain.training.loop import NonFinite

FULL = os.environ.get("POSTTRAIN_RELIABILITY") == "full"
PAGE = 4096


# Row 1: kills

STEPS, EVERY = 60, 4


def _train(folder: Path) -> None:
    torch.set_num_threads(1)
    run("sft", folder, steps=STEPS, checkpoint_every=EVERY)


def _complete_rows(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_kills_at_random_times_cost_at_most_one_interval_and_change_nothing(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_runs"])
    policy, _ = run("sft", tmp_path / "whole", steps=STEPS, checkpoint_every=EVERY)
    rows = rows_of(tmp_path / "whole/metrics.jsonl")
    rng, folder, kills, longest = random.Random(0), tmp_path / "out", 0, 1.0
    while kills < (200 if FULL else 20):
        child = context.Process(target=_train, args=(folder,))
        child.start()
        child.join(rng.uniform(0.0, longest))
        if child.exitcode is not None:
            assert child.exitcode == 0
            assert rows_of(folder / "metrics.jsonl") == rows
            shutil.rmtree(folder)
            longest *= 0.8
            continue
        child.kill()
        child.join()
        kills += 1
        taken = _complete_rows(folder / "metrics.jsonl")
        found = checkpoint.load(folder / "checkpoints", warn=pytest.fail)
        assert taken - (found[0] if found else 0) <= EVERY
    again, _ = run("sft", folder, steps=STEPS, checkpoint_every=EVERY)
    assert same(again.snapshot(), policy.snapshot())
    assert rows_of(folder / "metrics.jsonl") == rows
    assert (folder / "samples.jsonl").read_bytes() == (tmp_path / "whole/samples.jsonl").read_bytes()


# Row 2: resume from every step


def last_checkpoint(folder: Path) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]]:
    found = checkpoint.load(folder / "checkpoints", warn=pytest.fail)
    assert found is not None
    step, stored, state = found
    state["ledger"].pop("seconds")
    return step, {name: stored.read(name) for name in stored.forms}, state


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_resumed_from_every_step_it_ends_as_if_it_never_was(tmp_path, name):
    """Dropout stands for the random state, the rows' losses for the data's place."""
    steps = 40 if FULL else 8
    policy, ledger = run(name, tmp_path / "whole", DROPOUT, steps=steps, checkpoint_every=1)
    for step in range(steps):
        with pytest.raises(Killed):
            run(name, tmp_path / "out", DROPOUT, killed_at(step), steps=steps, checkpoint_every=1)
    again, ledger_again = run(name, tmp_path / "out", DROPOUT, steps=steps, checkpoint_every=1)
    assert same(again.snapshot(), policy.snapshot())
    assert dataclasses.replace(ledger_again, seconds=0) == dataclasses.replace(ledger, seconds=0)
    (step, tensors, state), (step_again, tensors_again, state_again) = map(
        last_checkpoint, (tmp_path / "whole", tmp_path / "out")
    )
    assert (step, state) == (step_again, state_again)
    assert any(n.endswith("/exp_avg_sq") for n in tensors)
    assert same(tensors, tensors_again)
    assert rows_of(tmp_path / "out/metrics.jsonl") == rows_of(tmp_path / "whole/metrics.jsonl")
    assert (tmp_path / "out/samples.jsonl").read_bytes() == (tmp_path / "whole/samples.jsonl").read_bytes()


# Row 3: how a step is cut


def watching(seen: list[Any]) -> Callable[[Method, Policy], None]:
    def change(method: Method, policy: Policy) -> None:
        inner = method.batch

        def batch(step: int) -> Batch:
            made = inner(step)
            seen.append(made.rows)
            return made

        method.batch = batch  # type: ignore[method-assign]

    return change


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_one_pass_of_eight_is_eight_of_one(tmp_path, name):
    """The same rows in the same order; losses and gradient norms to 1e-4. No two rows fit the smallest budget."""
    orders: list[list[Any]] = [[], []]
    runs = []
    for order, budget in zip(orders, (10**6, 16), strict=True):
        folder = tmp_path / str(budget)
        run(name, folder, change=watching(order), batch_size=8, tokens_per_forward=budget)
        runs.append(rows_of(folder / "metrics.jsonl"))
    assert orders[0] == orders[1]
    for a, b in zip(*runs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


# Row 4: damage


def damage_newest(folder: Path, damage: str, rng: random.Random) -> Path:
    """Flip one bit of, or cut, one file of the newest checkpoint, LATEST included; each file equally often."""
    files = [*sorted((folder / "step-000020").iterdir()), folder / LATEST]
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    else:
        data = data[: rng.randrange(len(data))]
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("damage", "times"), [("flip", 500 if FULL else 100), ("truncate", 100 if FULL else 50)])
def test_damage_is_always_noticed_and_the_previous_one_used(tmp_path, damage, times):
    rng = random.Random(0)
    put(tmp_path / "sound", 10)
    put(tmp_path / "sound", 20)
    for i in range(times):
        folder = shutil.copytree(tmp_path / "sound", tmp_path / str(i))
        path = damage_newest(folder, damage, rng)
        warnings: list[str] = []
        found = step_of(folder, warnings)
        assert warnings, path
        if path.name == LATEST:  # only the pointer is lost
            assert found == 20
            assert names(folder) == {"step-000010", "step-000020", LATEST}
        else:
            assert found == 10
            (kept,) = [name for name in names(folder) if name.startswith("damaged-step-000020-")]
            assert len(names(folder / kept)) == 3
            assert any(kept in warning for warning in warnings)
            assert any("step-000010" in warning for warning in warnings)
        put(folder, 30)
        assert step_of(folder) == 30
        shutil.rmtree(folder)


# Row 5: a disk that fills up


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[int], None]]:
    """A small disk at `tmp_path / "disk"`, and how to give it another size in bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={1 << 24}", "posttrain-test", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small disk cannot be mounted: {getattr(error, 'stderr', error)}")

    def resize(size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)

    yield resize
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # what was read may still be mapped


def used(folder: Path) -> int:
    facts = os.statvfs(folder)
    return (facts.f_blocks - facts.f_bfree) * facts.f_frsize


def message_of(go: Callable[[], object]) -> str | None:
    """What the user is told, where it does not go through."""
    try:
        go()
    except UserError as error:
        return str(error)
    return None


def test_disk_full_at_each_write_of_a_checkpoint(tmp_path, disk):
    """A page more room each time, until a save goes through: every write of it was refused once."""
    folder = tmp_path / "disk"
    put(folder, 10)
    before, refused = used(folder), 0
    while True:
        disk(before + refused * PAGE)
        told = message_of(lambda: put(folder, 20))
        if told is None:
            break
        assert f"checkpoint of step 20 in {folder}" in told
        assert "It needs " in told
        assert step_of(folder) == 10
        assert names(folder) - {"step-000020"} == {"step-000010", LATEST}
        shutil.rmtree(folder / "step-000020", ignore_errors=True)  # whole, where only LATEST was refused
        refused += 1
    assert refused >= 4  # tensors, state, manifest, LATEST
    assert step_of(folder) == 20


def test_disk_full_at_each_write_of_a_run(tmp_path, disk):
    whole, _ = run("sft", tmp_path / "whole")
    size, refused = 16 * PAGE, 0
    while True:
        disk(size)
        told = message_of(lambda: run("sft", tmp_path / "disk/out", checkpoint_every=3))
        if told is None:
            break
        assert str(tmp_path / "disk/out") in told
        refused += 1
        found = checkpoint.load(tmp_path / "disk/out/checkpoints", warn=pytest.fail)
        assert found is None or finite(found[1])
        size += PAGE if FULL else 16 * PAGE
        if refused % 2:  # else it begins anew
            shutil.rmtree(tmp_path / "disk/out", ignore_errors=True)
    assert refused > 10
    policy, _ = run("sft", tmp_path / "disk/out", checkpoint_every=3)
    assert same(policy.snapshot(), whole.snapshot())
    assert rows_of(tmp_path / "disk/out/metrics.jsonl") == rows_of(tmp_path / "whole/metrics.jsonl")


# Row 6: numbers that are none

AT = 4


def bad_gradient(bad: float) -> Callable[[Method, Policy], None]:
    def change(method: Method, policy: Policy) -> None:
        inner = method.batch
        now = 0

        def batch(step: int) -> Batch:
            nonlocal now
            now = step
            return inner(step)

        def hook(gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.clone()
            gradient.view(-1)[7] = bad if now == AT else gradient.view(-1)[7]
            return gradient

        method.batch = batch  # type: ignore[method-assign]
        next(iter(policy.parameters().values())).register_hook(hook)

    return change


def check_nothing_bad_is_kept(folder: Path, nonfinite: str, go: Callable[[], object]) -> None:
    """With `stop` the step ends the run; with `skip` it counts as skipped, and the run ends well."""
    if nonfinite == "stop":
        with pytest.raises(NonFinite, match=f"step {AT}"):
            go()
        assert [row["step"] for row in rows_of(folder / "metrics.jsonl")] == list(range(AT))
    else:
        go()
        assert [row["skipped"] for row in rows_of(folder / "metrics.jsonl")] == [int(step == AT) for step in range(8)]
    found = checkpoint.load(folder / "checkpoints", warn=pytest.fail)
    assert found is not None
    assert found[0] == (AT if nonfinite == "stop" else 7)
    assert finite(found[1])


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [partial(bad_loss, AT), bad_gradient], ids=["loss", "gradient"])
@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_no_bad_number_reaches_a_checkpoint(tmp_path, name, where, bad, nonfinite):
    check_nothing_bad_is_kept(
        tmp_path,
        nonfinite,
        lambda: run(name, tmp_path, change=where(bad), checkpoint_every=1, nonfinite=nonfinite),
    )


def bad_reward(bad: float) -> Callable[[Method, Policy], None]:
    """Of one completion of step `AT`."""

    def change(method: Any, policy: Policy) -> None:
        inner = method.batch
        left = 0

        def batch(step: int) -> Batch:
            nonlocal left
            left = int(step == AT)
            return inner(step)

        def score(rollouts: Sequence[Rollout]) -> list[Score]:
            nonlocal left
            found = [lengths(r.example, r.text) for r in rollouts]
            if left:
                found[0], left = Score(bad, "correct"), 0
            return found

        method.batch, method.score = batch, score

    return change


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_reward_that_is_no_number_counts_as_unscored(tmp_path, name, bad):
    settings = {"batch_size": 2, "n": 4, "iterations": 1, "minibatches": 1}
    run(name, tmp_path, change=bad_reward(bad), checkpoint_every=1, **settings)
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert [row["unscored"] for row in rows] == [1 / 8 if step == AT else 0 for step in range(8)]
    assert all(row["skipped"] == 0 for row in rows)
    found = checkpoint.load(tmp_path / "checkpoints", warn=pytest.fail)
    assert found is not None
    assert finite(found[1])
