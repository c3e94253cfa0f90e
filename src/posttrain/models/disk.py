"""Folders and files that appear whole or not at all, JSON in files, and one process at a time."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from posttrain.records import UserError


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A work folder that becomes `folder` when the block ends, synced to disk; an exception leaves nothing.

    What a killed process left is removed by the next one that stages the same folder.

    Raises:
        UserError: the place cannot be written, or the disk is full.
    """
    work = folder.parent / f".{folder.name}.{os.getpid()}.part"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for other in folder.parent.iterdir():
            left = re.fullmatch(re.escape(f".{folder.name}.") + r"(\d+)\.part", other.name)
            if left and (other == work or not _alive(int(left[1]))):
                shutil.rmtree(other)
        work.mkdir()
        yield work
        for path in (*work.rglob("*"), work):
            _sync(path)
        os.replace(work, folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{folder}: cannot be written ({why}); mend that or name another place") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; others wait. The kernel lets go of it when the process dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a")
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written ({error.strerror}); set POSTTRAIN_CACHE") from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is seen whole or not at all.

    Raises:
        UserError: the place cannot be written, or the disk is full.
    """
    work = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work.write_bytes(content)
        _sync(work)
        os.replace(work, path)
    except OSError as error:
        with suppress(OSError):
            work.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror}); mend that or name another place") from error


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The file's content; None where there is no file.

    Raises:
        UserError: it is damaged.
    """
    return _parsed(path, path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """A value a line. In ASCII: what a model writes may hold what is half a character, or breaks a line elsewhere."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[Any]:
    """The values; UserError where the file is damaged or missing."""
    if not path.is_file():
        raise _damaged(path, "is missing")
    return [_parsed(path, line) for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line]


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise _damaged(path, f"is not JSON as it was written ({error})") from None


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what}; restore it from a copy of the run folder, or choose another --out")
