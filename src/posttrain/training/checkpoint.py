"""Exact checkpoints that survive a kill, a full disk and damaged bytes. safetensors and JSON, no pickle.

A checkpoint is a folder `step-000040` with `tensors-00000.safetensors` from worker 0 (and so on), `state.json` and
`manifest.json` (the size and SHA-256 of the others). It is written under a temporary name, flushed to the disk and
renamed, so that under its own name it is always whole. `LATEST` holds the name of the one saved last and the SHA-256
of its manifest.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from posttrain.records import Failure, UserError
from posttrain.training.world import ALONE, World

STATE, MANIFEST, LATEST = "state.json", "manifest.json", "LATEST"
FILE = re.compile(r"tensors-\d{5}\.safetensors|state\.json")
NAME = re.compile(r"step-(\d{6,})(?:-(\d+))?")
"""The step, and a number where that step was saved again: a saved checkpoint is never written over."""

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""By their names in safetensors."""
PAGE = mmap.PAGESIZE
CHUNK = 2**24
"""Bytes that are written and hashed at a time."""
DIRECT = getattr(os, "O_DIRECT", 0)
"""Past the page cache, where the system has that: filling it with a file that nobody reads soon costs more than all
else that is done to the file."""

T = TypeVar("T")


class Writer:
    """Saves checkpoints in a thread while training goes on; the block ends when the last one is on the disk.

    One is written at a time; another save waits for it. The copy that is written takes as much memory as the tensors,
    once. With several workers each makes the same calls.
    """

    def __init__(self, folder: Path, world: World = ALONE, rows: Sequence[Path] = (), keep: int = 2) -> None:
        """`rows`: files that no checkpoint may be ahead of: they are flushed before it. `keep`: how many are kept."""
        self._folder, self._rows, self._keep = folder, rows, keep
        self._world, self._line = world, world.twin()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Path] | None = None
        self._memory = torch.empty(0, dtype=torch.uint8)

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Copy the tensors and begin to write a checkpoint of `step`; LATEST names it once it is whole.

        Tensors are stored bit by bit, of a DTensor this worker's rows. `state` is what JSON can hold (finite numbers;
        tuples come back as lists).

        Raises:
            UserError: of the save before this one, as by `check`.
        """
        self.wait()
        content = json.dumps(state, allow_nan=False).encode()
        pieces = {name: piece for name, t in tensors.items() if (piece := _piece(t.detach(), self._world.rank == 0))}
        image = self._image(pieces).numpy().data
        self._writing = self._thread.submit(
            _save, self._folder, step, image, content, rows=self._rows, keep=self._keep, world=self._line
        )

    def check(self) -> None:
        """To be called after each step: raises on every worker what went wrong in a thread of one of them.

        Raises:
            UserError: the disk is full or not writable; the checkpoints that were there are untouched.
        """
        failed = self._writing is not None and self._writing.done() and self._writing.exception() is not None
        if any(self._world.gather(failed)):
            self.wait()

    def wait(self) -> None:
        """Until the last save is on the disk; raises what went wrong, as `check` does."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _image(self, pieces: Mapping[str, Piece]) -> Tensor:
        """[bytes] uint8: the file of the pieces, in the memory of the one before, from the beginning of a page on."""
        header, places = _layout(pieces)
        size = len(header) + sum(piece.rows.nbytes for piece in pieces.values())
        if len(self._memory) < size:
            pinned = any(piece.rows.is_cuda for piece in pieces.values())
            memory = torch.empty(size + PAGE, dtype=torch.uint8, pin_memory=pinned)
            self._memory = memory[-memory.data_ptr() % PAGE :]
        image = self._memory[:size]
        image[: len(header)] = torch.frombuffer(header, dtype=torch.uint8)
        for name, (start, stop) in places.items():
            rows = pieces[name].rows
            image[len(header) + start : len(header) + stop].view(rows.dtype).view(rows.shape).copy_(rows)
        return image

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if error is None:
            self.wait()


