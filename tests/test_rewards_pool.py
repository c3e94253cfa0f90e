"""Rules in worker processes: what hangs or crashes costs its answer, never the run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from rewarded import question, said

from posttrain.recipe.rewards import RegexReward
from posttrain.rewards.match import regex
from posttrain.rewards.pool import _ending, pool
from posttrain.rewards.sources import by_rule

DIGITS = RegexReward(kind="regex", pattern=r"\d+", example="1")
ENDLESS = RegexReward(kind="regex", pattern="(a+)+b", example="ab", timeout_s=1.0)
"""Takes twice as long for each further a that no b follows."""


def test_a_worker_scores_as_the_rule_does() -> None:
    score = by_rule(DIGITS, regex(DIGITS))
    assert [s.value for s in score([said("12"), said("twelve"), said("")])] == [1.0, 0.0, 0.0]
    assert pool() is pool()


def test_what_hangs_is_killed_and_the_next_answer_is_scored() -> None:
    score = by_rule(ENDLESS, regex(ENDLESS))
    texts = ["ab", "a" * 40, "aab", "a" * 40, "b"]
    got = score([said(text) for text in texts])
    assert [s.value for s in got] == [1.0, None, 1.0, None, 0.0]
    assert {s.why for s in got if s.value is None} == {"took longer than 1 s"}
    assert pool().ask(DIGITS, question(), "7", 5.0).value == 1.0


def test_more_askers_than_workers_wait_their_turn() -> None:
    with ThreadPoolExecutor(16) as threads:
        texts = [str(i) if i % 3 else "none" for i in range(60)]
        got = list(threads.map(lambda text: pool().ask(DIGITS, question(), text, 5.0).value, texts))
    assert got == [float(i % 3 != 0) for i in range(60)]


def test_how_a_worker_ended() -> None:
    assert _ending(-9) == "signal SIGKILL"
    assert _ending(3) == "exit code 3"
