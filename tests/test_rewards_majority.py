"""The majority of a group as the right answer: who votes, what is elected, and what nobody may be paid for."""

from __future__ import annotations

import pytest
from rewarded import question, said
from tiny import tiny_policy
from tiny_runs import RENDERER, SEED, asked, prepared, rows_of, stage_of

from posttrain.recipe.rewards import MajorityReward
from posttrain.records import Rollout, Score
from posttrain.rewards import build
from posttrain.rewards.majority import elected, majority
from posttrain.sampling.local import LocalSampler
from posttrain.training.grpo import GrpoMethod
from posttrain.training.loop import train


def scores(*texts: str, by: str = "answer") -> list[Score]:
    return majority(MajorityReward(kind="majority", by=by))([said(text) for text in texts])


def values(*texts: str, by: str = "answer") -> list[float | None]:
    return [score.value for score in scores(*texts, by=by)]


@pytest.mark.parametrize(
    ("answers", "right"),
    [
        (["a", "b", "a"], "a"),
        (["b", "a", "c", "a", "c", "c"], "c"),
        (["a", "b", "a", "b", "c"], None),  # a tie
        (["a", "b", "c"], None),  # nobody agrees
        (["a", None, None], None),  # one vote
        (["a", None, "a", None, None], "a"),  # who says nothing does not vote
        ([None, None], None),
        (["a"], None),
        ([], None),
    ],
)
def test_what_is_elected(answers: list[str | None], right: str | None) -> None:
    assert elected(answers) == right


def test_the_most_frequent_answer_earns_one() -> None:
    """Three of five say 12 in their ways; "11" is wrong, and nothing is nothing."""
    found = scores("12", " 12.0\n", "11", "", "so <answer>+12</answer> it is")
    assert [score.value for score in found] == [1, 1, 0, 0, 1]
    assert [score.outcome for score in found] == ["correct", "correct", "wrong", "unparsed", "correct"]
    assert {score.why for score in found} == {"3 of 5 say '12'"}


def test_a_group_that_does_not_agree_is_unscored() -> None:
    found = scores("1", "1", "2", "2", "")
    assert {score.value for score in found} == {None}
    assert {score.outcome for score in found} == {"error"}
    assert "no answer has most of the 5 votes" in found[0].why


def test_each_prompt_elects_its_own() -> None:
    """One says 1 twice and 2 once, the other the reverse; so what is right here is wrong there."""
    one, other = question("One?"), question("Other?")
    asked = [(one, 0, "1"), (one, 0, "1"), (one, 0, "2"), (other, 1, "2"), (other, 1, "2"), (other, 1, "1")]
    rollouts = [said(text, example, group=group) for example, group, text in asked]
    found = majority(MajorityReward(kind="majority"))(rollouts)
    assert [score.value for score in found] == [1, 1, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("texts", "by", "expected"),
    [
        (("1,000", "1000", "1000.0", "10"), "answer", [1, 1, 1, 0]),
        (("New  York", "New\nYork", "new york"), "answer", [1, 1, 0]),
        ((r"so \boxed{x + 1}", "$x+1$", "x"), "math", [1, 1, 0]),
        ((r"\boxed{3} or \boxed{4}", "3", "3.", "I think it is 4"), "math", [0, 1, 1, 0]),
        (("I think 4", "I think 4", "4", "4", "4"), "math", [0, 0, 1, 1, 1]),
        (("3, 4", "3, 4", "3", "3", "3"), "math", [0, 0, 1, 1, 1]),  # several answers are none
    ],
)
def test_how_answers_are_read(texts: tuple[str, ...], by: str, expected: list[float]) -> None:
    assert values(*texts, by=by) == expected


def test_grpo_learns_from_it(tmp_path) -> None:
    """A random model of one-token answers agrees now and then; the run goes on where it does not."""
    policy = tiny_policy()
    stage = stage_of(
        "grpo",
        n=16,
        steps=3,
        batch_size=6,
        kl_weight=0.0,
        sampling={"max_new_tokens": 1, "temperature": 0.5},
        rewards=[{"kind": "majority"}],
        max_unscored=1.0,
    )
    score = build(stage.rewards, RENDERER, max_unscored=stage.max_unscored)
    seen: list[tuple[Rollout, Score]] = []

    def watched(rollouts):
        found = score(rollouts)
        seen.extend(zip(rollouts, found, strict=True))
        return found

    method = GrpoMethod(stage, prepared(asked()), policy, LocalSampler(policy, RENDERER), watched, SEED)
    train(policy, method, stage, tmp_path, SEED)
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert any(row["grad_norm"] > 0 for row in rows)
    assert {found.value for _, found in seen} >= {0.0, 1.0}
    assert [row["unscored"] for row in rows] == pytest.approx(
        [sum(found.value is None for _, found in seen[96 * k :][:96]) / 96 for k in range(3)]
    )
