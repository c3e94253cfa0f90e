"""What a stage takes of memory at its peak, told before it runs, and the token budget that fits what there is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from posttrain.data.chat import Rendered
from posttrain.data.prepare import Prepared
from posttrain.forest import Row, hidden_states, pack, split, token_logprobs, token_statistics
from posttrain.forest.attention import decoder
from posttrain.machine import own_memory
from posttrain.models.fused import foldable
from posttrain.models.memory import Pass, measure_forward, measure_pass
from posttrain.models.policy import Policy, outline
from posttrain.pipeline.calls import asks
from posttrain.recipe.blocks import Sampling
from posttrain.recipe.preference import OnlinePreference, Preference, SelfRewarding
from posttrain.recipe.rl import Grpo, Rl
from posttrain.recipe.schema import Stage
from posttrain.recipe.scoring import ScoringStage
from posttrain.recipe.supervised import Constitutional, Distill
from posttrain.records import UserError
from posttrain.rewards.judge import GRADE, META
from posttrain.sampling import local
from posttrain.sampling.choose import cut
from posttrain.sampling.grid import BLOCK
from posttrain.training.batch import chosen, draws, interval, rejected
from posttrain.training.constitutional import REQUESTS
from posttrain.training.distill import token_divergences
from posttrain.training.preference import second_model
from posttrain.training.self_rewarding import ADDITIVE

SMALLEST = 64
"""Tokens of a pass below which a budget is not lowered: it then costs much time and saves little."""
HEAVIEST = 8
"""Batches of a stage that are looked at, those with the most tokens."""

UNUSED = 400_000_000
HOLES = {"weights": 1 / 3, "gradients": 3 / 4, "activations": 1 / 5, "work": 1 / 5}
"""What glibc's heap holds beside the tensors, for `machine.tune` lets it keep what is freed: bytes in any case, and a
share of what comes and goes (of the weights, what reading them left). Fitted to five SFT stages of one 135M model, and
checked on the others of `benchmarks/memory.py`."""

Terms = dict[str, int]
"""Bytes by what takes them; their sum is the peak."""


class Unpredicted(Exception):
    """The model cannot be run without values (one whose routing depends on them cannot): says why."""


def stage_memory(stage: Stage, data: Prepared, policy: Policy, seed: int) -> Terms:
    """The terms of the stage's peak: of training, or of sampling where that takes more.

    `policy` may be an outline. Sampled completions are taken to be as long as they may.

    Raises:
        Unpredicted: by this model.
    """
    trained = sum(p.nbytes for p in policy.parameters().values())
    moments = sum(p.numel() * _state_bytes(p) for p in policy.parameters().values())
    terms = {"process": own_memory(), "weights": sum(p.nbytes for p in policy.model.parameters())}
    period = stage.period if isinstance(stage, Rl) else 1
    terms["base"] = trained  # what every stage's model is compared with
    if isinstance(stage, OnlinePreference):
        terms["reference"] = trained * (2 if stage.loss == "nash_md" else 1)  # and its mixture with the policy
    if isinstance(stage, Rl) and stage.kl_weight:
        terms["reference"] = trained
    if isinstance(stage, Grpo) and stage.prime:  # its model and moments, and what it is compared with
        terms["process rewards"] = trained + moments + (0 if stage.kl_weight else trained)
    terms["optimiser"] = moments
    if interval(stage.checkpoint_every, period) < stage.steps:
        terms["checkpoint"] = trained + moments
        if isinstance(stage, Rl) and stage.kl_weight and stage.reference_reset:
            terms["checkpoint"] += trained
        if isinstance(stage, Grpo) and stage.prime:
            terms["checkpoint"] += trained + moments
    answering, teacher = policy.model, None
    if isinstance(stage, Distill):
        teacher = second_model(policy, stage, outline).model
        terms["teacher"] = sum(p.nbytes for p in teacher.parameters())
        if stage.mode == "sequence":
            answering, teacher = teacher, None
    learned, prompts = _asked_back(stage, data, policy)
    try:
        step = _largest_pass(stage, learned, policy.model, seed, teacher)
        sampling = _sampling(stage, prompts, answering)
    except Exception as error:  # the model's code is not ours, and may fail in any way
        said = str(error).partition("\n")[0]
        raise Unpredicted(f"{type(decoder(policy.model)).__name__} does not run without values ({said})") from error
    training = {"gradients": step.gradients, "activations": step.activations, "work": step.work}
    phases: list[Terms] = [training, sampling]
    if isinstance(stage, Preference) and stage.reference is not None:
        other = second_model(policy, stage, outline)
        phases.append({"reference": sum(p.nbytes for p in other.model.parameters())})
    heaviest: Terms = max(phases, key=lambda phase: sum(phase.values()))
    terms |= heaviest
    holes = sum(share * terms.get(name, 0) for name, share in HOLES.items())
    return terms | {"allocator": UNUSED + round(holes)}


def fit(stage: Stage, data: Prepared, policy: Policy, seed: int) -> tuple[Stage, Terms]:
    """The stage with the largest token budget, halving, whose peak stays below `memory_gb`, and that peak's terms.

    Activation checkpointing is switched on where no budget is small enough without it.

    Raises:
        UserError: it fits with neither, or nobody can say whether it does.
        Unpredicted: the same without `memory_gb`.
    """
    for recompute in sorted({stage.activation_checkpointing, True}):
        budget = stage.tokens_per_forward
        while budget >= min(SMALLEST, stage.tokens_per_forward):
            tried = stage.model_copy(update={"tokens_per_forward": budget, "activation_checkpointing": recompute})
            try:
                terms = stage_memory(tried, data, policy, seed)
            except Unpredicted as error:
                if stage.memory_gb is None:
                    raise
                raise UserError(
                    f"stage {stage.id!r}: memory_gb: no pass can be picked, for the peak cannot be predicted: {error}; "
                    "leave memory_gb out and set tokens_per_forward"
                ) from error
            if stage.memory_gb is None or sum(terms.values()) <= stage.memory_gb * 1e9:
                return tried, terms
            budget //= 2
    raise UserError(
        f"stage {stage.id!r}: needs {sum(terms.values()) / 1e9:.1f} GB ({told(terms)}) even in passes of {budget * 2} "
        f"tokens, and memory_gb is {stage.memory_gb:g}; raise it, shorten the data (data.max_length), train an "
        "adapter, or take a smaller model"
    )


def told(terms: Terms) -> str:
    """The terms in a line, the largest first, without those below 1 % of the whole."""
    total = sum(terms.values())
    large = sorted(((size, name) for name, size in terms.items() if size >= total / 100), reverse=True)
    return ", ".join(f"{name} {size / 1e9:.2f}" for size, name in large)


def _state_bytes(weight: torch.Tensor) -> int:
    """Of the optimiser for each number: two moments, and a float32 master of what is less precise."""
    return 2 * weight.itemsize if weight.itemsize >= 4 else 3 * 4


def _largest_pass(stage: Stage, data: Prepared, model: nn.Module, seed: int, teacher: nn.Module | None) -> Pass:
    found: list[tuple[int, int, list[Row]]] = []
    several = False
    for batch in _batches(stage, data, seed):
        rows = [row for unit in batch for row in unit]
        ends = [sum(map(len, batch[: i + 1])) for i in range(len(batch))]
        units = [tuple(range(end - len(unit), end)) for unit, end in zip(batch, ends, strict=True)]
        packs = split(rows, units, stage.tokens_per_forward)
        several |= len(packs) > 1
        for members in packs:
            mine = [rows[i] for u in members for i in units[u]]
            found.append((len(pack(mine)), sum(sum(row.target) for row in mine), mine))
    # The most tokens fill the layers, the most targets the head.
    candidates = [max(found, key=lambda f: f[by])[2] for by in (0, 1)]
    largest = max(
        (
            measure_pass(model, _forward(stage, rows), stage.activation_checkpointing, several)
            for rows in (candidates if candidates[0] is not candidates[1] else candidates[:1])
        ),
        key=lambda p: p.peak,
    )
    if teacher is None:
        return largest
    # Its pass comes before the student's, whose activations are not there yet.
    before = max(measure_forward(teacher, _states(rows)) for rows in candidates)
    return largest._replace(work=max(largest.work, before - largest.activations))


def _states(rows: Sequence[Row]) -> Callable[[nn.Module], torch.Tensor]:
    return lambda model: hidden_states(model, pack(rows))


def _forward(stage: Stage, rows: Sequence[Row]) -> Callable[[nn.Module], torch.Tensor]:
    """The forest is made anew each time, for it keeps its masks."""
    if isinstance(stage, ScoringStage):  # its head is one number wide
        return _states(rows)
    if isinstance(stage, Preference) and stage.weighting:
        return lambda model: token_statistics(model, pack(rows), "collision")
    if isinstance(stage, Rl) and stage.entropy_weight:
        return lambda model: token_statistics(model, pack(rows), "entropy")
    if isinstance(stage, Distill) and stage.mode != "sequence":  # the student stands in for the teacher's head
        beta, temperature = stage.beta, stage.temperature
        return lambda model: token_divergences(model, model, pack(rows), beta=beta, temperature=temperature)
    sampled_at = stage.sampling.temperature if isinstance(stage, Rl | OnlinePreference) else 1.0
    return lambda model: token_logprobs(model, pack(rows), sampled_at)


def _batches(stage: Stage, data: Prepared, seed: int) -> list[list[tuple[Row, ...]]]:
    """The heaviest of the stage's batches, as the rows that must share a pass."""
    period = stage.period if isinstance(stage, Rl) else 1
    order = draws(stage, data.rows, data.weights, seed, period)
    asked = asks(stage, len(order))
    made = []
    for first in range(0, len(order), stage.batch_size):
        units: list[tuple[Row, ...]] = []
        for source, i in order[first : first + stage.batch_size]:
            item = data.rows[source][i]
            if isinstance(stage, Distill) and stage.mode == "on_policy":
                units.append((max(chosen(item), _sampled(item.prompt_ids, stage.sampling, 0), key=len),))
            elif asked and (not item.completion_ids or isinstance(stage, Preference)):  # else they were written before
                how = stage.judging if isinstance(stage, SelfRewarding) and stage.meta_judge else asked.sampling
                own = tuple(_sampled(item.prompt_ids, how, k) for k in range(asked.together))
                units += [(row,) for row in own] if isinstance(stage, Rl) else [own]
            elif item.rejected_ids:
                units.append((chosen(item), rejected(item)))
            else:
                units.append((chosen(item),))
        made.append(units)
    return sorted(made, key=lambda units: sum(len(row) for unit in units for row in unit))[-HEAVIEST:]


