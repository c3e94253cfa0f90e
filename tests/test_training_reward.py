"""Reward models: loss, gradient and scores against Transformers' own classifier, and what is held out."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from peft import PeftModel
from test_training_methods import ADAPTERS, gradient, moved, same_gradient
from tiny import tiny_model, tiny_policy, tiny_tokenizer
from tiny_runs import RENDERER, SEED, paired, prepared, rows_of, run, stage_of, turn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from posttrain.cli import main
from posttrain.data.prepare import Prepared, prepare
from posttrain.forest import pack, unrolled_hidden_states
from posttrain.losses import bradley_terry
from posttrain.models.policy import Policy, load, outline
from posttrain.models.reward import fitting, reward_model
from posttrain.recipe.blocks import Data, Lora
from posttrain.recipe.load import parse
from posttrain.records import Example, UserError
from posttrain.training.reward import RewardMethod, answers, ends, hold_out, preferred, rewards

TIGHT = {"rtol": 1e-9, "atol": 1e-12}


def with_margins() -> Prepared:
    return prepared([Example(e.id, e.prompt, e.completion, e.rejected, margin=i / 4) for i, e in enumerate(paired())])


def made(adapter: Lora | None = None, arch: str = "llama", dtype: torch.dtype = torch.float64) -> Policy:
    policy = tiny_policy(arch, adapter=adapter, dtype=dtype)
    moved(policy, 0.05)  # an adapter whose B is 0 gives A no gradient
    return reward_model(policy, ends(prepared(paired())), SEED)


def reloaded(policy: Policy, arch: str, folder: Path) -> tuple[torch.nn.Module, Any]:
    """What a user of plain Transformers and PEFT gets from the artifact."""
    policy.save(folder / "artifact")
    tokenizer = AutoTokenizer.from_pretrained(folder / "artifact")
    if policy.adapter is None:
        model = AutoModelForSequenceClassification.from_pretrained(folder / "artifact", dtype=torch.float64)
    else:
        tiny_model(arch, dtype=torch.float64).save_pretrained(folder / "base")
        base = AutoModelForSequenceClassification.from_pretrained(
            folder / "base", num_labels=1, pad_token_id=tokenizer.pad_token_id, dtype=torch.float64
        )
        model = PeftModel.from_pretrained(base, folder / "artifact", is_trainable=True, autocast_adapter_dtype=False)
    return model.eval(), tokenizer


def padded(tokenizer: Any, data: Prepared, **how: Any) -> Any:
    rows = [row for part in data.rows for pair in part for row in answers(pair)]
    assert len({len(row) for row in rows}) > 2
    return tokenizer.pad([{"input_ids": [*r.context, *r.completion]} for r in rows], return_tensors="pt", **how)


# Against Transformers


@pytest.mark.parametrize("adapter", ADAPTERS, ids=["full", "lora"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox"])
def test_loss_and_gradient_are_those_of_a_padded_batch_in_plain_transformers(tmp_path, arch, adapter):
    data, policy = with_margins(), made(adapter, arch)
    stage = stage_of("reward_model", batch_size=6, centring=0.02)
    method = RewardMethod(stage, data, SEED)
    batch = method.batch(0)
    found, ours = gradient(policy, method, batch, stage)

    theirs, tokenizer = reloaded(policy, arch, tmp_path)
    scores_P2 = theirs(**padded(tokenizer, data)).logits.view(6, 2)
    better_P, worse_P = scores_P2[:, 0], scores_P2[:, 1]
    margin_P = torch.arange(6, dtype=torch.float64) / 4
    loss = -torch.log(torch.sigmoid(better_P - worse_P - margin_P)) + 0.02 * (better_P + worse_P) ** 2
    loss.mean().backward()
    assert found["loss"] == pytest.approx(loss.mean().item(), rel=1e-9)
    assert found["accuracy"] == pytest.approx((better_P > worse_P).double().mean().item())
    assert found["margin"] == pytest.approx((better_P - worse_P).mean().item(), rel=1e-9)
    assert found["chosen_reward"] == pytest.approx(better_P.mean().item(), rel=1e-9)
    assert found["rejected_reward"] == pytest.approx(worse_P.mean().item(), rel=1e-9)
    plain = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    same_gradient(
        {n: g for n, g in ours.items() if g.abs().max() > 0}, plain, rtol=1e-5, atol=1e-6
    )  # norms are float32 inside
    assert any("score" in name for name in plain)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=["full", "lora"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_score_is_read_at_the_end_of_the_turn_and_not_at_padding(tmp_path, adapter, side):
    """The tokenizer pads with the end of a turn; left so, Transformers would read every score one token early."""
    policy, data = made(adapter), prepared(paired())
    theirs, tokenizer = reloaded(policy, "llama", tmp_path)
    assert tiny_tokenizer().pad_token_id == 2  # the trap
    assert tokenizer.pad_token_id not in ends(data) == {2}
    rows = [row for pair in data.rows[0] for row in answers(pair)]
    with torch.no_grad():
        batch = padded(tokenizer, data, padding_side=side)
        if side == "left":
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        scores_R = theirs(**batch).logits[:, 0]
        alone_R = torch.cat([theirs(torch.tensor([[*r.context, *r.completion]])).logits[:, 0] for r in rows])
        packed_R = rewards(policy.model, pack(rows))
    torch.testing.assert_close(scores_R, packed_R, **TIGHT)
    torch.testing.assert_close(alone_R, packed_R, **TIGHT)
    assert packed_R.std() > 0.01


def test_head_and_adapter_are_what_an_adapter_trains_and_saves(tmp_path):
    policy = made(Lora(r=4, targets=("q_proj",)))
    assert {name.rpartition("layers.")[2] for name in policy.parameters()} == {
        "base_model.model.score.modules_to_save.default.weight",
        *(f"{i}.self_attn.q_proj.lora_{x}.default.weight" for i in (0, 1) for x in "AB"),
    }
    policy.save(tmp_path / "artifact")
    config = json.loads((tmp_path / "artifact" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert "score" in config["modules_to_save"]


def test_a_reward_model_goes_on_from_the_adapter_it_is_given():
    lm, other = (tiny_policy(adapter=Lora(r=4)) for _ in range(2))
    for policy in (lm, other):
        moved(policy, 0.3)
    forest = pack([row for pair in prepared(paired()).rows[0] for row in answers(pair)])
    before_TD = unrolled_hidden_states(other.model, forest)
    after_TD = unrolled_hidden_states(reward_model(lm, {2}, 0).model, forest)
    torch.testing.assert_close(after_TD, before_TD, rtol=0, atol=0)
    assert (unrolled_hidden_states(tiny_policy().model, forest) - after_TD).abs().max() > 0.1


# Invariance and learning


@pytest.mark.parametrize("adapter", ADAPTERS, ids=["full", "lora"])
def test_neither_cutting_nor_order_changes_the_gradient(adapter):
    policy, stage = made(adapter), stage_of("reward_model", batch_size=6)
    method = RewardMethod(stage, with_margins(), SEED)
    batch = method.batch(0)
    whole = gradient(policy, method, batch, stage_of("reward_model", batch_size=6, tokens_per_forward=10_000))
    for budget in (16, 100):
        found, cut = gradient(policy, method, batch, stage_of("reward_model", batch_size=6, tokens_per_forward=budget))
        assert found == pytest.approx(whole[0], rel=1e-9)
        same_gradient(cut, whole[1], **TIGHT)
    mixed = list(range(6))
    random.Random(0).shuffle(mixed)
    method = RewardMethod(stage, with_margins()._replace(rows=(tuple(with_margins().rows[0][i] for i in mixed),)), SEED)
    found, other = gradient(policy, method, method.batch(0), stage)
    assert found == pytest.approx(whole[0], rel=1e-9)
    same_gradient(other, whole[1], **TIGHT)


def test_packed_rewards_are_the_unrolled_ones():
    policy = made()
    forest = pack([row for pair in prepared(paired()).rows[0] for row in answers(pair)])
    assert len(forest) < sum(len(row) for pair in prepared(paired()).rows[0] for row in answers(pair))
    torch.testing.assert_close(
        rewards(policy.model, forest), rewards(policy.model, forest, unrolled_hidden_states), **TIGHT
    )


def test_it_learns_what_is_preferred(tmp_path):
    policy, _ = run("reward_model", tmp_path, steps=30, batch_size=6, optim={"lr": 3e-3, "weight_decay": 0.0})
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert rows[-1]["accuracy"] == pytest.approx(1)
    assert rows[-1]["loss"] < 0.2 < 0.5 < rows[0]["loss"]
    pairs = prepared(paired()).rows[0]
    assert preferred(policy.model, pairs, 64) == [True] * len(pairs)
    swapped = prepared([Example(e.id, e.prompt, e.rejected, e.completion) for e in paired()]).rows[0]
    assert preferred(policy.model, swapped, 64) == [False] * len(pairs)


def test_a_tie_is_not_preferred():
    policy = made()
    with torch.no_grad():
        policy.model.score.weight.zero_()
    assert preferred(policy.model, prepared(paired()).rows[0], 64) == [False] * 6


# What is held out


def many(prompts: int, each: int = 2) -> list[Example]:
    return [
        Example(f"{i}/{j}", (turn("user", f"{i}?"),), (turn("assistant", f"yes {j}"),), (turn("assistant", "no"),))
        for i in range(prompts)
        for j in range(each)
    ]


def names(pairs: Any) -> set[str]:
    return {pair.example.id for pair in pairs}


def test_held_out_prompts_are_not_trained_on_and_do_not_depend_on_order():
    stage = stage_of("reward_model", holdout=0.2)
    examples = many(20)
    train, held = hold_out(stage, prepared(examples))
    assert names(held) | names(train.rows[0]) == {e.id for e in examples}
    assert len(held) == 8
    assert not {name.partition("/")[0] for name in names(held)} & {n.partition("/")[0] for n in names(train.rows[0])}
    random.Random(1).shuffle(examples)
    _, again = hold_out(stage, prepared(examples[:25], examples[25:]))
    assert names(again) == names(held)
    _, more = hold_out(stage_of("reward_model", holdout=0.5), prepared(examples))
    assert names(held) < names(more)


def test_nothing_is_held_out_where_nothing_is_asked():
    data = prepared(many(3))
    assert hold_out(stage_of("reward_model", holdout=0), data) == (data, [])


@pytest.mark.parametrize(("share", "prompts"), [(0.1, 4), (0.9, 2)])
def test_too_little_on_a_side_is_told(share, prompts):
    with pytest.raises(UserError, match=r"holdout .* leaves"):
        hold_out(stage_of("reward_model", holdout=share), prepared(many(prompts, each=1)))


# Margins


def test_a_margin_comes_from_the_data(tmp_path):
    rows = [
        {"prompt": "A?", "chosen": "yes", "rejected": "no", "margin": 0.5},
        {"prompt": "B?", "chosen": "yes", "rejected": "no"},
        {"prompt": "C?", "chosen": "yes", "rejected": "no", "margin": "much"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data = prepare(
        Data.model_validate({"sources": [{"source": str(path)}], "max_bad_rows": 0.5}), RENDERER, need="pair"
    )
    assert [pair.example.margin for pair in data.rows[0]] == [0.5, None]
    assert data.report["sources"][0]["bad_rows"] == ["pairs.jsonl:3: margin must be a number, it is 'much'"]

    method, policy = RewardMethod(stage_of("reward_model", batch_size=2), data, SEED), made()
    batch = method.batch(0)
    forest = pack(batch.rows)
    outputs_R = method.forward(policy.model, forest, unrolled_hidden_states)
    loss, _ = method.loss(batch, range(4), forest, outputs_R)
    margins = [row[0].example.margin or 0.0 for row in ([p] for p in data.rows[0])]
    by_prompt = {pair.prompt_ids: m for pair, m in zip(data.rows[0], margins, strict=True)}
    margin_P = torch.tensor([by_prompt[row.context] for row in batch.rows[::2]])
    want = bradley_terry(outputs_R[::2], outputs_R[1::2], margin_P=margin_P, centring=0.01).mean()
    assert loss.item() == pytest.approx(want.item(), rel=1e-12)
    assert -F.logsigmoid(outputs_R[::2] - outputs_R[1::2]).mean() < want


# What cannot be


def test_a_model_without_a_classifier_or_a_padding_token_is_refused():
    policy = tiny_policy()
    with pytest.raises(UserError, match=r"special token to pad with .*<\|im_end\|>"):
        fitting(policy, {0, 1, 2})
    policy.model.config.__class__ = type("Unknown", (type(policy.model.config),), {})
    with pytest.raises(UserError, match="no sequence classifier"):
        fitting(policy, {2})


@pytest.mark.parametrize("adapter", ADAPTERS, ids=["full", "lora"])
@pytest.mark.parametrize("how", [load, outline])
def test_a_reward_model_is_not_taken_for_a_language_model(tmp_path, adapter, how):
    made(adapter, dtype=torch.float32).save(tmp_path / "reward")
    with pytest.raises(UserError, match="is a reward model, which scores text and writes none"):
        how(str(tmp_path / "reward"))


RECIPE = """
schema: 1
name: x
model: {source: a/b}
stages:
  - {id: one, kind: reward_model, steps: 1, data: {sources: [{source: a.jsonl}]}}
