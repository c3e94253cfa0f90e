"""The supervised half of Constitutional AI: answers that the model itself criticised and revised by principles."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from posttrain.data.prepare import Prepared, with_answers
from posttrain.models.disk import read_rows, write_rows
from posttrain.recipe.supervised import Constitutional
from posttrain.records import Example, Ledger, Rollout, UserError, derive
from posttrain.sampling.protocol import Sampler, attempted
from posttrain.training.batch import draws
from posttrain.training.own import Slot

REQUESTS = {
    "critique": """\
An answer must keep to this principle: {principle}

Say in a few sentences where your last answer does not keep to it, if so it is. Do not write another answer yet.""",
    "revision": """\
Now write your answer to me anew, so that it keeps to the principle. Write the answer alone, with nothing before or \
after it.""",
}
"""What the model is asked about its answer, one after the other."""
UNUSABLE = ("empty", "unfinished", "too_long")
"""What is not learned: revisions that say nothing, or were cut off, and talks that grew too long for the context."""


@dataclass
class _Draft:
    """An answer on its way."""

    slot: Slot
    example: Example
    answer: str
    """The first version."""
    said: Rollout | None
    """What was said last; None where the conversation had become too long for the model's context."""
    talk: Example
    """The conversation before that."""
    rounds: list[dict[str, str]] = field(default_factory=list)

    def outcome(self) -> str:
        if self.said is None:
            return "too_long"
        if not self.said.text.strip():
            return "empty"
        if self.said.finish == "length":
            return "unfinished"
        return "unchanged" if self.said.text.split() == self.answer.split() else "revised"


def revise(
    stage: Constitutional, data: Prepared, sampler: Sampler, seed: int, path: Path
) -> tuple[Ledger, dict[str, Any]]:
    """Write to `path` how the model answers each prompt that the stage's steps come to, criticises its answer and
    revises it (Bai et al., 2212.08073, section 3), a line for each. Returns what it cost, and what is worth recording.

    Departures. A principle is one text, and what is asked about it the same for all, where the paper has requests for a
    critique and a revision with each. No worked examples come before it: a model that follows instructions needs none.
    What does not come to its end is not learned, for whoever imitates it does not learn to end; a revision that says
    what the first answer said is.

    Raises:
        UserError: no revision can be learned.
    """
    slots = sorted(set(draws(stage, data.rows, data.weights, seed)))
    prompts = [data.rows[s][i].example for s, i in slots]
    answers, ledger = sampler(prompts, 1, stage.sampling, derive(seed, stage.id, "answers"))
    drafts = [_Draft(slot, r.example, r.text, r, r.example) for slot, r in zip(slots, answers, strict=True)]
    for number in range(stage.rounds):
        for draft in drafts:
            if draft.said is not None:  # a round begins with the answer alone, as if it had been the first
                draft.talk = draft.example
                draft.rounds.append({"principle": _principle(stage, draft.slot, number, seed)})
        for what, request in REQUESTS.items():
            live = [draft for draft in drafts if draft.said is not None]
            for draft in live:
                draft.talk = _further(draft, request.format(principle=draft.rounds[-1]["principle"]))
            chance = derive(seed, stage.id, what, number)
            found, cost = attempted(sampler, [draft.talk for draft in live], 1, stage.sampling, chance)
            ledger += cost
            for draft, said in zip(live, found, strict=True):
                draft.said = None if isinstance(said, UserError) else said[0]
                draft.rounds[-1][what] = draft.said.text if draft.said else ""
    outcomes = [draft.outcome() for draft in drafts]
    counts = {what: outcomes.count(what) for what in ("revised", "unchanged", *UNUSABLE)}
    if not counts["revised"] + counts["unchanged"]:
        listed = ", ".join(f"{counts[what]} {what.replace('_', ' ')}" for what in UNUSABLE)
        raise UserError(
            f"stage {stage.id!r}: none of {len(drafts)} answers has a revision to learn ({listed}); raise "
            "sampling.max_new_tokens, or start from a model that follows instructions"
        )
    write_rows(path, map(_line, drafts))
    return ledger, {"answers": len(drafts)} | counts


def revised(path: Path, data: Prepared) -> Prepared:
    """`data` with the revisions that `revise` wrote, without the rows that have none to learn from."""
    lines = read_rows(path)
    return with_answers(data, [(*line["row"], line["ids"]) for line in lines if line["outcome"] not in UNUSABLE])


def _principle(stage: Constitutional, slot: Slot, number: int, seed: int) -> str:
    """That of a prompt in a round, whatever other prompts there are."""
    return random.Random(derive(seed, stage.id, "principle", *slot, number)).choice(stage.principles)


def _further(draft: _Draft, request: str) -> Example:
    """The conversation with what was said last, and what is asked next."""
    assert draft.said is not None
    turns = {"role": "assistant", "content": draft.said.text}, {"role": "user", "content": request}
    return replace(draft.talk, prompt=(*draft.talk.prompt, *turns))


def _line(draft: _Draft) -> dict[str, Any]:
    """For a person to read, and for `revised`."""
    read = {"prompt": draft.example.prompt, "answer": draft.answer, "rounds": draft.rounds, "outcome": draft.outcome()}
    return read | {"row": draft.slot, "ids": draft.said.ids if draft.said else ()}
