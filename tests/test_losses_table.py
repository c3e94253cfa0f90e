"""What holds for every loss that `posttrain losses` lists: it runs, in either precision, far out, and past garbage."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from posttrain import losses
from posttrain.losses import TABLE
from posttrain.recipe.objectives import OBJECTIVES

STOPPED = {"dft", "cispo", "vespo", "nash_md", "gspo_token"}
"""Their gradient is by construction not that of their value; each has its own test."""
CONSTANT = {"wpo"}
"""Weights, without a gradient."""
ORDERED = {"ld_dpo"}
"""Where tokens stand matters: what lies beyond the shorter side."""
PARTS = {
    "TABLE", "Entry", "Counts", "reduce", "reduce_pairs", "reduce_tokens", "segment_sum", "ratio", "importance",
    "clipped_share", "kl_divergence", "kto_kl", "running_mean",
}  # fmt: skip
"""What losses are made of, and what makes them a scalar."""
LEAVES = (
    "logps_T", "chosen_P", "rejected_P", "explored_P", "ratios_P", "means_P", "ratios_S", "scores_PK", "logits_T",
    "values_T", "entropies_T", "student_NV",
)  # fmt: skip
TARGET_T = torch.tensor([0, 1, 1, 0, 1, 1, 1, 0], dtype=torch.bool)
FIXED = {
    "target_T": TARGET_T,
    "sequence_T": torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]),
    "desirable_S": torch.tensor([True, False, False, True]),
    "S": 2,
    "shift": 0.3,
}


def needs(function: Callable[..., Any]) -> list[str]:
    return [name for name, p in inspect.signature(function).parameters.items() if p.default is p.empty]


def small(dtype: torch.dtype) -> dict[str, Any]:
    """Of each name a few ordinary values."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    drawn = {
        "chosen_P": draw(4), "rejected_P": draw(4), "explored_P": -draw(4).abs(), "ratios_P": draw(4),
        "means_P": -draw(4).abs(), "ratios_S": draw(4), "scores_PK": draw(3, 3), "rewards_PK": draw(3, 3).sigmoid(),
        "logps_T": -draw(8).abs(), "old_logps_T": -draw(8).abs(), "ref_logps_T": -draw(8).abs(),
        "advantages_T": draw(8), "collision_T": -draw(8).abs(), "entropies_T": draw(8).abs(), "logits_T": draw(8),
        "labels_T": draw(8).sigmoid(), "values_T": draw(8), "old_values_T": draw(8), "returns_T": draw(8),
        "preference_T": draw(8).sigmoid(), "student_NV": draw(5, 4), "teacher_NV": draw(5, 4),
        "kl": draw(1)[0].abs(),
    }  # fmt: skip
    return FIXED | drawn


def extreme(dtype: torch.dtype) -> dict[str, Any]:
    """Of each name values so far out that log-ratios are +-1e4, in every combination of signs."""

    def given(*values: float) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)

    far = 1e4
    sides = given(-1, -far, 0, -1, 0, -far, -far, 0), given(-1, 0, -far, -1, -far, 0, -far, 0)
    return small(dtype) | {
        "chosen_P": given(far, far, -far, -far), "rejected_P": given(far, -far, far, -far),
        "explored_P": given(-far, 0, -far, 0), "ratios_P": given(far, -far, 0, far),
        "ratios_S": given(far, far, -far, -far),
        "means_P": given(-far, -1e-30, 0, -math.log(2)), "kl": given(far)[0],
        "scores_PK": given(far, -far, 0).expand(3, 3), "logits_T": sides[0] - sides[1],
        "logps_T": sides[0], "old_logps_T": sides[1], "ref_logps_T": sides[1], "values_T": sides[0],
        "old_values_T": sides[1], "returns_T": -sides[0], "student_NV": given(far, -far, 0, far).expand(5, 4),
        "teacher_NV": given(-far, far, 0, far).expand(5, 4),
    }  # fmt: skip


