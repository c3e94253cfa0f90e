"""Every loss of a preference stage against its formula, written out one answer at a time, and what follows from it.

The models are float64, so that a wrong term cannot hide in rounding.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from test_training_methods import gradient, moved, plain_logps, policy64, same_gradient
from tiny import tiny_policy, tiny_tokenizer
from tiny_runs import (
    RENDERER,
    SEED,
    asked,
    labelled,
    lengths,
    paired,
    preference,
    prepared,
    rows_of,
    scorer,
)
from torch import Tensor

from posttrain.data.chat import Renderer
from posttrain.data.prepare import prepare
from posttrain.forest import split
from posttrain.losses import listwise
from posttrain.models.policy import Policy, outline
from posttrain.monitors.checks import watch_stage
from posttrain.pipeline.stages import need, stage_data
from posttrain.recipe.objectives import OBJECTIVES, Loss
from posttrain.recipe.preference import Preference
from posttrain.records import Example, Score, UserError
from posttrain.sampling.local import LocalSampler
from posttrain.training.loop import train
from posttrain.training.preference import (
    FUNCTIONS,
    Judged,
    PreferenceMethod,
    judged_from_data,
    judged_on_policy,
    read_judged,
    referred,
    second_model,
    write_judged,
)

TIGHT = {"rtol": 1e-8, "atol": 1e-11}
LISTS = {"on_policy": {"n": 4, "prompts": 6, "max_new_tokens": 6}}


def stage_of(loss: str, **settings: Any) -> Preference:
    own = LISTS if OBJECTIVES[loss].of in ("lists", "triples") else {}
    return Preference.model_validate(
        {
            "id": "toy",
            "kind": "preference",
            "data": {"sources": [{"source": "unused.jsonl"}]},
            "steps": 2,
            "batch_size": 6,
            "tokens_per_forward": 64,
            "optim": {"lr": 1e-2, "weight_decay": 0.0, "warmup": 0.0},
            "loss": loss,
            **own,
            **settings,
        }
    )


def made(loss: str, folder: Path, **settings: Any) -> tuple[Policy, Policy, PreferenceMethod, Preference]:
    """A policy away from its reference, that reference, and the method over six pairs, lists or answers."""
    policy, stage = policy64(), stage_of(loss, **settings)
    method = preference(policy, stage, folder)
    moved(policy, 0.05, seed=2)
    return policy, policy64(), method, stage


# Each loss is its formula


class Side(SimpleNamespace):
    """An answer: its summed log-probabilities under the policy (L) and the reference (R), and its tokens (n)."""

    L: Tensor
    R: Tensor
    n: int


def sides(policy: Policy, reference: Policy, items: Sequence[Judged]) -> list[list[Side]]:
    def side(row: Any) -> Side:
        with torch.no_grad():
            other = plain_logps(reference, row.context, row.completion).sum()
        return Side(L=plain_logps(policy, row.context, row.completion).sum(), R=other, n=len(row.completion))

    return [[side(row) for row in item.rows] for item in items]


def ls(x: Tensor) -> Tensor:
    return torch.log(torch.sigmoid(x))


def s(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


def r(a: Side) -> Tensor:
    return a.L - a.R


def odds(a: Side) -> Tensor:
    return torch.log(torch.exp(a.L / a.n) / (1 - torch.exp(a.L / a.n)))


def alpha_reward(a: Side) -> Tensor:
    return (1 - torch.exp(-0.25 * a.L / a.n)) / 0.25


PAIRS: dict[str, Callable[[Side, Side], Tensor]] = {
    "dpo": lambda w, v: -ls(0.1 * (r(w) - r(v))),
    "dpo_norm": lambda w, v: -ls(5 * (r(w) / w.n - r(v) / v.n)),
    "hinge": lambda w, v: torch.relu(1 - 0.05 * (r(w) - r(v))),
    "ipo": lambda w, v: (r(w) / w.n - r(v) / v.n - 1 / (2 * 0.1)) ** 2,
    "robust": lambda w, v: (-0.9 * ls(0.01 * (r(w) - r(v))) + 0.1 * ls(-0.01 * (r(w) - r(v)))) / 0.8,
    "exo": lambda w, v: (
        s(0.1 * (r(w) - r(v))) * (ls(0.1 * (r(w) - r(v))) - math.log(0.999))
        + s(-0.1 * (r(w) - r(v))) * (ls(-0.1 * (r(w) - r(v))) - math.log(0.001))
    ),
    "nca": lambda w, v: -ls(0.01 * r(w)) - ls(-0.01 * r(w)) / 2 - ls(-0.01 * r(v)) / 2,
    "bco": lambda w, v: -ls(0.01 * r(w)) - ls(-0.01 * r(v)),
    "sppo": lambda w, v: (r(w) - 500) ** 2 + (r(v) + 500) ** 2,
    "apo_zero": lambda w, v: 1 - s(0.1 * r(w)) + s(0.1 * r(v)),
    "apo_down": lambda w, v: s(0.1 * r(w)) + 1 - s(0.1 * (r(w) - r(v))),
    "discopop": lambda w, v: (
        -s(-(r(w) - r(v))) * ls(0.05 * (r(w) - r(v))) + s(r(w) - r(v)) * torch.exp(-0.05 * (r(w) - r(v)))
    ),
    "cpo": lambda w, v: -ls(0.1 * (w.L - v.L)),
    "tpo": lambda w, v: -ls(0.01 * (w.L - v.L)),
    "simpo": lambda w, v: -ls(2 * (w.L / w.n - v.L / v.n) - 1),
    "alphapo": lambda w, v: -ls(2.5 * (alpha_reward(w) - alpha_reward(v)) - 0.1),
    "orpo": lambda w, v: -0.1 * ls(odds(w) - odds(v)),
}
"""With the papers' own parameters; discopop's two are equal, so that its gate is s(d)."""
NLL = {"cpo": 1.0, "orpo": 1.0, "tpo": 1.0, "rrhf": 1.0, "pro": 0.05}


def whole(loss: str, items: Sequence[Judged], of: list[list[Side]], z: Tensor) -> Tensor:
    """The step's loss without its NLL."""
    if loss in PAIRS:
        return torch.stack([PAIRS[loss](w, v) for w, v, *_ in of]).mean()
    if loss == "aot":
        up, down = (torch.stack([r(pair[k]) for pair in of]).sort().values for k in (0, 1))
        return -ls(0.1 * (up - down)).mean()
    if loss == "aot_paired":
        ours = torch.stack([w.L - v.L for w, v in of]).sort().values
        theirs = torch.stack([w.R - v.R for w, v in of]).sort().values
        return -ls(0.1 * (ours - theirs)).mean()
    if OBJECTIVES[loss].of == "lists":
        rewards_PK = torch.tensor([item.rewards for item in items], dtype=torch.float64)
        if loss == "lipo":
            return listwise.lipo(torch.stack([torch.stack([0.05 * r(a) for a in k]) for k in of]), rewards_PK).mean()
        means_PK = torch.stack([torch.stack([a.L / a.n for a in k]) for k in of])
        return {"rrhf": listwise.rrhf, "pro": listwise.pro}[loss](means_PK, rewards_PK).mean()
    signs = [1 if item.rewards[0] else -1 for item in items]
    ratios = [r(a) for (a,) in of]
    terms = {
        "kto": lambda x, sign: 1 - s(sign * 0.1 * (x - z)),
        "apo_zero_unpaired": lambda x, sign: s(-sign * 0.1 * x),
        "bco_unpaired": lambda x, sign: -ls(sign * 0.01 * (x - torch.stack(ratios).mean().detach())),
    }
    return torch.stack([terms[loss](x, sign) for x, sign in zip(ratios, signs, strict=True)]).mean()


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_a_step_is_the_formula_of_its_loss(tmp_path, loss):
    """Value and gradient of the first step, cut into passes, against all answers one by one."""
    policy, reference, method, stage = made(loss, tmp_path, tokens_per_forward=30)
    batch = method.batch(0)
    assert len(split(batch.rows, batch.units, 30)) > 2
    found, ours = gradient(policy, method, batch, stage)

    of, z = sides(policy, reference, method.now), torch.tensor(0.0)
    if loss == "kto":
        others = sides(policy, reference, [dataclasses.replace(i, rows=(i.mismatched,)) for i in method.now])
        z = torch.stack([r(a) for (a,) in others]).mean().clamp(min=0).detach()
    expected = whole(loss, method.now, of, z)
    if loss in NLL:
        best = [group[-1 if loss == "tpo" else 0] for group in of]
        expected = expected - NLL[loss] * torch.stack([a.L for a in best]).sum() / sum(a.n for a in best)
    expected.backward()
    theirs = {name: p.grad for name, p in policy.parameters().items() if p.grad is not None}
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-9)
    scale = max(g.abs().max().item() for g in theirs.values())
    assert scale > 0
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6 * scale)  # norms are float32