def _asked_back(stage: Stage, data: Prepared, policy: Policy) -> tuple[Prepared, Prepared]:
    """`data` with its prompts as they are learned from, and as they are sampled for: the longest there are, which are
    those in which the model is asked about its own answers, where it is."""
    if isinstance(stage, Constitutional):
        request = "".join(REQUESTS.values()) + max(stage.principles, key=len)
        return data, _about(data, policy, request, 2 * stage.sampling.max_new_tokens, 1)
    if isinstance(stage, SelfRewarding):
        request, n = GRADE + (stage.judging.rubric or ADDITIVE), stage.judging.n
        graded = _about(data, policy, request, stage.sampling.max_new_tokens, stage.n)
        if not stage.meta_judge:
            return data, graded
        said = stage.sampling.max_new_tokens + 2 * stage.judging.max_new_tokens
        return graded, _about(data, policy, META + request, said, n * (n - 1))
    return data, data


def _about(data: Prepared, policy: Policy, request: str, said: int, times: int) -> Prepared:
    """The longest prompts behind a request and before what was `said`, in tokens, so many `times` each."""
    before, rows = policy.tokenizer.encode(request), [row for part in data.rows for row in part]
    longest = sorted(rows, key=lambda row: len(row.prompt_ids))[-local.ROWS :]
    asked = [Rendered(row.example, (*before, *row.prompt_ids, *[k] * said)) for row in longest for k in range(times)]
    return Prepared((tuple(asked),), (1.0,), data.report)


