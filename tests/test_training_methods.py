"""Each method against its formulas written out one sequence at a time, and what follows from them.

The models are float64, so that a wrong term cannot hide in rounding. What the forest carries beside the model's own
numbers (advantages, behaviour and old log-probs) is float32, hence `LOOSE`.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_policy
from tiny_runs import (
    ANSWERS,
    RENDERER,
    SEED,
    asked,
    grpo,
    lengths,
    paired,
    ppo,
    preference,
    prepared,
    rows_of,
    scorer,
    sft,
    stage_of,
    turn,
)
from torch import Tensor

from posttrain.data.prepare import Prepared
from posttrain.forest import pack, split, token_logprobs
from posttrain.models.policy import Policy
from posttrain.recipe.blocks import Lora, Sampling
from posttrain.records import Example, Rollout, Score, UserError
from posttrain.sampling.local import LocalSampler
from posttrain.training import loop
from posttrain.training.batch import Batch, Method
from posttrain.training.loop import train, trained
from posttrain.training.preference import (
    PreferenceMethod,
    judged_from_data,
    judged_on_policy,
    read_judged,
    referred,
    write_judged,
)
from posttrain.training.world import ALONE

TIGHT = {"rtol": 1e-9, "atol": 1e-12}
LOOSE = {"rtol": 1e-5, "atol": 1e-6}
ADAPTERS = [None, Lora(r=4)]
OPTIM = {"lr": 3e-3, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.1, "max_grad_norm": 0.5, "eps": 1e-4}
"""With the usual eps of 1e-8 AdamW turns the rounding of a gradient near 0 into whole steps."""


def policy64(adapter: Lora | None = None) -> Policy:
    policy = tiny_policy(adapter=adapter, dtype=torch.float64)
    moved(policy, 0.05)  # an adapter whose B is 0 gives A no gradient
    return policy


def moved(policy: Policy, by: float, seed: int = 1) -> None:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters().values():
            p.add_(by * torch.randn(p.shape, generator=rng, dtype=torch.float64).to(p.dtype))


def plain_logps(policy: Policy, context: Sequence[int], completion: Sequence[int], temperature: float = 1.0) -> Tensor:
    """Log-probs of the completion's tokens by the model's own forward pass over this sequence alone."""
    ids = torch.tensor([[*context, *completion]])
    logits = policy.model(ids).logits[0, len(context) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, ids[0, len(context) :, None]).squeeze(1)


class Naive:
    """AdamW, decay and clipping as PyTorch has them."""

    def __init__(self, policy: Policy) -> None:
        self.parameters = [p for p in policy.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": OPTIM["weight_decay"]},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=OPTIM["lr"], eps=OPTIM["eps"])

    def step(self, loss: Tensor) -> tuple[float, float]:
        self.adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, OPTIM["max_grad_norm"])
        self.adamw.step()
        return loss.item(), norm.item()


def agree(policy: Policy, naive: Policy, rows: list[dict[str, Any]], steps: list[tuple[float, float]]) -> None:
    """Same loss, gradient norm and weights, whether the norm was clipped or not."""
    assert [row["loss"] for row in rows] == pytest.approx([loss for loss, _ in steps], rel=1e-6, abs=1e-7)
    assert [row["grad_norm"] for row in rows] == pytest.approx([norm for _, norm in steps], rel=1e-5)
    for (name, p), (_, q) in zip(policy.parameters().items(), naive.parameters().items(), strict=True):
        torch.testing.assert_close(p, q, **LOOSE, msg=lambda text, name=name: f"{name}: {text}")


def gradient(policy: Policy, method: Method, batch: Batch, stage: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Loss and metrics of the step, and its gradient."""
    found, _ = loop.gradient(policy, method, batch, ALONE, stage.tokens_per_forward)
    counted = {name: counts for name, counts in found.items() if isinstance(counts, dict)}
    flat = {f"{name} {label}": n for name, counts in counted.items() for label, n in counts.items()}
    flat |= {name: value for name, value in found.items() if name not in counted}
    parameters = trained(policy, method)
    gradients = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    return flat, gradients