def shaped(policy: Policy, reference: Policy, item: Judged, alpha: float) -> list[Tensor]:
    """Of a pair the log-ratios with the tokens beyond the shorter side weighed by `alpha`."""
    short = min(len(row.completion) for row in item.rows)

    def total(model: Policy, row: Any) -> Tensor:
        logps = plain_logps(model, row.context, row.completion)
        return logps[:short].sum() + alpha * logps[short:].sum()

    with torch.no_grad():
        references = [total(reference, row) for row in item.rows]
    return [total(policy, row) - other for row, other in zip(item.rows, references, strict=True)]


def test_surplus_length_counts_less_in_policy_and_reference(tmp_path):
    policy, reference, method, stage = made("dpo", tmp_path, length_alpha=0.3)
    found, _ = gradient(policy, method, method.batch(0), stage)
    pairs = [shaped(policy, reference, item, 0.3) for item in method.now]
    assert any(len({len(row.completion) for row in item.rows}) > 1 for item in method.now)
    assert found["loss"] == pytest.approx(-sum(ls(0.1 * (w - v)).item() for w, v in pairs) / 6, rel=1e-9)
    everything = [shaped(policy, reference, item, 1.0) for item in method.now]
    assert found["loss"] != pytest.approx(-sum(ls(0.1 * (w - v)).item() for w, v in everything) / 6, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "g"),
    [
        ({"divergence": "forward_kl"}, lambda x: 1 - torch.exp(-x)),
        ({"divergence": "js"}, lambda x: math.log(2) + ls(x)),
        ({"divergence": "alpha", "alpha": 0.3}, lambda x: (torch.exp(-0.7 * x) - 1) / -0.7),
    ],
    ids=["forward_kl", "js", "alpha"],
)
@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_scores_come_from_the_divergence_that_is_asked_for(tmp_path, loss, settings, g):
    """Of the whole answer's log-ratio; a mean is taken of what comes out."""
    policy, reference, method, stage = made(loss, tmp_path, **settings)
    found, _ = gradient(policy, method, method.batch(0), stage)
    of = sides(policy, reference, method.now)
    if loss == "dpo":
        expected = [-ls(0.1 * (g(r(w)) - g(r(v)))) for w, v in of]
    else:
        expected = [(g(r(w)) / w.n - g(r(v)) / v.n - 5) ** 2 for w, v in of]
    assert found["loss"] == pytest.approx(sum(x.item() for x in expected) / 6, rel=1e-9)


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_pairs_are_weighed_by_how_likely_the_policy_is_to_write_them(tmp_path, loss):
    """e to the mean of log p - log sum p^2 over the tokens of each side; the gradient does not go through it."""
    policy, reference, method, stage = made(loss, tmp_path, weighting=True)
    found, ours = gradient(policy, method, method.batch(0), stage)
    expected = torch.tensor(0.0, dtype=torch.float64)
    for item, (w, v) in zip(method.now, sides(policy, reference, method.now), strict=True):
        weight = 1.0
        for row in item.rows:
            ids = torch.tensor([[*row.context, *row.completion]])
            logps_TV = policy.model(ids).logits[0, len(row.context) - 1 : -1].log_softmax(-1).detach()
            own_T = logps_TV.gather(1, torch.tensor(row.completion)[:, None]).squeeze(1)
            weight *= torch.exp((own_T - (2 * logps_TV).logsumexp(1)).mean()).item()
        expected = expected + weight * PAIRS[loss](w, v) / 6
    expected.backward()
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-6)
    for name, p in policy.parameters().items():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-7)