"""
SECOND = "  - {id: two, kind: %s, steps: 1, data: {sources: [{source: a.jsonl}]}%s}\n"


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (SECOND % ("sft", ""), "r:7: stages.1.from: 'one' is a reward model, which writes no text; start from another"),
        (SECOND % ("reward_model", ", from: one"), "stages.1.from: 'one' is a reward model"),
        ("evals: {retention: {}}\ngates: [{suite: retention, measure: kl, at_most: 1}]\n", "gates speak of the last"),
    ],
)
def test_no_stage_or_gate_builds_on_a_reward_model(more, what):
    with pytest.raises(UserError, match=what):
        parse(RECIPE + more, "r")
    parse(RECIPE + SECOND % ("sft", ", from: base"), "r")


def test_an_answer_without_its_end_is_no_answer():
    with pytest.raises(UserError, match=r"data\.too_long: a reward is read where an answer ends"):
        parse(RECIPE, "r", ["stages.one.data.too_long=truncate"])


# A whole run


def test_a_run_with_a_reward_model_between_other_stages(tmp_path, capsys):
    tiny_policy().save(tmp_path / "model")
    files = {}
    for name, rows in {
        "pairs": [{"prompt": e.prompt[0]["content"] + str(i), "chosen": "yes, so it is", "rejected": "no"}
                  for i in range(4) for e in paired()],
        "answers": [{"prompt": f"{i}?", "completion": "yes"} for i in range(8)],
    }.items():  # fmt: skip
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("\n".join(map(json.dumps, rows)))

    def stage(name: str, kind: str, file: str, **more: Any) -> dict[str, Any]:
        data = {"sources": [{"source": str(files[file])}]}
        return {"id": name, "kind": kind, "data": data, "steps": 3, "batch_size": 4, "optim": {"lr": 1e-3}, **more}

    stages = [
        stage("first", "sft", "answers"),
        stage("reward", "reward_model", "pairs", holdout=0.25, steps=12, checkpoint_every=5),
        stage("last", "sft", "answers", **{"from": "first"}),
    ]
    recipe = {"schema": 1, "name": "x", "model": {"source": str(tmp_path / "model"), "adapter": {"r": 4}}}
    recipe |= {"stages": stages, "evals": {"retention": {"rows": 2, "max_new_tokens": 4}}}
    path, out = tmp_path / "r.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(recipe))

    assert main(["run", str(path), "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["stages"][1]
    assert (planned["kind"], planned["rows"], planned["generated_tokens"]) == ("reward_model", 18, 0)
    assert main(["run", str(path), "--out", str(out)]) == 0

    record = json.loads((out / "stages/reward/stage.json").read_text())
    held = record["facts"]["held_out"]
    assert (record["facts"]["pairs"], held["n"], held["accuracy"]) == (18, 6, 1.0)
    assert held["interval"][0] == pytest.approx(0.6097, abs=1e-4)
    assert record["inputs"]["model"] == json.loads((out / "stages/first/stage.json").read_text())["artifact"]["digest"]
    assert record["ledger"]["shared_tokens"] > 0
    assert [row["stage"] for row in json.loads((out / "evals.json").read_text())["retention"]] == [
        "base",
        "first",
        "last",
    ]
    watched = {row["name"]: row for row in json.loads((out / "monitors.json").read_text())["rows"]}
    assert watched["held-out pairs"]["level"] == "ok"
    page = (out / "report.html").read_text()
    assert "held-out pairs" in page
    assert all(math.isfinite(row["margin"]) for row in rows_of(out / "stages/reward/metrics.jsonl"))

    digest = record["artifact"]["digest"]
    capsys.readouterr()
    assert main(["run", str(path), "--out", str(out)]) == 0
    assert "reward: finished already" in capsys.readouterr().err
    assert json.loads((out / "stages/reward/stage.json").read_text())["artifact"]["digest"] == digest
    assert main(["sample", str(out / "stages/reward/artifact"), "Hello"]) == 2
    assert "is a reward model" in capsys.readouterr().err