def same_gradient(a: dict[str, Tensor], b: dict[str, Tensor], **tolerance: float) -> None:
    assert a.keys() == b.keys()
    assert any(g.abs().max() > 1e-4 for g in a.values())
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


# One step, written out


@pytest.mark.parametrize("adapter", ADAPTERS, ids=["full", "lora"])
def test_sft_is_cross_entropy_over_a_padded_batch(tmp_path, adapter):
    stage = stage_of("sft", steps=2, batch_size=4, optim=OPTIM)
    policy, naive = policy64(adapter), policy64(adapter)
    method = sft(stage)
    train(policy, method, stage, tmp_path, 0)

    optimizer, steps = Naive(naive), []
    for step in range(2):
        rows = method.batch(step).rows
        longest = max(map(len, rows))
        ids, labels = torch.full((4, longest), 2), torch.full((4, longest), -100)
        mask = torch.zeros(4, longest, dtype=torch.long)
        for i, row in enumerate(rows):
            tokens = torch.tensor([*row.context, *row.completion])
            ids[i, : len(row)], mask[i, : len(row)] = tokens, 1
            wanted = torch.tensor([*[False] * len(row.context), *row.target])
            labels[i, : len(row)] = tokens.masked_fill(~wanted, -100)
        logits = naive.model(ids, attention_mask=mask).logits
        steps.append(optimizer.step(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())))
    agree(policy, naive, rows_of(tmp_path / "metrics.jsonl"), steps)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=["full", "lora"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"beta": 0.7, "label_smoothing": 0.1}, {"nll_weight": 0.5}, {"label_smoothing": 0.3, "nll_weight": 2}],
)
def test_dpo_is_its_formula(tmp_path, adapter, settings):
    stage = stage_of("dpo", steps=2, batch_size=3, optim=OPTIM, **settings)
    policy, naive, reference = policy64(adapter), policy64(adapter), policy64(adapter)
    method = preference(policy, stage)
    train(policy, method, stage, tmp_path, 0)

    optimizer, steps = Naive(naive), []
    for step in range(2):
        rows = method.batch(step).rows
        losses, nlls, tokens = [], [], 0
        for chosen, rejected in zip(rows[::2], rows[1::2], strict=True):
            pi_w, pi_l = (plain_logps(naive, r.context, r.completion) for r in (chosen, rejected))
            with torch.no_grad():
                ref_w, ref_l = (plain_logps(reference, r.context, r.completion) for r in (chosen, rejected))
            d = stage.beta * ((pi_w.sum() - ref_w.sum()) - (pi_l.sum() - ref_l.sum()))
            e = stage.label_smoothing
            losses.append(-(1 - e) * torch.log(torch.sigmoid(d)) - e * torch.log(1 - torch.sigmoid(d)))
            nlls.append(-pi_w.sum())
            tokens += len(chosen.completion)
        steps.append(optimizer.step(sum(losses) / 3 + stage.nll_weight * sum(nlls) / tokens))
    agree(policy, naive, rows_of(tmp_path / "metrics.jsonl"), steps)


class Recorded:
    """A sampler that remembers what it gave; its log-probs are off by up to `off`, as another engine's would be."""

    def __init__(self, policy: Policy, off: float = 0.0) -> None:
        self.inner, self.off = LocalSampler(policy, RENDERER), off
        self.rollouts: list[Rollout] = []

    def __call__(self, prompts: Sequence[Example], n: int, sampling: Sampling, seed: int) -> Any:
        rollouts, ledger = self.inner(prompts, n, sampling, seed)
        rng = random.Random(seed)
        self.rollouts = [
            dataclasses.replace(r, logps=tuple(x - rng.uniform(-self.off, self.off) for x in r.logps)) for r in rollouts
        ]
        return self.rollouts, ledger


def some_unscored(example: Example, text: str) -> Score:
    """For a third of the prompts every answer is worth the same; some answers cannot be scored at all."""
    if len(text) % 5 == 4:
        return Score(None, "error")
    return Score(1.0, "correct") if example.id in ("q:0", "q:3") else lengths(example, text)


