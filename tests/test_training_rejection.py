"""Rejection sampling: what is kept, of which prompt, by which weights; and that the loss is that of SFT on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scoring import END
from test_training_methods import gradient, plain_logps, policy64, same_gradient
from tiny import tiny_policy
from tiny_runs import RENDERER, asked, prepared, rejection, rows_of, run, stage_of, turn

from posttrain.models.policy import Policy
from posttrain.recipe.base import Misfit
from posttrain.records import Example, Ledger, Rollout, Score, UserError
from posttrain.training.rejection import right, with_hint

NAME = "rejection_sampling"
FOUR = {"prompts": 4, "rounds": 1, "at_least": 1.0, "check_first_step": False}
"""For a sampler that tells no true log-probabilities."""


def drawn(*answers: tuple[str, float | None, str], prompt: int = 1) -> list[tuple[Rollout, Score]]:
    example = Example("q")
    return [
        (Rollout(example, 0, (prompt,), (2, 3), (-1.0, -1.0), text, finish, "w"), Score(value, "correct"))
        for text, value, finish in answers
    ]


def test_what_is_kept() -> None:
    """Of one prompt: 0 earns enough; 1 has its words; 2 earns too little; 3 was cut off; 4 has no score; 5 is another
    right one. A second prompt may say what the first one said."""
    one = drawn(
        ("it is 4", 1.0, "stop"), ("it  is\n4", 1.0, "stop"), ("5", 0.5, "stop"), ("4.", 1.0, "length"),
        ("4!", None, "stop"), ("four", 2.0, "stop"),
    )  # fmt: skip
    both = [*one, *drawn(("it is 4", 1.0, "stop"), prompt=9)]
    assert right(both, 1.0) == [0, 5, 6]
    assert right(both, 1.0, most=1) == [0, 6]
    assert right(both, 0.5) == [0, 2, 5, 6]
    assert right(both, 3.0) == []


def test_the_hint_stands_below_the_question() -> None:
    example = Example("q", (turn("system", "Be short."), turn("user", "6 x 7?")), answer="42")
    hinted = with_hint(example, "(It is {answer}; say {why}.)")
    assert hinted.prompt == (turn("system", "Be short."), turn("user", "6 x 7?\n\n(It is 42; say {why}.)"))


class Knows:
    """Answers the first question, and any that has its answer in it; `calls` keeps what it was asked."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.calls: list[list[str]] = []

    def __call__(self, prompts: Sequence[Example], n: int, sampling: Any, seed: int) -> tuple[list[Rollout], Ledger]:
        self.calls.append([str(e.prompt[-1]["content"]) for e in prompts])
        found = []
        for p, example in enumerate(prompts):
            for k in range(n):
                content = str(example.prompt[-1]["content"])
                knows = example.id == "q:0" or ("hint" in content and example.id != "q:2")
                text = f"{example.answer}{' ' * k}" if knows and k < 2 else "no"
                ids = (*RENDERER.tokenizer.encode(text), END)
                prompt_ids = RENDERER.prompt_ids(example)
                logps = (-1.0,) * len(ids)
                found.append(Rollout(example, p, prompt_ids, ids, logps, text, "stop", self.policy.digest()))
        return found, Ledger(generated_tokens=sum(len(r.ids) for r in found))


def questions() -> list[Example]:
    """The last one has no reference answer, so nobody can give it away."""
    return [
        Example(f"q:{i}", (turn("user", f"Question {i}?"),), task="toy", answer=answer)
        for i, answer in enumerate(("a1", "b2", "c3", None))
    ]


def exactly(example: Example, text: str) -> Score:
    return Score(1.0, "correct") if text.strip() == example.answer else Score(0.0, "wrong")


def test_rationalisation_is_learned_without_the_hint(tmp_path: Path) -> None:
    """Four prompts, 3 answers each. q:0 is right twice, in the same words: one is kept, of 12. Of those that failed,
    q:1 and q:2 have an answer to be hinted at, and q:1 is then right: half of the two."""
    policy = tiny_policy()
    knows = Knows(policy)
    stage = stage_of(NAME, **FOUR, n=3, hint="hint: {answer}")
    method = rejection(policy, stage, tmp_path, exactly, knows, prepared(questions()))
    batch = method.batch(0)
    assert sorted(knows.calls[0]) == [f"Question {i}?" for i in range(4)]
    assert sorted(knows.calls[1]) == ["Question 1?\n\nhint: b2", "Question 2?\n\nhint: c3"]
    kept = {row.context: row.completion for row in batch.rows}
    data = questions()
    assert kept == {RENDERER.prompt_ids(data[i]): (*RENDERER.tokenizer.encode(data[i].answer), END) for i in (0, 1)}
    told = {name: batch.metrics[name] for name in ("kept", "solved", "rationalised", "examples", "reward")}
    assert told == {"kept": 1 / 12, "solved": 1 / 4, "rationalised": 1 / 2, "examples": 2, "reward": 2 / 12}
    assert {sample["prompt"] for sample in batch.samples} == {"Question 0?", "Question 1?"}
    assert batch.ledger.generated_tokens > 0 == method.batch(1).ledger.generated_tokens


