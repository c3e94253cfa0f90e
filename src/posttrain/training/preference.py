"""Learning from answers judged beforehand: pairs, ranked lists or single ones, from a file or self-written."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain import losses
from posttrain.credit.batch import as_row
from posttrain.credit.pairs import pairs, rankings
from posttrain.data.chat import Rendered
from posttrain.data.prepare import Prepared, schedule
from posttrain.forest import Forest, Row, token_statistics
from posttrain.forest.logprobs import States, check_head
from posttrain.models.disk import read_rows, write_rows
from posttrain.models.policy import Policy, load
from posttrain.recipe.objectives import OBJECTIVES, Loss
from posttrain.recipe.preference import Preference
from posttrain.recipe.supervised import Distill
from posttrain.records import Ledger, Rollout, Score, UserError, derive
from posttrain.rewards.protocol import Scorer, spent
from posttrain.sampling.protocol import Sampler
from posttrain.training.batch import (
    Batch,
    LogProbs,
    Metrics,
    asked,
    chosen,
    draws,
    frozen_logprobs,
    pair_sample,
    rejected,
    scored_sample,
)
from posttrain.training.own import Own
from posttrain.training.world import ALONE, World


@dataclass(frozen=True)
class Judged:
    """What one value of the loss is about: answers to one prompt, and what was said of them."""

    rows: tuple[Row, ...]
    """A better and a worse one, perhaps with a third to learn as it stands; a list, the best first; or a single one."""
    rewards: tuple[float, ...]
    """What each is worth, where only their order counts in pairs; 1 and 0 for a label; NaN where it is not known."""
    sample: dict[str, Any]
    """How it looks to a reader."""
    mismatched: Row | None = None
    """KTO's other row: the same prompt with the answer to another one."""
    reference: tuple[float, ...] = ()
    """What the reference says of `rows`, and of `mismatched` after them: summed log-probabilities, nats."""


def _orpo(chosen_P: Tensor, rejected_P: Tensor, *, beta: float) -> Tensor:
    return beta * losses.logistic(chosen_P, rejected_P, beta=1.0)


def _lipo(scores_PK: Tensor, rewards_PK: Tensor, *, beta: float) -> Tensor:
    return losses.lipo(beta * scores_PK, rewards_PK)


FUNCTIONS: dict[Loss, Callable[..., Tensor]] = {
    **{name: losses.TABLE[name].function for name in OBJECTIVES},
    "aot": losses.logistic,  # sorted here, over the whole step
    "aot_paired": losses.logistic,
    "alphapo": losses.logistic,  # listed is what makes its score
    "orpo": _orpo,
    "lipo": _lipo,
}
"""Of the scores of both sides; of scores and rewards [P, K]; or of scores and labels: what `losses.TABLE` lists, but
for five."""
OWN = ("beta", "label_smoothing", "gamma", "tau", "desirable_weight", "undesirable_weight")
"""The parameters that these functions take; the others shape the scores, or the sum of what is minimised."""