# However the step is cut, whatever the order


def built(name: str, policy: Policy, settings: dict[str, Any], order: Sequence[int] = range(6)) -> tuple[Any, Any]:
    """A method over six rows, pairs or prompts of one step, and its stage; `order` is theirs."""
    stage = stage_of(name, batch_size=6, check_first_step=False, **settings)  # a sampler that is off has its reasons
    if name == "sft":
        method: Any = sft(stage)
    elif name == "dpo":
        method = preference(policy, stage)
    else:
        method = {"grpo": grpo, "ppo": ppo}[name](policy, stage, some_unscored, one_by_one(policy))
    method.order[:6] = [method.order[i] for i in order]
    return method, stage


def one_by_one(policy: Policy) -> Any:
    """A sampler whose answers do not depend on where in the batch a prompt stands."""

    def sample(prompts: Sequence[Example], n: int, sampling: Sampling, seed: int) -> Any:
        parts = [Recorded(policy, off=0.4)([prompt], n, sampling, seed) for prompt in prompts]
        rollouts = [dataclasses.replace(r, group=p) for p, (found, _) in enumerate(parts) for r in found]
        return rollouts, parts[0][1]

    return sample


CASES: list[tuple[str, dict[str, Any]]] = [
    ("sft", {}),
    ("dpo", {"label_smoothing": 0.1, "nll_weight": 0.5}),
    *(("grpo", {"aggregate": aggregate}) for aggregate in ("token", "sequence", "constant")),
    ("grpo", {"ratio": "sequence", "aggregate": "sequence"}),
    ("grpo", {"kl_estimator": "k1", "kl_in": "reward"}),
    ("grpo", {"kl_estimator": "k2"}),
    *(("grpo", {"objective": objective}) for objective in ("cispo", "sapo", "gmpo", "vespo")),
    ("grpo", {"advantage": "whitened", "kl_in": "reward"}),
    ("grpo", {"advantage": "leave_one_out", "ratio": "product", "kl_corrected": True}),
    ("grpo", {"entropy_weight": 0.1}),
    ("ppo", {"n": 2, "minibatches": 1, "entropy_weight": 0.1}),
]


@pytest.mark.parametrize(
    ("name", "settings"), CASES, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))
)
def test_neither_cutting_nor_order_changes_the_gradient(name, settings):
    results = []
    for budget, order in ((100_000, range(6)), (16, range(6)), (70, (3, 5, 0, 4, 1, 2))):
        policy = policy64()
        method, stage = built(name, policy, {**settings, "tokens_per_forward": budget}, order)
        moved(policy, 0.03)
        batch = method.batch(0)
        results.append((len(split(batch.rows, batch.units, budget)), *gradient(policy, method, batch, stage)))
    (one, found, gradients), *others = results
    assert one == 1
    assert others[0][0] >= 6
    for _, other_found, other_gradients in others:
        same_gradient(gradients, other_gradients, **(LOOSE if name in ("grpo", "ppo") else TIGHT))
        assert other_found == pytest.approx(found, rel=1e-6 if name in ("grpo", "ppo") else 1e-9, abs=1e-9)


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_what_stands_at_context_tokens_reaches_neither_loss_nor_gradient(name):
    policy = policy64()
    method, _ = built(name, policy, {})
    batch = method.batch(0)
    rows = [i for unit in batch.units for i in unit]
    forest = pack([batch.rows[i] for i in rows])
    assert not forest.target_T.all()
    logps_T = token_logprobs(policy.model, forest).detach()
    gradients = []
    for rubbish in (0.0, math.nan):
        mixed_T = logps_T.masked_fill(~forest.target_T, rubbish).requires_grad_()
        loss, stats = method.loss(batch, rows, forest, mixed_T)
        loss.backward()
        gradients.append((loss.item(), stats, mixed_T.grad))
    assert gradients[0][:2] == gradients[1][:2]
    assert torch.equal(gradients[0][2], gradients[1][2])
    assert (gradients[0][2][~forest.target_T] == 0).all()


# Supervised fine-tuning


