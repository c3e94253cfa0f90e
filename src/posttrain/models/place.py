"""Where a model computes, and whether its layers are compiled."""

from __future__ import annotations

import os
import shutil

import torch
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from posttrain.forest.attention import NAME, decoder
from posttrain.records import UserError


def device(name: str) -> torch.device:
    """`auto` is CUDA where there is a usable device of it, else the CPU.

    Raises:
        UserError: the device that is named is not here.
    """
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UserError("model.device: cuda, and PyTorch finds no usable CUDA device here; set auto or cpu")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def compile_layers(model: torch.nn.Module) -> None:
    """Have each decoder layer compiled when it first runs, in place: weights keep their names.

    One compilation serves all layers alike and all numbers of tokens. Attention stays outside: what it does differs
    with every forest, and would be compiled for each anew.

    Raises:
        UserError: there is no compiler that PyTorch could use.
    """
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise UserError("model.compile: needs a C++ compiler, and there is none here; install g++ or leave compile out")
    AttentionInterface.register(NAME, torch.compiler.disable(ALL_ATTENTION_FUNCTIONS[NAME]))
    for layer in decoder(model).get_decoder().modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(dynamic=True)
