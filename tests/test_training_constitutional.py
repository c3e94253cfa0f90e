"""Constitutional AI: what the model is asked about its answers, and which of its revisions are learned."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from scoring import END
from test_training_methods import gradient, plain_logps, same_gradient
from tiny import tiny_policy
from tiny_runs import ENDS, RENDERER, SEED, asked, prepared, rows_of, stage_of, turn

from posttrain.data.prepare import Prepared
from posttrain.recipe.supervised import Constitutional
from posttrain.records import Example, Ledger, Rollout, UserError
from posttrain.sampling.local import LocalSampler
from posttrain.training.constitutional import revise, revised
from posttrain.training.loop import train
from posttrain.training.sft import SftMethod

RULES = "Be brief.\n\n  Be {polite}.  \n"


def stage(**settings: Any) -> Constitutional:
    common = {"id": "toy", "kind": "constitutional", "data": {"sources": [{"source": "x.jsonl"}]}, "steps": 3}
    own = {"batch_size": 2, "constitution": RULES, "optim": {"lr": 1e-2}, "sampling": {"max_new_tokens": 6}}
    return Constitutional.model_validate({**common, **own, **settings})


class Talks:
    """Says `line(number of the question, kind of turn, round)`, cut off where that ends with an ellipsis."""

    def __init__(self, line: Callable[[int, str, int], str]) -> None:
        self.line = line
        self.asked: list[list[tuple[str, str]]] = []
        self.calls: list[tuple[str, int]] = []

    def __call__(self, prompts: Sequence[Example], n: int, sampling: Any, seed: int) -> tuple[list[Rollout], Ledger]:
        talks = [[(message["role"], message["content"]) for message in example.prompt] for example in prompts]
        what = {1: "answer", 3: "critique", 5: "revision"}[len(talks[0])]
        self.calls.append((what, len(prompts)))
        number = sum(name == what for name, _ in self.calls) - 1
        self.asked += talks
        rollouts = []
        for p, example in enumerate(prompts):
            text = self.line(int(str(example.prompt[0]["content"]).split()[-1]), what, number)
            ids = (*RENDERER.tokenizer.encode(text), END)
            finish: Any = "length" if text.endswith("...") else "stop"
            prompt = RENDERER.prompt_ids(example)
            rollouts.append(Rollout(example, p, prompt, ids, (-1.0,) * len(ids), text, finish, "w"))
        return rollouts, Ledger(generated_tokens=sum(len(r.ids) for r in rollouts))


def numbered(n: int = 6) -> Prepared:
    return prepared([Example(f"q:{i}", (turn("user", f"Question {i}"),)) for i in range(n)])


def plain(i: int, what: str, number: int) -> str:
    return {"answer": f"{i}?", "critique": f"{i} is rude {number}", "revision": f"{i}, please {number}"}[what]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_conversation_in_which_an_answer_is_revised(tmp_path: Path) -> None:
    """Answer, critique by a principle, revision; a second round begins with the revised answer in place of the first.
    What is kept for a reader says all of it, and the last version is learned after the question alone."""
    talks, data = Talks(plain), numbered()
    ledger, facts = revise(stage(rounds=2), data, talks, SEED, tmp_path / "r.jsonl")
    assert talks.calls == [("answer", 6), *[("critique", 6), ("revision", 6)] * 2]
    found = {line["prompt"][0]["content"]: line for line in lines(tmp_path / "r.jsonl")}
    for i in range(6):
        line = found[f"Question {i}"]
        assert line["answer"] == f"{i}?"
        assert line["outcome"] == "revised"
        mine = [talk for talk in talks.asked if talk[0][1] == f"Question {i}"]
        for number, told in enumerate(line["rounds"]):
            assert (told["critique"], told["revision"]) == (f"{i} is rude {number}", f"{i}, please {number}")
            assert told["principle"] in ("Be brief.", "Be {polite}.")
            talk = mine[2 + 2 * number]
            assert mine[1 + 2 * number] == talk[:3]
            assert [role for role, _ in talk] == ["user", "assistant", "user", "assistant", "user"]
            assert talk[1][1] == (f"{i}, please 0" if number else f"{i}?")
            assert told["principle"] in talk[2][1]
            assert talk[3][1] == told["critique"]
    kept = revised(tmp_path / "r.jsonl", data).rows[0]
    assert {row.prompt_ids for row in kept} == {row.prompt_ids for row in data.rows[0]}
    for row in kept:
        i = row.example.id[2:]
        assert row.completion_ids == (*RENDERER.tokenizer.encode(f"{i}, please 1"), END)
        assert all(row.completion_target)
    assert facts == {"answers": 6, "revised": 6, "unchanged": 0, "empty": 0, "unfinished": 0, "too_long": 0}
    assert ledger.generated_tokens > sum(len(row.completion_ids) for row in kept)


def mixed(i: int, what: str, number: int) -> str:
    if what == "revision":
        return {0: " \n", 1: "1, so it ...", 2: " 2? "}.get(i, f"{i}, please")
    if what == "critique" and i == 3:
        return "it is long " * 40  # the context of 256 has no room for the question after it
    return plain(i, what, number)


def roomy(talks: Talks, context: int) -> Any:
    def sampler(prompts: Sequence[Example], *how: Any) -> tuple[list[Rollout], Ledger]:
        if any(len(RENDERER.prompt_ids(example)) >= context for example in prompts):
            raise UserError("no room for an answer")
        return talks(prompts, *how)

    return sampler


def test_what_is_not_learned_is_counted(tmp_path: Path) -> None:
    """Empty, cut off, the same as before, too long for the context, and two that are revised: three are learned."""
    data, path = numbered(), tmp_path / "r.jsonl"
    _, facts = revise(stage(), data, roomy(Talks(mixed), 480), SEED, path)
    assert facts == {"answers": 6, "revised": 2, "unchanged": 1, "empty": 1, "unfinished": 1, "too_long": 1}
    by_number = {int(line["prompt"][0]["content"][-1]): line["outcome"] for line in lines(path)}
    assert by_number == {0: "empty", 1: "unfinished", 2: "unchanged", 3: "too_long", 4: "revised", 5: "revised"}
    assert {row.example.id for row in revised(path, data).rows[0]} == {"q:2", "q:4", "q:5"}


def test_nothing_to_learn_is_said_and_not_kept(tmp_path: Path) -> None:
    talks = Talks(lambda i, what, number: f"{what} and on ...")
    with pytest.raises(UserError, match=r"'toy': none of 6 answers has a revision to learn \(0 empty, 6 unfinished, 0"):
        revise(stage(), numbered(), talks, SEED, tmp_path / "r.jsonl")
    assert not list(tmp_path.iterdir())


def principles(path: Path) -> dict[str, list[str]]:
    return {line["prompt"][0]["content"]: [told["principle"] for told in line["rounds"]] for line in lines(path)}


def test_a_principle_is_drawn_for_each_prompt_and_round(tmp_path: Path) -> None:
    """By seed: the same again, whatever other prompts there are; and every one has its turn."""
    long = stage(steps=20, rounds=2)
    for name, n in (("many", 40), ("again", 40), ("few", 6)):
        revise(long, numbered(n), Talks(plain), SEED, tmp_path / name)
    many = principles(tmp_path / "many")
    assert principles(tmp_path / "again") == many
    assert principles(tmp_path / "few").items() <= many.items()
    drawn = [principle for each in many.values() for principle in each]
    assert 20 < drawn.count("Be brief.") < 60  # of 80, 40 are expected; 4 deviations are 18
    assert any(a != b for a, b in many.values())


def test_only_prompts_that_the_steps_come_to_are_answered(tmp_path: Path) -> None:
    talks, data = Talks(plain), prepared([e.example for e in numbered(9).rows[0]], [Example("n", (turn("user", "9"),))])
    data = data._replace(weights=(1.0, 1e-9))
    _, facts = revise(stage(steps=2), data, talks, SEED, tmp_path / "r.jsonl")
    assert facts["answers"] == 4
    kept = revised(tmp_path / "r.jsonl", data)
    assert (len(kept.rows), len(kept.rows[0]), kept.weights) == (1, 4, (1.0,))


def test_the_loss_is_that_of_sft_on_the_revisions(tmp_path: Path) -> None:
    """Sampled for real: the mean NLL of the revisions' tokens as they were sampled, after the question alone."""
    policy, path = tiny_policy(dtype=torch.float64, max_position_embeddings=2048), tmp_path / "r.jsonl"
    how = stage(batch_size=4, sampling={"max_new_tokens": 6, "stop": ENDS}, constitution="Be brief.")
    data = prepared(asked())
    _, facts = revise(how, data, LocalSampler(policy, RENDERER), SEED, path)
    assert facts["revised"] > 0
    assert sum(facts.values()) == 2 * facts["answers"]
    method = SftMethod(how, revised(path, data), SEED)
    batch = method.batch(0)
    expected = -torch.cat([plain_logps(policy, row.context, row.completion) for row in batch.rows]).mean()
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in policy.parameters().items() if p.grad is not None}
    for budget in (16, 1024):
        told, found = gradient(policy, method, batch, stage_of("sft", tokens_per_forward=budget))
        assert told["loss"] == pytest.approx(expected.item(), rel=1e-9)
        same_gradient(found, wanted)


def test_the_revisions_become_likely(tmp_path: Path) -> None:
    policy, how = tiny_policy(), stage(steps=20, optim={"lr": 1e-2, "schedule": "constant"})
    data = numbered()
    revise(how, data, Talks(plain), SEED, tmp_path / "r.jsonl")
    train(policy, SftMethod(how, revised(tmp_path / "r.jsonl", data), SEED), how, tmp_path, SEED)
    losses = [row["loss"] for row in rows_of(tmp_path / "metrics.jsonl")]
    assert losses[-1] < 0.5 * losses[0]


def test_a_constitution_holds_a_principle() -> None:
    assert stage().principles == ("Be brief.", "Be {polite}.")
    for text, why in (
        (" \n\n", "holds no principle"),
        ("rules.md", "names a file"),
        ("my rules.txt\n", "names a file"),
    ):
        with pytest.raises(ValidationError) as caught:
            stage(constitution=text)
        assert why in repr(caught.value)
    assert stage(constitution="Be brief.").principles == ("Be brief.",)