def test_sft_learns_four_answers_by_heart(tmp_path):
    asks = ("sum of 9", "a fox", "the dog", "Two hours")
    data = prepared(
        [Example(a, (turn("user", a),), (turn("assistant", b),)) for a, b in zip(asks, ANSWERS, strict=False)]
    )
    stage = stage_of("sft", steps=80, batch_size=4, optim={"lr": 1e-2, "weight_decay": 0.0})
    policy = tiny_policy()
    train(policy, sft(stage, data), stage, tmp_path, 0)
    losses = [row["loss"] for row in rows_of(tmp_path / "metrics.jsonl")]
    assert losses[0] > 4
    assert losses[-1] < 0.02
    prompts = [row.example for row in data.rows[0]]
    rollouts, _ = LocalSampler(policy, RENDERER)(prompts, 1, Sampling(temperature=0, max_new_tokens=40), 0)
    assert [(r.text, r.finish) for r in rollouts] == [(a, "stop") for a in ANSWERS[:4]]


def test_sft_sees_every_row_once_an_epoch():
    stage = stage_of("sft", steps=8, batch_size=2)
    method = sft(stage)
    epochs = [[row for step in range(e, e + 4) for row in method.batch(step).rows] for e in (0, 4)]
    assert set(epochs[0]) == set(epochs[1])
    assert len(set(epochs[0])) == 8
    assert epochs[0] != epochs[1]


def test_a_text_of_one_token_is_no_error():
    data = prepared([Example("t", text="")])
    method = sft(stage_of("sft", batch_size=1), data)
    policy = policy64()
    found, _ = loop.gradient(policy, method, method.batch(0), ALONE, 1024)
    assert found["loss"] == 0


# Preferences


@pytest.mark.parametrize("adapter", ADAPTERS, ids=["full", "lora"])
@pytest.mark.parametrize(("name", "size"), [("dpo", 6), ("dpo on-policy", 4)])
def test_dpo_begins_at_log_two_and_raises_the_margin(tmp_path, adapter, name, size):
    policy = tiny_policy(adapter=adapter)
    stage = stage_of(name, steps=16, batch_size=size, optim={"lr": 3e-3 if adapter is None else 2e-2})
    train(policy, preference(policy, stage, tmp_path), stage, tmp_path, 0)
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["margin"] > 1
    assert rows[-1]["accuracy"] == pytest.approx(1)
    assert rows[-1]["loss"] < 0.4


