"""The Python door: light to open, and each object the composition it says it is."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
import torch
from tiny import tiny_policy

import posttrain as pt
from posttrain.data.chat import Renderer
from posttrain.data.prepare import prompt_key
from posttrain.forest import token_logprobs
from posttrain.models import policy as models
from posttrain.recipe.blocks import Sampling
from posttrain.sampling.local import LocalSampler

TASK = "reasoning_gym/chain_sum"
SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


@pytest.fixture
def policy() -> pt.Policy:
    return pt.Policy.of(tiny_policy(), seed=3)


# The package


def test_opening_it_is_light():
    heavy = ("torch", "transformers", "numpy", "pydantic")
    check = f"import posttrain as pt, sys; dir(pt); pt.UserError; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_type_checkers_see_the_names_there_are(repo_root):
    tree = ast.parse((repo_root / "src" / "posttrain" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == {**pt.NAMES, **dict.fromkeys(pt.ROOMS, "posttrain")}
    assert dir(pt) == sorted([*seen, "__version__"])
    assert all(getattr(pt, name) is not None for name in dir(pt))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'sampel'"):
        pt.sampel  # noqa: B018


# The loop of the design, on a tiny model


def test_the_loop_reads_as_designed(policy):
    task = pt.task(TASK, seed=1)
    opt = pt.AdamW(policy, lr=1e-3)
    before = policy.digest()
    for prompts in task.batches(2, steps=2):
        rollouts = policy.sample(prompts, n=3, temperature=1.0, max_new_tokens=8)
        scores = [pt.Score(float(len(set(r.text))), "wrong") for r in rollouts]
        batch = pt.credit.grpo(rollouts, scores)
        logps_T = policy.logprobs(batch)
        loss_T = pt.losses.policy_gradient(
            logps_T, batch.behaviour_logps_T, batch.weights_T, batch.target_T, batch.sequence_T
        )
        assert opt.step(pt.losses.reduce(loss_T, batch)) > 0
        assert {r.weights for r in rollouts} == {before}
        assert (before := policy.digest()) != rollouts[0].weights


# Policy


def test_it_is_the_same_model_not_a_copy():
    inner = tiny_policy(adapter=pt.Lora(r=2))
    policy = pt.Policy.of(inner)
    assert policy.model is inner.model
    assert policy.parameters().keys() == inner.parameters().keys()
    assert policy.digest() == inner.digest()


def test_what_was_saved_is_loaded(tmp_path, policy):
    artifact = policy.save(tmp_path / "out")
    again = pt.load(str(tmp_path / "out"), seed=5)
    assert isinstance(again, pt.Policy)
    assert (again.digest(), again.seed) == (artifact.digest, 5)


def test_a_string_is_what_a_user_says(policy):
    said = pt.Example("x", ({"role": "user", "content": "What is 1 + 1?"},))
    (a,), (b,) = (policy.sample([p], max_new_tokens=6, seed=0) for p in ("What is 1 + 1?", said))
    assert (a.prompt_ids, a.ids, a.logps) == (b.prompt_ids, b.ids, b.logps)


def test_sampling_is_the_samplers(policy):
    prompts = pt.task(TASK).examples(3)
    settings = {"temperature": 0.7, "top_p": 0.9, "top_k": 30, "min_p": 0.01, "max_new_tokens": 7, "stop": ("e",)}
    ours = policy.sample(prompts, n=2, seed=11, **settings)
    theirs, _ = LocalSampler(policy, Renderer(policy.tokenizer))(prompts, 2, Sampling(**settings), 11)
    assert ours == theirs


def test_calls_draw_afresh_and_programs_alike():
    first, second = pt.Policy.of(tiny_policy(), seed=3), pt.Policy.of(tiny_policy(), seed=3)
    calls = [[p.sample(["a"], max_new_tokens=8) for _ in range(2)] for p in (first, second)]
    assert calls[0] == calls[1]
    assert calls[0][0] != calls[0][1]
    assert calls[0][0] != pt.Policy.of(tiny_policy(), seed=4).sample(["a"], max_new_tokens=8)


@pytest.mark.parametrize(("setting", "value"), [("temperature", -1.0), ("top_p", 0.0), ("max_new_tokens", 0)])
def test_a_setting_out_of_range_is_named(policy, setting, value):
    with pytest.raises(pt.UserError, match=rf"{setting}: .* \(given: {value}\)"):
        policy.sample(["a"], **{setting: value})


def test_nothing_to_sample_or_to_train_on_is_said(policy):
    for prompts, n in (([], 1), (["a"], 0)):
        with pytest.raises(pt.UserError, match="both must be at least 1"):
            policy.sample(prompts, n=n)
    with pytest.raises(pt.UserError, match="size 0 and 3 steps"):
        next(pt.task(TASK).batches(0, steps=3))


def test_a_batch_of_examples_trains_on_their_answers(policy):
    examples = pt.task(TASK, seed=1).examples(4)
    batch = policy.batch(examples)
    renderer = Renderer(policy.tokenizer)
    learned = [row for e in examples for row in renderer.render(e)]
    for (start, stop), row in zip(batch.spans, learned, strict=True):
        assert tuple(batch.ids_T[start:stop].tolist()) == row.completion_ids
        assert tuple(batch.target_T[start:stop].tolist()) == row.completion_target
    assert batch.counts.tokens == int(batch.target_T.sum()) == sum(sum(row.completion_target) for row in learned)
    assert batch.counts.sequences == 4
    logps_T = policy.logprobs(batch, temperature=0.5)
    torch.testing.assert_close(logps_T, token_logprobs(policy.model, batch, 0.5), rtol=0, atol=0)
    loss = pt.losses.reduce(pt.losses.nll(logps_T), batch)
    torch.testing.assert_close(loss, -logps_T.sum() / batch.counts.tokens)


def test_an_example_that_cannot_be_learned_is_named(policy):
    (good,) = pt.task(TASK).examples(1)
    with pytest.raises(pt.UserError, match=r"^rows:7: there is no completion"):
        policy.batch([good, pt.Example("rows:7", good.prompt)])
    long = pt.Example("rows:8", good.prompt, ({"role": "assistant", "content": "qx" * 300},))
    with pytest.raises(pt.UserError, match=r"^rows:8: \d+ tokens, and the model's context is 256"):
        policy.batch([long])


# Task


def test_a_task_is_the_same_for_the_same_seed():
    assert pt.task(TASK, seed=1).examples(5) == pt.task(TASK, seed=1).examples(9)[:5]
    assert pt.task(TASK, seed=1).examples(5) != pt.task(TASK, seed=2).examples(5)


def test_batches_go_through_the_items_in_order():
    task = pt.task(TASK, seed=1)
    assert [e for batch in task.batches(3, steps=4) for e in batch] == task.examples(12)


def test_what_is_held_out_is_never_in_a_batch():
    task = pt.task(TASK, seed=1, **SMALL)
    test = pt.task(TASK, seed=2, **SMALL).examples(60)
    keys = {prompt_key(e) for e in test}
    assert any(prompt_key(e) in keys for e in task.examples(60))
    batches = list(task.batches(10, steps=6, held_out=test))
    assert [len(batch) for batch in batches] == [10] * 6
    assert not any(prompt_key(e) in keys for batch in batches for e in batch)
    with pytest.raises(pt.UserError, match="every item is among those held out"):
        next(task.batches(10, steps=6, held_out=task.examples(60)))


def test_gold_answers_score_one_and_others_none(policy):
    task = pt.task(TASK, seed=1)
    examples = task.examples(2)
    rollouts = [pt.Rollout(e, 0, (1,), (2,), (0.0,), text, "stop", "") for e in examples for text in (e.answer, "a")]
    assert [(s.value, s.outcome) for s in task.score(rollouts)] == [(1.0, "correct"), (0.0, "unparsed")] * 2


def test_accuracy_counts_greedy_answers(policy, monkeypatch):
    """Answers given for the model: every other one is the gold."""
    task = pt.task(TASK, seed=1)
    asked = {}

    def sample(self, prompts, **settings):
        asked.update(settings)
        texts = [e.answer if i % 2 else "no" for i, e in enumerate(prompts)]
        return [
            pt.Rollout(e, i, (1,), (2,), (0.0,), t, "stop", "")
            for i, (e, t) in enumerate(zip(prompts, texts, strict=True))
        ]

    monkeypatch.setattr(pt.Policy, "sample", sample)
    assert task.accuracy(policy, task.examples(6)) == 0.5
    assert asked["temperature"] == 0


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("chain_sum", {}, r"chain_sum: no task; write reasoning_gym/NAME"),
        ("reasoning_gym/chain_sun", {}, "did you mean chain_sum"),
        (TASK, {"min_term": 2}, "no key 'min_term'; did you mean min_terms"),
        (TASK, {"min_terms": 5, "max_terms": 2}, "refused"),
    ],
)
def test_a_wrong_task_is_refused_at_once(name, config, message):
    with pytest.raises(pt.UserError, match=message):
        pt.task(name, **config)


# Optimiser


def test_a_step_is_adamws_on_the_clipped_gradient(policy):
    """Adam's first step moves each weight by lr g / (|g| + eps), g the clipped gradient."""
    opt = pt.AdamW(policy, lr=0.01, max_grad_norm=0.5, eps=1e-3)
    batch = policy.batch(pt.task(TASK).examples(2))

    def loss() -> torch.Tensor:
        return pt.losses.reduce(pt.losses.nll(policy.logprobs(batch)), batch)

    before = policy.snapshot()
    gradients = dict(zip(before, torch.autograd.grad(loss(), list(policy.parameters().values())), strict=True))
    norm = torch.stack([g.norm() for g in gradients.values()]).norm().item()
    assert norm > 0.5
    assert opt.step(loss()) == pytest.approx(norm, rel=1e-5)
    for name, weight in policy.parameters().items():
        clipped = gradients[name] * 0.5 / norm
        torch.testing.assert_close(weight, before[name] - 0.01 * clipped / (clipped.abs() + 1e-3), rtol=1e-4, atol=1e-6)
        assert weight.grad is None


