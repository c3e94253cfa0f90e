"""Checkpoints of several workers: each its rows, read back by any other number of them, whole or not there at all."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import tiny_policy
from tiny_runs import SEED, rows_of, same, sft, stage_of
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from workers import together

from posttrain.cluster.sharded import shard
from posttrain.records import UserError
from posttrain.training import checkpoint
from posttrain.training.batch import Batch
from posttrain.training.checkpoint import Writer, load
from posttrain.training.loop import train
from posttrain.training.world import Distributed

SIZES = (1, 2, 3)
CUT = {"even": (6, 3), "uneven": (7, 2, 2), "short": (2, 5), "one": (1,), "none": (0, 3), "vector": (10,)}


def whole(step: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(step)
    tensors = {name: torch.randn(shape, generator=rng) for name, shape in CUT.items()}
    return {
        **tensors,
        "bfloat16": tensors["even"].bfloat16(),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "everywhere": torch.randn(3, generator=rng),
        "count": torch.tensor(float(step)),
    }


def spread(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As FSDP2 has them: rows cut over the workers, but for what all of them hold."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    held = {"count": None, "everywhere": Replicate()}
    return {
        name: tensor
        if held.get(name, Shard(0)) is None
        else distribute_tensor(tensor, mesh, [held.get(name, Shard(0))])
        for name, tensor in tensors.items()
    }


def put(folder: Path, *steps: int) -> None:
    with Writer(folder, Distributed()) as writer:
        for step in steps:
            writer.save(step, spread(whole(step)), {"step": step})


def bits(tensor: Tensor) -> bytes:
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def get(folder: Path) -> tuple[int | None, list[str]]:
    """Step of what `load` gives, once it is that step's content bit for bit, and the warnings."""
    warnings: list[str] = []
    found = load(folder, warnings.append, Distributed())
    if found is None:
        return None, warnings
    step, stored, state = found
    assert state == {"step": step}
    expected = whole(step)
    assert stored.forms == {name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()}
    for name, tensor in spread(expected).items():
        read = stored.like(name, tensor)
        if isinstance(tensor, DTensor):
            assert isinstance(read, DTensor)
            assert bits(read.to_local()) == bits(tensor.to_local()), name
        assert bits(read) == bits(expected[name]), name
    return step, warnings


def get_all(folders: list[Path]) -> list[Any]:
    return [get(folder) for folder in folders]


def test_any_number_of_workers_reads_what_any_number_wrote(tmp_path):
    folders = [tmp_path / str(size) for size in SIZES]
    for size, folder in zip(SIZES, folders, strict=True):
        together(size, put, folder, 10, 20)
        files = sorted(path.name for path in (folder / "step-000020").glob("tensors-*"))
        assert files == [f"tensors-{rank:05d}.safetensors" for rank in range(size)]
    for size in SIZES:
        assert together(size, get_all, folders) == [[(20, [])] * len(SIZES)] * size


def test_each_row_is_written_once(tmp_path):
    together(3, put, tmp_path, 1)
    held = sum(tensor.nbytes for tensor in whole(1).values())
    files = list((tmp_path / "step-000001").glob("tensors-*"))
    with_headers = sum(path.stat().st_size for path in files)
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files)
    assert with_headers - headers == held


@pytest.mark.parametrize("name", ["tensors-00000.safetensors", "tensors-00001.safetensors", "manifest.json"])
def test_damage_to_any_workers_file_is_noticed_by_all_of_them(tmp_path, name):
    together(2, put, tmp_path, 10, 20)
    path = tmp_path / "step-000020" / name
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    for size in (3, 1):  # put aside by the first; then there is nothing to tell
        answers = together(size, get, tmp_path)
        assert [step for step, _ in answers] == [10] * size
        assert [bool(warnings) for _, warnings in answers] == [True] + [False] * (size - 1)
    assert len(list(tmp_path.glob("damaged-step-000020-*"))) == 1


