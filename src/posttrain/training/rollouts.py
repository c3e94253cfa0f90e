"""What a batch of rollouts is to the policy gradients: drawn, credited, learned in parts, and watched."""

from __future__ import annotations

import dataclasses
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.credit.batch import as_row, groups
from posttrain.data.prepare import schedule
from posttrain.forest import Forest
from posttrain.forest.logprobs import States, token_statistics
from posttrain.losses import Counts, clipped_share, importance, kl, ratio
from posttrain.losses.policy import Level, entropy_bonus
from posttrain.recipe.rl import Grpo, Ppo
from posttrain.records import Failure, Ledger, Rollout, Score, UserError, derive
from posttrain.rewards.protocol import Scorer
from posttrain.sampling.protocol import Answer
from posttrain.training.batch import Batch, Metrics, draws, interval, scored_sample
from posttrain.training.own import OwnMethod, Scored, Slot, with_scores
from posttrain.training.world import World

BOUNDS = (0.5, 0.8, 0.9, 0.98, 0.999, 1.001, 1.02, 1.1, 1.25, 2.0)
"""Of the bins in which ratios are counted."""
LENGTHS = 8
"""Bins in which completions are counted by their length."""


def shared(score: Scorer, world: World) -> Scorer:
    """`score`, which all workers of `world` call together: each has it score the answers to its share of the prompts,
    and gets the scores of all. Answers to one prompt stay together, for some rewards compare them.

    Raises:
        UserError, Failure: what `score` raised on one worker, on all of them.
    """
    if world.size == 1:
        return score

    def scored(rollouts: Sequence[Rollout]) -> list[Score]:
        mine = [i for group in groups(rollouts)[world.rank :: world.size] for i in group]
        given: dict[int, Score] | UserError | Failure = {}
        try:
            if mine:
                given = dict(zip(mine, score([rollouts[i] for i in mine]), strict=True))
        except (UserError, Failure) as error:
            given = error
        found: dict[int, Score] = {}
        for part in world.gather(given):
            if isinstance(part, UserError | Failure):
                raise part
            found |= part
        return [found[i] for i in range(len(rollouts))]

    return scored


