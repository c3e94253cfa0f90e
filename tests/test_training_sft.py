"""Dynamic fine-tuning and continued pre-training, against their formulas written out one sequence at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny import tiny_policy
from tiny_runs import OPTIM, RENDERER, SEED, answered, prepared, rows_of
from torch import Tensor

from posttrain.data.prepare import Prepared, prepare
from posttrain.models.policy import Policy
from posttrain.recipe.blocks import Data
from posttrain.recipe.supervised import ContinuedPretraining, Sft
from posttrain.records import UserError
from posttrain.training.loop import gradient, train
from posttrain.training.sft import SftMethod
from posttrain.training.world import ALONE

COMMON = {"id": "toy", "data": {"sources": [{"source": "x.jsonl"}]}, "steps": 2, "batch_size": 4, "optim": OPTIM}
LONG = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 3


def documents(tmp_path: Path, max_length: int = 24) -> Prepared:
    path = tmp_path / "d.txt"
    path.write_text(f"{LONG}\nA fox.\nHow long did it travel? Two hours.\n")
    data = Data.model_validate({"sources": [{"source": str(path)}], "max_length": max_length})
    return prepare(data, RENDERER, need="text")


def stage_of(kind: str, **settings: Any) -> Any:
    made = {"sft": Sft, "continued_pretraining": ContinuedPretraining}[kind]
    return made.model_validate({**COMMON, "kind": kind, **settings})


def logps(policy: Policy, context: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
    """By the model's own forward pass over this sequence alone."""
    ids = torch.tensor([[*context, *completion]])
    found = policy.model(ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
    return found.gather(1, ids[0, len(context) :, None]).squeeze(1)


def gradients(policy: Policy) -> list[Tensor]:
    found = [p.grad.clone() for p in policy.parameters().values() if p.grad is not None]
    for p in policy.parameters().values():
        p.grad = None
    return found


@pytest.mark.parametrize("budget", [16, 4096])
def test_dft_has_the_gradient_of_minus_the_probability(budget: int) -> None:
    """-sg(p) log p is worth -p log p, and its gradient, -p grad(log p), is that of -p."""
    policy = tiny_policy(dtype=torch.float64)
    method = SftMethod(stage_of("sft", loss="dft"), prepared(answered()), SEED)
    batch = method.batch(0)
    found, _ = gradient(policy, method, batch, ALONE, budget)
    ours = gradients(policy)
    of_targets = torch.cat([logps(policy, r.context, r.completion)[torch.tensor(r.target)] for r in batch.rows])
    assert found["loss"] == pytest.approx(-(of_targets.exp() * of_targets).mean().item(), rel=1e-10)
    (-of_targets.exp().mean()).backward()
    for a, b in zip(ours, gradients(policy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("max_length", [8, 24, 1024])
def test_every_token_of_a_document_but_its_first_is_a_target_once(tmp_path: Path, max_length: int) -> None:
    data = documents(tmp_path, max_length)
    pieces: dict[str, list[Any]] = {}
    for piece in data.rows[0]:
        pieces.setdefault(piece.example.id, []).append(piece)
    assert len(pieces) == 3
    for mine in pieces.values():
        (whole,) = RENDERER.render(mine[0].example)
        assert sum((p.completion_ids for p in mine), ()) == whole.completion_ids
        assert mine[0].prompt_ids == whole.prompt_ids
        assert [p.prompt_ids for p in mine[1:]] == [p.completion_ids[-1:] for p in mine[:-1]]
        assert all(all(p.completion_target) and 1 < 1 + len(p.completion_ids) <= max_length for p in mine)
    assert (len(data.rows[0]) == 3) == (max_length == 1024)


def test_continued_pretraining_is_the_mean_nll_of_the_pieces(tmp_path: Path) -> None:
    stage = stage_of("continued_pretraining", tokens_per_forward=40)
    policy, plain = tiny_policy(dtype=torch.float64), tiny_policy(dtype=torch.float64)
    data = documents(tmp_path)
    method = SftMethod(stage, data, SEED)
    train(policy, method, stage, tmp_path / "out", 0)
    rows = rows_of(tmp_path / "out" / "metrics.jsonl")
    batch = method.batch(0)
    loss = -torch.cat([logps(plain, r.context, r.completion) for r in batch.rows]).mean()
    assert rows[0]["loss"] == pytest.approx(loss.item(), rel=1e-10)
    loss.backward()
    norm = torch.cat([g.flatten() for g in gradients(plain)]).norm().item()
    assert rows[0]["grad_norm"] == pytest.approx(norm, rel=1e-8)


def test_text_and_answers_are_each_refused_where_the_other_is_needed(tmp_path: Path) -> None:
    text, chat = tmp_path / "d.txt", tmp_path / "d.jsonl"
    text.write_text("A fox.\n")
    chat.write_text('{"prompt": "q", "completion": "a"}\n')
    with pytest.raises(UserError, match="a stage of kind continued_pretraining learns from that"):
        prepare(Data.model_validate({"sources": [{"source": str(text)}]}), RENDERER, need="completion")
    with pytest.raises(UserError, match="answers are learned by a stage of kind sft"):
        prepare(Data.model_validate({"sources": [{"source": str(chat)}]}), RENDERER, need="text")


@pytest.mark.parametrize(("key", "value"), [("system", "Be kind."), ("too_long", "truncate")])
def test_what_documents_do_not_read_is_refused(key: str, value: str) -> None:
    with pytest.raises(ValidationError, match="leave it out"):
        stage_of("continued_pretraining", data={**COMMON["data"], key: value})  # type: ignore[dict-item]
