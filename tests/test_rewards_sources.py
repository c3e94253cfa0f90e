"""From the blocks of a recipe to one scorer."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from rewarded import question, said
from tiny_runs import RENDERER

from posttrain.data import tasks
from posttrain.recipe.rewards import Reward, Rewarded
from posttrain.recipe.rl import Grpo
from posttrain.records import Failure, UserError
from posttrain.rewards import TABLE, build
from posttrain.rewards.sources import RULES, lacking, proven

CITIES = [question(f"Capital {i}?", city) for i, city in enumerate(("Paris", "New York", "São Paulo", "Bern", "Oslo"))]


def rewarded(*rewards: dict[str, Any], **settings: Any) -> Rewarded:
    return Rewarded.model_validate({"rewards": rewards, **settings})


def scores(*rewards: dict[str, Any], texts: list[str], **settings: Any) -> list[Any]:
    block = rewarded(*rewards, **settings)
    score = build(block.rewards, RENDERER, max_unscored=block.max_unscored)
    return score([said(text, CITIES[1]) for text in texts])


def test_every_kind_stands_in_the_table_with_its_source() -> None:
    kinds = {get_args(block.model_fields["kind"].annotation)[0] for block in get_args(get_args(Reward)[0])}
    assert kinds == set(TABLE)
    assert set(RULES) < kinds
    assert all(entry.summary and entry.paper for entry in TABLE.values())


def test_several_rewards_make_one() -> None:
    """Two for the right city, 0.1 for the layout, without which nothing is earned."""
    right = {"kind": "exact", "weight": 2}
    layout = {"kind": "format", "tags": ["answer"], "weight": 0.1, "gate": 1}
    answers = ["<answer>New York</answer>", "<answer>Bern</answer>", "New York"]
    got = scores(right, layout, texts=answers)
    assert [s.value for s in got] == pytest.approx([2.1, 0.1, 0.0])
    assert [dict(s.parts) for s in got] == [{"exact": e, "format": f} for e, f in ((1, 1), (0, 1), (1, 0))]
    assert [s.outcome for s in got] == ["correct", "wrong", "wrong"]


def test_an_ensemble_of_rules_in_workers_and_here() -> None:
    words = {"kind": "regex", "id": "words", "pattern": r"\w+ \w+", "example": "a b"}
    both = {"kind": "ensemble", "of": ["exact", "words"], "how": "mean"}
    got = scores({"kind": "exact"}, words, both, texts=["New York", "Not it", "Bern"])
    assert [s.value for s in got] == [1.0, 0.5, 0.0]


def test_what_cannot_be_scored_stops_the_run() -> None:
    endless = {"kind": "regex", "pattern": "(a+)+b", "example": "ab", "timeout_s": 1.0}
    texts = ["a" * 40, "ab", "aab"]
    assert [s.value for s in scores(endless, texts=texts, max_unscored=0.5)] == [None, 1.0, 1.0]
    with pytest.raises(Failure, match="1 x took longer than 1 s"):
        scores(endless, texts=texts)


def test_rows_that_cannot_be_scored_say_what_they_lack() -> None:
    lacks = lacking(rewarded({"kind": "exact"}, {"kind": "length", "max_tokens": 9, "buffer": 3}).rewards)
    assert [lacks(example) for example in (CITIES[0], question())] == ["", "it has no reference answer"]
    lacks = lacking(rewarded({"kind": "verifier"}).rewards)
    assert lacks(tasks.load("chain_sum", 1, 0, {})[0]) == ""
    assert lacks(CITIES[0]).startswith("no verifier can score an answer to it")


def test_rules_prove_themselves_before_use() -> None:
    proven(rewarded({"kind": "exact"}, {"kind": "format"}).rewards, {"cities.jsonl": CITIES})
    loose = rewarded({"kind": "regex", "id": "any", "pattern": ".*", "example": "x"})
    with pytest.raises(
        UserError, match=r"reward 'any' can be fooled on cities.jsonl, so no model may train on it:\n  q: "
    ):
        proven(loose.rewards, {"cities.jsonl": CITIES})


def grpo(*rewards: dict[str, Any]) -> Grpo:
    data = {"sources": [{"source": "x.jsonl"}]}
    return Grpo.model_validate({"id": "g", "kind": "grpo", "steps": 1, "data": data, "rewards": rewards})


def test_the_default_is_the_verifier() -> None:
    stage = Grpo.model_validate({"id": "g", "kind": "grpo", "steps": 1, "data": {"sources": [{"source": "x.jsonl"}]}})
    assert [(reward.name, reward.weight, reward.gate) for reward in stage.rewards] == [("verifier", 1.0, None)]


@pytest.mark.parametrize(
    ("rewards", "what"),
    [
        ([{"kind": "exact"}, {"kind": "exact"}], "'exact' is taken; give each reward its own"),
        ([{"kind": "exact"}, {"kind": "ensemble", "of": ["exact", "judge"]}], "no single reward 'judge' here"),
        (
            [{"kind": "exact", "weight": 1}, {"kind": "verifier"}, {"kind": "ensemble", "of": ["exact", "verifier"]}],
            "counts through the ensemble alone; leave its weight out",
        ),
        ([{"kind": "length", "max_tokens": 4, "buffer": 5}], "no answer is unpunished"),
        ([{"kind": "format", "tags": ["think", "think"]}], "names one tag twice"),
        ([{"kind": "format", "tags": ["a<b"]}], "'a<b' is no name of a tag"),
        ([{"kind": "exact"}, {"kind": "ensemble", "of": ["exact", "exact"]}], "names one reward twice"),
        ([{"kind": "exact", "weight": 0}, {"kind": "verifier", "weight": 0}], "all answers would earn the same"),
        (
            [{"kind": "exact"}, {"kind": "verifier"}, {"kind": "ensemble", "of": ["exact", "verifier"], "weight": 0}],
            "all answers would earn the same",
        ),
        ([{"kind": "implicit", "source": "m", "reference": "m"}], "every answer would earn 0"),
        ([], "at least 1"),
        ([{"kind": "exact", "weight": -1}], "greater than or equal to 0"),
        ([{"kind": "exactly"}], "exactly"),
    ],
)
def test_rewards_that_do_not_fit_are_refused(rewards: list[dict[str, Any]], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        grpo(*rewards)