def run(name: str, values: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and the gradient of its sum in everything that is differentiated."""
    function = TABLE[name].function
    given = {key: values[key] for key in needs(function)}
    leaves = {key: given[key].clone().requires_grad_() for key in given if key in LEAVES}
    loss = function(**given | leaves)
    if name in CONSTANT:
        assert not loss.requires_grad
        return loss, {}
    loss.sum().backward()
    return loss.detach(), {key: leaf.grad for key, leaf in leaves.items()}


@pytest.mark.parametrize("name", TABLE)
def test_every_loss_runs_and_teaches(name):
    loss, gradients = run(name, small(torch.float64))
    assert loss.dtype == torch.float64
    assert loss.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert name in CONSTANT or all((gradient != 0).any() for gradient in gradients.values())


@pytest.mark.parametrize("name", [name for name in TABLE if name not in STOPPED | CONSTANT])
def test_gradients_agree_with_finite_differences(name):
    function, values = TABLE[name].function, small(torch.float64)
    fixed = {key: values[key] for key in needs(function) if key not in LEAVES}
    names = [key for key in needs(function) if key in LEAVES]
    leaves = tuple(values[key].requires_grad_() for key in names)
    assert torch.autograd.gradcheck(lambda *xs: function(**fixed, **dict(zip(names, xs, strict=True))), leaves)


@pytest.mark.parametrize("name", TABLE)
def test_float32_agrees_with_float64(name):
    (single, singles), (double, doubles) = run(name, small(torch.float32)), run(name, small(torch.float64))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-6)
    for key, gradient in singles.items():
        torch.testing.assert_close(gradient.double(), doubles[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_out_it_stays_finite(name, dtype):
    loss, gradients = run(name, extreme(dtype))
    assert loss.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


BY_TOKEN = [name for name in TABLE if "target_T" in needs(TABLE[name].function)]


@pytest.mark.parametrize("name", BY_TOKEN)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_what_stands_at_other_tokens_is_not_read(name, garbage):
    clean = small(torch.float64)
    dirty = {
        key: value.masked_fill(~TARGET_T, garbage) if key.endswith("_T") and value.is_floating_point() else value
        for key, value in clean.items()
    }
    dirty["sequence_T"] = clean["sequence_T"].masked_fill(~TARGET_T, 10**9)
    (expected, gradients), (found, dirtied) = run(name, clean), run(name, dirty)
    assert torch.equal(found, expected)
    for key, gradient in dirtied.items():
        assert torch.equal(gradient, gradients[key])
        assert (gradient[~TARGET_T] == 0).all()


@pytest.mark.parametrize("name", [name for name in BY_TOKEN if name not in CONSTANT])
def test_without_target_tokens_there_is_no_loss(name):
    values = small(torch.float64)
    values |= {key: torch.full((8,), math.nan, dtype=torch.float64) for key in values if key.endswith("_T")}
    values |= {"target_T": torch.zeros(8, dtype=torch.bool), "sequence_T": FIXED["sequence_T"]}
    loss, gradients = run(name, values)
    assert (loss == 0).all()
    assert all((gradient == 0).all() for gradient in gradients.values())


@pytest.mark.parametrize("name", [name for name in TABLE if name not in ORDERED])
def test_the_order_of_tokens_pairs_and_rows_does_not_matter(name):
    """The losses follow a permutation of what they are of. Those of optimal transport, and of sequences, are summed."""
    values, rng = small(torch.float64), torch.Generator().manual_seed(1)
    orders: dict[str, torch.Tensor] = {}
    mixed = dict(values)
    for key in needs(TABLE[name].function):
        kind = key.rpartition("_")[2]
        if isinstance(values[key], torch.Tensor) and values[key].dim():
            order = orders.setdefault(kind, torch.randperm(len(values[key]), generator=rng))
            mixed[key] = values[key][order]
    assert len(orders) == 1
    (expected, gradients), (found, shuffled) = run(name, values), run(name, mixed)
    order = next(iter(orders.values()))
    if name.startswith("aot") or name in CONSTANT:
        torch.testing.assert_close(found.sum(), expected.sum())
    else:
        torch.testing.assert_close(found, expected[order])
    for key, gradient in shuffled.items():
        torch.testing.assert_close(gradient, gradients[key][order])


def test_the_table_says_what_each_is_and_where_it_comes_from():
    for name, entry in TABLE.items():
        assert name == name.lower().replace("-", "_")
        assert entry.summary
        assert entry.paper
        assert len(f"{name}{entry.summary}{entry.paper}") < 120, f"{name}: keep it to a line"


def test_every_loss_that_can_be_called_is_listed():
    listed = {getattr(entry.function, "func", entry.function).__name__ for entry in TABLE.values()}
    assert listed | PARTS == set(losses.__all__)
    assert not listed & PARTS


def test_the_recipe_speaks_of_the_same_losses():
    assert {name: TABLE[name].paper for name in OBJECTIVES} == {name: o.paper for name, o in OBJECTIVES.items()}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_stage_s_defaults_are_the_table_s(name):
    """What a stage reads and the listed function takes has one value, the paper's."""
    reads = OBJECTIVES[name].reads
    takes = inspect.signature(TABLE[name].function).parameters
    shared = reads.keys() & takes.keys()
    assert {key: takes[key].default for key in shared} == {key: reads[key] for key in shared}
