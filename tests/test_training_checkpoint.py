"""Checkpoints: exact, and whole or not there at all, whatever happens while they are written or afterwards."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from posttrain.records import UserError
from posttrain.training import checkpoint
from posttrain.training.checkpoint import LATEST, Writer, load


class Killed(BaseException):
    """Ends the process where it stands: no handler for errors runs."""


def content(step: int) -> tuple[dict[str, torch.Tensor], dict]:
    rng = torch.Generator().manual_seed(step)
    tensors = {"w": torch.randn(64, 3, generator=rng), "rng": rng.get_state()[:100], "step": torch.tensor(float(step))}
    return tensors, {"cursor": [step, 0.1 * step], "name": f"run {step}"}


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict, **options: int) -> None:
    with Writer(folder, **options) as writer:
        writer.save(step, tensors, state)


def put(folder: Path, step: int, **options: int) -> Path:
    """What is saved is `content`; the path is that of the step's first save."""
    save(folder, step, *content(step), **options)
    return folder / f"step-{step:06d}"


def step_of(folder: Path, warnings: list[str] | None = None) -> int | None:
    """Step of what `load` gives, after checking that it is that step's content whole."""
    found = load(folder, warn=([] if warnings is None else warnings).append)
    if found is None:
        return None
    step, stored, state = found
    tensors = {name: stored.read(name) for name in stored.forms}
    expected_tensors, expected_state = content(step)
    assert state == expected_state
    assert tensors.keys() == expected_tensors.keys()
    assert all(torch.equal(tensors[name], expected_tensors[name]) for name in tensors)
    return step


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_everything_comes_back_bit_for_bit(tmp_path):
    base = torch.randn(6, 4)
    tied = torch.randn(3, 3)
    tensors = {
        "bfloat16": torch.randn(5, 7).bfloat16(),
        "float16": torch.randn(3).half(),
        "float64": torch.randn(2, dtype=torch.float64),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "int64": torch.tensor([2**62, -1]),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "scalar.int": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "empty.too": torch.zeros(0),
        "transposed": base.T,
        "rows": base[2:4],
        "strided": base[:, ::2],
        "expanded": torch.ones(1).expand(5),
        "tied.a": tied,
        "tied.b": tied,
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    state = {"float": 0.1 + 0.2, "big": 2**70, "text": "ü\u2028", "nested": {"list": [1, None, True]}}
    save(tmp_path, 3, tensors, state)
    step, stored, loaded_state = load(tmp_path)
    assert (step, loaded_state) == (3, state)
    assert stored.forms == {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        assert bits(stored.read(name)) == bits(tensor.detach()), name
        assert bits(stored.like(name, tensor)) == bits(tensor.detach()), name


@pytest.mark.parametrize("refused", [0, checkpoint.DIRECT], ids=["direct", "not direct"])
def test_written_in_pieces_it_is_the_same(tmp_path, monkeypatch, refused):
    """A system may write less than it was given, and a disk may refuse what does not come from its cache."""
    real, direct = os.write, []

    def write(file: int, data: memoryview) -> int:
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        if flags & refused:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        direct.append(bool(flags & checkpoint.DIRECT))
        return real(file, data[: 4096 if len(data) > 4096 else 100])

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(checkpoint, "CHUNK", 3 * 4096)
    tensors = {"w": torch.randn(100, 101), "b": torch.ones(3, dtype=torch.bool)}
    save(tmp_path, 1, tensors, {})
    _, stored, _ = load(tmp_path, pytest.fail)
    assert all(torch.equal(stored.read(name), tensor) for name, tensor in tensors.items())
    assert not (refused and any(direct))


def test_there_is_none(tmp_path):
    assert load(tmp_path) is None
    assert load(tmp_path / "absent") is None


def test_the_last_two_are_kept_and_latest_names_the_last(tmp_path):
    for step in (10, 20, 30):
        path = put(tmp_path, step)
    assert path == tmp_path / "step-000030"
    assert names(tmp_path) == {"step-000020", "step-000030", LATEST}
    assert (tmp_path / LATEST).read_text().split()[0] == "step-000030"
    put(tmp_path, 40, keep=1)
    assert names(tmp_path) == {"step-000040", LATEST}
    assert step_of(tmp_path) == 40


def test_what_was_saved_last_is_loaded_even_when_its_step_is_lower(tmp_path):
    for step in (30, 40, 20):
        put(tmp_path, step)
    assert step_of(tmp_path) == 20
    assert names(tmp_path) == {"step-000020", "step-000040", LATEST}


def test_a_step_can_be_saved_again(tmp_path):
    tensors, state = content(5)
    for again in range(4):
        save(tmp_path, 5, tensors, {**state, "again": again})
        step, _, loaded = load(tmp_path)
        assert (step, loaded["again"]) == (5, again)
    assert len(names(tmp_path)) == 3


def test_leftovers_of_a_killed_save_go_at_the_next(tmp_path):
    (tmp_path / "tmp-1").mkdir()
    (tmp_path / "tmp-1" / "tensors-00000.safetensors").write_bytes(b"half")
    (tmp_path / "tmp-2").write_bytes(b"half")
    assert load(tmp_path) is None
    put(tmp_path, 1)
    assert names(tmp_path) == {"step-000001", LATEST}


@pytest.mark.parametrize("name", ["tensors-00000.safetensors", "state.json", "manifest.json"])
def test_a_missing_file_is_noticed(tmp_path, name):
    put(tmp_path, 10)
    (put(tmp_path, 20) / name).unlink()
    warnings: list[str] = []
    assert step_of(tmp_path, warnings) == 10
    assert any(name in warning for warning in warnings)


def test_a_lost_checkpoint_is_noticed(tmp_path):
    put(tmp_path, 10)
    shutil.rmtree(put(tmp_path, 20))
    warnings: list[str] = []
    assert step_of(tmp_path, warnings) == 10
    assert "step-000020" in warnings[0]


def test_when_none_is_sound_it_says_so(tmp_path):
    (put(tmp_path, 10) / "state.json").write_text("{}")
    warnings: list[str] = []
    assert step_of(tmp_path, warnings) is None
    assert "starting from the beginning" in warnings[-1]
    assert any(name.startswith("damaged-step-000010") for name in names(tmp_path))


WRITING = ("write", "fsync", "rename", "replace")
DELETING = ("unlink", "rmdir")


def fail_at(
    monkeypatch: pytest.MonkeyPatch, n: int, error: BaseException, kinds: tuple[str, ...], *, done: bool = False
) -> list[str]:
    """Raise at the n-th file operation of these kinds, once it is `done` or instead; returns the calls so far."""
    calls: list[str] = []

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def wrapped(*args, **kwargs):
            calls.append(name)
            if len(calls) != n:
                return real(*args, **kwargs)
            if done:
                with suppress(OSError):
                    real(*args, **kwargs)
            raise error

        monkeypatch.setattr(os, name, wrapped)

    for name in kinds:
        wrap(name)
    return calls


def operations(folder: Path, steps: tuple[int, ...], new: int, kinds: tuple[str, ...]) -> int:
    """How many file operations of these kinds a save of `new` makes in a folder that holds `steps`."""
    for step in steps:
        put(folder, step)
    with pytest.MonkeyPatch.context() as patch:
        calls = fail_at(patch, 0, Killed(), kinds)
        put(folder, new)
    assert set(WRITING) <= set(calls)
    return len(calls)


SITUATIONS = [((), 10), ((10,), 20), ((10, 20), 30), ((10, 20), 20), ((10,), 10)]


@pytest.mark.parametrize(("steps", "new"), SITUATIONS)
@pytest.mark.parametrize("done", [False, True])
def test_killed_between_any_two_file_operations(tmp_path, steps, new, done):
    """`load` gives the old or the new one whole, without a word of damage; the same save then goes through."""
    old = steps[-1] if steps else None
    kinds = WRITING + DELETING
    for n in range(1, operations(tmp_path / "count", steps, new, kinds) + 1):
        folder = tmp_path / str(n)
        for step in steps:
            put(folder, step)
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, n, Killed(), kinds, done=done)
            with pytest.raises(Killed):
                put(folder, new)
        warnings: list[str] = []
        assert step_of(folder, warnings) in {old, new}
        put(folder, new)
        assert step_of(folder, warnings) == new
        assert warnings == []
        assert not any(name.startswith("tmp-") for name in names(folder))
        assert len(names(folder)) <= 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize(("steps", "new"), SITUATIONS)
def test_an_error_at_any_file_operation_leaves_the_old_one_and_no_rest(tmp_path, steps, new, number):
    for n in range(1, operations(tmp_path / "count", steps, new, WRITING) + 1):
        folder = tmp_path / str(n)
        for step in steps:
            put(folder, step)
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, n, OSError(number, os.strerror(number)), WRITING)
            with pytest.raises(UserError, match=rf"{os.strerror(number)}.*bytes") as caught:
                put(folder, new)
        assert str(folder) in str(caught.value)
        assert not any(name.startswith("tmp-") for name in names(folder))
        assert step_of(folder) in ({steps[-1], new} if steps else {None, new})
        put(folder, new)
        assert step_of(folder) == new