def test_label_smoothing_and_the_nll_term_add_what_they_say(tmp_path):
    policy, reference, method, stage = made("cpo", tmp_path, label_smoothing=0.2, nll_weight=0.3)
    found, _ = gradient(policy, method, method.batch(0), stage)
    of = sides(policy, reference, method.now)
    losses = [-0.8 * ls(0.1 * (w.L - v.L)) - 0.2 * ls(-0.1 * (w.L - v.L)) for w, v in of]
    nll = -sum(w.L.item() for w, _ in of) / sum(w.n for w, _ in of)
    assert found["loss"] == pytest.approx(sum(x.item() for x in losses) / 6 + 0.3 * nll, rel=1e-9)


def test_every_loss_has_its_function():
    assert set(FUNCTIONS) == set(get_args(Loss))


# However the step is cut, whatever its order

CASES: list[tuple[str, dict[str, Any]]] = [
    *((loss, {}) for loss in ("ipo", "aot", "aot_paired", "kto", "bco_unpaired", "orpo", "lipo")),
    ("dpo", {"length_alpha": 0.4, "divergence": "js", "nll_weight": 0.2}),
    ("simpo", {"weighting": True}),
]


@pytest.mark.parametrize(("loss", "settings"), CASES, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_neither_cutting_nor_order_changes_the_gradient(tmp_path, loss, settings):
    results = []
    for budget, order in ((100_000, range(6)), (16, range(6)), (70, (3, 5, 0, 4, 1, 2))):
        policy, _, method, stage = made(loss, tmp_path, tokens_per_forward=budget, **settings)
        drawn = method.order[:6]
        method.order[:6] = [drawn[i % len(drawn)] for i in order]
        batch = method.batch(0)
        results.append((len(split(batch.rows, batch.units, budget)), *gradient(policy, method, batch, stage)))
    (one, found, gradients), *others = results
    assert one == 1
    assert others[0][0] >= 4
    for _, other_found, other_gradients in others:
        same_gradient(gradients, other_gradients, **TIGHT)
        assert other_found == pytest.approx(found, rel=1e-8, abs=1e-9)


def test_bco_shifts_by_the_mean_of_all_it_has_seen():
    policy, stage = policy64(), stage_of("bco_unpaired", batch_size=2, steps=3, beta=0.5)
    method = preference(policy, stage)
    moved(policy, 0.05, seed=2)
    reference, seen = policy64(), []
    for step in range(3):
        method.batch(step)
        seen += [0.5 * r(a).item() for (a,) in sides(policy, reference, method.now)]
        (shift,) = method.whole
        assert shift.item() == pytest.approx(sum(seen) / len(seen))
        again = method.batch(step)  # asked twice, it counts once
        assert method.whole[0].item() == pytest.approx(shift.item())
        assert again.rows == tuple(item.rows[0] for item in method.now)
    other = preference(policy64(), stage)
    other.restore({}, json.loads(json.dumps(method.state()[1])))
    assert other.means == method.means


# Where the answers come from, and the reference


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_two_steps_train(tmp_path, loss):
    """The whole loop, its check of the first step included; what is kept is read back."""
    policy = tiny_policy()
    before = policy.snapshot()
    stage = stage_of(loss, batch_size=2)
    train(policy, preference(policy, stage, tmp_path), stage, tmp_path, SEED)
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert any("chosen_logp" in row for row in rows)
    assert any(not torch.equal(before[name], p) for name, p in policy.parameters().items())


def test_a_loss_without_a_reference_asks_none(tmp_path):
    stage, data = stage_of("simpo"), prepared(paired())
    judged = judged_from_data(policy64(), stage, data, SEED)
    nobody: Any = None
    assert referred(nobody, stage, judged) == (judged, {})
    assert all(item.reference == () for item in judged[0])


def test_a_second_model_is_the_reference_and_its_digest_is_told(tmp_path):
    other = tiny_policy(seed=5)
    other.save(tmp_path / "other")
    policy, stage = tiny_policy(), stage_of("dpo", reference={"source": str(tmp_path / "other")})
    judged, facts = referred(policy, stage, judged_from_data(policy, stage, prepared(paired()), SEED))
    assert facts == {"reference": other.digest()}
    for item in judged[0]:
        expected = [plain_logps(other, row.context, row.completion).sum().item() for row in item.rows]
        assert item.reference == pytest.approx(expected, abs=1e-4)
    method = PreferenceMethod(stage, prepared(paired()), SEED, judged, policy)
    found, _ = gradient(policy, method, method.batch(0), stage)
    assert abs(found["margin"]) > 1e-3


def test_a_reference_that_reads_other_tokens_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["zebra"])
    dataclasses.replace(tiny_policy(), tokenizer=tokenizer).save(tmp_path / "other")
    policy, stage = tiny_policy(), stage_of("dpo", reference={"source": str(tmp_path / "other")})
    judged = judged_from_data(policy, stage, prepared(paired()), SEED)
    with pytest.raises(UserError, match=r"not the policy's vocabulary.*1 are not the same \('zebra' is nothing here"):
        referred(policy, stage, judged)
    with pytest.raises(UserError, match="not the policy's vocabulary"):  # told before anything slow, from its outline
        second_model(policy, stage, outline)