def _sampled(prompt: Sequence[int], sampling: Sampling, k: int) -> Row:
    length = sampling.max_new_tokens
    return Row(tuple(prompt), (k,) * length, (True,) * length)


def _sampling(stage: Stage, data: Prepared, model: nn.Module) -> Terms:
    """Of the local engine, in one call for all prompts of a step (of a stage or round that begins so)."""
    asked = asks(stage, sum(map(len, data.rows)))
    if asked is None:
        return {}
    prompts, n, sampling, _ = asked.calls[-1]
    ids = sorted((r.prompt_ids for rows in data.rows for r in rows), key=len)[-prompts:]
    rows = min(local.ROWS, prompts * n)
    ids = ids[-math.ceil(rows / n) :]
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dtype = next(model.parameters()).dtype
    token = 2 * config.num_hidden_layers * heads * width * dtype.itemsize
    longest, new = (-(-length // BLOCK) * BLOCK for length in (len(ids[-1]), sampling.max_new_tokens))
    prefill = pack([Row(tuple(p), (), ()) for p in ids])

    def decode(model: nn.Module) -> torch.Tensor:
        logits_BV = torch.empty(rows, config.vocab_size, dtype=dtype, device=next(model.parameters()).device)
        return cut((logits_BV.float() - logits_BV.amax(-1, keepdim=True)).exp_(), sampling)  # what `choose` makes

    work = max(
        measure_forward(model, lambda m: hidden_states(m, prefill)) + token * len(prefill),
        measure_forward(model, decode),
    )
    copied = sum(weight.nbytes for _, _, weight in foldable(model))
    return {"keys and values": token * (len(ids) * longest + rows * new), "work": work, "folded": copied}