def test_without_a_hint_nobody_is_asked_again(tmp_path: Path) -> None:
    policy = tiny_policy()
    knows = Knows(policy)
    stage = stage_of(NAME, **FOUR, n=3)
    method = rejection(policy, stage, tmp_path, exactly, knows, prepared(questions()))
    assert len({row.context for row in method.batch(0).rows}) == 1
    assert len(knows.calls) == 1


def test_the_loss_is_that_of_sft_on_what_was_kept(tmp_path: Path) -> None:
    """-sum of the log-probabilities of all kept tokens of the step / their number, however the step is cut."""
    policy = policy64(None)
    method = rejection(policy, stage_of(NAME, batch_size=4), tmp_path)
    batch = method.batch(0)
    logps = [plain_logps(policy, row.context, row.completion) for row in batch.rows]
    expected = -torch.cat(logps).mean()
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in policy.parameters().items() if p.grad is not None}
    for budget in (16, 1024):
        told, found = gradient(policy, method, batch, stage_of(NAME, tokens_per_forward=budget))
        assert told["loss"] == pytest.approx(expected.item(), rel=1e-9)
        same_gradient(found, wanted)


def test_a_round_samples_with_the_weights_that_the_last_one_left(tmp_path: Path) -> None:
    policy, _ = run(NAME, tmp_path)
    rounds = [json.loads((tmp_path / f"kept-{k}.json").read_text()) for k in (0, 1)]
    assert rounds[0]["weights"] == tiny_policy().digest()
    assert rounds[1]["weights"] not in (rounds[0]["weights"], policy.digest())
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "kept" in row] == [0, 4]
    for k, made in enumerate(rounds):
        lines = (tmp_path / f"kept-{k}.jsonl").read_text().splitlines()
        assert len(lines) == made["metrics"]["examples"] == rows[4 * k]["examples"]
    assert not list(tmp_path.glob("kept-2*"))


def test_every_prompt_has_its_turn_before_one_comes_again(tmp_path: Path) -> None:
    method = rejection(tiny_policy(), stage_of(NAME, prompts=3), tmp_path)
    assert sorted(method.slots) == [(0, i) for i in range(len(asked()))]


class Refuses:
    def __call__(self, *args: Any) -> Any:
        raise AssertionError("sampled again")


def test_a_round_that_was_sampled_is_not_sampled_again(tmp_path: Path) -> None:
    """With the same weights; with others what they wrote is no use, but in mid-round the rows are its own."""
    first = rejection(tiny_policy(), stage_of(NAME), tmp_path).batch(0)
    assert rejection(tiny_policy(), stage_of(NAME), tmp_path, sampler=Refuses()).batch(0) == first
    other = tiny_policy(seed=1)
    with pytest.raises(AssertionError, match="sampled again"):
        rejection(other, stage_of(NAME), tmp_path, sampler=Refuses()).batch(0)
    assert rejection(other, stage_of(NAME), tmp_path, sampler=Refuses()).batch(3).rows
    with pytest.raises(UserError, match=r"kept-1\.json: is missing"):
        rejection(other, stage_of(NAME), tmp_path, sampler=Refuses()).batch(5)


def test_nothing_kept_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stage 'toy', round 0: none of 24 answers to 6 prompts came to its end"):
        rejection(tiny_policy(), stage_of(NAME, at_least=7), tmp_path).batch(0)
    assert not list(tmp_path.iterdir())


def test_a_source_that_gives_nothing_leaves_the_mixture(tmp_path: Path) -> None:
    policy, data = tiny_policy(), questions()
    stage = stage_of(NAME, **FOUR, n=2)
    method = rejection(policy, stage, tmp_path, exactly, Knows(policy), prepared(data[1:3], data[:1]))
    rows = [row for step in range(8) for row in method.batch(step).rows]
    assert {row.context for row in rows} == {RENDERER.prompt_ids(data[0])}


def test_it_learns_to_say_what_it_keeps(tmp_path: Path) -> None:
    """Rounds raise the reward: the probability of what was kept rises, and it is sampled again."""
    run(NAME, tmp_path, steps=12, rounds=3, at_least=1.0, batch_size=4, n=6)
    rewards = [row["reward"] for row in rows_of(tmp_path / "metrics.jsonl") if "reward" in row]
    assert len(rewards) == 3
    assert rewards[-1] > rewards[0] + 0.1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rounds": 3}, "8 steps cannot be shared out evenly among 3 rounds"),
        ({"sampling": {"temperature": 0}}, "must be 1 at temperature 0"),
        ({"hint": "Think harder."}, "write {answer} there"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises((Misfit, ValueError)) as caught:
        stage_of(NAME, **settings)
    assert told in repr(caught.value)
