"""A student that is every second layer of its teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import ARCHS, tiny_model, tiny_policy
from tiny_runs import RENDERER, asked

from posttrain.models.memory import stack_of
from posttrain.models.policy import load
from posttrain.models.student import every_second_layer, half_depth
from posttrain.recipe.blocks import Lora, Sampling
from posttrain.records import UserError
from posttrain.sampling.local import LocalSampler

IDS = torch.tensor([[1, 5, 9, 30, 12, 77, 4, 8, 200, 3, 18]])


@pytest.mark.parametrize("depth", [4, 5])
@pytest.mark.parametrize("arch", ARCHS)
def test_it_computes_what_the_teacher_does_without_its_odd_layers(arch: str, depth: int) -> None:
    own = {"no_rope_layers": [1, 0, 1, 1, 0][:depth]} if arch == "smollm3" else {}
    teacher = tiny_model(arch, num_hidden_layers=depth, **own)
    state = torch.random.get_rng_state()
    student = every_second_layer(teacher)
    assert torch.equal(state, torch.random.get_rng_state())
    assert len(stack_of(student)) == student.config.num_hidden_layers == (depth + 1) // 2
    layers = stack_of(teacher)
    types = getattr(teacher.config, "layer_types", None)
    if types:  # the decoder looks the mask of each layer up by its place
        teacher.config.layer_types = types[::2]
    del layers[1::2]
    teacher.config.num_hidden_layers = len(layers)
    with torch.no_grad():
        torch.testing.assert_close(student(IDS).logits, teacher(IDS, use_cache=False).logits)


def test_it_is_saved_as_a_model_of_its_own_that_samples(tmp_path: Path) -> None:
    tiny_policy(num_hidden_layers=4).save(tmp_path / "teacher")
    made = half_depth(str(tmp_path / "teacher"), tmp_path / "student")
    student = load(str(tmp_path / "student"))
    assert made.digest == student.digest()
    assert student.tokenizer.get_vocab() == tiny_policy().tokenizer.get_vocab()
    greedy = Sampling(temperature=0, max_new_tokens=5)
    (rollout,), _ = LocalSampler(student, RENDERER)([asked()[0]], 1, greedy, 0)
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.ids]])
    with torch.no_grad():
        said = student.model(ids, use_cache=False).logits[0, len(rollout.prompt_ids) - 1 : -1].argmax(-1)
    assert tuple(said.tolist()) == rollout.ids


def test_what_cannot_be_halved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 1 layer"):
        every_second_layer(tiny_model(num_hidden_layers=1))
    tiny_policy().save(tmp_path / "base")
    load(str(tmp_path / "base"), adapter=Lora(r=2)).save(tmp_path / "adapter")
    with pytest.raises(UserError, match="is an adapter"):
        half_depth(str(tmp_path / "adapter"), tmp_path / "student")
