"""Shared fixtures. Threads are set to one so that parallel workers do not fight over two cores."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real third-party data beside the checkout; not part of the project."""
    path = Path(os.environ.get("POSTTRAIN_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no shared data at {path} (set POSTTRAIN_SHARED_DATA)")
    return path


@pytest.fixture
def read_only_folder() -> Iterator[tuple[Path, Callable[[], AbstractContextManager[None]]]]:
    """A folder, and a block in which it cannot be written: root, whom modes do not bind, is nobody there."""
    folder = Path(tempfile.mkdtemp())  # not below pytest's own folder, which nobody may not even enter

    @contextmanager
    def locked() -> Iterator[None]:
        folder.chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o755)

    yield folder, locked
    shutil.rmtree(folder)
