"""Process reward models: loss and gradient against Transformers' own classifier on step after step, and a whole run."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from scoring import shaken
from tiny import tiny_policy
from tiny_runs import RENDERER, rows_of, turn
from torch import Tensor

from posttrain.cli import main
from posttrain.data.chat import Rendered
from posttrain.data.prepare import Prepared, prepare
from posttrain.data.steps import solution, step_ends
from posttrain.forest import pack, unrolled_hidden_states
from posttrain.models.policy import Policy
from posttrain.models.reward import marked, reward_model
from posttrain.recipe.blocks import Data, Lora
from posttrain.recipe.load import parse
from posttrain.recipe.scoring import ProcessRewardModel
from posttrain.records import Example, Score, UserError
from posttrain.sampling.local import LocalSampler
from posttrain.training.batch import Batch
from posttrain.training.loop import train
from posttrain.training.process_reward import (
    ProcessRewardMethod,
    labelled_solutions,
    labels,
    read_solutions,
    verdicts,
    write_solutions,
)
from posttrain.training.reward import ends, hold_out

SEED = 3
SOLUTIONS = (
    (("12 and 30 is 42",), (True,)),
    (("It is 12.", "So 30.", "The answer is 42"), (True, None, False)),
    (("The dog", "and the fox jumps", "over", "two hours"), (1.0, 0.75, 0.25, 0.0)),
    (("no", "yes"), (False, True)),
    (("A train leaves at 9,", "and arrives at 11"), (None, 0.5)),
    (("b", "c", "d"), (True, True, True)),
)


def data() -> Prepared:
    rows = []
    for i, (steps, marks) in enumerate(SOLUTIONS):
        completion = tuple(turn("assistant", step) for step in steps)
        rows += solution(Example(f"s:{i}", (turn("user", f"Why {i}?"),), completion, step_labels=marks), RENDERER)
    return Prepared((tuple(rows),), (1.0,), {})


def stage_of(**settings: Any) -> ProcessRewardModel:
    common = {"id": "toy", "kind": "process_reward_model", "data": {"sources": [{"source": "unused.jsonl"}]}}
    optim = {"lr": 1e-2, **settings.pop("optim", {})}
    small = {"steps": 8, "batch_size": 6, "tokens_per_forward": 64, "optim": optim}
    return ProcessRewardModel.model_validate({**common, **small, **settings})


def made(adapter: Lora | None = None, dtype: torch.dtype = torch.float64) -> Policy:
    policy = tiny_policy(adapter=adapter, dtype=dtype)
    return shaken(reward_model(policy, ends(data()), SEED), 0.05)


def gradient(policy: Policy, method: ProcessRewardMethod, batch: Batch, cuts: list[list[int]]) -> tuple[Any, Any]:
    """Loss, metrics and gradient of a step in passes of these rows."""
    policy.model.zero_grad(set_to_none=True)
    found: dict[str, float] = {}
    for rows in cuts:
        forest = pack([batch.rows[i] for i in rows])
        loss, stats = method.loss(batch, rows, forest, method.forward(policy.model, forest, unrolled_hidden_states))
        loss.backward()
        for name, value in {"loss": loss.item(), **stats}.items():
            found[name] = found.get(name, 0.0) + value
    return found, {n: p.grad.clone() for n, p in policy.parameters().items() if p.grad is not None}


@pytest.mark.parametrize("adapter", [None, Lora(r=4)], ids=["full", "lora"])
def test_loss_and_gradient_are_those_of_each_step_as_a_sequence_of_its_own(adapter: Lora | None) -> None:
    """The mean over the 13 labelled steps of -y log s(z) - (1 - y) log s(-z), z the classifier's output for the
    sequence that ends with the step."""
    policy = made(adapter)
    method = ProcessRewardMethod(stage_of(), data(), SEED)
    batch = method.batch(0)
    found, ours = gradient(policy, method, batch, [list(range(6))])

    policy.model.zero_grad(set_to_none=True)
    terms: list[Tensor] = []
    right = []
    for row in data().rows[0]:
        stops = step_ends(row.completion_ids, RENDERER.decode)
        for stop, label in zip(stops, row.example.step_labels, strict=True):
            if label is None:
                continue
            ids = torch.tensor([[*row.prompt_ids, *row.completion_ids[: stop + 1]]])
            z = policy.model(ids).logits[0, 0]
            terms.append(-label * F.logsigmoid(z) - (1 - label) * F.logsigmoid(-z))
            right.append((z.item() > 0) == (label > 0.5))
    loss = torch.stack(terms).mean()
    loss.backward()
    assert len(terms) == 13 == batch.counts.tokens
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert found["accuracy"] == pytest.approx(sum(right) / 13)
    assert found["good"] == pytest.approx((1 + 1 + 2 + 1 + 0.5 + 3) / 13)
    for name, p in policy.parameters().items():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-5, atol=1e-6)
    assert max(float(g.abs().max()) for g in ours.values()) > 1e-3


def test_neither_cutting_nor_packing_changes_the_gradient() -> None:
    policy = made()
    method = ProcessRewardMethod(stage_of(), data(), SEED)
    batch = method.batch(0)
    found, whole = gradient(policy, method, batch, [list(range(6))])
    for cuts in ([[i] for i in range(6)], [[3, 0], [5, 1, 2, 4]]):
        again, cut = gradient(policy, method, batch, cuts)
        assert again == pytest.approx(found, rel=1e-9)
        for name in whole:
            torch.testing.assert_close(cut[name], whole[name], rtol=1e-9, atol=1e-12)
    forest = pack(batch.rows)
    torch.testing.assert_close(
        marked(policy.model, forest), marked(policy.model, forest, unrolled_hidden_states), rtol=1e-9, atol=1e-12
    )


def test_it_learns_which_steps_are_good(tmp_path: Path) -> None:
    policy = made(dtype=torch.float32)
    stage = stage_of(steps=40, optim={"lr": 3e-3})
    rows = data().rows[0]
    train(policy, ProcessRewardMethod(stage, data(), SEED), stage, tmp_path, SEED)
    metrics = rows_of(tmp_path / "metrics.jsonl")
    assert metrics[-1]["loss"] < 0.4 * metrics[0]["loss"]
    found = verdicts(policy.model, rows, 64)
    assert sum(verdict.right for verdict in found) >= 12  # a label of one half has no right side
    assert [v.good for v in found] == [label > 0.5 for row in rows for label in labels(row)]
    assert [v.solution for v in found] == [s for s, row in enumerate(rows) for _ in labels(row)]


def test_what_was_cut_off_has_no_labels_left_over() -> None:
    row = data().rows[0][2]
    first = step_ends(row.completion_ids, RENDERER.decode)[1]
    cut = replace(
        row, completion_ids=row.completion_ids[: first + 1], completion_target=row.completion_target[: first + 1]
    )
    assert labels(row) == [1.0, 0.75, 0.25, 0.0]
    assert labels(cut) == [1.0, 0.75]


def test_held_out_solutions_are_of_other_prompts() -> None:
    left, held = hold_out(stage_of(holdout=0.3), data())
    assert len(held) == 2
    assert not {row.example.id for row in held} & {row.example.id for row in left.rows[0]}


def test_rows_that_cannot_be_used_are_told_by_their_line(tmp_path: Path) -> None:
    rows = [
        {"prompt": "A?", "completions": ["one", "two"], "labels": [True, False]},
        {"prompt": "B?", "completions": ["one", "two"], "labels": [True]},
        {"prompt": "C?", "completions": ["one"], "labels": [None]},
        {"prompt": "D?", "completions": ["one\ntwo", "three"], "labels": [True, True]},
    ]
    path = tmp_path / "steps.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    given = Data.model_validate({"sources": [{"source": str(path)}], "max_bad_rows": 0.8})
    done = prepare(given, RENDERER, need=solution)
    assert [row.example.id for row in done.rows[0]] == ["steps.jsonl:1"]
    told = done.report["sources"][0]["bad_rows"]
    assert [line.partition(": ")[0] for line in told] == ["steps.jsonl:2", "steps.jsonl:3", "steps.jsonl:4"]
    assert "2 completions and 1 labels" in told[0]
    assert "of which one is labelled" in told[1]
    assert "completions[0] holds the separator" in told[2]


RECIPE = """
schema: 1
name: x
model: {source: a/b}
stages:
  - {id: one, kind: process_reward_model, steps: 1, data: {sources: [{source: a.jsonl}]}}
