"""Distillation against its formulas, written out in float64 one sequence at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny import tiny_policy
from tiny_runs import OPTIM, RENDERER, SEED, answered, asked, prepared, rows_of, same, turn
from torch import Tensor

from posttrain.data.prepare import Prepared
from posttrain.forest import hidden_states, pack, split, unrolled_hidden_states
from posttrain.models.policy import Policy
from posttrain.recipe.blocks import Lora
from posttrain.recipe.supervised import Distill
from posttrain.records import Example, UserError
from posttrain.sampling.local import LocalSampler
from posttrain.training import distill
from posttrain.training.distill import DistillMethod, taught, teach, teacher_of, token_divergences
from posttrain.training.loop import gradient, train
from posttrain.training.world import ALONE

COMMON = {
    "id": "toy",
    "kind": "distill",
    "teacher": {"source": "teacher"},
    "data": {"sources": [{"source": "x.jsonl"}]},
    "steps": 4,
    "batch_size": 4,
    "optim": OPTIM,
    "sampling": {"max_new_tokens": 6},
}
MODES: dict[str, dict[str, Any]] = {
    "off_policy": {"sampling": {}},
    "forward": {"sampling": {}, "beta": 0.0, "temperature": 2.0},
    "on_policy": {"mode": "on_policy"},
    "minillm": {"mode": "on_policy", "beta": 1.0, "student_share": 1.0},
}


def stage_of(name: str, **settings: Any) -> Distill:
    return Distill.model_validate({**COMMON, **MODES[name], **settings})


def teacher(dtype: torch.dtype = torch.float64, **config: Any) -> Policy:
    """Wider than the student, and with more logits."""
    return tiny_policy(seed=7, dtype=dtype, **{"hidden_size": 48, "vocab": 336, **config})


def method_of(stage: Distill, student: Policy, by: Policy | None = None, data: Prepared | None = None) -> DistillMethod:
    by = teacher(student.model.dtype) if by is None else by
    return DistillMethod(stage, data or prepared(answered()[:6]), student, by, LocalSampler(student, RENDERER), SEED)


def plain(stage: Distill, student: Policy, by: Policy, rows: Any) -> Tensor:
    """The step's loss: of the definition, with M taken in probabilities."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids = torch.tensor([[*row.context, *row.completion]])
        logits = [m.model(ids).logits[0, len(row.context) - 1 : -1, :320] / stage.temperature for m in (student, by)]
        p, q = (z.softmax(-1) for z in logits)
        q = q.detach()

        def kl(a: Tensor, b: Tensor) -> Tensor:
            return (a * (a / b).log()).sum(-1)

        m = (1 - stage.beta) * p + stage.beta * q
        value = {0.0: kl(q, p), 1.0: kl(p, q)}.get(stage.beta, stage.beta * kl(q, m) + (1 - stage.beta) * kl(p, m))
        at = torch.tensor(row.target)
        total, tokens = total + value[at].sum(), tokens + int(at.sum())
    return total / tokens


def gradients(policy: Policy) -> list[Tensor]:
    found = [p.grad.clone() for p in policy.parameters().values() if p.grad is not None]
    for p in policy.parameters().values():
        p.grad = None
    return found


