"""The setting that makes float32 products fast must leave them float32; memory is counted as it was held."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from posttrain import machine


def test_products_are_as_exact_as_float32_once_tuned():
    facts = machine.tune()
    assert machine.tune() == facts
    assert machine.worst_error() <= machine.EXACT
    assert facts["threads"] == torch.get_num_threads()


def test_rounding_to_bfloat16_would_be_noticed(monkeypatch):
    """What a processor with AMX would do with the same permission."""
    product = torch.Tensor.__matmul__

    def rounding(a, b):
        return product(a.bfloat16(), b.bfloat16()).float() if a.dtype == torch.float32 else product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    assert machine.worst_error() > 100 * machine.EXACT


def test_permission_is_withdrawn_where_products_are_rounded(monkeypatch):
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    monkeypatch.setattr(machine, "worst_error", lambda: 1e-3)
    try:
        matmul.fp32_precision = "none"
        assert machine._onednn.__wrapped__() is False
        assert matmul.fp32_precision == "none"
    finally:
        matmul.fp32_precision = before


CHILD = """
from posttrain.machine import own_memory, peak_memory

own, before = own_memory(), peak_memory()
held = b"x" * 2**28
del held
print(own, before, peak_memory(), own_memory())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is one number for all of it")
def test_memory_is_the_process_s_own_and_its_peak_stays():
    held = b"x" * 2**29  # by the parent, which is no business of the child's
    found = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    own, before, after, own_again = map(int, found.stdout.split())
    assert 2**26 < own <= before < machine.peak_memory() - len(held) / 2
    assert after - before >= 0.9 * 2**28
    assert own_again == own
