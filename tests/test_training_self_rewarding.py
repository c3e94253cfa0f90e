"""Self-rewarding: who is preferred by which grades, DPO against the first weights of a round, and rounds."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scoring import END
from test_training_methods import ADAPTERS, gradient, moved, plain_logps, policy64, same_gradient
from tiny import tiny_policy
from tiny_runs import RENDERER, SEED, SelfJudge, asked, prepared, rows_of, run, same, self_rewarding, stage_of

from posttrain.forest import hidden_states, pack, unrolled_hidden_states
from posttrain.models.policy import Policy
from posttrain.recipe.base import Misfit
from posttrain.recipe.blocks import Lora
from posttrain.records import Example, Failure, Ledger, Rollout, UserError
from posttrain.training.loop import train
from posttrain.training.self_rewarding import ADDITIVE, SelfRewardingMethod

NAME = "self_rewarding"
PLAIN = {"rounds": 1, "meta_judge": False, "length_control": 0.0, "check_first_step": False}


class Says(SelfJudge):
    """A policy whose answers and judgements are given: `answers[k]` is its k-th answer to whatever it is asked, and
    `judgements[answer]` what it says of that, in turn. Of two judgements the one with more letters is the better."""

    def __init__(self, policy: Policy, answers: Sequence[str], judgements: dict[str, Sequence[str]]) -> None:
        super().__init__(policy)
        self.answers, self.judgements = answers, judgements
        self.asked: list[Example] = []

    def __call__(self, prompts: Sequence[Example], n: int, sampling: Any, seed: int) -> tuple[list[Rollout], Ledger]:
        weights, rollouts = self.policy.digest(), []
        self.asked += prompts
        for p, example in enumerate(prompts):
            for k in range(n):
                text = self.answer(example, k)
                ids, prompt = (*RENDERER.tokenizer.encode(text), END), RENDERER.prompt_ids(example)
                rollouts.append(Rollout(example, p, prompt, ids, (-1.0,) * len(ids), text, "stop", weights))
        return rollouts, Ledger(generated_tokens=sum(len(r.ids) for r in rollouts))

    def answer(self, example: Example, k: int) -> str:
        question = str(example.prompt[-1]["content"])
        if question.startswith("Grade"):
            return self.judgements[shown(question, "answer")][k]
        if question.startswith("Say which"):
            one, other = (len(shown(question, f"answer {which}")) for which in "AB")
            return f"<better>{'A' if one > other else 'B' if one < other else 'tie'}</better>"
        return self.answers[k]


def shown(question: str, name: str) -> str:
    [text] = re.findall(rf"^<{name} \w+>\n(.*?)\n</{name} \w+>$", question, re.DOTALL | re.MULTILINE)
    return html.unescape(text)


def grades(*given: int) -> list[str]:
    return [f"<grade>{grade}</grade>" for grade in given]


ANSWERS = ("a", "b b", "c c c")
JUDGED = {"a": grades(1, 2), "b b": grades(5, 4), "c c c": ["no idea", *grades(0)]}


def of(
    tmp_path: Path, answers: Sequence[str], judgements: dict[str, Sequence[str]], prompts: int = 2, **settings: Any
) -> tuple[SelfRewardingMethod, Says]:
    policy = tiny_policy()
    says = Says(policy, answers, judgements)
    own = {**PLAIN, "prompts": prompts, "n": len(answers), "judging": {"n": len(judgements[answers[0]])}, **settings}
    return self_rewarding(policy, stage_of(NAME, **own), tmp_path, says, prepared(asked())), says


def kept(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(line: dict[str, Any]) -> tuple[str, str]:
    return line["sample"]["text"], line["sample"]["rejected"]


def test_the_best_and_the_worst_by_mean_grades_are_a_pair(tmp_path: Path) -> None:
    """Of 0 to 5: "a" has a mean of 1.5, "b b" of 4.5, and "c c c", one of whose judgements cannot be read, of 0: as
    shares of the range 0.3, 0.9 and 0. So for each of two prompts: mean reward 0.4, one judgement in six unread."""
    method, says = of(tmp_path, ANSWERS, JUDGED)
    batch = method.batch(0)
    lines = kept(tmp_path / "judged-0.jsonl")
    assert [(texts(line), line["rewards"]) for line in lines] == [(("b b", "c c c"), [0.9, 0.0])] * 2
    questions = {RENDERER.prompt_ids(example) for example in says.asked[:2]}
    assert {row.context for row in batch.rows} == questions
    assert {RENDERER.decode(row.completion) for row in batch.rows} == {"b b", "c c c"}
    assert batch.metrics["reward"] == pytest.approx(0.4)
    assert batch.metrics["unread"] == pytest.approx(1 / 6)
    assert batch.metrics["pairs"] == 2
    written = [
        sum(len(RENDERER.tokenizer.encode(text)) + 1 for text in some) * 2
        for some in (ANSWERS, [said for judgements in JUDGED.values() for said in judgements])
    ]
    assert [batch.ledger.generated_tokens, batch.ledger.reward_tokens] == written  # judgements are no answers
    for line in lines:
        sums = [plain_logps(method.policy, line["prompt_ids"], ids).sum().item() for ids, _ in line["rows"]]
        assert line["reference"] == pytest.approx(sums, abs=1e-4)


def test_the_judge_is_told_how_points_add_up(tmp_path: Path) -> None:
    method, says = of(tmp_path, ANSWERS, JUDGED, prompts=1)
    method.batch(0)
    question = str(says.asked[1].prompt[0]["content"])
    assert ADDITIVE in question
    assert "from 0, the worst, to 5, the best" in question
    assert shown(question, "answer") == "a"
    assert str(says.asked[0].prompt[-1]["content"]) in shown(question, "question")
    method, says = of(tmp_path / "own", ANSWERS, JUDGED, prompts=1, judging={"n": 2, "rubric": "Be brief."})
    method.batch(0)
    assert "Be brief." in str(says.asked[1].prompt[0]["content"])
    assert ADDITIVE not in str(says.asked[1].prompt[0]["content"])


def test_length_control_prefers_the_shorter_of_two_good_ones(tmp_path: Path) -> None:
    """Grades 4, 5, 1 and 0: a quarter of the range, 1.25, makes 4 as good as 5 and 1 as bad as 0."""
    answers = ("yes", "yes, it is so", "no, it is not so", "no")
    judged = dict(zip(answers, ([said] for said in grades(4, 5, 1, 0)), strict=True))
    of(tmp_path / "off", answers, judged, prompts=1)[0].batch(0)
    of(tmp_path / "on", answers, judged, prompts=1, length_control=0.25)[0].batch(0)
    assert texts(kept(tmp_path / "off" / "judged-0.jsonl")[0]) == ("yes, it is so", "no")
    assert texts(kept(tmp_path / "on" / "judged-0.jsonl")[0]) == ("yes", "no, it is not so")


def test_judgements_of_the_answer_they_disagree_about_are_a_pair(tmp_path: Path) -> None:
    """Grades of "b b" vary most. Its readable judgements are compared two by two in both orders; the longest wins both
    of its comparisons and the shortest none. The pair stands behind the question that asked for them."""
    about = ["so <grade>5</grade>", "so so so <grade>0</grade>", "no grade", "<grade>3</grade>"]
    judged = {"a": grades(1, 1, 2, 2), "b b": about, "c c c": grades(4, 4, 4, 5)}
    method, says = of(tmp_path, ANSWERS, judged, prompts=1, meta_judge=True)
    batch = method.batch(0)
    own, judging = kept(tmp_path / "judged-0.jsonl")
    assert texts(own) == ("c c c", "a")
    assert texts(judging) == (about[1], about[3])
    assert judging["rewards"] == [1.0, 0.0]
    question = next(e for e in says.asked if shown_answer(e) == "b b")
    assert tuple(judging["prompt_ids"]) == RENDERER.prompt_ids(question)
    compared = [e for e in says.asked if str(e.prompt[-1]["content"]).startswith("Say which")]
    assert len(compared) == 3 * 2
    assert all("no grade" not in html.unescape(str(e.prompt[-1]["content"])) for e in compared)
    told = {name: batch.metrics[name] for name in ("pairs", "judgement_pairs", "turned", "shown_first")}
    assert told == {"pairs": 1, "judgement_pairs": 1, "turned": 0.0, "shown_first": 0.5}


def shown_answer(example: Example) -> str | None:
    question = str(example.prompt[-1]["content"])
    return shown(question, "answer") if question.startswith("Grade") else None


def test_length_control_is_that_of_judgements_too(tmp_path: Path) -> None:
    """Each longer judgement beats each shorter one: shares of wins 1, 2/3, 1/3 and 0. With 0.4 the second is as good as
    the first, and shorter; the third as bad as the last, and longer."""
    about = ["dddd <grade>5</grade>", "ccc <grade>0</grade>", "bb <grade>3</grade>", "a <grade>3</grade>"]
    judged = {"a": grades(1, 1, 1, 1), "b b": about, "c c c": grades(4, 4, 4, 4)}
    of(tmp_path, ANSWERS, judged, prompts=1, meta_judge=True, length_control=0.4)[0].batch(0)
    assert texts(kept(tmp_path / "judged-0.jsonl")[1]) == (about[1], about[2])


def test_an_answer_is_not_preferred_to_itself(tmp_path: Path) -> None:
    """The judge contradicts itself over one text: the one pair there would be says nothing."""

    class Wavers(Says):
        def answer(self, example: Example, k: int) -> str:
            said = super().answer(example, k)
            if said.startswith("<grade>"):
                self.turn = getattr(self, "turn", 0) + 1
                return f"<grade>{self.turn % 6}</grade>"
            return said

    policy = tiny_policy()
    stage = stage_of(NAME, **PLAIN, n=2, judging={"n": 1})
    says = Wavers(policy, ("same", "same"), {"same": grades(0)})
    with pytest.raises(UserError, match="prefers no answer to another for any of 6 prompts"):
        self_rewarding(policy, stage, tmp_path, says).batch(0)


def test_grades_that_are_all_alike_teach_nothing_and_that_is_said(tmp_path: Path) -> None:
    method, _ = of(tmp_path, ("a", "b"), {"a": grades(3), "b": grades(3)})
    with pytest.raises(UserError, match=r"stage 'toy', round 0: the model prefers no answer to another for any of 2"):
        method.batch(0)
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_judge_is_told(tmp_path: Path) -> None:
    judged = {"a": ["well"], "b": grades(3)}
    with pytest.raises(Failure, match=r"2 of 4 answers could not be scored, more than max_unscored \(20%\) allows"):
        of(tmp_path, ("a", "b"), judged)[0].batch(0)
    method, _ = of(tmp_path, ("a", "b", "c"), {**judged, "c": grades(1)}, max_unscored=0.5)
    batch = method.batch(0)
    assert batch.metrics["unscored"] == pytest.approx(1 / 3)
    assert {RENDERER.decode(row.completion) for row in batch.rows} == {"b", "c"}


# What is learned


def pairwise(policy: Policy, batch: Any, reference: list[float], beta: float, nll: float) -> torch.Tensor:
    """The step's loss, one sequence at a time: mean of -log s(beta d), d the difference of summed log-ratios, and of
    the preferred side the NLL per token."""
    logps = [plain_logps(policy, row.context, row.completion) for row in batch.rows]
    ratios = [x.sum() - r for x, r in zip(logps, reference, strict=True)]
    losses = [-torch.nn.functional.logsigmoid(beta * (a - b)) for a, b in zip(ratios[::2], ratios[1::2], strict=True)]
    return torch.stack(losses).mean() - nll * torch.cat(logps[::2]).mean()


@pytest.mark.parametrize("adapter", ADAPTERS, ids=["full", "lora"])
def test_dpo_against_the_weights_that_the_round_began_with(tmp_path: Path, adapter: Lora | None) -> None:
    """In the second round, whose reference is not what the stage began with; however the step is cut."""
    policy = policy64(adapter)
    stage = stage_of(NAME, batch_size=3, beta=0.3, nll_weight=0.5)
    method = self_rewarding(policy, stage, tmp_path)
    method.batch(0)
    moved(policy, 0.02, seed=5)
    began = policy.snapshot()
    batch = method.batch(4)
    with policy.swapped(began):
        reference = [plain_logps(policy, row.context, row.completion).sum().item() for row in batch.rows]
    told, _ = gradient(policy, method, batch, stage)
    assert told["loss"] == pytest.approx(pairwise(policy, batch, reference, 0.3, 0.5).item(), rel=1e-6)
    assert told["margin"] == pytest.approx(0, abs=1e-4)
    moved(policy, 0.02, seed=6)
    batch = method.batch(5)
    with policy.swapped(began):
        reference = [plain_logps(policy, row.context, row.completion).sum().item() for row in batch.rows]
    expected = pairwise(policy, batch, reference, 0.3, 0.5)
    live = policy.parameters()
    wanted = dict(zip(live, torch.autograd.grad(expected, list(live.values())), strict=True))
    for budget in (16, 1024):
        told, found = gradient(policy, method, batch, stage_of(NAME, tokens_per_forward=budget))
        assert told["loss"] == pytest.approx(expected.item(), rel=1e-6)
        same_gradient(found, wanted, rtol=1e-4, atol=1e-5)  # its norms compute in float32


def test_packed_is_unrolled(tmp_path: Path) -> None:
    policy = policy64()
    method = self_rewarding(policy, stage_of(NAME, batch_size=4), tmp_path)
    batch = method.batch(0)
    moved(policy, 0.02)
    rows = list(range(len(batch.rows)))
    losses = []
    for states in (hidden_states, unrolled_hidden_states):
        forest = pack(batch.rows)
        losses.append(method.loss(batch, rows, forest, method.forward(policy.model, forest, states))[0])
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-8)


# Rounds


def test_a_round_answers_and_judges_with_the_weights_that_the_last_one_left(tmp_path: Path) -> None:
    policy, _ = run(NAME, tmp_path)
    rounds = [json.loads((tmp_path / f"judged-{k}.json").read_text()) for k in (0, 1)]
    assert rounds[0]["weights"] == tiny_policy().digest()
    assert rounds[1]["weights"] not in (rounds[0]["weights"], policy.digest())
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "pairs" in row] == [0, 4]
    for k, made in enumerate(rounds):
        told = made["metrics"]
        assert len(kept(tmp_path / f"judged-{k}.jsonl")) == told["pairs"] + told["judgement_pairs"]
        assert told["judgement_pairs"] > 0
        assert rows[4 * k]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # a round begins at its reference
        assert rows[4 * k]["margin"] == pytest.approx(0, abs=1e-5)
        assert abs(rows[4 * k + 3]["margin"]) > 1e-3


class Refuses:
    def __call__(self, *args: Any) -> Any:
        raise AssertionError("sampled again")


def test_a_round_that_was_judged_is_not_judged_again(tmp_path: Path) -> None:
    """With the same weights; in mid-round the pairs are its own, whatever the weights."""
    first = self_rewarding(tiny_policy(), stage_of(NAME), tmp_path).batch(0)
    assert self_rewarding(tiny_policy(), stage_of(NAME), tmp_path, Refuses()).batch(0) == first
    other = tiny_policy(seed=1)
    with pytest.raises(AssertionError, match="sampled again"):
        self_rewarding(other, stage_of(NAME), tmp_path, Refuses()).batch(0)
    assert self_rewarding(other, stage_of(NAME), tmp_path, Refuses()).batch(3).rows
    with pytest.raises(UserError, match=r"judged-1\.json: is missing"):
        self_rewarding(other, stage_of(NAME), tmp_path, Refuses()).batch(5)


class Prefers(SelfJudge):
    """Grades an answer by a property of it."""

    def __init__(self, policy: Policy, good: Callable[[str], bool]) -> None:
        super().__init__(policy)
        self.good = good

    def say(self, question: str, chance: int) -> str:
        return f"<grade>{5 * self.good(shown(question, 'answer'))}</grade>"


def test_it_learns_what_it_finds_good(tmp_path: Path) -> None:
    """An answer of one token is good if that stands in the later half of the vocabulary: rounds raise the grade."""
    policy = tiny_policy()
    half = {RENDERER.decode([token]) for token in range(160)}
    how = {"optim": {"lr": 1e-2, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0}}
    sampling = {"max_new_tokens": 1}
    stage = stage_of(NAME, **{**PLAIN, "rounds": 4}, steps=16, prompts=12, batch_size=8, sampling=sampling, **how)
    sampler = Prefers(policy, lambda text: text not in half)
    train(policy, self_rewarding(policy, stage, tmp_path, sampler), stage, tmp_path, SEED)
    rewards = [row["reward"] for row in rows_of(tmp_path / "metrics.jsonl") if "reward" in row]
    assert len(rewards) == 4
    assert rewards[-1] > rewards[0] + 0.1


def test_a_killed_run_goes_on_as_if_it_never_was(tmp_path: Path) -> None:
    """In the middle of a round, with a checkpoint from the round before; more in tests/test_training_loop.py."""

    class Killed(BaseException):
        pass

    def kill(row: dict[str, Any]) -> None:
        if row["step"] == 5:
            raise Killed

    whole, _ = run(NAME, tmp_path / "whole")
    with pytest.raises(Killed):
        run(NAME, tmp_path / "killed", on_step=kill, checkpoint_every=3)
    policy, _ = run(NAME, tmp_path / "killed", checkpoint_every=3)
    assert same(policy.snapshot(), whole.snapshot())
    assert rows_of(tmp_path / "killed" / "metrics.jsonl") == rows_of(tmp_path / "whole" / "metrics.jsonl")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rounds": 3}, "8 steps cannot be shared out evenly among 3 rounds"),
        ({"sampling": {"temperature": 0}}, "must be above 0"),
        ({"judging": {"temperature": 0}}, "must be 1 at temperature 0"),
        ({"judging": {"n": 1}}, "must be at least 2 where judgements are compared"),
        ({"length_control": 0.5}, "less than 0.5"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises((Misfit, ValueError)) as caught:
        stage_of(NAME, **settings)
    assert told in repr(caught.value)
