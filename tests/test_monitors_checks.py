"""Alarms of RL runs against arithmetic done by hand."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.monitors.checks import equal_length_gain, watch_stage


def step(counts: dict[str, int], rewards: dict[str, float], **more: Any) -> dict[str, Any]:
    length = sum(counts.values()) * 1.0
    return {"length": length, "unscored": 0.0, "length_counts": counts, "length_rewards": rewards, **more}


def named(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in rows}


def test_a_gain_that_is_length_alone_is_none_at_equal_length():
    """Long answers earn 1 and short ones 0, before and after; at first 3 of 4 are short, in the end 1 of 4."""
    first = step({"1 to 8": 3, "9 to 16": 1}, {"1 to 8": 0.0, "9 to 16": 1.0})
    last = step({"1 to 8": 1, "9 to 16": 3}, {"1 to 8": 0.0, "9 to 16": 3.0})
    assert equal_length_gain([first, last]) == (0.5, 0.0)
    row = named(watch_stage("a", "grpo", [first, last]))["gain at equal length"]
    assert (row["level"], row["value"], row["limit"]) == ("warn", 0.0, 0.25)


def test_a_gain_at_each_length_is_a_gain():
    """Each bin rises by 1/2, by as many answers as both ends have: weights 2 and 1."""
    first = step({"1 to 8": 2, "9 to 16": 2}, {"1 to 8": 0.0, "9 to 16": 1.0})
    last = step({"1 to 8": 3, "9 to 16": 1}, {"1 to 8": 1.5, "9 to 16": 1.0})
    whole, matched = equal_length_gain([first, last])
    assert whole == pytest.approx(2.5 / 4 - 1 / 4)
    assert matched == pytest.approx(0.5)
    assert named(watch_stage("a", "ppo", [first, last]))["gain at equal length"]["level"] == "ok"


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"length": 3.0}],
        [step({"1 to 8": 2}, {"1 to 8": 1.0}), step({"9 to 16": 2}, {"9 to 16": 2.0})],
        [step({"1 to 8": 0}, {"1 to 8": 0.0})],
    ],
)
def test_where_no_length_is_in_both_ends_nothing_is_said(rows):
    assert equal_length_gain(rows) is None


def test_ends_are_fifths_of_the_steps():
    rows = [step({"1 to 8": 1}, {"1 to 8": reward}) for reward in (0, 0, 9, 9, 9, 9, 9, 9, 1, 1)]
    assert equal_length_gain(rows) == (1.0, 1.0)


@pytest.mark.parametrize(("follows", "level"), [(0.8, "warn"), (0.2, "ok"), (-0.9, "ok")])
def test_reward_that_follows_length_is_told(follows, level):
    rows = [step({"1 to 8": 1}, {"1 to 8": 1.0}, length_reward=x) for x in (None, follows)]
    assert named(watch_stage("a", "grpo", rows))["reward follows length"]["level"] == level


def test_a_stage_of_one_completion_a_prompt_has_no_groups():
    rows = [step({"1 to 8": 1}, {"1 to 8": 1.0})] * 2
    assert "groups with signal" not in named(watch_stage("a", "ppo", rows))
    assert (
        named(watch_stage("a", "grpo", [{**row, "signal": 0.1} for row in rows]))["groups with signal"]["level"]
        == "warn"
    )


@pytest.mark.parametrize(("shares", "level"), [((0.5, 0.3), "ok"), ((0.1, 0.2), "warn")])
@pytest.mark.parametrize(("kind", "metric"), [("rejection_sampling", "solved"), ("online_preference", "learned")])
def test_prompts_that_were_asked_in_vain_are_told(kind, metric, shares, level):
    """A round's row stands at its first step; the steps between have none."""
    rows = [{metric: shares[0]}, {}, {metric: shares[1]}, {}]
    row = named(watch_stage("a", kind, rows))["prompts learned from"]
    assert (row["value"], row["level"]) == (pytest.approx(sum(shares) / 2), level)


@pytest.mark.parametrize(("ends", "level"), [(0.4, "ok"), (-0.9, "ok"), (-1.5, "warn")])
def test_chosen_answers_that_the_reference_finds_likelier_are_told(ends, level):
    """Mean log-ratio of the last fifth: of ten steps two."""
    rows = [{"chosen_ratio": x} for x in (9.0,) * 8 + (ends - 0.1, ends + 0.1)]
    row = named(watch_stage("a", "online_preference", rows))["chosen log-ratio"]
    assert (row["value"], row["level"]) == (pytest.approx(ends), level)


@pytest.mark.parametrize("kind", ["grpo", "ppo", "online_preference"])
@pytest.mark.parametrize(("kl", "level"), [(0.3, "ok"), (0.7, "warn")])
def test_a_policy_far_from_its_reference_is_told(kind, kl, level):
    row = named(watch_stage("a", kind, [{"kl": 0.0}, {"kl": kl}]))["distance from the reference"]
    assert (row["value"], row["level"]) == (kl, level)


@pytest.mark.parametrize(("last", "level"), [(0.4, "ok"), (0.9, "warn")])
def test_a_student_should_come_nearer_to_its_teacher(last, level):
    found = named(watch_stage("a", "distill", [{"loss": 0.8, "length": 4.0}, {"loss": last, "length": 8.0}]))
    assert (found["distance from the teacher"]["value"], found["distance from the teacher"]["level"]) == (
        pytest.approx(last - 0.8),
        level,
    )
    assert found["length growth"]["level"] == "warn"  # of its own answers, on-policy


@pytest.mark.parametrize("kind", ["rejection_sampling", "online_preference", "self_rewarding"])
def test_stages_that_sample_are_watched_as_rl_is(kind):
    rows = [step({"1 to 8": 1}, {"1 to 8": 1.0}, length_reward=x, signal=0.1) for x in (0.1, 0.8)]
    rows = [{**row, "unscored": 0.25, "mismatch_max": 1.2, "mismatch_min": 0.9} for row in rows]
    found = named(watch_stage("a", kind, rows))
    for name in ("reward follows length", "unscored completions", "sampler mismatch"):
        assert found[name]["level"] == "warn", name
    assert ("groups with signal" in found) == (kind != "rejection_sampling")  # which learns from what is all right too


def test_a_stage_without_answers_has_nothing_to_say_of_them():
    assert watch_stage("a", "sft", [{"loss": 1.0}, {"loss": 2.0}]) == []
