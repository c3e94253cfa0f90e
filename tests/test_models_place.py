"""Where a model computes, and its layers compiled."""

from __future__ import annotations

import random
import shutil

import pytest
import torch
from test_forest import random_forest
from tiny import tiny_model, tiny_policy

from posttrain.forest import token_logprobs
from posttrain.models import place
from posttrain.models.policy import load
from posttrain.recipe.blocks import Lora
from posttrain.records import UserError


def test_auto_is_what_is_there():
    assert place.device("cpu") == torch.device("cpu")
    assert place.device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(tmp_path):
    tiny_policy().save(tmp_path / "model")
    with pytest.raises(UserError, match="no usable CUDA device"):
        load(str(tmp_path / "model"), device="cuda")


def test_compile_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"needs a C.. compiler"):
        place.compile_layers(tiny_model())


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_compiled_layers_give_the_same_values_and_gradients():
    """Over forests of several sizes, which one compilation must serve; the weights keep their names."""
    plain, compiled = tiny_policy(adapter=Lora(r=2)), tiny_policy(adapter=Lora(r=2))
    place.compile_layers(compiled.model)
    assert plain.parameters().keys() == compiled.parameters().keys()
    for seed in (0, 1, 3):
        forest = random_forest(random.Random(seed))
        found = []
        for policy in (plain, compiled):
            logps_T = token_logprobs(policy.model, forest)
            gradient = torch.autograd.grad(logps_T.sum(), list(policy.parameters().values()), allow_unused=True)
            found.append([logps_T.detach(), *(g for g in gradient if g is not None)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
