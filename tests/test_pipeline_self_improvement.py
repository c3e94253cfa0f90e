"""Models that better themselves, through the command line: a constitution and AI preferences by it, self-rewarding."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, get_args

import pytest
from test_bad_input import jsonl, refused, source, write
from tiny import tiny_policy
from tiny_runs import RENDERER, SEED, prepared, turn

from posttrain.cli import main
from posttrain.pipeline import stages
from posttrain.recipe.schema import Stage
from posttrain.recipe.supervised import Sft
from posttrain.records import Example, Failure
from posttrain.rewards.judge import Judge
from posttrain.sampling.local import LocalSampler
from posttrain.training import METHODS
from posttrain.training.loop import train
from posttrain.training.self_rewarding import ADDITIVE
from posttrain.training.sft import SftMethod

RULES = "Be brief.\nBe polite.\n"
ASKED = [f"What is {i}?" for i in range(12)]
ENDS = {"max_new_tokens": 8, "stop": list("aeiou")}


@pytest.fixture(scope="module")
def critic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned to end with a grade what it is asked as a judge: one by heart for each answer, so that
    they differ."""
    folder, rng = tmp_path_factory.mktemp("critic"), random.Random(0)
    policy = tiny_policy(max_position_embeddings=4096)
    judges = [Judge(LocalSampler(policy, RENDERER), rubric, low=0, high=5) for rubric in (RULES, ADDITIVE)]
    examples = []
    for i, text in enumerate(ASKED):
        for judge in judges:
            answer = "".join(rng.choice("bcdfghjk lmnp") for _ in range(6))
            (asked,) = judge.question(Example(f"q:{i}", (turn("user", text),)), answer).prompt
            said = turn("assistant", f"<grade>{rng.randint(1, 5)}</grade>")
            examples.append(Example(f"q:{len(examples)}", (asked,), (said,)))
    common = {"id": "critic", "kind": "sft", "data": source("none"), "steps": 60, "batch_size": 6}
    how = Sft.model_validate({**common, "tokens_per_forward": 8192, "optim": {"lr": 1e-2}, "check_first_step": False})
    train(policy, SftMethod(how, prepared(examples), SEED), how, folder / "run", SEED)
    policy.save(folder / "model")
    return folder / "model"


@pytest.fixture
def here(critic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").symlink_to(critic)
    (tmp_path / "asked.jsonl").write_text(jsonl([{"prompt": text} for text in ASKED]))
    return tmp_path


def recipe(*kinds: str, **changes: Any) -> dict[str, Any]:
    """Of one stage with `changes`, or of several."""
    judge = {"kind": "judge", "source": "model", "rubric": RULES, "max_new_tokens": 24}
    own: dict[str, dict[str, Any]] = {
        "constitutional": {"constitution": RULES, "rounds": 2, "sampling": ENDS},
        "preference": {"on_policy": {"prompts": 12, "n": 4, **ENDS, "rewards": [judge], "max_unscored": 1.0}},
        "self_rewarding": {
            "prompts": 6,
            "rounds": 2,
            "sampling": ENDS,
            "judging": {"n": 2, "max_new_tokens": 24},
            "max_unscored": 1.0,
        },
    }
    common = {"steps": 4, "batch_size": 2, "data": source("asked.jsonl")}
    made = [{"id": kind, "kind": kind, **common, **own[kind], **changes} for kind in kinds]
    return {"schema": 1, "name": "t", "model": {"source": "model"}, "stages": made}


def record(kind: str, out: str = "out") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(f"{out}/stages/{kind}/stage.json").read_text())
    return found


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out/stages", name).read_text().splitlines()]


