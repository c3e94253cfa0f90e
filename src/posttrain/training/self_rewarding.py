"""Rounds of answering, judging one's own answers and learning to prefer the better ones."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import pvariance
from typing import Any

from torch import Tensor

from posttrain.credit.batch import as_row
from posttrain.credit.pairs import pairs
from posttrain.data.prepare import Prepared, schedule
from posttrain.forest import Forest
from posttrain.models.policy import Policy
from posttrain.recipe.blocks import Sampling
from posttrain.recipe.preference import SelfRewarding
from posttrain.records import Example, Ledger, Rollout, Score, UserError, derive
from posttrain.rewards.judge import META, Judge, PairJudge, tournament
from posttrain.rewards.protocol import check_scored
from posttrain.sampling.protocol import Sampler
from posttrain.training.batch import Batch, LogProbs, Metrics, asked
from posttrain.training.preference import Judged, PreferenceMethod, read_judged, referred, write_judged
from posttrain.training.rollouts import check_weights, measured
from posttrain.training.rounds import sampled_once
from posttrain.training.world import ALONE, World

POINTS = 5
ADDITIVE = """\
Points add up. The first is for an answer that has to do with what was asked, be it incomplete or in part beside the \
point. The second is for one that answers a good part of it. The third is for one that answers the main of it in a way \
that is of use. The fourth is for one that answers it directly, in full and in good order, as a helpful assistant \
does, with little to improve. The fifth is for one that is made for this very question, with knowledge and insight and \
nothing beside the point."""
BETTER = """\
The better one goes by the criteria that stand in the question, is right about the answer that stands there, and ends \
with the grade that follows from both. How long it is does not matter."""


class SelfRewardingMethod(LogProbs):
    """Rounds: the policy answers `prompts` prompts `n` times each and grades every answer `judging.n` times, 0 to 5
    points that add up; a best and a worst answer by their mean grades are a pair, and DPO learns the pairs, with the
    weights that the round began with as reference (Self-Rewarding, Yuan et al., 2401.10020).

    With `meta_judge` it learns to judge as well (Meta-Rewarding, Wu et al., 2407.19594): of each prompt it compares, by
    twos and in both orders, the readable judgements of the answer whose grades differ most; the best and the worst of
    them are one more pair, after the question that asked for them.

    What a round's pairs are and what the reference says of them stands in `folder`, in judged-ROUND.jsonl, with the
    weights that wrote it: a continued run learns from the same pairs and samples none of them again.

    Departures. Prompts are those of the data, where the first paper has the model write new ones; that the model learns
    to judge from examples before the first round is a stage of kind sft of its own. A judgement that cannot be read has
    no grade, and an answer without any is in no pair. Judgements are ranked by their share of wins, where the second
    paper fits Elo scores, which rank alike where every pair is compared, to wins that it weighs by place; here a win
    that turns with the order is a tie. `length_control` is that paper's rule for answers, and is used for judgements
    too, in place of its limit on the length of the one preferred.
    """

    period = 1

    def __init__(
        self,
        stage: SelfRewarding,
        data: Prepared,
        policy: Policy,
        sampler: Sampler,
        folder: Path,
        seed: int,
        world: World = ALONE,
    ) -> None:
        self.stage, self.data, self.policy, self.sampler = stage, data, policy, sampler
        self.folder, self.seed, self.world = folder, seed, world
        sizes, slots = [len(rows) for rows in data.rows], stage.rounds * stage.prompts
        self.slots = schedule(sizes, data.weights, slots, derive(seed, stage.id, "prompts"))
        self.round = -1

    def batch(self, step: int) -> Batch:
        number, at = divmod(step, self.stage.round_steps)
        if at == 0 or number != self.round:
            made = self._begin(number, at == 0)
        batch = self.learning.batch(at)
        return batch if at else dataclasses.replace(batch, metrics=made["metrics"], ledger=Ledger(**made["ledger"]))

    def loss(self, batch: Batch, rows: Sequence[int], forest: Forest, logps_T: Tensor) -> tuple[Tensor, Metrics]:
        return self.learning.loss(batch, rows, forest, logps_T)

    def _begin(self, number: int, first: bool) -> dict[str, Any]:
        """Have the pairs of a round; `first` says that it begins."""
        path = self.folder / f"judged-{number}.jsonl"
        made = sampled_once(path, first, self.policy, self.world, partial(self.judged, number), write_judged)
        judged = read_judged(path, len(self.data.rows))
        seed = derive(self.seed, self.stage.id, "round", number)
        self.learning = PreferenceMethod(self.stage.learning, self.data, seed, judged, self.policy, self.world)
        self.round = number
        return made

    def judged(self, number: int, digest: str) -> tuple[list[list[Judged]], Metrics, Ledger]:
        """The round's pairs by source, with what the policy of now, whose digest is given, says of them.

        Raises:
            Failure: too few answers could be graded.
            UserError: there is no pair.
        """
        stage = self.stage
        slots = self.slots[number * stage.prompts :][: stage.prompts]
        seeds = partial(derive, self.seed, stage.id, "round", number)
        rng = random.Random(seeds("ties"))
        made: list[list[Judged]] = [[] for _ in self.data.rows]

        def own(prompts: Sequence[Example], n: int, sampling: Sampling, seed: int) -> tuple[list[Rollout], Ledger]:
            rollouts, cost = self.sampler(prompts, n, sampling, seed)
            check_weights(rollouts, {digest})
            return rollouts, cost

        def put(rollouts: Sequence[Rollout], scores: Sequence[Score], of: Sequence[int]) -> int:
            """Put away the pairs among texts, of which each belongs to a prompt `of` the round; returns how many."""
            found = pairs(rollouts, scores, rng, stage.length_control)
            found = [(a, b) for a, b in found if rollouts[a].ids != rollouts[b].ids]  # a judge may contradict itself
            for a, b in found:
                made[slots[of[a]][0]].append(_judged(rollouts, scores, a, b))
            return len(found)

        prompts = [self.data.rows[s][i].example for s, i in slots]
        answers, ledger = own(prompts, stage.n, stage.sampling, seeds("answers"))
        judge = judge_of(stage, own, seeds("judgements"))
        said = judge.judgements(answers)
        scores = [judge.score(of) for of in said]
        check_scored(scores, stage.max_unscored)
        grades = [[] if isinstance(of, UserError) else [judge.read(r.text).value for r in of] for of in said]
        metrics = dict(measured(list(zip(answers, scores, strict=True)), stage.sampling.max_new_tokens))
        metrics["unread"] = sum(each.count(None) for each in grades) / (len(answers) * stage.judging.n)
        metrics["pairs"] = put(answers, scores, [answer.group for answer in answers])
        ledger += judge.ledger
        if stage.meta_judge:
            meta = PairJudge(own, BETTER, form=META, sampling=stage.judging, seed=seeds("comparisons"))
            places, judgements = _uncertain(answers, said, grades, rng)
            metrics["judgement_pairs"] = put(judgements, tournament(meta)(judgements), places)
            ledger += meta.ledger
            if bias := meta.bias():
                metrics |= {"turned": bias.turned, "shown_first": bias.shown_first}
        if not any(made):
            raise UserError(
                f"stage {stage.id!r}, round {number}: the model prefers no answer to another for any of {len(slots)} "
                "prompts, for its grades are alike, so there is nothing to learn; raise n, judging.n or the "
                "temperatures, or teach it to judge before (docs/self-improvement.md)"
            )
        return referred(self.policy, stage.learning, made, self.world)[0], metrics, ledger


def judge_of(stage: SelfRewarding, sampler: Sampler, seed: int) -> Judge:
    """What grades the answers, if `sampler` draws from the policy."""
    how = stage.judging
    return Judge(sampler, how.rubric or ADDITIVE, low=0, high=POINTS, sampling=how, draws=how.n, seed=seed)


def _uncertain(
    answers: Sequence[Rollout],
    said: Sequence[list[Rollout] | UserError],
    grades: Sequence[Sequence[float | None]],
    rng: random.Random,
) -> tuple[list[int], list[Rollout]]:
    """For each prompt the readable judgements of the answer whose grades vary most, and beside each the number of the
    prompt; none where no answer has two."""
    spread: dict[int, dict[int, float]] = {}
    for i, each in enumerate(grades):
        known = [grade for grade in each if grade is not None]
        if len(known) > 1:
            spread.setdefault(answers[i].group, {})[i] = pvariance(known)
    prompts: list[int] = []
    found: list[Rollout] = []
    for prompt, by_answer in spread.items():
        most = rng.choice([i for i, variance in by_answer.items() if variance == max(by_answer.values())])
        of = said[most]
        assert not isinstance(of, UserError)
        read = [judgement for judgement, grade in zip(of, grades[most], strict=True) if grade is not None]
        prompts += [prompt] * len(read)
        found += read
    return prompts, found


def _judged(rollouts: Sequence[Rollout], scores: Sequence[Score], a: int, b: int) -> Judged:
    best, worst = rollouts[a], rollouts[b]
    value, other = scores[a].value, scores[b].value
    assert value is not None
    assert other is not None
    sample = {"prompt": asked(best.example), "text": best.text, "score": value, "rejected": worst.text}
    return Judged((as_row(best), as_row(worst)), (value, other), sample)
