"""Scores by a reward model, by steps and by log-ratios: the numbers of plain Transformers, and what has none."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from scoring import END, TEXTS, Scripted, answers, plain, question, saved, shaken
from tiny import CHATML, tiny_policy, tiny_tokenizer
from tiny_runs import RENDERER
from tokenizers import Tokenizer

from posttrain.cli import main
from posttrain.data.chat import Renderer
from posttrain.data.steps import step_ends
from posttrain.models.policy import Policy
from posttrain.models.reward import load_reward_model
from posttrain.recipe.blocks import Lora, Sampling
from posttrain.recipe.rewards import ImplicitReward, JudgeReward, ModelReward, ProcessReward
from posttrain.records import Rollout, Score, UserError
from posttrain.rewards.implicit import implicit_scorer
from posttrain.rewards.learned import check, learned
from posttrain.rewards.model import model_scorer
from posttrain.rewards.outrank import PLEAS, said
from posttrain.rewards.process import AGGREGATES, label_steps, process_scorer


def values(scores: list[Score]) -> list[float]:
    assert all(score.value is not None for score in scores), scores
    return [float(score.value or 0) for score in scores]


def other_tokens() -> Any:
    """The tiny tokenizer with the ids of two letters swapped."""
    tokenizer = tiny_tokenizer()
    form = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = form["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    names = {f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "pad", "unk")}
    return type(tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(form)), chat_template=CHATML, **names)


# A reward model


@pytest.mark.parametrize("adapter", [None, Lora(r=4)], ids=["full", "lora"])
def test_a_reward_is_the_number_at_the_end_of_the_answer(tmp_path: Path, adapter: Lora | None) -> None:
    saved(tmp_path, adapter)
    number, rollouts = plain(tmp_path), answers()
    found = values(model_scorer(load_reward_model(str(tmp_path / "reward")), RENDERER)(rollouts))
    assert found == pytest.approx([number([*r.prompt_ids, *r.ids]) for r in rollouts], abs=1e-5)
    scores = model_scorer(load_reward_model(str(tmp_path / "reward")), RENDERER)(rollouts)
    assert [score.outcome for score in scores] == ["correct" if value > 0 else "wrong" for value in found]


def test_passes_do_not_change_it(tmp_path: Path) -> None:
    model = saved(tmp_path)
    rollouts = [*answers(), *answers(example=question("What is 12 and 30?"))]
    whole = values(model_scorer(model, RENDERER)(rollouts))
    assert values(model_scorer(model, RENDERER, tokens=1)(rollouts)) == pytest.approx(whole, abs=1e-5)
    assert values(model_scorer(model, RENDERER)(rollouts[::-1])) == pytest.approx(whole[::-1], abs=1e-5)
    assert model_scorer(model, RENDERER)([]) == []


def test_an_answer_that_was_cut_off_is_read_at_an_end_of_turn(tmp_path: Path) -> None:
    model, (rollout,) = saved(tmp_path), answers("Yes")
    cut = replace(rollout, ids=rollout.ids[:-1], finish="length")
    assert rollout.ids[-1] == END
    assert values(model_scorer(model, RENDERER)([cut])) == values(model_scorer(model, RENDERER)([rollout]))


def test_another_tokenizer_is_given_the_text(tmp_path: Path) -> None:
    model = saved(tmp_path)
    other = Policy(model.model, other_tokens(), "other", "d")
    texts = ("a b", "Yes", "b c")
    with pytest.warns(UserWarning, match="other has other tokens: answers are rendered for it again"):
        scorer = model_scorer(other, RENDERER)
    renderer = Renderer(other.tokenizer)
    own = [said(question(), text, renderer) for text in texts]
    assert own[0].ids != answers(texts[0])[0].ids
    assert values(scorer(answers(*texts))) == pytest.approx(values(model_scorer(other, renderer)(own)), abs=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model_scorer(model, RENDERER)


def test_another_tokenizer_without_a_template_is_refused(tmp_path: Path) -> None:
    model, tokenizer = saved(tmp_path), other_tokens()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="another tokenizer than the model that answers, and no chat template"):
        model_scorer(Policy(model.model, tokenizer, "other", "d"), RENDERER)


def test_what_is_too_long_is_unscored_with_its_cause_and_the_rest_scored(tmp_path: Path) -> None:
    model = saved(tmp_path)
    long = replace(answers("Yes")[0], ids=(5,) * 300)
    first, second, third = model_scorer(model, RENDERER)([answers("Yes")[0], long, answers("No")[0]])
    assert (second.value, second.outcome) == (None, "error")
    assert "q:Is it far?: " in second.why
    assert "the scoring model's context is 256" in second.why
    alone = values(model_scorer(model, RENDERER)(answers("Yes", "No")))
    assert values([first, third]) == pytest.approx(alone, abs=1e-5)


# A process reward model


def test_aggregates() -> None:
    found = {name: of([0.5, 0.25, 1.0]) for name, of in AGGREGATES.items()}
    assert found == {"min": 0.25, "product": 0.125, "last": 1.0, "mean": pytest.approx(1.75 / 3)}


@pytest.mark.parametrize("aggregate", list(AGGREGATES))
def test_steps_have_the_chances_of_the_sequences_that_end_with_them(tmp_path: Path, aggregate: Any) -> None:
    saved(tmp_path, Lora(r=4))
    number, rollouts = plain(tmp_path), answers("one\ntwo is two\n\nand three", "Yes")
    scores = process_scorer(load_reward_model(str(tmp_path / "reward")), RENDERER, aggregate=aggregate)(rollouts)
    for rollout, score in zip(rollouts, scores, strict=True):
        ends = step_ends(rollout.ids, RENDERER.decode)
        odds = [number([*rollout.prompt_ids, *rollout.ids[: end + 1]]) for end in ends]
        chances = [1 / (1 + math.exp(-x)) for x in odds]
        assert score.value == pytest.approx(AGGREGATES[aggregate](chances), abs=1e-5)
        assert [float(x) for x in score.why.removeprefix("steps: ").split()] == pytest.approx(chances, abs=1e-3)
    assert len(step_ends(rollouts[0].ids, RENDERER.decode)) == 3


def test_a_blank_answer_is_worth_nothing_and_not_the_empty_product(tmp_path: Path) -> None:
    (score,) = process_scorer(saved(tmp_path), RENDERER, aggregate="product")(answers("\n \n"))
    assert (score.value, score.outcome) == (0.0, "unparsed")


def verified(rollouts: Any) -> list[Score]:
    """Right is what ends with 42; `?` cannot be scored."""
    told = []
    for r in rollouts:
        if r.text.endswith("?"):
            told.append(Score(None, "error", why="?"))
        else:
            told.append(Score(1.0, "correct") if r.text.endswith("42") else Score(0.0, "wrong"))
    return told


@pytest.mark.parametrize(("hard", "labels"), [(False, (0.5, 0.75, 1.0)), (True, (1.0, 1.0, 1.0))])
def test_labels_are_the_share_of_rollouts_that_come_right(hard: bool, labels: tuple[float, ...]) -> None:
    """Of the first step two completions of four come right, of the second three, and the solution itself is right."""
    (solution,) = answers("12 and 30\nis 42, so\n42")
    right = {1: 2, 2: 3}

    def line(example: Any, k: int) -> str:
        steps = RENDERER.decode(example.begun).count("\n")
        return "42" if k < right[steps] else "7"

    sampler = Scripted(line)
    found, ledger = label_steps([solution], sampler, verified, RENDERER, n=4, sampling=Sampling(), seed=0, hard=hard)
    assert [e.step_labels for e in found] == [labels]
    assert [turn["content"] for turn in found[0].completion] == ["12 and 30", "is 42, so", "42"]
    begun = [RENDERER.decode(example.begun) for example in sampler.asked]
    assert begun == ["12 and 30\n", "12 and 30\nis 42, so\n"]
    assert all(example.begun == solution.ids[: len(example.begun)] for example in sampler.asked)
    assert ledger.generated_tokens == sum(len(RENDERER.tokenizer.encode(t)) + 1 for t in ["42"] * 5 + ["7"] * 3)


def test_a_wrong_solution_and_what_cannot_be_scored() -> None:
    """Every completion of the first step cannot be scored, so it has no label; the solution is wrong, a label of 0."""
    wrong, blank = answers("12\n7", "\n")
    found, _ = label_steps(
        [blank, wrong], Scripted(lambda e, k: "what?"), verified, RENDERER, n=2, sampling=Sampling(), seed=0
    )
    assert [e.step_labels for e in found] == [(), (None, 0.0)]
    assert all(e.begun == () for e in found)


def test_a_solution_of_one_step_needs_no_rollouts() -> None:
    sampler = Scripted(lambda e, k: "42")
    found, ledger = label_steps(answers("42", "7"), sampler, verified, RENDERER, n=4, sampling=Sampling(), seed=0)
    assert [e.step_labels for e in found] == [(1.0,), (0.0,)]
    assert (sampler.asked, ledger.generated_tokens) == ([], 0)


def test_a_prompt_goes_on_from_what_is_begun() -> None:
    example = question()
    assert RENDERER.prompt_ids(replace(example, begun=(7, 8))) == (*RENDERER.prompt_ids(example), 7, 8)


# An implicit reward


def logp(policy: Policy, rollout: Rollout) -> float:
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.ids]])
    with torch.no_grad():
        logps = policy.model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
    return float(logps[-len(rollout.ids) :].sum())


def test_the_implicit_reward_is_a_scaled_log_ratio() -> None:
    policy, reference = shaken(tiny_policy()), tiny_policy()
    rollouts = answers()
    found = values(implicit_scorer(policy, reference, RENDERER, beta=0.3)(rollouts))
    assert found == pytest.approx([0.3 * (logp(policy, r) - logp(reference, r)) for r in rollouts], abs=1e-4)
    assert values(implicit_scorer(policy, policy, RENDERER, beta=0.3)(rollouts)) == [0.0] * len(TEXTS)
    kept = {"ids": rollouts[1].ids[:-1], "target": rollouts[1].target[:-1]}
    cut = replace(rollouts[1], **kept, finish="length")  # no end is made up
    [value] = values(implicit_scorer(policy, reference, RENDERER, beta=0.3)([cut]))
    assert value == pytest.approx(0.3 * (logp(policy, cut) - logp(reference, cut)), abs=1e-4)


def test_a_reference_of_another_tokenizer_is_refused() -> None:
    policy = tiny_policy()
    with pytest.raises(UserError, match="have different tokenizers"):
        implicit_scorer(policy, Policy(policy.model, other_tokens(), "other", "d"), RENDERER, beta=0.1)


# In a recipe


def test_a_recipes_blocks_become_scorers(tmp_path: Path) -> None:
    saved(tmp_path)
    base, reward = str(tmp_path / "base"), str(tmp_path / "reward")
    rollouts = answers()
    by_hand = values(model_scorer(load_reward_model(reward), RENDERER)(rollouts))
    assert values(learned(ModelReward(kind="model", source=reward), RENDERER)(rollouts)) == by_hand
    chances = learned(ProcessReward(kind="process", source=reward, aggregate="mean"), RENDERER)(rollouts)
    assert all(0 < value < 1 for value in values(chances))
    implied = learned(ImplicitReward(kind="implicit", source=base, reference=f"{base}/."), RENDERER)(rollouts)
    assert values(implied) == [0.0] * len(rollouts)
    tiny_policy(max_position_embeddings=4096).save(tmp_path / "judge")
    for compare in (False, True):
        judge = JudgeReward(
            kind="judge", source=str(tmp_path / "judge"), max_new_tokens=2, compare=compare, rubric="Be short."
        )
        scores = learned(judge, RENDERER)(answers("Yes", "No"))
        assert [(score.value, score.outcome) for score in scores] == [(None, "unparsed")] * 2


def test_a_source_without_a_head_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    saved(tmp_path)
    base, reward = str(tmp_path / "base"), str(tmp_path / "reward")
    for kind in (ModelReward(kind="model", source=base), ProcessReward(kind="process", source=base)):
        with pytest.raises(UserError, match="has no head that scores"):
            check(kind)
    check(ModelReward(kind="model", source=reward))
    check(JudgeReward(kind="judge", source=base))
    with pytest.raises(UserError, match="no such directory"):
        check(ImplicitReward(kind="implicit", source=base, reference=str(tmp_path / "nowhere")))
    other = tiny_policy()
    other.tokenizer.add_tokens(["zzz"])
    other.save(tmp_path / "other")
    with pytest.raises(UserError, match="have different tokenizers"):
        check(ImplicitReward(kind="implicit", source=base, reference=str(tmp_path / "other")))
    check(ImplicitReward(kind="implicit", source=base, reference=f"{base}/."))


# Whole runs


def ran(folder: Path, name: str, **stages: tuple[dict[str, Any], list[dict[str, Any]]]) -> int:
    """The exit code of a run of these stages, each with its rows."""
    made = []
    for id, (stage, rows) in stages.items():
        (folder / f"{id}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        made.append(
            {"id": id, "data": {"sources": [{"source": f"{id}.jsonl"}]}, "batch_size": 4, "from": "base"} | stage
        )
    recipe = {"schema": 1, "name": "x", "model": {"source": "base", "adapter": {"r": 4}}, "stages": made}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return main(["run", str(folder / f"{name}.yaml"), "--out", str(folder / name)])


def test_a_reward_model_that_is_proven_trains_a_policy_and_one_that_is_not_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = saved(tmp_path)
    with torch.no_grad():
        flat.parameters()["score.weight"].zero_()  # what says nothing is worth as much as the right answer
    flat.save(tmp_path / "flat")
    wrong = [*PLEAS.values(), "qwxz vlk", "?!", "no"]
    good = "yes, so it is"
    pairs = [{"prompt": f"{i}?", "chosen": good, "rejected": text} for i in range(4) for text in (*wrong, f"{i}?")]
    learns = {"kind": "reward_model", "steps": 30, "batch_size": 8, "holdout": 0, "optim": {"lr": 5e-3}}
    rows = [{"prompt": f"{i}?", "completion": good} for i in range(4)]

    def uses(source: str) -> dict[str, Any]:
        rewards = [{"kind": "model", "source": source}, {"kind": "length", "max_tokens": 4, "buffer": 2, "weight": 0.1}]
        sampling = {"max_new_tokens": 4}
        return {"kind": "grpo", "steps": 2, "n": 4, "batch_size": 2, "rewards": rewards, "sampling": sampling}

    assert ran(tmp_path, "both", reward=(learns, pairs), rl=(uses("stage:reward"), rows)) == 0
    steps = [json.loads(line) for line in (tmp_path / "both/stages/rl/metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(row["reward"]) and row["reward/model"] for row in steps)
    capsys.readouterr()
    for source, why in {
        "flat": "reward 'model' did not prove itself, so no model may train on it",
        "base": "is a language model, which has no head that scores",
        "stage:rl": "'rl' is no earlier stage of kind reward_model (there are: none)",
    }.items():
        assert ran(tmp_path, f"not-{source[:4]}", rl=(uses(source), rows)) == 2
        assert why in capsys.readouterr().err
