"""Real worker processes over gloo, for the tests of what several do together."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PRELOAD = ["torch.distributed.fsdp", "tiny_runs"]


def together(size: int, work: Callable[..., Any], *args: Any, killed: tuple[int, ...] = ()) -> list[Any]:
    """What `work(*args)` returned in each of `size` workers; None from those that are expected to be killed.

    `work` must be a function of a module. An exception in a worker is raised here with its traceback as text.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as meeting:
        children, ends = [], []
        for rank in range(size):
            end, other = context.Pipe(duplex=False)
            child = context.Process(target=_work, args=(other, rank, size, Path(meeting, "store"), work, args))
            child.start()
            other.close()
            children.append(child)
            ends.append(end)
        answers = [_answer(end) for end in ends]
        for child in children:
            child.join()
    for rank, (_, error) in enumerate(answers):
        if rank in killed:
            assert children[rank].exitcode == -signal.SIGKILL
        elif error is not None:
            raise AssertionError(f"worker {rank}: {error}")
    return [value for value, _ in answers]


def _answer(end: Connection) -> tuple[Any, str | None]:
    try:
        return pickle.loads(end.recv_bytes())
    except (EOFError, ConnectionError):
        return None, "gone without a word"


def _work(end: Connection, rank: int, size: int, store: Path, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        end.send_bytes(pickle.dumps((work(*args), None)))  # a tensor by value: the worker may be gone when it is read
    except BaseException:
        end.send_bytes(pickle.dumps((None, traceback.format_exc())))
    finally:
        dist.destroy_process_group()
