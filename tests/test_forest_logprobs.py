"""What a target token's distribution says of itself, against the model's own logits, one sequence at a time."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_policy
from torch import Tensor

from posttrain.forest import Row, logprobs, pack, token_logprobs, token_statistics
from posttrain.recipe.blocks import Lora

ROWS = (
    Row((5, 6, 7, 8, 9, 10, 11, 12, 13, 14), (20, 21, 22), (True, True, True)),
    Row((5, 6, 7, 8, 9, 10, 11, 12, 13, 14), (30, 31, 32, 33), (True, False, True, True)),
    Row((40,), (41, 42), (True, True)),
)


def one_by_one(model: torch.nn.Module, temperature: float) -> Tensor:
    """[3, N]: log p, entropy and collision of the target tokens, row by row, from all logits at once."""
    found = []
    for row in ROWS:
        ids_1T = torch.tensor([[*row.context, *row.completion]])
        logps_TV = (model(ids_1T).logits[0, len(row.context) - 1 : -1] / temperature).log_softmax(-1)
        own_T = logps_TV.gather(1, torch.tensor(row.completion)[:, None]).squeeze(1)
        entropy_T = torch.distributions.Categorical(logits=logps_TV).entropy()
        found.append(torch.stack([own_T, entropy_T, logps_TV.exp().square().sum(1).log()])[:, list(row.target)])
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("adapter", [None, Lora(r=2)], ids=["trained head", "frozen head"])
def test_statistics_are_those_of_the_whole_distribution(monkeypatch, adapter, temperature):
    """Values and the entropy's gradient, in chunks of 4 of the 8 target tokens; the shared context stands once."""
    monkeypatch.setattr(logprobs, "CHUNK", 4)
    policy = tiny_policy(adapter=adapter, dtype=torch.float64)
    forest = pack(ROWS)
    assert len(forest) < sum(map(len, ROWS))
    order_N = torch.cat([torch.arange(*span)[list(row.target)] for row, span in zip(ROWS, forest.spans, strict=True)])
    # A weight for each number, so that no two gradients can change places.
    weight_2N = torch.linspace(0.5, 2, 16, dtype=torch.float64).view(2, 8)

    found_3T = token_statistics(policy.model, forest, "entropy", "collision", temperature=temperature)
    (found_3T[:2, order_N] * weight_2N).sum().backward()
    ours = {name: p.grad.clone() for name, p in policy.parameters().items()}
    policy.model.zero_grad()
    expected_3N = one_by_one(policy.model, temperature)
    (expected_3N[:2] * weight_2N).sum().backward()

    torch.testing.assert_close(found_3T[:, order_N], expected_3N, rtol=1e-6, atol=1e-6)
    assert (found_3T[:, ~forest.target_T] == 0).all()
    assert any(g.abs().max() > 1e-3 for g in ours.values())
    for name, p in policy.parameters().items():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-3, atol=1e-5)  # Transformers takes norms in float32


def test_the_collision_is_a_constant_and_the_log_probabilities_are_those_of_the_plain_pass():
    policy, forest = tiny_policy(), pack(ROWS)
    logps_T, collision_T = token_statistics(policy.model, forest, "collision")
    torch.testing.assert_close(logps_T, token_logprobs(policy.model, forest))
    collision_T.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters().values())