def test_a_full_disk_is_told_with_path_and_bytes(tmp_path):
    """A limit on the size of files stands in for the disk: the write of the tensors fails half-way."""
    put(tmp_path, 10)
    before = names(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=r"needs 400\d\d\d bytes") as caught:
            save(tmp_path, 20, {"w": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path) in str(caught.value)
    assert names(tmp_path) == before
    assert step_of(tmp_path) == 10


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the checkpoint of step 1"):
        put(tmp_path / "file" / "checkpoints", 1)


def test_a_read_only_folder_is_told(read_only_folder):
    folder, locked = read_only_folder
    put(folder, 10)
    with locked(), pytest.raises(UserError, match="Permission denied"):
        put(folder, 20)
    assert step_of(folder) == 10


def test_state_that_json_cannot_hold_exactly_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        save(tmp_path / "new", 1, {}, {"loss": float("nan")})
    assert not (tmp_path / "new").exists()


# Beside the training


@pytest.fixture
def slow_disk(monkeypatch):
    """A write waits until it is let go; afterwards it does not."""
    go = threading.Event()
    real = os.write

    def write(*args):
        assert go.wait(60)
        return real(*args)

    monkeypatch.setattr(os, "write", write)
    yield go
    go.set()


def test_training_goes_on_while_a_checkpoint_is_written_and_changes_nothing_in_it(tmp_path, slow_disk):
    tensors, state = content(10)
    with Writer(tmp_path) as writer:
        writer.save(10, tensors, state)
        writer.check()
        for tensor in tensors.values():
            tensor.zero_()
        state["name"] = "another"
        assert step_of(tmp_path) is None
        slow_disk.set()
    assert step_of(tmp_path) == 10


def test_one_is_written_at_a_time_and_into_the_same_memory(tmp_path, slow_disk):
    with Writer(tmp_path) as writer:
        writer.save(10, *content(10))
        held = writer._memory.data_ptr()
        threading.Timer(0.2, slow_disk.set).start()
        writer.save(20, *content(20))
        assert (tmp_path / LATEST).read_text().startswith("step-000010 ")
        assert writer._memory.data_ptr() == held
    assert step_of(tmp_path) == 20


def test_what_goes_wrong_in_the_thread_is_told_at_the_next_step(tmp_path, monkeypatch):
    def write(*args):
        raise OSError(28, "No space left on device")

    put(tmp_path, 10)
    monkeypatch.setattr(os, "write", write)

    def told(how: Callable[[Writer], object]) -> None:
        with Writer(tmp_path) as writer:
            writer.save(20, *content(20))
            wait([writer._writing])
            how(writer)
            assert how is nothing  # that one is told when the block ends

    def nothing(writer: Writer) -> None:
        pass

    for how in (Writer.check, Writer.wait, lambda writer: writer.save(30, *content(30)), nothing):
        with pytest.raises(UserError, match="step 20"):
            told(how)
    monkeypatch.undo()
    assert step_of(tmp_path) == 10


def test_rows_are_on_the_disk_before_the_checkpoint_that_knows_of_them(tmp_path, monkeypatch):
    rows = tmp_path / "metrics.jsonl"
    rows.write_text("{}\n")
    flushed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    with Writer(tmp_path / "checkpoints", rows=(rows, tmp_path)) as writer:
        writer.save(10, *content(10))
    assert flushed[:2] == [str(rows), str(tmp_path)]
    assert flushed[-1] == str(tmp_path / "checkpoints")


def test_an_error_of_the_training_is_not_hidden_by_one_of_the_last_save(tmp_path, monkeypatch):
    fail_at(monkeypatch, 1, OSError(28, "No space left on device"), ("rename",))
    with pytest.raises(ZeroDivisionError), Writer(tmp_path) as writer:  # noqa: PT012
        writer.save(10, *content(10))
        raise ZeroDivisionError