def test_kto_reads_each_prompt_with_the_answer_to_another_one():
    policy, stage = tiny_policy(max_position_embeddings=40), stage_of("kto")
    (items,) = judged_from_data(policy, stage, prepared(labelled()), SEED)
    rows = {item.rows[0].context: item.rows[0] for item in items}
    for item in items:
        (row,), other = item.rows, item.mismatched
        assert other is not None
        assert other.context == row.context
        room = 40 - len(row.context)
        source = [r for r in rows.values() if r.completion[:room] == other.completion and r.context != row.context]
        assert len(source) == 1
        assert other.target == source[0].target[:room]
    assert len({item.mismatched.completion for item in items if item.mismatched}) == 6
    assert any(len(item.mismatched.completion) == 40 - len(item.rows[0].context) for item in items if item.mismatched)


def test_kto_begins_where_the_reference_point_is_zero(tmp_path):
    """At the reference every log-ratio is 0, so is z, and each term is its weight times 1/2."""
    policy = policy64()
    stage = stage_of("kto", desirable_weight=2.0, undesirable_weight=0.5)
    method = preference(policy, stage)
    found, _ = gradient(policy, method, method.batch(0), stage)
    good = sum(item.rewards[0] for item in method.now)
    assert method.whole[0].item() == pytest.approx(0, abs=1e-9)
    assert found["loss"] == pytest.approx((2.0 * good + 0.5 * (6 - good)) / 2 / 6)