def killed_while_writing(folder: Path, who: int) -> str:
    """What the other worker learns when `who` dies in the middle of the save of step 20."""
    put(folder, 10)
    real = os.write

    def write(*args: Any) -> int:
        written = real(*args)
        if dist.get_rank() == who:
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    os.write = write
    with pytest.raises(RuntimeError) as caught:
        put(folder, 20)
    return str(caught.value)


@pytest.mark.parametrize("who", [0, 1])
def test_a_worker_killed_in_the_middle_of_a_save_leaves_the_one_before(tmp_path, who):
    answers = together(2, killed_while_writing, tmp_path, who, killed=(who,))
    assert answers[1 - who]
    assert {path.name for path in tmp_path.glob("step-*")} == {"step-000010"}
    for size in (2, 3):
        assert together(size, get, tmp_path) == [(10, [])] * size
    together(3, put, tmp_path, 20)
    assert together(2, get, tmp_path) == [(20, [])] * 2
    assert not list(tmp_path.glob("tmp-*"))


def full_disk(folder: Path, who: int) -> tuple[str, int]:
    """What the user is told on this worker when the disk of `who` is full at step 20, and the steps it took then."""
    put(folder, 10)

    def write(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    if dist.get_rank() == who:
        os.write = write
    steps = 0
    with pytest.raises(UserError) as caught, Writer(folder, Distributed()) as writer:  # noqa: PT012
        writer.save(20, spread(whole(20)), {"step": 20})
        for steps in range(100_000):  # noqa: B007
            writer.check()
    return str(caught.value), steps


@pytest.mark.parametrize("who", [0, 1])
def test_a_full_disk_of_one_worker_is_told_by_all_after_the_same_step(tmp_path, who):
    (message, steps), other = together(2, full_disk, tmp_path, who)
    assert other == (message, steps)
    assert message.startswith(f"cannot write the checkpoint of step 20 in {tmp_path}: [Errno 28] No space left")
    assert together(1, get, tmp_path) == [(10, [])]
    assert not list(tmp_path.glob("tmp-*"))


def cut_by_column() -> None:
    tensor = distribute_tensor(torch.zeros(4, 4), init_device_mesh("cpu", (2,)), [Shard(1)])
    with pytest.raises(ValueError, match="cut along the first dimension"):
        checkpoint._piece(tensor, leads=True)


def test_another_cut_is_refused():
    together(2, cut_by_column)


def trained(folder: Path, dies: int | None = None) -> dict[str, Tensor]:
    """Weights at the end of a run of SFT by these workers; worker `dies` is killed as step 5 begins."""
    world = Distributed()
    policy = shard(tiny_policy(), world)
    stage = stage_of("sft", checkpoint_every=3)
    method = sft(stage)
    inner = method.batch

    def batch(step: int) -> Batch:
        if step == 5 and world.rank == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(step)

    method.batch = batch  # type: ignore[method-assign]
    train(policy, method, stage, folder, SEED, world=world)
    return policy.weights()


def bereaved(folder: Path) -> None:
    with pytest.raises(RuntimeError):
        trained(folder, dies=1)


def test_a_run_that_lost_a_worker_goes_on_with_as_many_or_fewer_or_more(tmp_path):
    """With as many it is the run that lost none, bit for bit; with others to what the order of sums does in 8 steps."""
    whole = together(2, trained, tmp_path / "whole")[0]
    together(2, bereaved, tmp_path / "lost", killed=(1,))
    assert len(rows_of(tmp_path / "lost/metrics.jsonl")) == 5
    for size in SIZES:
        folder = shutil.copytree(tmp_path / "lost", tmp_path / str(size))
        weights = together(size, trained, folder)[0]
        if size == 2:
            assert same(weights, whole)
            assert rows_of(folder / "metrics.jsonl") == rows_of(tmp_path / "whole/metrics.jsonl")
        else:
            assert all(torch.allclose(weights[name], whole[name], atol=1e-4) for name in whole)
        assert [row["step"] for row in rows_of(folder / "metrics.jsonl")] == list(range(8))
