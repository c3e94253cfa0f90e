"""A student for distillation, made of its teacher: every second layer, with the teacher's own weights."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from posttrain.models.memory import stack_of
from posttrain.models.policy import attach, load
from posttrain.records import Artifact, UserError


def half_depth(source: str, folder: Path, dtype: str = "float32") -> Artifact:
    """Write to `folder` the model that `source` names with its layers 0, 2, 4 and so on alone, as DistilBERT begins
    (Sanh et al., 1910.01108).

    It has the teacher's tokenizer, and says nothing sensible before it is trained.

    Raises:
        UserError: the source cannot be had, is an adapter, or has one layer.
    """
    teacher = load(source, dtype=dtype, device="cpu")
    if isinstance(teacher.model, PeftModel):
        raise UserError(f"{source}: is an adapter, and its layers are those of its base; merge it first")
    model = every_second_layer(teacher.model)
    return attach(model, teacher.tokenizer, source=source, revision=teacher.revision).save(folder)


def every_second_layer(teacher: PreTrainedModel) -> PreTrainedModel:
    """A model of half the depth, rounded up, with copies of the teacher's weights."""
    depth = len(stack_of(teacher))
    if depth < 2:
        raise UserError(f"{type(teacher).__name__} has {depth} layer; there is none to leave out")
    config = copy.deepcopy(teacher.config)
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == depth:  # what each layer attends to, say
            setattr(config, name, value[::2])
    config.num_hidden_layers = -(-depth // 2)
    with torch.random.fork_rng():
        student = AutoModelForCausalLM.from_config(config, dtype=teacher.dtype)
    student.load_state_dict(_renumbered(teacher))
    student.generation_config = copy.deepcopy(teacher.generation_config)
    made: PreTrainedModel = student.eval()
    return made


def _renumbered(teacher: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Its weights without those of odd layers, the others' layers numbered anew."""
    stack = stack_of(teacher)
    prefix = next(name for name, module in teacher.named_modules() if module is stack) + "."
    kept = {}
    for name, weight in teacher.state_dict().items():
        if name.startswith(prefix):
            layer, _, rest = name.removeprefix(prefix).partition(".")
            if int(layer) % 2:
                continue
            name = f"{prefix}{int(layer) // 2}.{rest}"
        kept[name] = weight
    return kept
