"""Learning from the right ones of its own answers: RFT, STaR, ReST and expert iteration."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from posttrain.credit.batch import as_row
from posttrain.data.prepare import Prepared, schedule
from posttrain.forest import Forest, Row
from posttrain.losses import nll, reduce_tokens
from posttrain.models.disk import read_rows, write_rows
from posttrain.models.policy import Policy
from posttrain.recipe.rl import HINT, RejectionSampling
from posttrain.records import Example, Ledger, Rollout, UserError, derive
from posttrain.rewards.protocol import Scorer
from posttrain.sampling.protocol import Sampler
from posttrain.training.batch import Batch, Metrics, scored_sample, singly
from posttrain.training.own import Scored, Slot, with_scores
from posttrain.training.rollouts import measured
from posttrain.training.rounds import RoundMethod


class Kept(NamedTuple):
    """An answer to learn, of the prompt from which it is learned."""

    source: int
    row: Row
    sample: dict[str, Any]
    """How it looks to a reader."""


class RejectionMethod(RoundMethod):
    """Rounds of sampling, keeping and learning what was kept by its likelihood, per token of the step.

    RFT (Yuan et al., 2308.01825) is one round, with a large `n`. Expert iteration (ReST, Gulcehre et al., 2308.08998;
    ReST-EM, Singh et al., 2312.06585) is several, each with the weights that the one before it left. STaR (Zelikman et
    al., 2203.14465) also asks again, with the answer as a hint, where nothing was right.

    Departures. Training goes on from round to round, where STaR and ReST-EM begin each from the first weights. Answers
    of the same words are one, where RFT compares the equations in them. ReST's threshold does not rise within a round.
    An answer that was cut off is not kept, for whoever imitates it does not learn to end.
    """

    stage: RejectionSampling
    name = "kept"

    def __init__(
        self, stage: RejectionSampling, data: Prepared, policy: Policy, sampler: Sampler, score: Scorer, *where: Any
    ) -> None:
        super().__init__(stage, data, policy, sampler, *where)
        self.score = score

    def learn(self, at: int) -> Batch:
        size = self.stage.batch_size
        items = [self.kept[s][i] for s, i in self.order[at * size : (at + 1) * size]]
        return singly([item.row for item in items], samples=() if at else tuple(item.sample for item in items[:2]))

    def loss(
        self, batch: Batch, rows: Sequence[int], forest: Forest, logps_T: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        return reduce_tokens(nll(logps_T), forest.target_T, batch.counts), {}

    def write(self, path: Path, found: Sequence[Kept]) -> None:
        lines = [
            {"source": source, "ids": [row.context, row.completion, row.target], "sample": sample}
            for source, row, sample in found
        ]
        write_rows(path, lines)

    def take(self, path: Path, number: int) -> None:
        found: list[list[Kept]] = [[] for _ in self.data.rows]
        for kept in read_rows(path):
            found[kept["source"]].append(Kept(kept["source"], Row(*map(tuple, kept["ids"])), kept["sample"]))
        some = [s for s, part in enumerate(found) if part]  # a source that gave nothing leaves the mixture
        self.kept = [found[s] for s in some]
        sizes, weights = [len(part) for part in self.kept], [self.data.weights[s] for s in some]
        slots = self.stage.round_steps * self.stage.batch_size
        self.order = schedule(sizes, weights, slots, derive(self.seed, self.stage.id, "order", number))

    def sample(self, number: int) -> tuple[list[Kept], Metrics, Ledger]:
        """What the policy of now answers rightly to the round's prompts.

        Raises:
            UserError: nothing.
        """
        stage = self.stage
        slots = self.slots[number * stage.prompts :][: stage.prompts]
        drawn, ledger = self._ask(slots, self._examples(slots), "round", number)
        found = [(slots[drawn[i][0].group], drawn[i]) for i in right(drawn, stage.at_least, stage.most)]
        solved = {slot for slot, _ in found}
        metrics = dict(measured(drawn, stage.sampling.max_new_tokens))
        metrics |= {"kept": len(found) / len(drawn), "solved": sum(slot in solved for slot in slots) / len(slots)}
        left = [slot for slot in dict.fromkeys(slots) if slot not in solved and self._example(slot).answer is not None]
        if stage.hint is not None and left:
            hinted = [with_hint(example, stage.hint) for example in self._examples(left)]
            more, cost = self._ask(left, hinted, "hinted", number)
            ledger += cost
            told = [(left[more[i][0].group], more[i]) for i in right(more, stage.at_least, stage.most)]
            metrics["rationalised"] = len({slot for slot, _ in told}) / len(left)
            found += told
        if not found:
            hint = "" if stage.hint else " give a hint,"
            raise UserError(
                f"stage {stage.id!r}, round {number}: none of {len(drawn)} answers to {len(slots)} prompts came to its "
                f"end and earned {stage.at_least:g} or more, so there is nothing to learn; raise prompts, n or "
                f"sampling.max_new_tokens, lower at_least,{hint} or choose a task that the model solves sometimes"
            )
        metrics["examples"] = len(found)
        kept = [Kept(source, as_row(rollout), scored_sample(rollout, s)) for (source, _), (rollout, s) in found]
        return kept, metrics, ledger

    def _ask(
        self, slots: Sequence[Slot], prompts: Sequence[Example], who: str, number: int
    ) -> tuple[list[Scored], Ledger]:
        """Answers to `prompts` with their scores, as answers to the prompts in the data."""
        stage = self.stage
        answers, ledger = self.sampler(prompts, stage.n, stage.sampling, derive(self.seed, stage.id, who, number))
        return with_scores(self.score, [self._unhinted(answer, slots[answer.group]) for answer in answers], ledger)

    def _unhinted(self, rollout: Rollout, slot: Slot) -> Rollout:
        """The same tokens after the prompt in the data."""
        row = self.data.rows[slot[0]][slot[1]]
        return dataclasses.replace(rollout, example=row.example, prompt_ids=row.prompt_ids)

    def _example(self, slot: Slot) -> Example:
        return self.data.rows[slot[0]][slot[1]].example

    def _examples(self, slots: Sequence[Slot]) -> list[Example]:
        return [self._example(slot) for slot in slots]


def right(drawn: Sequence[Scored], at_least: float, most: int | None = None) -> list[int]:
    """Which answers to keep: those that came to their end and earn `at_least`, no two to one prompt of the same words,
    and of each prompt the first `most`."""
    said: dict[tuple[int, ...], set[tuple[str, ...]]] = {}
    found = []
    for i, (rollout, score) in enumerate(drawn):
        before, words = said.setdefault(rollout.prompt_ids, set()), tuple(rollout.text.split())
        good = rollout.finish == "stop" and score.value is not None and score.value >= at_least
        if good and words not in before and (most is None or len(before) < most):
            before.add(words)
            found.append(i)
    return found


def with_hint(example: Example, hint: str) -> Example:
    """The same question with its reference answer given away below it."""
    *before, last = example.prompt
    text = f"{last['content']}\n\n{hint.replace(HINT, example.answer or '')}"
    return dataclasses.replace(example, prompt=(*before, {**last, "content": text}))