@pytest.mark.parametrize("good", [True, False])
@pytest.mark.parametrize("loss", [loss for loss, objective in OBJECTIVES.items() if objective.of == "answers"])
def test_answers_of_one_label_are_refused(loss, good):
    """Where the data hold no others, and where the steps come to no others."""
    rows = [e for e in labelled() if e.label is good]
    told = rf"loss {loss} learns what tells.*of {len(rows)} to learn from {len(rows) * good} are labelled good"
    with pytest.raises(UserError, match=told):
        judged_from_data(tiny_policy(), stage_of(loss), prepared(rows), SEED)
    few = prepared(rows, [e for e in labelled() if e.label is not good])._replace(weights=(1.0, 1e-9))
    with pytest.raises(UserError, match="or more steps"):
        judged_from_data(tiny_policy(), stage_of(loss, steps=1, batch_size=2), few, SEED)


def test_lists_hold_every_answer_the_best_first_and_can_be_kept(tmp_path):
    policy, stage = tiny_policy(), stage_of("lipo")

    def some(example: Example, text: str) -> Score:
        return Score(None, "error") if len(text) % 4 == 3 else lengths(example, text)

    sampler, data = LocalSampler(policy, RENDERER), prepared(asked())
    judged, _, facts = judged_on_policy(policy, stage, data, sampler, scorer(some), SEED)
    judged, _ = referred(policy, stage, judged)
    assert facts["lists"] == len(judged[0]) > 0
    assert any(math.isnan(reward) for item in judged[0] for reward in item.rewards)
    for item in judged[0]:
        known = [reward for reward in item.rewards if not math.isnan(reward)]
        assert len(item.rows) == len(item.rewards) == len(item.reference) == 4
        assert known == sorted(known, reverse=True)
        assert known == list(item.rewards[: len(known)])
        assert known[0] > known[-1]
    write_judged(tmp_path / "judged.jsonl", judged)
    again = read_judged(tmp_path / "judged.jsonl", 1)
    assert [str(item) for item in again[0]] == [str(item) for item in judged[0]]  # NaN is not itself