@pytest.mark.parametrize("name", MODES)
def test_a_step_is_the_definition_however_it_is_cut(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "CHUNK", 5)
    student, by = tiny_policy(dtype=torch.float64), teacher()
    stage = stage_of(name)
    method = method_of(stage, student, by)
    batch = method.batch(0)
    loss = plain(stage, student, by, batch.rows)
    loss.backward()
    norm = gradients(student)
    assert max(float(g.abs().max()) for g in norm) > 1e-3
    for budget in (4096, 16):
        found, _ = gradient(student, method, batch, ALONE, budget)
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-6)
        for a, b in zip(gradients(student), norm, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    assert len(split(batch.rows, batch.units, 16)) > 2
    assert all(p.grad is None for p in by.model.parameters())


def test_packed_is_unrolled() -> None:
    student, by = tiny_policy(dtype=torch.float64), teacher()
    batch = method_of(stage_of("off_policy"), student, by).batch(0)
    forest = pack(batch.rows)
    both = [
        token_divergences(student.model, by.model, forest, beta=0.5, temperature=1.0, states=states)
        for states in (hidden_states, unrolled_hidden_states)
    ]
    torch.testing.assert_close(*both, rtol=1e-6, atol=1e-8)
    assert (both[0][:, ~forest.target_T] == 0).all()


@pytest.mark.parametrize("name", ["off_policy", "forward", "minillm"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path: Path, name: str) -> None:
    student = tiny_policy()
    before = student.snapshot()
    stage = stage_of(name, steps=1)
    train(student, method_of(stage, student, tiny_policy()), stage, tmp_path, SEED)
    (row,) = rows_of(tmp_path / "metrics.jsonl")
    assert row["loss"] == pytest.approx(0, abs=1e-6)
    assert row["grad_norm"] == pytest.approx(0, abs=1e-5)
    assert row["nll"] > 0.5
    assert before.keys() == student.snapshot().keys()


def test_who_answers_is_a_share_and_the_same_again() -> None:
    student = tiny_policy()
    stage = stage_of("on_policy", steps=40, student_share=0.25)
    method, again = method_of(stage, student), method_of(stage, student)
    said = {(row.completion, row.target) for row in (distill.chosen(r) for r in method.data.rows[0])}
    own = 0
    for step in range(20):
        rows = method.batch(step).rows
        assert rows == again.batch(step).rows
        own += sum((row.completion, row.target) not in said for row in rows)
    assert 8 < own < 33  # of 80, 20 are expected; 3 deviations are 11.6


def test_the_student_comes_near_its_teacher(tmp_path: Path) -> None:
    student = tiny_policy()
    stage = stage_of("minillm", steps=30, batch_size=6, optim={"lr": 1e-2, "schedule": "constant"})
    train(student, method_of(stage, student), stage, tmp_path, SEED)
    losses = [row["loss"] for row in rows_of(tmp_path / "metrics.jsonl")]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize(("name", "adapter"), [("on_policy", None), ("off_policy", Lora(r=4))])
def test_a_run_that_was_stopped_ends_in_the_same_weights(tmp_path: Path, name: str, adapter: Lora | None) -> None:
    class Stopped(Exception):
        pass

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise Stopped

    stage = stage_of(name, steps=5, checkpoint_every=2)
    whole = tiny_policy(adapter=adapter)
    train(whole, method_of(stage, whole), stage, tmp_path / "whole", SEED)
    cut = tiny_policy(adapter=adapter)
    with pytest.raises(Stopped):
        train(cut, method_of(stage, cut), stage, tmp_path / "cut", SEED, stop)
    again = tiny_policy(adapter=adapter)
    train(again, method_of(stage, again), stage, tmp_path / "cut", SEED)
    assert same(whole.snapshot(), again.snapshot())
    assert rows_of(tmp_path / "whole" / "metrics.jsonl") == rows_of(tmp_path / "cut" / "metrics.jsonl")


def test_the_teachers_answers_are_kept_as_sampled(tmp_path: Path) -> None:
    by, data = teacher(torch.float32), prepared(asked(), [Example("n", (turn("user", "never"),))])
    data = data._replace(weights=(1.0, 1e-9))
    stage = stage_of("off_policy", mode="sequence", sampling={"max_new_tokens": 6}, steps=2)
    ledger, facts = teach(stage, data, LocalSampler(by, RENDERER), SEED, tmp_path / "t.jsonl")
    kept = taught(tmp_path / "t.jsonl", data)
    assert len(kept.rows) == 1  # the other source's turn never came
    assert facts["answers"] == len(kept.rows[0]) == 6
    assert facts["answer_tokens"] == ledger.generated_tokens == sum(len(r.completion_ids) for r in kept.rows[0])
    again, _ = LocalSampler(by, RENDERER)([r.example for r in kept.rows[0]], 1, stage.sampling, 0)
    assert [r.prompt_ids for r in again] == [r.prompt_ids for r in kept.rows[0]]
    assert all(all(r.completion_target) for r in kept.rows[0])


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    by = teacher(torch.float32)
    by.tokenizer.add_tokens(["zzz"])
    by.save(tmp_path / "other")
    stage = stage_of("off_policy", teacher={"source": str(tmp_path / "other")})
    with pytest.raises(UserError, match=r"teacher .*other has not the policy's vocabulary.*'zzz'"):
        teacher_of(tiny_policy(), stage)
    teacher(torch.float32).save(tmp_path / "right")
    stage = stage_of("off_policy", teacher={"source": str(tmp_path / "right")})
    assert teacher_of(tiny_policy(), stage).model.config.hidden_size == 48


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"mode": "sequence", "beta": 0.1}, "beta"),
        ({"mode": "off_policy", "sampling": {"max_new_tokens": 5}}, "sampling"),
        ({"mode": "off_policy", "student_share": 0.2, "sampling": {}}, "student_share"),
    ],
)
def test_a_key_that_the_mode_does_not_read_is_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError, match="does not read it") as error:
        Distill.model_validate({**COMMON, **settings})
    assert key in json.dumps([str(e["ctx"]["error"].problems) for e in error.value.errors()])