def sampled_at(stage: Grpo | Ppo, step: int) -> int:
    """The step before which the weights stand that sample the rollouts of `step`, where a batch begins.

    They are `staleness` batches old, but never from before the last checkpoint: so a run that continues there finds
    nothing on its way, asks for what the undisturbed run asked for, and counts nothing twice.
    """
    every = interval(stage.checkpoint_every, stage.period)
    return max(step - stage.staleness * stage.period, step // every * every)


class RolloutMethod(OwnMethod, ABC):
    """Rollouts are drawn every `period` steps, and what has nothing to teach is not computed.

    A subclass says what each token is worth (`credit`) and what is minimised (`objective`), and makes of `policy_loss`
    its `loss`.

    Departure from the papers: sampler and trainer are kept apart. A ratio is that to the trainer's log-probabilities
    when a batch was first used; from the sampler's they differ by rounding, or by another engine's mathematics, which
    an importance weight corrects for.
    """

    stage: Grpo | Ppo
    objective: Callable[..., Tensor]
    """A loss of losses/policy.py with its parameters."""
    level: Level = "token"
    """Of its ratio."""
    clip: Mapping[str, Any] | None = None
    """Its bounds, where it is `policy_gradient`."""
    always = False
    """Whether a completion worth nothing is computed too, for another term of the loss."""

    def __init__(self, stage: Grpo | Ppo, *args: Any, **kwargs: Any) -> None:
        super().__init__(stage, *args, **kwargs)
        self.period = stage.period
        self.order = draws(stage, self.data.rows, self.data.weights, self.seed, self.period, stage.curriculum)
        self.reference = self.policy.snapshot() if stage.kl_weight else None
        self.pending: dict[int, tuple[list[Slot], Answer]] = {}
        """What was asked for the batch that begins with a step."""
        self.solved: dict[Slot, tuple[int, int]] = {}
        """Of each prompt how many answers were right, of how many; kept for a curriculum."""

    @abstractmethod
    def credit(self, rollouts: Sequence[Rollout], scores: Sequence[Score]) -> list[list[float] | None]:
        """What each token of each completion is worth; None for one without a score. May add to `told`, the
        metrics, and to `spent`, what the batch cost."""

    # What a checkpoint holds

    def parameters(self) -> dict[str, nn.Parameter]:
        return {}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        reference = self.reference if self.stage.reference_reset else None  # else it is what the stage starts from
        return reference or {}, {"solved": [[*slot, *count] for slot, count in self.solved.items()]}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        if tensors:
            self.reference = dict(tensors)
        self.solved = {(source, row): (right, tried) for source, row, right, tried in state["solved"]}

    # A batch of rollouts

    def batch(self, step: int) -> Batch:
        first = step % self.period == 0
        if first:
            self._begin(step)
        self.members, batch = self.parts[step % self.period]
        self.fresh = first and not any(self.old)
        return batch

    def _begin(self, step: int) -> None:
        stage = self.stage
        if self.reference is not None and stage.reference_reset and step and step % stage.reference_reset == 0:
            self.reference = self.policy.snapshot()
        self.told: dict[str, float] = {}
        drawn, kept, self.spent = self.draw(step)
        rollouts, scores = [r for r, _ in kept], [s for _, s in kept]
        scored = [i for i, s in enumerate(scores) if s.value is not None]
        self.behaviour = [r.logps for r in rollouts]
        self.sampled = [r.sampled for r in rollouts]
        self.old: list[Sequence[float] | None] = [None] * len(rollouts)
        self.references: list[Sequence[float] | None] = [None] * len(rollouts)
        if self.reference is not None:
            with self.policy.swapped(self.reference):
                self._put(self.references, scored, rollouts)
        self.advantages = self.credit(rollouts, scores)
        # The denominators count what is worth nothing too, for a zero is an answer, but not what is unscored.
        learned = [i for i in scored if not (stage.mask_truncated and rollouts[i].finish == "length")]
        if stage.minibatches > 1 and not any(self.old):  # all but the first meet weights that have moved
            self._put(self.old, learned, rollouts)
        shuffle = random.Random(derive(self.seed, stage.id, "minibatches", step)).shuffle
        self.parts = []
        for _ in range(stage.iterations):
            order = list(learned)
            if stage.minibatches > 1:
                shuffle(order)
            self.parts += [self._part(rollouts, order[k :: stage.minibatches]) for k in range(stage.minibatches)]
        members, first = self.parts[0]
        metrics = {**measured(drawn, stage.whole.max_new_tokens), **self.told}
        samples = tuple(scored_sample(*one) for one in drawn[:2])
        self.parts[0] = members, dataclasses.replace(first, metrics=metrics, samples=samples, ledger=self.spent)

    def _part(self, rollouts: Sequence[Rollout], learned: Sequence[int]) -> tuple[list[int], Batch]:
        """What one step learns from, and which rollouts its rows are."""
        members = [i for i in learned if self.always or any(self.advantages[i] or ())]
        counts = Counts(tokens=sum(rollouts[i].sampled for i in learned), sequences=len(learned))
        rows = tuple(as_row(rollouts[i]) for i in members)
        return members, Batch(rows, tuple((i,) for i in range(len(rows))), counts)

    def draw(self, step: int) -> tuple[list[Scored], list[Scored], Ledger]:
        """All that was sampled for a step, the part of it that the step learns from, and what it cost."""
        drawn, ledger = self.sample(step)
        return drawn, drawn, ledger

    def sample(self, step: int, again: int = 0) -> tuple[list[Scored], Ledger]:
        """Rollouts for a step with their scores: its own, or the `again`-th further ones."""
        stage = self.stage
        if again:
            slots = self._further(step, again)
            answer = self._ask(slots, "step", step, "again", again)
        else:
            for later in range(step, stage.steps, self.period):
                if sampled_at(stage, later) == step:  # the weights of now have to sample these
                    slots = self._prompts(later)
                    self.pending[later] = slots, self._ask(slots, "step", later)
            slots, answer = self.pending.pop(step)
        drawn, ledger = with_scores(self.score, *answer())
        if stage.curriculum > 1:
            for rollout, score in drawn:
                right, tried = self.solved.get(slots[rollout.group], (0, 0))
                self.solved[slots[rollout.group]] = right + (score.outcome == "correct"), tried + 1
        return drawn, ledger

    def _ask(self, slots: Sequence[Slot], *names: str | int) -> Answer:
        stage = self.stage
        prompts = [self.data.rows[source][row].example for source, row in slots]
        return self.sampler.request(prompts, stage.n, stage.sampling, derive(self.seed, stage.id, *names))

    def _prompts(self, step: int) -> list[Slot]:
        """The next `batch_size` prompts; with a curriculum those of the next few times as many that it chooses."""
        stage = self.stage
        look = stage.batch_size * stage.curriculum
        candidates = self.order[step // self.period * look :][:look]
        if stage.curriculum == 1:
            return candidates

        def from_half(slot: Slot) -> tuple[bool, float]:
            right, tried = self.solved.get(slot, (0, 0))
            return tried > 0, abs((right + 1) / (tried + 2) - 0.5)  # a share of few answers is uncertain

        return [*sorted(dict.fromkeys(candidates), key=from_half), *candidates][: stage.batch_size]

    def _further(self, step: int, again: int) -> list[Slot]:
        """Prompts drawn for this step alone: however many it needs, those of other steps stay what they are."""
        size, sizes = self.stage.batch_size, [len(rows) for rows in self.data.rows]
        order = schedule(sizes, self.data.weights, again * size, derive(self.seed, self.stage.id, "further", step))
        return order[-size:]

    def _put(self, into: list[Sequence[float] | None], members: Sequence[int], rollouts: Sequence[Rollout]) -> None:
        """The log-probabilities that the model of now gives the tokens of these rollouts."""
        for i, logps in zip(members, self.logprobs([as_row(rollouts[i]) for i in members]), strict=True):
            into[i] = logps

    def penalties(self, weight: float) -> list[list[float]]:
        """`weight` times the estimate of the KL from the reference at each token, of the policy that sampled it; 0
        without a reference. Tells the mean KL."""
        if self.reference is None:
            return [[0.0] * len(logps) for logps in self.behaviour]
        flat = [x for logps in self.behaviour for x in logps]
        known = [r if r is not None else b for b, r in zip(self.behaviour, self.references, strict=True)]
        sampled_T = torch.tensor(flat, dtype=torch.float64)
        reference_T = torch.tensor([x for logps in known for x in logps], dtype=torch.float64)
        kl_T = kl(sampled_T, reference_T, torch.ones(len(flat), dtype=torch.bool), self.stage.kl_estimator)
        scored = sum(n for n, logps in zip(self.sampled, self.references, strict=True) if logps is not None)
        if scored:
            self.told["kl"] = kl_T.sum().item() / scored
        lengths = [len(logps) for logps in self.behaviour]
        return [part.tolist() for part in (weight * kl_T).split(lengths)]

    # The loss

    def forward(self, model: nn.Module, forest: Forest, states: States) -> Tensor:
        """[T] log-probabilities; where entropies have a weight [2, T], with them."""
        if self.stage.entropy_weight:
            return token_statistics(model, forest, "entropy", temperature=self.temperature, states=states)
        return super().forward(model, forest, states)

    def spread(self, values: Sequence[Sequence[float] | None], rows: Sequence[int], forest: Forest) -> Tensor:
        """[T]: what is known of each rollout's tokens, for the rollouts of this pass."""
        return forest.spread([values[self.members[row]] or () for row in rows])

    def policy_loss(
        self, batch: Batch, rows: Sequence[int], forest: Forest, outputs_KT: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, float | Mapping[str, float]]]:
        """`loss_T`, not yet reduced, the old log-probabilities `old_T`, and what was measured."""
        stage, target_T, sequence_T, logps_T = self.stage, forest.target_T, forest.sequence_T, outputs_KT[0]
        if self.fresh:
            old_T = logps_T.detach()
            for row, (start, stop) in zip(rows, forest.spans, strict=True):
                self.old[self.members[row]] = old_T[start:stop].tolist()
        else:
            old_T = self.spread(self.old, rows, forest).to(logps_T.dtype)
        behaviour_T = self.spread(self.behaviour, rows, forest).to(logps_T.dtype)
        advantages_T = self.spread(self.advantages, rows, forest).to(logps_T.dtype)
        correction_T = importance(old_T, behaviour_T, target_T, how=stage.importance, cap=stage.importance_cap)
        tokens = logps_T, old_T, advantages_T, target_T, sequence_T
        loss_T = correction_T * self.objective(*tokens)
        if stage.entropy_weight:
            loss_T = loss_T + stage.entropy_weight * entropy_bonus(outputs_KT[1], target_T)
        apart_N = (old_T - behaviour_T)[target_T].exp()
        moved_N = ratio(logps_T.detach(), old_T, target_T, sequence_T, self.level)[target_T]
        stats = ratios("mismatch", apart_N) | ratios("ratio", moved_N)
        if self.clip is not None:
            stats["clipped"] = clipped_share(*tokens, batch.counts, **self.clip).item()
        return loss_T, old_T, stats


def ratios(name: str, ratio_N: Tensor) -> dict[str, float | Mapping[str, float]]:
    """The lowest and the highest, and how many lie between which bounds."""
    bounds = torch.tensor(BOUNDS, dtype=ratio_N.dtype)
    counts = torch.bucketize(ratio_N.detach(), bounds).bincount(minlength=len(BOUNDS) + 1).tolist()
    labels = [f"to {BOUNDS[0]}", *(f"{low} to {high}" for low, high in pairwise(BOUNDS))]
    binned = dict(zip([*labels, f"above {BOUNDS[-1]}"], counts, strict=True))
    return {f"{name}_min": ratio_N.min().item(), f"{name}_max": ratio_N.max().item(), f"{name}_counts": binned}


def measured(drawn: Sequence[Scored], longest: int) -> Metrics:
    """What a batch of rollouts shows before anything is learned from it; `longest` is how many tokens one may have."""
    rollouts, scores = [r for r, _ in drawn], [s for _, s in drawn]
    lengths = [r.sampled for r in rollouts]
    rewards = {i: s.value for i, s in enumerate(scores) if s.value is not None}
    members = groups(rollouts)
    found: dict[str, float | Mapping[str, float]] = {"reward": _mean(list(rewards.values()))}
    for name in dict.fromkeys(name for s in scores for name in s.parts):
        found[f"reward/{name}"] = _mean([s.parts[name] for s in scores if name in s.parts])
    if len(members) < len(rollouts):
        found["signal"] = _mean([len({rewards[i] for i in group if i in rewards}) > 1 for group in members])
    else:
        members = [list(range(len(rollouts)))]  # one completion for each prompt: compared with one another
    width = -(-longest // LENGTHS)
    starts = range(1, longest + 1, width)
    by_length: list[list[float]] = [[] for _ in starts]
    for i, reward in rewards.items():
        by_length[min((lengths[i] - 1) // width, len(starts) - 1)].append(reward)
    labels = [f"{start} to {min(start + width - 1, longest)}" if width > 1 else str(start) for start in starts]
    found |= {
        "length": _mean(lengths),
        "length_reward": _correlation([[(lengths[i], rewards[i]) for i in g if i in rewards] for g in members]),
        "length_counts": dict(zip(labels, map(len, by_length), strict=True)),
        "length_rewards": dict(zip(labels, map(sum, by_length), strict=True)),
        "unparsed": _mean([s.outcome == "unparsed" for s in scores]),
        "unscored": 1 - len(rewards) / len(scores),
        "truncated": _mean([r.finish == "length" for r in rollouts]),
        "entropy": -sum(sum(r.logps) for r in rollouts) / sum(lengths),
    }
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _correlation(by_group: Sequence[Sequence[tuple[float, float]]]) -> float:
    """Pearson's, of pairs from their group's means: a prompt with long answers and high rewards is no evidence."""
    xs, ys = [], []
    for group in by_group:
        x_mean, y_mean = _mean([x for x, _ in group]), _mean([y for _, y in group])
        xs += [x - x_mean for x, _ in group]
        ys += [y - y_mean for _, y in group]
    scale = math.sqrt(sum(x * x for x in xs) * sum(y * y for y in ys))
    return sum(x * y for x, y in zip(xs, ys, strict=True)) / scale if scale > 1e-12 else math.nan
