"""Distillation: what a larger model would say next, learned by a smaller one with the same vocabulary."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from posttrain.credit.batch import as_row
from posttrain.data.chat import Rendered
from posttrain.data.prepare import Prepared, with_answers
from posttrain.forest import Forest, hidden_states
from posttrain.forest.logprobs import CHUNK, States, check_head, head
from posttrain.losses import jsd, nll, reduce_tokens
from posttrain.models.cost import forward_flops_per_token
from posttrain.models.disk import read_rows, write_rows
from posttrain.models.policy import Policy, load
from posttrain.recipe.supervised import Distill
from posttrain.records import Ledger, Rollout, derive
from posttrain.sampling.protocol import Sampler
from posttrain.training.batch import Batch, Metrics, asked, chosen, draws, singly
from posttrain.training.own import Own
from posttrain.training.preference import second_model


def teacher_of(policy: Policy, stage: Distill) -> Policy:
    """The stage's teacher, on the policy's device.

    Raises:
        UserError: it cannot be had, has another vocabulary, or makes its logits in a way of its own.
    """
    teacher = second_model(policy, stage, partial(load, device=policy.model.device.type))
    check_head(teacher.model)
    return teacher


def token_divergences(
    student: nn.Module,
    teacher: nn.Module,
    forest: Forest,
    *,
    beta: float,
    temperature: float,
    states: States = hidden_states,
) -> Tensor:
    """[2, T], nats, 0 where there is no target: `losses.jsd` of the two distributions that a target token may come
    from, and the log-probability that the student gives the token.

    The gradient is the student's alone. No more than one chunk of either's logits exists at a time, in the backward
    pass too, where they are computed again. Released models of one tokenizer may differ in the number of their logits,
    for they pad their vocabularies differently: what only one of them has is left out of the divergence.
    """
    with torch.no_grad():
        theirs_ND = states(teacher, forest)[forest.predicting_N]
    ours_ND = states(student, forest)[forest.predicting_N]

    def measure(ours_CD: Tensor, theirs_CD: Tensor, ids_C: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_CV = _precise(head(teacher, theirs_CD))
        student_CV = _precise(head(student, ours_CD))
        logps_C = student_CV.gather(1, ids_C[:, None]).squeeze(1) - student_CV.logsumexp(1)
        V = min(student_CV.shape[1], teacher_CV.shape[1])
        return torch.stack([jsd(student_CV[:, :V], teacher_CV[:, :V], beta=beta, temperature=temperature), logps_C])

    at_N = forest.target_T.nonzero().squeeze(1)
    ids_N = forest.ids_T[at_N].to(ours_ND.device)
    chunks = zip(*(all_N.split(CHUNK) for all_N in (ours_ND, theirs_ND, ids_N)), strict=True)
    found = torch.cat([checkpoint(measure, *chunk, use_reentrant=False) for chunk in chunks], dim=-1).to(at_N.device)
    return found.new_zeros(2, len(forest)).index_copy(-1, at_N, found)


def _precise(logits_CV: Tensor) -> Tensor:
    return logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()


class DistillMethod:
    """Mean divergence of student and teacher over all target tokens of the step (GKD, Agarwal et al., 2306.13649), on
    the data's answers and, on-policy, on a share of the student's own. With `beta` 1 on these alone it is the
    single-step part of MiniLLM (Gu et al., 2306.08543).

    Departures from GKD. Who answers is drawn for each prompt, where its Algorithm 1 draws it for a whole step. Its
    loss is a mean over sequences of their means; here every token weighs the same. The sampler's own randomness is no
    part of the gradient, as in the paper.
    """

    period = 1

    def __init__(
        self, stage: Distill, data: Prepared, policy: Policy, teacher: Policy, sampler: Sampler, seed: int
    ) -> None:
        self.stage, self.data, self.teacher, self.seed = stage, data, teacher, seed
        self.sampler = Own(sampler, policy, stage)
        self.order = draws(stage, data.rows, data.weights, seed)
        self.share = stage.student_share if stage.mode == "on_policy" else 0.0

    def batch(self, step: int) -> Batch:
        stage, size = self.stage, self.stage.batch_size
        items = [self.data.rows[s][i] for s, i in self.order[step * size : (step + 1) * size]]
        rng = random.Random(derive(self.seed, stage.id, "who answers", step))
        own = [i for i in range(size) if rng.random() < self.share]
        rollouts, ledger = self._sample([items[i] for i in own], step)
        answers = {own[r.group]: as_row(r) for r in rollouts}
        rows = [answers[i] if i in answers else chosen(item) for i, item in enumerate(items)]
        config = self.teacher.model.config
        ledger += Ledger(flops=sum(forward_flops_per_token(config, len(row)) * len(row) for row in rows))
        metrics = {}
        if rollouts:
            metrics["length"] = sum(len(r.ids) for r in rollouts) / len(rollouts)
            metrics["truncated"] = sum(r.finish == "length" for r in rollouts) / len(rollouts)
        samples = tuple({"prompt": asked(r.example), "text": r.text} for r in rollouts[:1])
        return singly(rows, metrics=metrics, samples=samples, ledger=ledger)

    def _sample(self, items: Sequence[Rendered], step: int) -> tuple[list[Rollout], Ledger]:
        """What the student of now answers."""
        if not items:
            return [], Ledger()
        seed = derive(self.seed, self.stage.id, "step", step)
        return self.sampler([item.example for item in items], 1, self.stage.sampling, seed)

    def forward(self, model: nn.Module, forest: Forest, states: States) -> Tensor:
        how = {"beta": self.stage.beta, "temperature": self.stage.temperature}
        return token_divergences(model, self.teacher.model, forest, states=states, **how)

    def loss(self, batch: Batch, rows: Sequence[int], forest: Forest, outputs_KT: Tensor) -> tuple[Tensor, Metrics]:
        loss = reduce_tokens(outputs_KT[0], forest.target_T, batch.counts)
        said = reduce_tokens(nll(outputs_KT[1].detach()), forest.target_T, batch.counts)
        return loss, {"nll": said.item()}


# Sequence-level: the teacher's own answers


def teach(stage: Distill, data: Prepared, sampler: Sampler, seed: int, path: Path) -> tuple[Ledger, dict[str, Any]]:
    """Write to `path` the teacher's answer to each prompt that the stage's steps come to, as sampled (Kim and Rush,
    1606.07947, who take the teacher's likeliest answer; that is `temperature: 0` but for their beam). Returns what it
    cost, and what is worth recording."""
    used = sorted(set(draws(stage, data.rows, data.weights, seed)))
    prompts = [data.rows[s][i].example for s, i in used]
    rollouts, ledger = sampler(prompts, 1, stage.sampling, derive(seed, stage.id, "teacher"))
    write_rows(path, [[*used[r.group], r.ids] for r in rollouts])
    tokens = sum(len(r.ids) for r in rollouts)
    cut = sum(r.finish == "length" for r in rollouts) / len(rollouts)
    return ledger, {"answers": len(rollouts), "answer_tokens": tokens, "truncated": cut}


def taught(path: Path, data: Prepared) -> Prepared:
    """`data` with the answers that `teach` wrote, without the rows that have none."""
    return with_answers(data, read_rows(path))
