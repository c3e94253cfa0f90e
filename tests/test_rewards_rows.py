"""What models that score read of an episode, and what reading costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scoring import Scripted, answers, question, saved, shaken
from tiny import tiny_policy
from tiny_runs import RENDERER

from posttrain.forest import Forest, Row, pack
from posttrain.models.cost import forward_flops_per_token
from posttrain.models.policy import Policy
from posttrain.models.reward import marked
from posttrain.records import Ledger, Rollout, Score
from posttrain.rewards.combine import Part, combined
from posttrain.rewards.implicit import implicit_scorer
from posttrain.rewards.judge import Judge, PairJudge, tournament
from posttrain.rewards.model import model_scorer
from posttrain.rewards.protocol import charged, finite, spent
from posttrain.rewards.rows import Rows, by_rows, last, reader


def token_logps(policy: Policy, rollout: Rollout) -> list[float]:
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.ids]])
    with torch.no_grad():
        logps = policy.model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
    return logps[-len(rollout.ids) :].tolist()


def test_the_implicit_reward_is_of_what_the_model_wrote_and_not_of_what_tools_said() -> None:
    """An episode: three tokens of the model, four that it was told, and the rest its own again."""
    policy, reference = shaken(tiny_policy()), tiny_policy()
    (rollout,) = answers("No, it is not far at all.")
    target = tuple(not 3 <= t < 7 for t in range(len(rollout.ids)))
    episode = replace(rollout, target=target)
    apart = [p - q for p, q in zip(token_logps(policy, rollout), token_logps(reference, rollout), strict=True)]
    (whole,) = implicit_scorer(policy, reference, RENDERER, beta=0.3)([rollout])
    (own,) = implicit_scorer(policy, reference, RENDERER, beta=0.3)([episode])
    assert whole.value == pytest.approx(0.3 * sum(apart), abs=1e-4)
    assert own.value == pytest.approx(0.3 * sum(x for x, mine in zip(apart, target, strict=True) if mine), abs=1e-4)
    assert abs((whole.value or 0) - (own.value or 0)) > 1e-2


# What it costs


def test_a_reward_model_costs_the_tokens_it_computes(tmp_path: Path) -> None:
    """Four answers to one prompt, which is computed once, in one pass; and no logits."""
    model, rollouts = saved(tmp_path), answers()
    scores = model_scorer(model, RENDERER)(rollouts)
    rows = [Row(r.prompt_ids, r.ids, (True,) * len(r.ids)) for r in rollouts]
    tokens, longest = len(pack(rows)), max(map(len, rows))
    assert tokens < sum(map(len, rows))
    cost = spent(scores)
    assert cost.reward_tokens == tokens
    assert cost.flops == pytest.approx(tokens * forward_flops_per_token(model.model.config, longest, 0.0))
    assert cost.seconds > 0
    assert cost == replace(Ledger(reward_tokens=tokens), flops=cost.flops, seconds=cost.seconds)  # nothing else


def test_a_log_ratio_costs_both_models() -> None:
    policy, rollouts = tiny_policy(), answers("Yes")
    cost = spent(implicit_scorer(policy, tiny_policy(), RENDERER, beta=0.1)(rollouts))
    (rollout,) = rollouts
    tokens, targets = len(rollout.prompt_ids) + len(rollout.ids), len(rollout.ids)
    each = forward_flops_per_token(policy.model.config, tokens, targets / tokens)
    assert (cost.reward_tokens, cost.flops) == (2 * tokens, pytest.approx(2 * tokens * each))


def test_several_rewards_cost_all_of_them_and_nothing_costs_nothing(tmp_path: Path) -> None:
    one = model_scorer(saved(tmp_path), RENDERER)
    free = combined([Part("free", lambda rollouts: [Score(1.0, "correct")] * len(rollouts))])
    both = combined([Part("a", one), Part("b", one, gate=1e9), Part("c", free)])
    rollouts = answers()
    assert spent(both(rollouts)).reward_tokens == 2 * spent(one(rollouts)).reward_tokens
    assert spent(free(rollouts)) == Ledger()
    assert spent(one([])) == Ledger()


@pytest.mark.parametrize("compare", [False, True])
def test_a_judge_costs_what_it_is_told_and_what_it_says(compare: bool) -> None:
    """Its tokens are the reward's, none the policy's; a second call costs itself alone."""

    class Counted(Scripted):
        spent = Ledger()

        def __call__(self, *question: Any) -> Any:
            rollouts, ledger = super().__call__(*question)
            ledger += Ledger(prompt_tokens=sum(len(r.prompt_ids) for r in rollouts), flops=2.0, seconds=0.25)
            self.spent += ledger
            return rollouts, ledger

    sampler = Counted(lambda example, k: "<better>A</better>" if compare else "<grade>3</grade>")
    score = tournament(PairJudge(sampler)) if compare else Judge(sampler)
    for texts in (("Yes", "No", "Nil"), ("Yes", "No")):
        sampler.spent = Ledger()
        cost = spent(score(answers(*texts, example=question())))
        told = sampler.spent
        assert cost.reward_tokens == told.prompt_tokens + told.generated_tokens > 0
        assert (cost.flops, cost.seconds) == pytest.approx((told.flops, told.seconds))
        assert cost.generated_tokens == cost.prompt_tokens == 0


def test_a_cost_is_no_part_of_what_a_score_says() -> None:
    scores = charged([Score(1.0, "correct"), Score(None, "error")], Ledger(reward_tokens=3))
    assert scores == [Score(1.0, "correct"), Score(None, "error")]
    assert spent([finite(score) for score in scores]).reward_tokens == 3
    assert charged([], Ledger(reward_tokens=3)) == []


def lost(*_: Any) -> Any:
    raise RuntimeError("the device is gone")


def test_what_was_read_before_a_reward_broke_down_is_paid(tmp_path: Path) -> None:
    """Of two models the second breaks down; of two passes of one model the second."""
    policy, reference, rollouts = tiny_policy(), tiny_policy(), answers("Yes", "No")
    whole = spent(implicit_scorer(policy, reference, RENDERER, beta=0.1)(rollouts))
    reference.model.get_input_embeddings().register_forward_pre_hook(lost)
    scores = implicit_scorer(policy, reference, RENDERER, beta=0.1)(rollouts)
    assert [(score.value, score.why) for score in scores] == [(None, "RuntimeError: the device is gone")] * 2
    assert spent(scores).reward_tokens == whole.reward_tokens / 2 > 0

    model, passes = saved(tmp_path), iter([marked])

    def compute(forest: Forest) -> Any:
        return next(passes, lost)(model.model, forest)

    by_passes = by_rows(Rows(model, RENDERER, last), reader(model, compute, 1), lambda values: Score(1.0, "correct"))
    (rollout,) = answers("Yes")
    scores = by_passes([rollout, rollout])
    assert [score.value for score in scores] == [None, None]
    assert spent(scores).reward_tokens == len(rollout.prompt_ids) + len(rollout.ids)
