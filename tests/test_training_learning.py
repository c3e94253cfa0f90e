"""On a policy whose every answer can be written down each method reaches the optimum that is known.

Credit, losses and methods are the package's; the model is a table (toy.py), and its samples are drawn evenly, so that a
batch says almost what the expectation would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import Ids, Table, ToyPolicy, ToySampler, learn, toy, toy_data, toy_scorer

from posttrain.recipe.rl import Grpo, Ppo
from posttrain.training.grpo import GrpoMethod
from posttrain.training.ppo import PpoMethod


def method_of(policy: ToyPolicy, reward: Callable[[Ids], float], steps: int, settings: dict[str, Any]) -> Any:
    model: Any = policy.model
    common = {"id": "toy", "data": {"sources": [{"source": "unused.jsonl"}]}, "steps": steps, "batch_size": 1}
    common |= {"kind": "grpo", "n": 64, "sampling": {"max_new_tokens": model.longest}}
    kinds: dict[str, tuple[Any, Any]] = {"grpo": (Grpo, GrpoMethod), "ppo": (Ppo, PpoMethod)}
    kind, method = kinds[settings.get("kind", "grpo")]
    stage = kind.model_validate({**common, **settings})
    return method(stage, toy_data(), policy, ToySampler(policy), toy_scorer(reward), 0)


def worths(model: Table, reward: Callable[[Ids], float]) -> Tensor:
    """Of every answer that there is."""
    return torch.tensor([reward(ids) for ids in model.completions], dtype=torch.float64)


def expected(model: Table, reward: Callable[[Ids], float]) -> float:
    return float(model.probabilities() @ worths(model, reward))


def closed_form(model: Table, reward: Callable[[Ids], float], beta: float) -> Tensor:
    """p exp(r / beta) / Z with the model as it stands for p: what maximises E[r] - beta KL(pi, p)."""
    weights = model.probabilities() * (worths(model, reward) / beta).exp()
    return weights / weights.sum()


def apart(p: Tensor, q: Tensor) -> float:
    """Total variation."""
    return float((p - q).abs().sum() / 2)


def tempting(ids: Ids) -> float:
    """The best answer is one of nine of two tokens; an answer that ends at once is worth half as much."""
    return {(2, 1): 1.0, (0,): 0.5}.get(ids, 0.2 if ids[0] == 1 else 0.0)


def graded(ids: Ids) -> float:
    """One answer of each worth, told by its first token."""
    return (0.0, 0.2, 0.5, 0.8, 1.0)[ids[0]]


METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"aggregate": "sequence"},
    "dapo": {"clip_high": 0.28, "max_draws": 2},
    "dr grpo": {"aggregate": "constant", "baseline_std": "none"},
    "rloo": {"advantage": "leave_one_out", "ratio": "product", "aggregate": "sequence"},
    "reinforce++": {"advantage": "whitened"},
    "gspo": {"ratio": "sequence", "aggregate": "sequence"},
    "gspo-token": {"ratio": "sequence_token", "aggregate": "sequence"},
    "luspo": {"ratio": "sequence", "aggregate": "sum"},
    "cispo": {"objective": "cispo"},
    "sapo": {"objective": "sapo", "aggregate": "sequence"},
    "gmpo": {"objective": "gmpo", "aggregate": "sequence"},
    "vespo": {"objective": "vespo"},
    "ppo": {"kind": "ppo", "kl_weight": 0.0, "iterations": 2},
}


@pytest.mark.parametrize("name", METHODS)
def test_the_best_answer_is_found(name):
    """Two steps on each batch, so that ratios and what bounds them play their part."""
    policy = toy(3, 2)
    model: Any = policy.model
    method = method_of(policy, tempting, 80, {"iterations": 2, **METHODS[name]})
    assert expected(model, tempting) < 0.4
    learn(method, policy, 80, 0.2)
    assert expected(model, tempting) > 0.95


BETA = 0.5
K1_IN_REWARD = {"kl_estimator": "k1", "kl_in": "reward", "baseline_std": "none"}
ONE_TOKEN: dict[str, dict[str, Any]] = {
    "clip, k2": {"kl_estimator": "k2"},
    "clip, k1 corrected": {"kl_estimator": "k1", "kl_corrected": True},
    "clip, k3 corrected": {"kl_estimator": "k3", "kl_corrected": True},
    "clip, k1 in the reward": K1_IN_REWARD,
    "gspo, k2": {"ratio": "sequence", "aggregate": "sequence", "kl_estimator": "k2"},
    "cispo, k2": {"objective": "cispo", "kl_estimator": "k2"},
    "sapo, k2": {"objective": "sapo", "kl_estimator": "k2"},
    "gmpo, k2": {"objective": "gmpo", "aggregate": "sequence", "kl_estimator": "k2"},
    "vespo, k2": {"objective": "vespo", "kl_estimator": "k2"},
}


@pytest.mark.parametrize("name", ONE_TOKEN)
def test_with_a_kl_penalty_the_optimum_is_the_closed_form(name):
    """Answers of one token, for which a penalty at each token in the loss is that of the whole answer."""
    policy = toy(5, 1, spread=0.5)
    model: Any = policy.model
    wanted = closed_form(model, graded, BETA)
    assert apart(model.probabilities(), wanted) > 0.2
    settings = {"kl_weight": BETA, "baseline_std": "none", "n": 128, **ONE_TOKEN[name]}
    learn(method_of(policy, graded, 100, settings), policy, 100, 0.1)
    assert apart(model.probabilities(), wanted) < 0.02


def test_k3_in_the_loss_as_it_stands_has_another_optimum():
    """Its gradient is that of KL(p, pi): the optimum is pi = beta p / (c - r), c such that it sums to 1."""
    policy = toy(5, 1, spread=0.5)
    model: Any = policy.model
    p, rewards = model.probabilities(), worths(model, graded)
    low, high = 1.0, 10.0
    for _ in range(60):
        c = (low + high) / 2
        low, high = (c, high) if (BETA * p / (c - rewards)).sum() > 1 else (low, c)
    settings = {"kl_weight": BETA, "baseline_std": "none", "n": 128, "kl_estimator": "k3"}
    learn(method_of(policy, graded, 100, settings), policy, 100, 0.1)
    assert apart(model.probabilities(), BETA * p / (c - rewards)) < 0.02
    assert apart(BETA * p / (c - rewards), closed_form(toy(5, 1, spread=0.5).model, graded, BETA)) > 0.02


IN_REWARD: dict[str, dict[str, Any]] = {
    "dr grpo": {**K1_IN_REWARD, "aggregate": "sum"},
    "rloo": {
        "advantage": "leave_one_out", "ratio": "product", "aggregate": "sequence", "kl_estimator": "k1",
        "kl_in": "reward",
    },
    "reinforce++": {"advantage": "whitened", "kl_estimator": "k1", "kl_in": "reward"},
    "ppo": {"kind": "ppo", "iterations": 1, "gae_lambda": 1.0, "value_clip": None, "value_weight": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("name", IN_REWARD)
def test_in_the_reward_it_is_the_closed_form_over_whole_answers(name):
    """Of one or two tokens: what the first one costs later counts, which a penalty in the loss does not see."""
    policy = toy(3, 2, spread=0.5)
    model: Any = policy.model
    wanted = closed_form(model, tempting, BETA)
    assert apart(model.probabilities(), wanted) > 0.2
    learn(method_of(policy, tempting, 150, {"kl_weight": BETA, "n": 128, **IN_REWARD[name]}), policy, 150, 0.1)
    assert apart(model.probabilities(), wanted) < 0.02


def test_an_entropy_bonus_keeps_the_policy_as_open_as_its_weight_says():
    """E[r] + a H is largest at exp(r / a) / Z."""
    policy = toy(5, 1, spread=0.5)
    model: Any = policy.model
    settings = {"entropy_weight": BETA, "baseline_std": "none", "n": 128}
    learn(method_of(policy, graded, 100, settings), policy, 100, 0.1)
    assert apart(model.probabilities(), (worths(model, graded) / BETA).softmax(0)) < 0.02


def test_ppo_solves_three_steps_with_its_critic():
    """Only 1, 1, 1 earns 1; to begin with 0 earns 0.2, and at first little less than the rest. The critic ends at what
    is to be had from each state on the way: from the beginning, after 1 and after 1, 1."""
    policy = toy(2, 3, end=None)
    model: Any = policy.model

    def reward(ids: Ids) -> float:
        return 1.0 if ids == (1, 1, 1) else 0.2 if ids[0] == 0 else 0.0

    settings = {"kind": "ppo", "kl_weight": 0.0, "gae_lambda": 0.9, "value_weight": 1.0, "value_clip": None}
    method = method_of(policy, reward, 240, {**settings, "minibatches": 2})
    assert expected(model, reward) == pytest.approx(0.225)
    learn(method, policy, 240, 0.1)
    assert expected(model, reward) > 0.95
    values = (method.critic.weight + method.critic.bias).squeeze(0)
    for prefix in ((), (1,), (1, 1)):
        assert values[model.node[prefix]].item() == pytest.approx(1, abs=0.1)