class PreferenceMethod(LogProbs):
    """Any loss of `recipe/objectives.py`. What the reference says is known before the first step.

    Where an answer's loss depends on the others of its step, what it depends on is taken over the whole step, in
    passes without a gradient before the others: so it matters neither how the step is cut nor in which order it is.

    Departures. AOT sorts the answers of the step, where TRL sorts those of a micro-batch. KTO's mismatched answers are
    those of other rows of the data, drawn once. Paired BCO has no shift, as in TRL. The NLL term is the mean over all
    tokens of the step's best answers, without the prompts that ORPO's code takes in, and its weight in PRO does not
    grow with the list. Lists are what the policy samples itself.
    """

    period = 1

    def __init__(
        self,
        stage: Preference,
        data: Prepared,
        seed: int,
        judged: list[list[Judged]],
        policy: Policy,
        world: World = ALONE,
    ) -> None:
        some = [s for s, part in enumerate(judged) if part]  # a source that gave nothing leaves the mixture
        self.stage, self.policy, self.world = stage, policy, world
        self.judged = [judged[s] for s in some]
        self.order = draws(stage, self.judged, [data.weights[s] for s in some], seed)
        self.objective, self.function = OBJECTIVES[stage.loss], FUNCTIONS[stage.loss]
        self.own = {name: value for name, value in stage.parameters.items() if name in OWN}
        self.best = 2 if self.objective.of == "triples" else 0
        """Which of its answers the NLL is of."""
        self.means: dict[int, float] = {}
        """Of unpaired BCO: the mean of all scores up to the step before this one, and with this one's."""

    def batch(self, step: int) -> Batch:
        size = self.stage.batch_size
        self.now = [self.judged[s][i] for s, i in self.order[step * size : (step + 1) * size]]
        rows = tuple(row for item in self.now for row in item.rows)
        K = self.stage.width
        tokens = sum(sum(item.rows[self.best].target) for item in self.now)  # the NLL's, the only loss per token
        units = tuple(tuple(range(i, i + K)) for i in range(0, len(rows), K))
        self.whole = self._whole_step(step, rows) if self.objective.whole_step else ()
        counts = losses.Counts(tokens=tokens, sequences=len(rows), pairs=len(self.now))
        return Batch(rows, units, counts, samples=tuple(item.sample for item in self.now[:1]))

    def parameters(self) -> dict[str, nn.Parameter]:
        return {}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"means": list(self.means.items())}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        self.means = dict(state["means"])

    def forward(self, model: nn.Module, forest: Forest, states: States) -> Tensor:
        if self.stage.weighting:
            return token_statistics(model, forest, "collision", states=states)
        return super().forward(model, forest, states)

    def loss(self, batch: Batch, rows: Sequence[int], forest: Forest, outputs: Tensor) -> tuple[Tensor, Metrics]:
        stage, counts, R, K = self.stage, batch.counts, len(rows), self.stage.width
        logps_T = outputs[0] if stage.weighting else outputs
        target_T, sequence_T = forest.target_T, forest.sequence_T
        at_P = torch.tensor([row // K for row in rows[::K]])  # rows come in units, in their order
        items = [self.now[p] for p in at_P.tolist()]
        sums_R = _sums(logps_T, target_T, sequence_T, R, stage.length_alpha)
        scores_PK = self._scores(sums_R, target_T, sequence_T, items).view(-1, K)
        loss_P = self._losses(scores_PK, items, at_P)
        if stage.weighting:
            weight_R = losses.wpo_weight(logps_T, outputs[1], target_T, sequence_T, R)
            loss_P = loss_P * weight_R.view(-1, K).prod(1)
        loss = losses.reduce_pairs(loss_P, counts)
        if stage.nll_weight:
            is_best_T = target_T & (sequence_T % K == self.best)
            loss = loss + stage.nll_weight * losses.reduce_tokens(losses.nll(logps_T), is_best_T, counts)
        whole_R = _sums(logps_T.detach(), target_T, sequence_T, R, None)
        return loss, self._metrics(scores_PK.detach(), whole_R.view(-1, K), items, counts)

    def _scores(self, sums_R: Tensor, target_T: Tensor, sequence_T: Tensor, items: Sequence[Judged]) -> Tensor:
        """`scores_R`: what the loss compares."""
        stage = self.stage
        if self.objective.reference:
            reference = [x for item in items for x in item.reference[: stage.width]]
            sums_R = sums_R - torch.tensor(reference, dtype=sums_R.dtype)
        if stage.divergence is not None:
            shape: dict[str, float] = {} if stage.alpha is None else {"alpha": stage.alpha}
            sums_R = losses.divergence(sums_R, stage.divergence, **shape)
        if self.objective.score == "sum":
            return sums_R
        tokens_R = _sums(torch.ones_like(target_T, dtype=sums_R.dtype), target_T, sequence_T, len(sums_R), None)
        means_R = sums_R / tokens_R
        if self.objective.score == "odds":
            return losses.log_odds(means_R)
        if self.objective.score == "alpha":
            return losses.alpha_length(means_R, alpha=stage.parameters["alpha"])
        return means_R

    def _losses(self, scores_PK: Tensor, items: Sequence[Judged], at_P: Tensor) -> Tensor:
        """`loss_P`."""
        own, whole = self.own, [constant.to(scores_PK.dtype) for constant in self.whole]
        rewards_PK = torch.tensor([item.rewards for item in items], dtype=scores_PK.dtype)
        if self.objective.of == "lists":
            return self.function(scores_PK, rewards_PK, **own)
        if self.objective.of == "answers":
            return self.function(scores_PK[:, 0], rewards_PK[:, 0] > 0.5, *whole, **own)
        chosen_P, rejected_P = scores_PK[:, 0], scores_PK[:, 1]
        if self.stage.loss == "aot_paired":
            return self.function(chosen_P - rejected_P, whole[0][at_P], **own)
        if self.stage.loss == "aot":
            # The partner of each in the sorted step is a constant, so every term is there twice, with the gradient of
            # one side each; the value, which is then twice the loss, is halved.
            both_P = self.function(chosen_P, whole[0][at_P], **own) + self.function(whole[1][at_P], rejected_P, **own)
            return both_P - both_P.detach() / 2
        return self.function(chosen_P, rejected_P, **own)

    def _whole_step(self, step: int, rows: Sequence[Row]) -> tuple[Tensor, ...]:
        """What the loss must know of the whole step, from the weights of now: constants, float64."""
        loss, now = self.stage.loss, self.now
        apart = loss == "kto"
        passed = [item.mismatched for item in now if item.mismatched] if apart else rows
        logps = frozen_logprobs(self.policy, passed, self.stage.tokens_per_forward, world=self.world)
        sums = torch.tensor([math.fsum(row) for row in logps], dtype=torch.float64)
        reference = [x for item in now for x in item.reference[self.stage.width if apart else 0 :]]
        ratios = sums - torch.tensor(reference, dtype=torch.float64)
        if apart:
            return (losses.kto_kl(ratios),)
        if loss == "bco_unpaired":
            before, count = self.means.get(step - 1, 0.0), step * self.stage.batch_size
            after, _ = losses.running_mean(before, count, self.own["beta"] * ratios)
            self.means = {step - 1: before, step: after}
            return (torch.tensor(after, dtype=torch.float64),)
        chosen_P, rejected_P = ratios.view(-1, 2).unbind(1)
        if loss == "aot":
            return _ranked_as(chosen_P, rejected_P), _ranked_as(rejected_P, chosen_P)
        # Paired: margins of the policy against the reference's of the same rank. Scores are ratios, so that a margin
        # has the reference's own taken off already.
        of_reference_P = -torch.tensor(reference, dtype=torch.float64).view(-1, 2).diff().squeeze(1)
        margins_P = chosen_P - rejected_P + of_reference_P
        return (_ranked_as(margins_P, of_reference_P) - of_reference_P,)

    def _metrics(
        self, scores_PK: Tensor, logps_PK: Tensor, items: Sequence[Judged], counts: losses.Counts
    ) -> dict[str, float]:
        scale = self.own.get("beta", 1.0)
        if self.objective.of == "answers":
            good_P = torch.tensor([item.rewards[0] > 0.5 for item in items])
            n_good = sum(item.rewards[0] > 0.5 for item in self.now)
            sides = {"chosen": (good_P, n_good), "rejected": (~good_P, len(self.now) - n_good)}
            found = {f"{side}_logp": (logps_PK[mask_P, 0].sum() / n).item() for side, (mask_P, n) in sides.items() if n}
            if n_good and n_good < len(self.now):
                mean_P = good_P / n_good - (~good_P).to(scores_PK.dtype) / (len(self.now) - n_good)
                found["margin"] = (scale * mean_P * scores_PK[:, 0]).sum().item()
            return found
        last_P = torch.tensor([sum(not math.isnan(r) for r in item.rewards) - 1 for item in items])[:, None]
        margin_P = scale * (scores_PK[:, 0] - scores_PK.gather(1, last_P).squeeze(1))
        shares = {
            "margin": margin_P,
            "accuracy": (margin_P > 0).to(margin_P.dtype),
            "chosen_logp": logps_PK[:, 0],
            "rejected_logp": logps_PK.gather(1, last_P).squeeze(1),
        }
        return {name: losses.reduce_pairs(value_P, counts).item() for name, value_P in shares.items()}


def _sums(logps_T: Tensor, target_T: Tensor, sequence_T: Tensor, R: int, length_alpha: float | None) -> Tensor:
    """[R]: what the target tokens of each row sum up to, those beyond the other side's length by `length_alpha`."""
    if length_alpha is not None and length_alpha < 1:
        return losses.desensitised(logps_T, target_T, sequence_T, alpha=length_alpha)
    return losses.segment_sum(logps_T[target_T], sequence_T[target_T], R)


def _ranked_as(values_P: Tensor, others_P: Tensor) -> Tensor:
    """For each of `values_P` the one of `others_P` that has its rank."""
    return others_P.sort().values[values_P.argsort(stable=True).argsort()]


def judged_from_data(policy: Policy, stage: Preference, data: Prepared, seed: int) -> list[list[Judged]]:
    """Pairs or labelled answers as they stand in the data, one list a source.

    Of a large file only as many as the stage's steps come to, drawn at random: the reference must read each.

    Raises:
        UserError: labelled answers are of one kind.
    """
    sizes, slots = [len(rows) for rows in data.rows], stage.steps * stage.batch_size
    used = sorted(set(schedule(sizes, data.weights, slots, derive(seed, stage.id, "rows"))))
    rows = [[part[i] for source, i in used if source == s] for s, part in enumerate(data.rows)]
    single = OBJECTIVES[stage.loss].of == "answers"
    if single:
        check_labels(stage, rows)
    made = [[*map(_labelled if single else _paired, part)] for part in rows]
    return _mismatched(policy, stage, made, seed) if stage.loss == "kto" else made


def check_labels(stage: Preference, rows: Iterable[Sequence[Rendered]]) -> None:
    """Refuse labelled answers (a list for each source) that are all good or all bad: they would push the policy one
    way, whatever it is asked, and that would look like learning.

    Raises:
        UserError: so they are.
    """
    labels = [bool(row.example.label) for part in rows for row in part]
    good = sum(labels)
    if good in (0, len(labels)):
        raise UserError(
            f"stage {stage.id!r}: loss {stage.loss} learns what tells good answers from bad ones, and of "
            f"{len(labels)} to learn from {good} are labelled good and {len(labels) - good} bad; give rows of both "
            "labels (or more steps, if there are both). Good answers alone are for a stage of kind sft"
        )


def _paired(rendered: Rendered) -> Judged:
    return Judged((chosen(rendered), rejected(rendered)), (1.0, 0.0), pair_sample(rendered.example))


def _labelled(rendered: Rendered) -> Judged:
    example = rendered.example
    text = str(example.completion[-1].get("content", ""))
    sample = {"prompt": asked(example), "text": text, "outcome": "good" if example.label else "bad"}
    return Judged((chosen(rendered),), (float(bool(example.label)),), sample)


def _mismatched(policy: Policy, stage: Preference, made: list[list[Judged]], seed: int) -> list[list[Judged]]:
    """Each with the answer of the next in a random round, cut where the model's context ends."""
    order = [(s, i) for s, part in enumerate(made) for i in range(len(part))]
    random.Random(derive(seed, stage.id, "mismatched")).shuffle(order)
    found = [list(part) for part in made]
    for (s, i), (t, j) in zip(order, [*order[1:], order[0]], strict=True):
        own, other = made[s][i].rows[0], made[t][j].rows[0]
        room = policy.context - len(own.context)
        row = Row(own.context, other.completion[:room], other.target[:room])
        found[s][i] = replace(made[s][i], mismatched=row)
    return found


def ranked(rollouts: Sequence[Rollout], scores: Sequence[Score], members: Sequence[int]) -> Judged:
    """Those of the answers that are `members`, all to one prompt, the best first and what has no score last."""
    rewards = tuple(math.nan if (value := scores[i].value) is None else value for i in members)
    best, worst = members[0], [i for i, reward in zip(members, rewards, strict=True) if not math.isnan(reward)][-1]
    sample = scored_sample(rollouts[best], scores[best]) | {"rejected": rollouts[worst].text}
    return Judged(tuple(as_row(rollouts[i]) for i in members), rewards, sample)


def judged_on_policy(
    policy: Policy, stage: Preference, data: Prepared, sampler: Sampler, score: Scorer, seed: int
) -> tuple[list[list[Judged]], Ledger, dict[str, float]]:
    """What the policy writes itself: of each prompt's answers a best and a worst (and the data's own, for a triple), or
    all of them in their order.

    Token ids are kept as sampled. A prompt whose answers all score alike gives nothing.

    Raises:
        UserError: no prompt gives anything, or the loss cannot take such rewards.
    """
    how, of = stage.on_policy, OBJECTIVES[stage.loss].of
    assert how is not None
    order = schedule(
        [len(rows) for rows in data.rows], data.weights, how.prompts, derive(seed, stage.id, "pair prompts")
    )
    prompts = [data.rows[s][i].example for s, i in order]
    rollouts, ledger = Own(sampler, policy, stage)(prompts, how.n, how, derive(seed, stage.id, "pairs"))
    rng = random.Random(derive(seed, stage.id, "ties"))
    made: list[list[Judged]] = [[] for _ in data.rows]
    scores = score(rollouts)
    known = [s.value for s in scores if s.value is not None]
    if stage.loss == "lipo" and (outside := [value for value in known if not 0 <= value <= 1]):
        raise UserError(
            f"stage {stage.id!r}: loss lipo weighs pairs by 2 to the rewards, which must lie between 0 and 1, and one "
            f"is {outside[0]:g}; score by a verifier, or by a judge with compare: true, or take loss rrhf or pro, "
            "which go by the order alone"
        )
    found: Sequence[Sequence[int]] = rankings(rollouts, scores) if of == "lists" else pairs(rollouts, scores, rng)
    for members in found:
        item, (source, i) = ranked(rollouts, scores, members), order[rollouts[members[0]].group]
        if of == "triples":
            own = chosen(data.rows[source][i])
            item = replace(item, rows=(*item.rows, own), rewards=(*item.rewards, math.nan))
        made[source].append(item)
    if not any(made):
        raise UserError(
            f"stage {stage.id!r}: none of {how.prompts} prompts gave answers of different score "
            f"({len(scores) - len(known)} of {len(scores)} answers have none), so there is no pair to learn from; "
            "raise on_policy.n or temperature, or choose a task that the model solves sometimes"
        )
    facts = {
        "prompts": how.prompts,
        of: sum(map(len, made)),
        "correct": sum(s.outcome == "correct" for s in scores) / len(scores),
    }
    return made, ledger + spent(scores), facts


def referred(
    policy: Policy, stage: Preference, judged: list[list[Judged]], world: World = ALONE
) -> tuple[list[list[Judged]], dict[str, str]]:
    """The same with what the reference says of them, and the reference's digest where it is not the policy itself.

    A loss without a reference costs no pass.

    Raises:
        UserError: the reference cannot be had, or has another vocabulary.
    """
    if not OBJECTIVES[stage.loss].reference:
        return judged, {}
    model, facts = policy, {}
    if stage.reference is not None:
        model = second_model(policy, stage, partial(load, device=policy.model.device.type))
        check_head(model.model)
        facts = {"reference": model.digest()}
    items = [item for part in judged for item in part]
    rows = [row for item in items for row in item.rows]
    others = [item.mismatched for item in items if item.mismatched is not None]
    logps = frozen_logprobs(model, [*rows, *others], stage.tokens_per_forward, world=world)
    sums = iter(_row_sums(rows, logps[: len(rows)], stage.length_alpha))
    more = iter(_row_sums(others, logps[len(rows) :], None))

    def known(item: Judged) -> Judged:
        own = [next(sums) for _ in item.rows]
        return replace(item, reference=(*own, *([] if item.mismatched is None else [next(more)])))

    return [[known(item) for item in part] for part in judged], facts


def _row_sums(rows: Sequence[Row], logps: Sequence[Sequence[float]], length_alpha: float | None) -> list[float]:
    logps_T = torch.tensor([x for row in logps for x in row], dtype=torch.float64)
    target_T = torch.tensor([t for row in rows for t in row.target], dtype=torch.bool)
    sequence_T = torch.tensor([r for r, row in enumerate(rows) for _ in row.target], dtype=torch.long)
    return [float(x) for x in _sums(logps_T, target_T, sequence_T, len(rows), length_alpha)]


def second_model(policy: Policy, stage: Preference | Distill, make: Callable[..., Policy]) -> Policy:
    """The stage's teacher, or its reference where that is another model, in the policy's precision; `make` is `load` or
    `outline`.

    Raises:
        UserError: it cannot be had, or has another vocabulary.
    """
    name, other = ("teacher", stage.teacher) if isinstance(stage, Distill) else ("reference", stage.reference)
    assert other is not None
    model = make(other.source, revision=other.revision, dtype=str(policy.model.dtype).removeprefix("torch."))
    ours, theirs = policy.tokenizer.get_vocab(), model.tokenizer.get_vocab()
    apart = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if apart:
        ids = (f"{tokens[apart[0]]}" if apart[0] in tokens else "nothing" for tokens in (ours, theirs))
        raise UserError(
            f"stage {stage.id!r}: {name} {other.source} has not the policy's vocabulary: of {len(theirs)} and "
            f"{len(ours)} tokens, and {len(apart)} are not the same ({apart[0]!r} is {' here and '.join(ids)} there); "
            f"its log-probabilities would be of other text. Take a {name} with the policy's own tokenizer"
        )
    return model


def write_judged(path: Path, kept: list[list[Judged]]) -> None:
    """Keep them with what the reference says, so that a continued run neither samples nor asks it again."""

    def line(source: int, item: Judged) -> dict[str, Any]:
        rows = [*item.rows, *([] if item.mismatched is None else [item.mismatched])]
        return {
            "source": source,
            "prompt_ids": item.rows[0].context,
            "rows": [[row.completion, row.target] for row in rows],
            "rewards": [None if math.isnan(reward) else reward for reward in item.rewards],
            "reference": item.reference,
            "sample": item.sample,
        }

    write_rows(path, [line(source, item) for source, part in enumerate(kept) for item in part])


def read_judged(path: Path, sources: int) -> list[list[Judged]]:
    found: list[list[Judged]] = [[] for _ in range(sources)]
    for kept in read_rows(path):
        context = tuple(kept["prompt_ids"])
        rows = [Row(context, *(tuple(x) for x in row)) for row in kept["rows"]]
        rewards = tuple(math.nan if reward is None else reward for reward in kept["rewards"])
        other = rows[len(rewards)] if len(rows) > len(rewards) else None
        own = tuple(rows[: len(rewards)])
        item = Judged(own, rewards, kept["sample"], other, tuple(kept["reference"]))
        found[kept["source"]].append(item)
    return found
