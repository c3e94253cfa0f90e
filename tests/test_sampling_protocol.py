"""Prompts that are made of what a model wrote: those that cannot be asked do not keep the others from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from tiny import tiny_policy
from tiny_runs import RENDERER, turn

from posttrain.data.shapes import Malformed
from posttrain.recipe.blocks import Sampling
from posttrain.records import Example, Failure, Ledger, Rollout, UserError
from posttrain.sampling.local import LocalSampler
from posttrain.sampling.protocol import attempted

HOW = Sampling(max_new_tokens=3)


def prompts(*texts: str) -> list[Example]:
    return [Example(f"q:{text[:8]}", (turn("user", text),)) for text in texts]


def test_all_that_can_be_asked_is_asked_as_the_sampler_would() -> None:
    sampler, asked = LocalSampler(tiny_policy(), RENDERER), prompts("Is it far?", "Two hours")
    found, cost = attempted(sampler, asked, 2, HOW, 7)
    rollouts, ledger = sampler(asked, 2, HOW, 7)
    assert found == [rollouts[:2], rollouts[2:]]
    assert cost.generated_tokens == ledger.generated_tokens
    assert attempted(sampler, [], 2, HOW, 7) == ([], Ledger())


def test_a_prompt_without_room_is_told_apart() -> None:
    """Two of five are longer than the context of 256; the groups of the others have the numbers of their prompts."""
    sampler = LocalSampler(tiny_policy(), RENDERER)
    found, cost = attempted(sampler, prompts("a", "x " * 300, "b", "c", "y " * 300), 2, HOW, 7)
    assert [isinstance(said, UserError) for said in found] == [False, True, False, False, True]
    assert "no room for an answer" in str(found[1])
    rollouts = [rollout for said in found if not isinstance(said, UserError) for rollout in said]
    assert [rollout.group for rollout in rollouts] == [0, 0, 2, 2, 3, 3]
    assert cost.generated_tokens == sum(len(rollout.ids) for rollout in rollouts)


@pytest.mark.parametrize("error", [UserError("no"), Malformed("no"), Failure("gone")])
def test_only_what_is_wrong_with_a_prompt_is_passed_over(error: Exception) -> None:
    def sampler(asked: Sequence[Example], *how: Any) -> tuple[list[Rollout], Ledger]:
        raise error

    if isinstance(error, Failure):
        with pytest.raises(Failure):
            attempted(sampler, prompts("a", "b"), 1, HOW, 0)
        return
    found, _ = attempted(sampler, prompts("a", "b"), 1, HOW, 0)
    assert [str(said) for said in found] == ["no", "no"]
