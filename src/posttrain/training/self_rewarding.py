"""Rounds of answering, judging one's own answers and learning to prefer the better ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import pvariance

from torch import Tensor

from posttrain.credit.pairs import pairs
from posttrain.forest import Forest
from posttrain.recipe.preference import SelfRewarding
from posttrain.records import Ledger, Rollout, Score, UserError, derive
from posttrain.rewards.judge import META, Judge, PairJudge, tournament
from posttrain.rewards.protocol import as_reward, check_scored
from posttrain.training.batch import Batch, Metrics
from posttrain.training.preference import Judged, PreferenceMethod, ranked, read_judged, referred, write_judged
from posttrain.training.rollouts import measured
from posttrain.training.rounds import RoundMethod

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


class SelfRewardingMethod(RoundMethod):
    """Rounds: the policy answers `prompts` prompts `n` times each and grades every answer `judging.n` times, 0 to 5
    points that add up; a best and a worst answer by their mean grades are a pair, and DPO learns the pairs, with the
    weights that the round began with as reference (Self-Rewarding, Yuan et al., 2401.10020).

    With `meta_judge` it learns to judge as well (Meta-Rewarding, Wu et al., 2407.19594): of each prompt it compares, by
    twos and in both orders, the readable judgements of the answer whose grades differ most; the best and the worst of
    them are one more pair, after the question that asked for them.

    Departures. Prompts are those of the data, where the first paper has the model write new ones; that the model learns
    to judge from examples before the first round is a stage of kind sft of its own. A judgement that cannot be read has
    no grade, and an answer without any is in no pair. Judgements are ranked by their share of wins, where the second
    paper fits Elo scores, which rank alike where every pair is compared, to wins that it weighs by place; here a win
    that turns with the order is a tie. `length_control` is that paper's rule for answers, and is used for judgements
    too, in place of its limit on the length of the one preferred.
    """

    stage: SelfRewarding
    name = "judged"

    def learn(self, at: int) -> Batch:
        return self.learning.batch(at)

    def loss(self, batch: Batch, rows: Sequence[int], forest: Forest, logps_T: Tensor) -> tuple[Tensor, Metrics]:
        return self.learning.loss(batch, rows, forest, logps_T)

    def write(self, path: Path, found: list[list[Judged]]) -> None:
        write_judged(path, found)

    def take(self, path: Path, number: int) -> None:
        judged, seed = read_judged(path, len(self.data.rows)), derive(self.seed, self.stage.id, "round", number)
        self.learning = PreferenceMethod(self.stage.learning, self.data, seed, judged, self.policy, self.world)

    def sample(self, number: int) -> tuple[list[list[Judged]], Metrics, Ledger]:
        """The round's pairs by source, with what the policy of now says of them.

        Raises:
            Failure: too few answers could be graded.
            UserError: there is no pair.
        """
        stage, how = self.stage, self.stage.judging
        slots = self.slots[number * stage.prompts :][: stage.prompts]
        seeds = partial(derive, self.seed, stage.id, "round", number)
        rng = random.Random(seeds("ties"))
        made: list[list[Judged]] = [[] for _ in self.data.rows]

        def put(rollouts: Sequence[Rollout], scores: Sequence[Score], of: Sequence[int]) -> int:
            """Put away the pairs among texts, of which each belongs to a prompt `of` the round; returns how many."""
            found = pairs(rollouts, scores, rng, stage.length_control)
            found = [(a, b) for a, b in found if rollouts[a].ids != rollouts[b].ids]  # a judge may contradict itself
            for best, worst in found:
                source, _ = slots[of[best]]
                made[source].append(ranked(rollouts, scores, (best, worst)))
            return len(found)

        prompts = [self.data.rows[s][i].example for s, i in slots]
        answers, ledger = self.sampler(prompts, stage.n, stage.sampling, seeds("answers"))
        rubric, seed = how.rubric or ADDITIVE, seeds("judgements")
        judge = Judge(self.sampler, rubric, low=0, high=POINTS, sampling=how, draws=how.n, seed=seed)
        said = judge.judgements(answers)
        scores = [judge.score(of) for of in said]
        check_scored(scores, stage.max_unscored)
        grades = [[] if isinstance(of, UserError) else [judge.read(r.text).value for r in of] for of in said]
        metrics = dict(measured(list(zip(answers, scores, strict=True)), stage.sampling.max_new_tokens))
        metrics["unread"] = sum(each.count(None) for each in grades) / (len(answers) * how.n)
        metrics["pairs"] = put(answers, scores, [answer.group for answer in answers])
        ledger += as_reward(judge.ledger)
        if stage.meta_judge:
            meta = PairJudge(self.sampler, BETTER, form=META, sampling=how, seed=seeds("comparisons"))
            places, judgements = _uncertain(answers, said, grades, rng)
            metrics["judgement_pairs"] = put(judgements, tournament(meta)(judgements), places)
            ledger += as_reward(meta.ledger)
            if bias := meta.bias():
                metrics |= {"turned": bias.turned, "shown_first": bias.shown_first}
        if not any(made):
            raise UserError(
                f"stage {stage.id!r}, round {number}: the model prefers no answer to another for any of {len(slots)} "
                "prompts, for its grades are alike, so there is nothing to learn; raise n, judging.n or the "
                "temperatures, or teach it to judge before (docs/self-improvement.md)"
            )
        return referred(self.policy, stage.learning, made, self.world)[0], metrics, ledger


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
