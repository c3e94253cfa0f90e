"""Generated tasks: reproducible, apart by seed, and strict about their names and keys."""

from __future__ import annotations

import json
import sys

import pytest

from posttrain.data import tasks
from posttrain.data.prepare import prompt_key
from posttrain.data.sources import read
from posttrain.recipe.blocks import Source
from posttrain.records import UserError


def test_items_are_reproducible_and_longer_runs_only_add() -> None:
    first = tasks.load("chain_sum", 20, 1, {"min_terms": 3})
    assert first == tasks.load("chain_sum", 30, 1, {"min_terms": 3})[:20]
    example = first[3]
    assert example.id == "reasoning_gym/chain_sum?seed=1#3"
    assert example.completion == ({"role": "assistant", "content": example.answer},)
    assert eval(example.meta["entry"]["metadata"]["expression"]) == int(example.answer or "")
    assert json.loads(json.dumps(example.meta)) == example.meta


def test_neighbouring_seeds_share_nothing() -> None:
    """reasoning_gym's own seeds 0 and 1 share 99 of 100 items."""
    keys = [{prompt_key(e) for e in tasks.load("chain_sum", 100, seed, {"min_digits": 3})} for seed in (0, 1)]
    assert not keys[0] & keys[1]


@pytest.mark.parametrize(
    ("name", "config", "why"),
    [
        ("chain_sums", {}, "did you mean chain_sum"),
        ("chain_sum", {"min_term": 2}, "did you mean min_terms"),
        ("chain_sum", {"size": 2}, "`rows`"),
        ("chain_sum", {"min_terms": 9, "max_terms": 2}, "refused: max_terms must be"),
        ("chain_sum", {"min_terms": "two"}, "refused"),
    ],
)
def test_mistakes_are_named(name: str, config: dict[str, object], why: str) -> None:
    with pytest.raises(UserError, match=why):
        tasks.load(name, 4, 0, config)


def test_as_a_source() -> None:
    loaded = read(Source(source="reasoning_gym/chain_sum", rows=5, seed=2))
    assert len(loaded.examples) == loaded.report.rows == 5


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(UserError, match=r"pip install posttrain\[tasks\]"):
        tasks.names()