def test_a_loss_that_is_not_finite_takes_no_step(policy):
    opt = pt.AdamW(policy, lr=0.01)
    before = policy.digest()
    weight = next(iter(policy.parameters().values()))
    with pytest.raises(pt.Failure, match=r"loss nan, gradient norm nan: no step was taken"):
        opt.step(weight.sum() * float("nan"))
    assert policy.digest() == before
    assert weight.grad is None
    opt.step(weight.sum())
    assert policy.digest() != before


def test_settings_of_the_optimiser_are_checked(policy):
    with pytest.raises(pt.UserError, match=r"lr: .* \(given: -1\)"):
        pt.AdamW(policy, lr=-1)
    with pytest.raises(pt.UserError, match=r"weight_decy: .* not permitted"):
        pt.AdamW(policy, lr=1e-3, weight_decy=0.1)


# Scripts


def test_arguments_are_read_as_what_their_defaults_are(monkeypatch):
    got = {}

    def main(steps: int = 3, lr: float = 0.1, model: str = "a") -> None:
        got.update(steps=steps, lr=lr, model=model)

    monkeypatch.setattr(sys, "argv", ["x.py", "lr=1e-4", "model=b=c"])
    pt.script(main)
    assert got == {"steps": 3, "lr": 1e-4, "model": "b=c"}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("steps", "steps: not an argument; there are, with their defaults: steps=3"),
        ("step=4", "step=4: not an argument; there are, with their defaults: steps=3"),
        ("steps=4.5", "steps=4.5: steps is of type int, such as 3"),
        ("steps=0", "nothing to do"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argument, message, monkeypatch, capsys):
    def main(steps: int = 3) -> None:
        if not steps:
            raise pt.UserError("nothing to do")

    monkeypatch.setattr(sys, "argv", ["x.py", argument])
    with pytest.raises(SystemExit) as stopped:
        pt.script(main)
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", message + "\n")


def test_the_door_policy_serves_the_rooms(policy):
    assert isinstance(policy, models.Policy)
    with policy.swapped({name: torch.zeros_like(p) for name, p in policy.parameters().items()}):
        flat_T = policy.logprobs(policy.batch(pt.task(TASK).examples(1)))
    assert flat_T[flat_T != 0].exp().mul(320).tolist() == pytest.approx([1.0] * int((flat_T != 0).sum()), rel=1e-4)