"""


def test_no_stage_builds_on_it() -> None:
    assert parse(RECIPE, "r").stages[0].optim.lr == 1e-4
    with pytest.raises(UserError, match="'one' is a reward model, which writes no text"):
        parse(RECIPE + "  - {id: two, kind: sft, steps: 1, data: {sources: [{source: a.jsonl}]}}\n", "r")


def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_policy().save(tmp_path / "model")
    rng = random.Random(0)
    rows = []
    for i in range(24):
        good = [rng.random() < 0.5 for _ in range(3)]
        rows.append({"prompt": f"{i}?", "completions": ["yes it is" if g else "no" for g in good], "labels": good})
    (tmp_path / "steps.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stage = {"id": "steps", "kind": "process_reward_model", "steps": 40, "batch_size": 6, "holdout": 0.25}
    stage |= {"data": {"sources": [{"source": "steps.jsonl"}]}, "optim": {"lr": 3e-3}}
    recipe = {"schema": 1, "name": "x", "model": {"source": str(tmp_path / "model"), "adapter": {"r": 4}}}
    path, out = tmp_path / "r.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(recipe | {"stages": [stage]}))

    assert main(["run", str(path), "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["stages"][0]
    assert (planned["kind"], planned["rows"]) == ("process_reward_model", 18)
    assert planned["example"].count("⟦") == 3
    assert main(["run", str(path), "--out", str(out)]) == 0
    record = json.loads((out / "stages/steps/stage.json").read_text())
    held = record["facts"]["held_out"]
    assert (record["facts"]["solutions"], held["n"], held["of"]) == (18, 18, "steps")
    assert held["accuracy"] > 0.9 > held["chance"]
    assert held["interval"][0] < held["accuracy"] <= held["interval"][1]
    watched = {row["name"]: row for row in json.loads((out / "monitors.json").read_text())["rows"]}
    assert watched["held-out steps"]["limit"] == pytest.approx(held["chance"])
    assert "held-out steps" in (out / "report.html").read_text()
    assert all(math.isfinite(row["said_good"]) for row in rows_of(out / "stages/steps/metrics.jsonl"))


# Labels from rollouts


def sampling_stage(**rollouts: Any) -> ProcessRewardModel:
    own = {"prompts": 4, "solutions": 3, "n": 4, "max_new_tokens": 12, **rollouts}
    return stage_of(separator=" ", holdout=0, rollouts=own)


def prompts() -> Prepared:
    examples = [Example(f"q:{i}", (turn("user", f"Why {i}?"),)) for i in range(4)]
    return Prepared((tuple(Rendered(e, RENDERER.prompt_ids(e)) for e in examples),), (1.0,), {})


def even(rollouts: Any) -> list[Score]:
    """A toy verifier that a random model pleases half of the time."""
    right = [sum(r.ids) % 2 == 0 for r in rollouts]
    return [Score(float(x), "correct" if x else "wrong") for x in right]


def test_sampled_solutions_are_labelled_on_their_own_ids(tmp_path: Path) -> None:
    policy = tiny_policy()
    made, ledger, facts = labelled_solutions(
        sampling_stage(), prompts(), LocalSampler(policy, RENDERER), even, RENDERER, SEED
    )
    rows = made.rows[0]
    assert facts["steps"] == sum(len(labels(row)) for row in rows)
    assert 0 < facts["good"] < 1
    assert any(0 < label < 1 for row in rows for label in labels(row))
    for row in rows:
        assert row.prompt_ids == RENDERER.prompt_ids(Example("", row.example.prompt))
        ends_of = step_ends(row.completion_ids, RENDERER.decode, " ")
        assert [i for i, target in enumerate(row.completion_target) if target] == list(ends_of)
        assert labels(row)[-1] == float(sum(row.completion_ids) % 2 == 0)
    first = sum(len(row.completion_ids) for row in rows)
    assert ledger.generated_tokens > first
    write_solutions(tmp_path / "s.jsonl", made)
    again = read_solutions(tmp_path / "s.jsonl", {})
    kept = [(r.prompt_ids, r.completion_ids, r.completion_target, labels(r)) for r in rows]
    assert [(r.prompt_ids, r.completion_ids, r.completion_target, labels(r)) for r in again.rows[0]] == kept
    ProcessRewardMethod(sampling_stage(), again, SEED).batch(0)


def test_labels_that_are_all_the_same_teach_nothing() -> None:
    sampler = LocalSampler(tiny_policy(), RENDERER)
    with pytest.raises(UserError, match=r"all \d+ steps have the label 0 after 4 prompts"):
        labelled_solutions(
            sampling_stage(), prompts(), sampler, lambda rs: [Score(0.0, "wrong")] * len(rs), RENDERER, SEED
        )
    with pytest.raises(UserError, match="no step could be labelled"):
        labelled_solutions(
            sampling_stage(), prompts(), sampler, lambda rs: [Score(None, "error")] * len(rs), RENDERER, SEED
        )


def test_a_file_whose_labels_are_all_the_same_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_policy().save(tmp_path / "model")
    rows = [{"prompt": f"{i}?", "completions": ["yes it is", "no"], "labels": [True, True]} for i in range(12)]
    (tmp_path / "steps.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stage = {"id": "steps", "kind": "process_reward_model", "steps": 2}
    stage |= {"data": {"sources": [{"source": "steps.jsonl"}]}}
    recipe = {"schema": 1, "name": "x", "model": {"source": str(tmp_path / "model")}, "stages": [stage]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["run", str(tmp_path / "r.yaml"), "--dry-run"]) == 2
    assert "stage 'steps': all 24 steps have the label 1, so there is nothing to tell apart" in capsys.readouterr().err


def test_a_whole_run_on_rollouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The answers of the toy task are what a random model says now and then: anything with an `e`."""
    tiny_policy().save(tmp_path / "model")
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps({"prompt": f"{i}?", "completion": "e"}) for i in range(12)))
    reward = {"kind": "regex", "pattern": "(?s).*e.*", "example": "e"}
    own = {"prompts": 12, "solutions": 2, "n": 2, "max_new_tokens": 8, "rewards": [reward]}
    stage = {"id": "steps", "kind": "process_reward_model", "steps": 3, "batch_size": 4, "holdout": 0.25}
    stage |= {"data": {"sources": [{"source": "q.jsonl"}]}, "separator": "e", "rollouts": own}
    recipe = {"schema": 1, "name": "x", "model": {"source": str(tmp_path / "model"), "adapter": {"r": 4}}}
    path, out = tmp_path / "r.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(recipe | {"stages": [stage]}))
    assert main(["run", str(path), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"][0]["generated_tokens"] == 12 * 2 * 8
    assert main(["run", str(path), "--out", str(out)]) == 0
    record = json.loads((out / "stages/steps/stage.json").read_text())
    assert record["facts"]["prompts"] == 12
    assert record["ledger"]["generated_tokens"] > 0
    assert record["facts"]["held_out"]["of"] == "steps"
    assert (out / "stages/steps/solutions.jsonl").is_file()