def test_dpo_metrics_are_those_of_the_pairs(tmp_path):
    policy = policy64()
    stage = stage_of("dpo", batch_size=6)
    method = preference(policy, stage)
    before = {row: plain_logps(policy, row.context, row.completion).sum().item() for row in method.batch(0).rows}
    moved(policy, 0.05)
    found, _ = gradient(policy, method, method.batch(0), stage)
    after = {row: plain_logps(policy, row.context, row.completion).sum().item() for row in before}
    chosen, rejected = list(before)[::2], list(before)[1::2]
    margins = [0.1 * (after[c] - before[c] - after[r] + before[r]) for c, r in zip(chosen, rejected, strict=True)]
    assert found["margin"] == pytest.approx(sum(margins) / 6)
    assert found["accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 6)
    assert found["chosen_logp"] == pytest.approx(sum(after[c] for c in chosen) / 6)
    assert found["rejected_logp"] == pytest.approx(sum(after[r] for r in rejected) / 6)


def test_nll_keeps_the_chosen_answers_likely(tmp_path):
    """The pull apart may lower both; the NLL term guards the chosen one."""
    ends = []
    for weight in (0.0, 3.0):
        policy = tiny_policy()
        stage = stage_of("dpo", steps=12, batch_size=6, nll_weight=weight, optim={"lr": 1e-2})
        train(policy, preference(policy, stage), stage, tmp_path / str(weight), 0)
        ends.append(rows_of(tmp_path / str(weight) / "metrics.jsonl"))
    assert ends[1][-1]["chosen_logp"] > ends[0][-1]["chosen_logp"]
    assert ends[1][-1]["chosen_logp"] > ends[1][0]["chosen_logp"]


def on_policy(score: Any, data: Prepared, policy: Policy | None = None) -> Any:
    policy = policy or tiny_policy()
    sampler = Recorded(policy)
    stage = stage_of("dpo", on_policy={"n": 4, "prompts": 12, "max_new_tokens": 6})
    judged, ledger, facts = judged_on_policy(policy, stage, data, sampler, scorer(score), 0)
    return sampler, (referred(policy, stage, judged)[0], ledger, facts)


def test_on_policy_pairs_are_what_was_sampled_token_for_token(tmp_path):
    policy = tiny_policy()
    sampler, (pairs, ledger, facts) = on_policy(some_unscored, prepared(asked()), policy)
    scored = {(r.prompt_ids, r.ids): some_unscored(r.example, r.text).value for r in sampler.rollouts}
    sides = [side for pair in pairs[0] for side in pair.rows]
    assert {(side.context, side.completion) for side in sides} <= scored.keys()
    assert all(all(side.target) for side in sides)
    for pair in pairs[0]:
        chosen, rejected = (scored[side.context, side.completion] for side in pair.rows)
        assert chosen > rejected
        assert pair.rewards == (chosen, rejected)
        assert len({side.context for side in pair.rows}) == 1
        sums = [plain_logps(policy, s.context, s.completion).sum().item() for s in pair.rows]
        assert pair.reference == pytest.approx(sums, abs=1e-4)
    # Retokenising what was said would not have given these.
    texts = [(RENDERER.decode(side.completion), side.completion) for side in sides]
    assert any(tuple(RENDERER.tokenizer(text)["input_ids"]) != ids for text, ids in texts)
    correct = [some_unscored(r.example, r.text).outcome == "correct" for r in sampler.rollouts]
    assert facts == {"prompts": 12, "pairs": len(pairs[0]), "correct": sum(correct) / 48}
    assert ledger.generated_tokens == sum(len(r.ids) for r in sampler.rollouts)
    write_judged(tmp_path / "judged.jsonl", pairs)
    assert read_judged(tmp_path / "judged.jsonl", 1) == pairs


def test_no_pair_is_the_users_error():
    for score in (Score(1.0, "correct"), Score(None, "error")):
        with pytest.raises(UserError, match=r"stage 'toy': none of 12 prompts.*raise on_policy.n or temperature"):
            on_policy(lambda example, text, score=score: score, prepared(asked()))


def test_a_source_without_pairs_leaves_the_mixture_to_the_others():
    examples = asked()
    data = prepared(examples[:2], examples[2:4], examples[4:])._replace(weights=(4.0, 2.0, 1.0))
    policy = tiny_policy()
    _, (pairs, _, _) = on_policy(lambda e, t: Score(0.0, "wrong") if e in examples[:2] else lengths(e, t), data, policy)
    assert pairs[0] == []
    assert pairs[1]
    assert pairs[2]
    method = PreferenceMethod(stage_of("dpo", batch_size=3), data, 0, pairs, policy)
    shares = [
        sum(row == pair.rows[0] for step in range(8) for row in method.batch(step).rows for pair in part)
        for part in pairs
    ]
    assert shares == [0, 16, 8]


def test_dpo_refers_only_the_pairs_it_comes_to():
    """Two steps on a large file must not wait for the reference of every pair in it."""
    policy, data = tiny_policy(), prepared(paired() * 50, paired())
    few = stage_of("dpo", steps=2, batch_size=4)
    pairs = judged_from_data(policy, few, data, SEED)
    assert [len(part) for part in pairs] == [4, 4]  # two sources of one weight, eight slots
    method = PreferenceMethod(few, data, SEED, referred(policy, few, pairs)[0], policy)
    seen = [pair.sample["prompt"] for step in range(2) for pair in (method.batch(step), method.now)[1]]
    assert sorted(seen) == sorted(pair.sample["prompt"] for part in pairs for pair in part)
    many = stage_of("dpo", steps=200, batch_size=4)
    assert [len(part) for part in judged_from_data(policy, many, data, SEED)] == [300, 6]