class Stored:
    """The tensors of a checkpoint, read from its files when they are asked for, in any cut."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.forms: dict[str, tuple[torch.Size, torch.dtype]] = {}
        """Shape and type of each tensor, whole."""
        self._parts: dict[str, list[tuple[Any, int]]] = {}
        for path in files:
            file = safe_open(path, framework="pt")
            cut = json.loads(file.metadata()["cut"])
            for name in file.keys():  # noqa: SIM118  (it is not a dict)
                first, total = cut.get(name, (0, None))
                part = file.get_slice(name)
                shape = part.get_shape()
                dtype = (part[:0] if shape else file.get_tensor(name)).dtype
                self.forms[name] = torch.Size(shape if total is None else [total, *shape[1:]]), dtype
                self._parts.setdefault(name, []).append((part if shape else file, first))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` of a tensor along its first dimension; all of it by default."""
        shape, _ = self.forms[name]
        if not shape:
            return self._parts[name][0][0].get_tensor(name).clone()
        stop = shape[0] if stop is None else stop
        found = [
            part[max(start - first, 0) : max(stop - first, 0)]
            for part, first in sorted(self._parts[name], key=lambda part: part[1])
        ]
        rows = torch.cat(found)
        if len(rows) != stop - start:
            raise Failure(f"the checkpoint holds {len(rows)} of rows {start} to {stop} of {name}")
        return rows

    def like(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor `name`, spread over the workers as `tensor` of the same shape is, on its device."""
        if not isinstance(tensor, DTensor):
            return self.read(name).to(tensor.device)
        start, stop = _span(tensor)
        return DTensor.from_local(
            self.read(name, start, stop).to(tensor.device),
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )


def load(
    folder: Path, warn: Callable[[str], None] = warnings.warn, world: World = ALONE
) -> tuple[int, Stored, dict[str, Any]] | None:
    """`(step, tensors, state)` of the checkpoint that LATEST names, or None where there is no checkpoint.

    Every byte is verified first, by several workers each its part; they need not be as many as saved it. A damaged
    checkpoint is renamed to `damaged-...`, never deleted, and the newest sound one takes its place; `warn` is told
    what was wrong and what is used (the leader's only).
    """
    leads = world.rank == 0
    candidates = world.gather(_candidates(folder, warn) if leads and folder.is_dir() else [])[0]
    problem = None
    for path in candidates:
        damaged, problem = problem is not None, _problem(path, world)
        if problem is None:
            step = _step(path)
            if damaged and leads:
                warn(f"continuing from {path} (step {step})")
            return step, Stored(sorted(path.glob("tensors-*.safetensors"))), json.loads((path / STATE).read_bytes())
        if leads:
            _put_aside(path, problem, warn)
    if problem is not None and leads:
        warn(f"no sound checkpoint is left in {folder}; starting from the beginning")
    return None


@dataclass(frozen=True)
class Piece:
    """What one worker stores of a tensor."""

    rows: Tensor
    first: int = 0
    """Where its rows begin among those of the whole tensor."""
    total: int | None = None
    """How many rows the whole tensor has; None: this is the whole tensor."""


def _piece(tensor: Tensor, leads: bool) -> Piece | None:
    """None where another worker stores it, or there is nothing to store."""
    if not isinstance(tensor, DTensor):
        return Piece(tensor) if leads else None
    position = tensor.device_mesh.get_coordinate() or ()
    if any(at != 0 for at, placement in zip(position, tensor.placements, strict=True) if placement.is_replicate()):
        return None
    start, stop = _span(tensor)
    if start == stop and any(position):  # the first stores a tensor that has no rows at all
        return None
    return Piece(tensor.to_local(), start, tensor.shape[0])


def _span(tensor: DTensor) -> tuple[int, int]:
    """This worker's rows, start and stop. A sharded dimension is cut as by `torch.chunk`: the last may have none."""
    start, stop = 0, tensor.shape[0]
    for at, placement, size in zip(
        tensor.device_mesh.get_coordinate() or (), tensor.placements, tensor.device_mesh.shape, strict=True
    ):
        if placement.is_shard(0) and (start, stop) == (0, tensor.shape[0]):
            each = -(-tensor.shape[0] // size)
            start, stop = min(at * each, stop), min((at + 1) * each, stop)
        elif not placement.is_replicate():
            raise ValueError(f"a checkpoint can store tensors cut along the first dimension, not {tensor.placements}")
    return start, stop


def _layout(pieces: Mapping[str, Piece]) -> tuple[bytearray, dict[str, tuple[int, int]]]:
    """How a safetensors file of the pieces begins, and from where to where each stands in the rest."""
    cut = {name: (piece.first, piece.total) for name, piece in pieces.items() if piece.total is not None}
    places, at = {}, 0
    for name in sorted(pieces, key=lambda name: -pieces[name].rows.itemsize):  # each at a multiple of its item's size
        places[name] = at, at + pieces[name].rows.nbytes
        at = places[name][1]
    entries = {
        name: {"dtype": DTYPES[pieces[name].rows.dtype], "shape": pieces[name].rows.shape, "data_offsets": place}
        for name, place in places.items()
    }
    text = json.dumps({"__metadata__": {"cut": json.dumps(cut)}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return bytearray(len(text).to_bytes(8, "little") + text), places


def _save(
    folder: Path,
    step: int,
    image: memoryview,
    state: bytes,
    *,
    rows: Sequence[Path],
    keep: int,
    world: World,
) -> Path:
    """Write a checkpoint, point LATEST at it, and keep it and the `keep - 1` newest of the others.

    Killed at any moment, `load` gives the one before or this one.
    """
    name = f"tensors-{world.rank:05d}.safetensors"
    needed = len(image) + len(state)
    temporary = folder / world.gather(f"tmp-{uuid.uuid4().hex}")[0]

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_temporary(folder)
        temporary.mkdir()
        for path in rows:
            _fsync(path)

    def write() -> dict[str, Any]:
        return {name: _write(temporary / name, image)}

    def commit() -> Path:
        manifest = _manifest(step, {**files, STATE: _write(temporary / STATE, state)})
        _write(temporary / MANIFEST, manifest)
        _fsync(temporary)
        path = folder / _free_name(folder, step)
        os.rename(temporary, path)
        _fsync(folder)
        pointer = folder / f"tmp-{uuid.uuid4().hex}"
        _write(pointer, f"{path.name} {hashlib.sha256(manifest).hexdigest()}".encode())
        os.replace(pointer, folder / LATEST)
        _fsync(folder)
        others = [old for old in _newest_first(folder) if old != path]
        for old in others[keep - 1 :]:
            os.rename(old, folder / f"tmp-{uuid.uuid4().hex}")  # killed while deleting, it must not look damaged
        _remove_temporary(folder)
        return path

    def together(work: Callable[[], T], leader_only: bool = False) -> list[T]:
        """What `work` gave on each worker. An error on one is an error on all; the leader sweeps up."""
        given: T | None = None
        failure: UserError | None = None
        try:
            if world.rank == 0 or not leader_only:
                given = work()
        except OSError as error:
            failure = UserError(
                f"cannot write the checkpoint of step {step} in {folder}: {error}. It needs {needed} bytes"
                f"{_free(folder)}. Make room or choose another folder, then run the same command: earlier checkpoints "
                "are intact"
            )
            failure.__cause__ = error
        everyone = world.gather((given, failure and str(failure)))
        messages = [message for _, message in everyone if message]
        if messages:
            if world.rank == 0:
                _remove_temporary(folder)
            raise failure or UserError(messages[0])
        return [given for given, _ in everyone]

    together(begin, leader_only=True)
    files = {n: facts for written in together(write) for n, facts in written.items()}
    return together(commit, leader_only=True)[0]


def _put_aside(path: Path, problem: str, warn: Callable[[str], None]) -> None:
    aside = path.with_name(f"damaged-{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        os.rename(path, aside)
        warn(f"checkpoint {path} is damaged ({problem}); kept as {aside.name}")
    except OSError as error:
        warn(f"checkpoint {path} is damaged ({problem}) and cannot be renamed ({error}); it is left out")


def _candidates(folder: Path, warn: Callable[[str], None]) -> list[Path]:
    """The checkpoint that LATEST names, then the others, newest first."""
    paths = _newest_first(folder)
    if not (folder / LATEST).is_file():  # killed before the first one was pointed at
        return paths
    content = (folder / LATEST).read_bytes()
    for path in paths:
        if content.startswith(f"{path.name} ".encode()):
            manifest = path / MANIFEST
            digest = hashlib.sha256(manifest.read_bytes() if manifest.is_file() else b"").hexdigest()
            if content == f"{path.name} {digest}".encode():
                return [path, *(other for other in paths if other != path)]
    warn(f"{folder / LATEST} names no checkpoint as it was saved ({content[:100]!r}); looking for the newest sound one")
    return paths


def _problem(path: Path, world: World) -> str | None:
    """What is wrong with the checkpoint; None where it is as it was saved. Each worker reads every so-manieth file."""
    stored, facts, problem = b"", {}, None
    try:
        stored = (path / MANIFEST).read_bytes()
        names = sorted(json.loads(stored)["files"])
        if not all(FILE.fullmatch(name) for name in names):
            raise ValueError(names)
        facts = {name: _facts(path / name) for name in names[world.rank :: world.size]}
    except OSError as error:
        problem = str(error)
    except (ValueError, KeyError, TypeError):
        problem = f"{MANIFEST} is not as it was written"
    everyone = world.gather((facts, problem))
    problems = [problem for _, problem in everyone if problem]
    if problems:
        return problems[0]
    # Compared byte for byte, the manifest guards itself too.
    if stored != _manifest(_step(path), {name: fact for facts, _ in everyone for name, fact in facts.items()}):
        return f"its files do not have the sizes and digests of {MANIFEST}"
    return None


def _manifest(step: int, files: Mapping[str, Mapping[str, Any]]) -> bytes:
    return json.dumps({"step": step, "files": dict(sorted(files.items()))}, indent=1).encode()


def _facts(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _step(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[1])  # type: ignore[index]


def _newest_first(folder: Path) -> list[Path]:
    named = [(NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    numbered = [((int(match[1]), int(match[2] or 1)), path) for match, path in named if match and path.is_dir()]
    return [path for _, path in sorted(numbered, reverse=True)]


def _free_name(folder: Path, step: int) -> str:
    name, again = f"step-{step:06d}", 1
    while (folder / name).exists():
        again += 1
        name = f"step-{step:06d}-{again}"
    return name


def _write(path: Path, content: bytes | memoryview) -> dict[str, Any]:
    """Write a file and flush it to the disk; returns its facts, of which the digest is taken on the way."""
    digest = hashlib.sha256()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        with suppress(OSError):  # a disk that has no such way
            fcntl.fcntl(file, fcntl.F_SETFL, DIRECT)
        for at in range(0, len(content), CHUNK):
            left = memoryview(content)[at : at + CHUNK]
            digest.update(left)
            while left:
                left = left[_put(file, left) :]
        os.fsync(file)
    finally:
        os.close(file)
    return {"bytes": len(content), "sha256": digest.hexdigest()}


def _put(file: int, content: memoryview) -> int:
    """`os.write`; through the page cache where it is no whole number of blocks, as the end of a file."""
    try:
        return os.write(file, content)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fcntl.fcntl(file, fcntl.F_SETFL, 0)
        return os.write(file, content)


def _fsync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_temporary(folder: Path) -> None:
    """Delete what a failed or killed save, or a killed deletion, left behind."""
    for path in folder.glob("tmp-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _free(folder: Path) -> str:
    try:
        return f" ({shutil.disk_usage(folder).free} are free)"
    except OSError:
        return ""
