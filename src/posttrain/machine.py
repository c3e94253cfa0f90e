"""The settings of a process that decide how fast it multiplies matrices, and what it takes before any model does."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import resource
import sys
from pathlib import Path
from typing import Any

import torch

EXACT = 1e-5
"""Largest relative error of a float32 product. Rounding to bfloat16 gives 1e-3, float32 sums 1e-6."""

SHAPES = 64
"""Of matrix products whose code oneDNN keeps: several times those of one layer and the head, forward and backward."""


def tune() -> dict[str, Any]:
    """Set this process up for a run; returns what was found and chosen, for the record. Twice is as good as once.

    Called where a model is loaded, never on import, for it is a setting of the whole process.

    On x86 PyTorch multiplies float32 matrices with MKL, which leaves half of the speed of many processors unused.
    Its other library, oneDNN, takes float32 products only where lower precision is allowed. Whether it then really
    rounds depends on the processor (one with AMX does, others have no faster way than float32), so a product is
    compared with float64 first, and the permission is withdrawn where the error is above `EXACT`.

    oneDNN keeps the code it made for the last 1,024 shapes, and no two passes of a run have the same shape: it is
    told to keep what one pass needs.

    glibc gives large freed blocks back to the system, and each product then waits for its pages to be mapped and
    zeroed anew. It is told to keep them.
    """
    return {
        "threads": torch.get_num_threads(),
        "float32_matmul": "oneDNN" if _onednn() else "default",
        "freed_memory": "kept" if _kept() else "default",
    }


@functools.cache
def _onednn() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(SHAPES))  # read once, at the first product
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    if worst_error() <= EXACT:
        return True
    matmul.fp32_precision = before
    return False


@functools.cache
def _kept() -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt, (trim_threshold, mmap_threshold) = ctypes.CDLL(None).mallopt, (-1, -3)  # names and numbers of malloc.h
    largest = 2**31 - 1  # both are C ints
    return bool(mallopt(mmap_threshold, largest) and mallopt(trim_threshold, largest))


@functools.cache
def own_memory() -> int:
    """Bytes of the process itself, its libraries loaded, no model yet: to be called first before there is one."""
    return _resident("VmRSS")


def peak_memory() -> int:
    """Most bytes the process has held so far."""
    return _resident("VmHWM")


def _resident(name: str) -> int:
    """As Linux has it; elsewhere the peak stands for both. On Linux ru_maxrss begins with what the parent held."""
    status = Path("/proc/self/status")
    found = re.search(rf"^{name}:\s+(\d+) kB$", status.read_text() if status.exists() else "", re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def worst_error() -> float:
    """Largest error of float32 products against float64, relative to the largest entry: all layouts autograd uses."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for rows, inner, columns in ((256, 576, 192), (64, 256, 512), (7, 64, 33)):
        a = torch.randn(rows, inner, generator=generator)
        b = torch.randn(inner, columns, generator=generator)
        exact = a.double() @ b.double()
        for product in (a @ b, a @ b.t().contiguous().t(), a.t().contiguous().t() @ b):
            worst = max(worst, float((product.double() - exact).abs().max() / exact.abs().max()))
    return worst