def test_revisions_and_then_ai_preferences_by_the_same_constitution(here: Path, capsys: Any) -> None:
    """The second stage starts from what the first one left, and its judge is told the constitution."""
    command = write(recipe("constitutional", "preference"))
    assert main([*command, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["stages"]
    assert [stage["generated_tokens"] for stage in planned] == [8 * 5 * 8, 12 * 4 * 8]
    assert main(command) == 0
    made = record("constitutional")
    kept = rows("constitutional/revised.jsonl")
    assert made["facts"]["answers"] == len(kept) == 8
    assert made["facts"]["revised"] == sum(line["outcome"] == "revised" for line in kept) > 0
    assert all({told["principle"] for told in line["rounds"]} <= set(RULES.splitlines()) for line in kept)
    assert made["ledger"]["generated_tokens"] > 0
    assert record("preference")["inputs"]["model"] == made["artifact"]["digest"]
    assert record("preference")["facts"]["pairs"] > 0
    assert all(line["rewards"][0] > line["rewards"][1] for line in rows("preference/judged.jsonl"))
    capsys.readouterr()
    assert main(command) == 0
    assert "constitutional: finished already" in "".join(capsys.readouterr())


def test_a_run_that_was_stopped_revises_nothing_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = write(recipe("constitutional"))

    def stop(*args: Any) -> Any:
        raise Failure("the machine went away")

    with monkeypatch.context() as patched:
        patched.setattr(stages, "train", stop)
        assert main(command) == 1
    said = Path("out/stages/constitutional/revised.jsonl").read_text()
    with monkeypatch.context() as patched:
        patched.setattr(stages, "revise", stop)
        assert main(command) == 0
    assert Path("out/stages/constitutional/revised.jsonl").read_text() == said
    assert main([*command[:-1], "whole"]) == 0
    whole, continued = record("constitutional", "whole"), record("constitutional")
    assert whole["artifact"]["digest"] == continued["artifact"]["digest"]
    assert whole["ledger"]["generated_tokens"] == continued["ledger"]["generated_tokens"]


def test_revisions_that_are_all_cut_off_are_the_users_error(here: Path, capsys: Any) -> None:
    message = refused(write(recipe("constitutional", sampling={"max_new_tokens": 1})), capsys)
    assert "none of 8 answers has a revision to learn" in message


def test_a_model_that_rewards_itself(here: Path, capsys: Any) -> None:
    """Two rounds, each with its own pairs, whose metrics say how it judged."""
    command = write(recipe("self_rewarding"))
    assert main([*command, "--dry-run", "--json"]) == 0
    (planned,) = json.loads(capsys.readouterr().out)["stages"]
    assert planned["generated_tokens"] == 2 * 6 * 4 * (8 + 2 * 24)
    assert main(command) == 0
    told = [row for row in rows("self_rewarding/metrics.jsonl") if "pairs" in row]
    assert [row["step"] for row in told] == [0, 2]
    for number, row in enumerate(told):
        kept = rows(f"self_rewarding/judged-{number}.jsonl")
        assert len(kept) == row["pairs"] > 0
        assert all(0 <= line["rewards"][1] < line["rewards"][0] <= 1 for line in kept)
        assert 0 <= row["unread"] < 1
    assert record("self_rewarding")["ledger"]["generated_tokens"] <= planned["generated_tokens"]


def test_judgements_that_are_compared_are_planned_for(here: Path, capsys: Any) -> None:
    """Of each prompt 4 answers with 3 judgements each, and 3 x 2 comparisons of those of one answer."""
    given = recipe("self_rewarding", meta_judge=True, judging={"n": 3, "max_new_tokens": 24})
    assert main([*write(given), "--dry-run", "--json"]) == 0
    (planned,) = json.loads(capsys.readouterr().out)["stages"]
    assert planned["generated_tokens"] == 2 * 6 * (4 * (8 + 3 * 24) + 3 * 2 * 24)


def test_a_model_that_does_not_judge_is_told(here: Path, capsys: Any) -> None:
    given = recipe("self_rewarding", max_unscored=0.1, judging={"n": 1, "max_new_tokens": 1})
    message = refused(write(given), capsys, code=1)
    assert "24 of 24 answers could not be scored" in message
    assert "the judge did not end with one <grade>N</grade>" in message


def test_every_kind_of_stage_is_a_method_that_is_listed() -> None:
    union, *_ = get_args(Stage)
    kinds = [get_args(kind.model_fields["kind"].annotation)[0] for kind in get_args(union)]
    assert kinds == list(METHODS)