def test_rewards_that_lipo_cannot_weigh_pairs_by_are_refused():
    """2 to the number of a reward model is no gain."""
    policy, stage = tiny_policy(), stage_of("lipo")

    def wide(example: Example, text: str) -> Score:
        return Score(30.0 * lengths(example, text).value, "correct")

    with pytest.raises(UserError, match=r"stage 'toy': loss lipo .* must lie between 0 and 1, and one is"):
        judged_on_policy(policy, stage, prepared(asked()), LocalSampler(policy, RENDERER), scorer(wide), SEED)


@pytest.mark.parametrize("loss", ["kto", "dpo"])
def test_what_is_kept_is_what_is_read(tmp_path, loss):
    policy, stage = tiny_policy(), stage_of(loss)
    data = prepared(labelled() if loss == "kto" else paired())
    judged, _ = referred(policy, stage, judged_from_data(policy, stage, data, SEED))
    write_judged(tmp_path / "judged.jsonl", judged)
    assert read_judged(tmp_path / "judged.jsonl", 1) == judged


# Data that does not fit


@pytest.mark.parametrize(
    ("loss", "row", "why"),
    [
        ("kto", {"prompt": "Hi", "chosen": "a", "rejected": "b"}, "it bears no label that says whether"),
        ("kto", {"prompt": "Hi", "completion": "a"}, "it bears no label that says whether"),
        ("dpo", {"prompt": "Hi", "completion": "a", "label": True}, "it holds no pair of a better and a worse answer"),
        ("dpo", {"prompt": "Hi", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
    ],
)
def test_rows_of_the_other_kind_are_refused_with_their_line(tmp_path, loss, row, why):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    stage = stage_of(loss, data={"sources": [{"source": str(path)}]})
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: {why}"):
        prepare(stage.data, Renderer(tiny_tokenizer()), need=need(stage))


def test_labelled_rows_keep_good_and_bad_answers(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Hi {i}", "completion": "a", "label": i % 2 == 0} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = stage_of("kto", data={"sources": [{"source": str(path)}]})
    data = prepare(stage.data, Renderer(tiny_tokenizer()), need=need(stage))
    (items,) = judged_from_data(tiny_policy(), stage, data, SEED)
    assert [item.rewards for item in items] == [(1.0,), (0.0,), (1.0,), (0.0,)]
    assert [item.sample["outcome"] for item in items] == ["good", "bad", "good", "bad"]
    path.write_text("".join(json.dumps(row | {"label": True}) + "\n" for row in rows))
    with pytest.raises(UserError, match="of 4 to learn from 4 are labelled good and 0 bad"):  # told by a dry run, too
        stage_data(stage, tiny_policy(), frozenset())


# What is watched


def test_unpaired_metrics_are_means_over_the_good_and_the_bad_answers(tmp_path):
    policy, reference, method, stage = made("kto", tmp_path, tokens_per_forward=30)
    found, _ = gradient(policy, method, method.batch(0), stage)
    of = [a for (a,) in sides(policy, reference, method.now)]
    groups = {
        name: [a for a, item in zip(of, method.now, strict=True) if bool(item.rewards[0]) == good]
        for name, good in (("chosen", True), ("rejected", False))
    }
    for name, group in groups.items():
        assert found[f"{name}_logp"] == pytest.approx(sum(a.L.item() for a in group) / len(group))
    means = [sum(r(a).item() for a in group) / len(group) for group in groups.values()]
    assert found["margin"] == pytest.approx(0.1 * (means[0] - means[1]))


def test_a_falling_chosen_probability_is_an_alarm():
    falling = [{"step": i, "chosen_logp": -10.0 - i / 2} for i in range(10)]
    (row,) = watch_stage("a", "preference", falling)
    assert (row["name"], row["level"]) == ("chosen log-probability", "warn")
    assert row["value"] == pytest.approx(-4.0)
    (row,) = watch_stage("a", "preference", falling[::-1])
    assert row["level"] == "ok"
    assert watch_stage("a", "preference", [{"step": 0, "rejected_logp": -3.0}]) == []
