"""Exact checkpoints that survive a kill, a full disk and damaged bytes. safetensors and JSON, no pickle.

A checkpoint is a folder `step-000040` with `tensors.safetensors`, `state.json` and `manifest.json` (the size and
SHA-256 of both). It is written under a temporary name, flushed to the disk and renamed, so that under its own name
it is always whole. `LATEST` holds the name of the one saved last and the SHA-256 of its manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.records import UserError

TENSORS, STATE, MANIFEST, LATEST = "tensors.safetensors", "state.json", "manifest.json", "LATEST"
NAME = re.compile(r"step-(\d{6,})(?:-(\d+))?")
"""The step, and a number where that step was saved again: a saved checkpoint is never written over."""


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Write a checkpoint of `step`, point LATEST at it, and keep it and the `keep - 1` newest of the others.

    `state` is what JSON can hold (finite numbers; tuples come back as lists). Tensors are stored bit by bit; views
    and tied tensors are stored as tensors of their own. Where the disk is full or not writable, UserError, and
    the checkpoints that were there are untouched. Killed at any moment, `load` gives the one before or this one.
    """
    state_json = json.dumps(state, allow_nan=False).encode()
    storable = _storable(tensors)
    needed = sum(t.nbytes for t in storable.values()) + len(state_json)
    temporary = folder / f"tmp-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_temporary(folder)
        temporary.mkdir()
        save_file(storable, temporary / TENSORS)
        _fsync(temporary / TENSORS)
        _write(temporary / STATE, state_json)
        manifest = _manifest(temporary, step)
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
    except (OSError, SafetensorError) as error:
        _remove_temporary(folder)
        raise UserError(
            f"cannot write the checkpoint of step {step} in {folder}: {error}. It needs {needed} bytes{_free(folder)}. "
            "Make room or choose another folder, then run the same command: earlier checkpoints are intact"
        ) from error
    return path


def load(
    folder: Path, warn: Callable[[str], None] = warnings.warn
) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """`(step, tensors, state)` of the checkpoint that LATEST names, or None where there is no checkpoint.

    Every byte is verified first. A damaged checkpoint is renamed to `damaged-...`, never deleted, and the newest
    sound one takes its place; `warn` is told what was wrong and what is used.
    """
    if not folder.is_dir():
        return None
    damaged = False
    for path in _candidates(folder, warn):
        problem = _problem(path)
        if problem is None:
            step = int(NAME.fullmatch(path.name)[1])  # type: ignore[index]
            if damaged:
                warn(f"continuing from {path} (step {step})")
            return step, load_file(path / TENSORS), json.loads((path / STATE).read_bytes())
        damaged = True
        aside = folder / f"damaged-{path.name}-{uuid.uuid4().hex[:8]}"
        try:
            os.rename(path, aside)
            warn(f"checkpoint {path} is damaged ({problem}); kept as {aside.name}")
        except OSError as error:
            warn(f"checkpoint {path} is damaged ({problem}) and cannot be renamed ({error}); it is left out")
    if damaged:
        warn(f"no sound checkpoint is left in {folder}; starting from the beginning")
    return None


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


def _problem(path: Path) -> str | None:
    """What is wrong with the checkpoint; None where it is as it was saved."""
    try:
        stored = (path / MANIFEST).read_bytes()
        if stored == _manifest(path, int(NAME.fullmatch(path.name)[1])):  # type: ignore[index]
            return None
        return f"its files do not have the sizes and digests of {MANIFEST}"
    except OSError as error:
        return str(error)


def _manifest(path: Path, step: int) -> bytes:
    """The manifest that the files in `path` should have. Compared byte for byte, it guards itself too."""
    files = {}
    for name in (TENSORS, STATE):
        with open(path / name, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[name] = {"bytes": (path / name).stat().st_size, "sha256": digest}
    return json.dumps({"step": step, "files": files}, indent=1).encode()


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous on the CPU, no two over the same memory; copied only where they are not so already."""
    seen: set[int] = set()
    storable = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensor.untyped_storage().data_ptr())
        storable[name] = tensor
    return storable


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


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


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
