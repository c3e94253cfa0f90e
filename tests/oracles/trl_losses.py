"""Every loss that TRL 1.16 has too, value and gradient, against TRL's own methods: `make test-oracles`.

It runs in the environment of the peers (benchmarks/peers.py), where `posttrain.losses` needs nothing but torch. TRL's
methods are called as they stand, on a `self` that holds the settings they read and on a model that is a table: the
logits of the next token are the row of this one. Both sides read the same table, so both gradients are in its entries.

Where TRL departs from a loss's paper the case says so. What TRL computes in the midst of sampling or of a training
step is no method to call, and is not here: GRPO's and RLOO's advantages, online DPO.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from inspect import getattr_static
from types import SimpleNamespace
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
warnings.simplefilter("ignore")

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.functional import one_hot  # noqa: E402
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer, SFTTrainer  # noqa: E402
from trl.experimental.cpo import CPOTrainer  # noqa: E402
from trl.experimental.gkd import GKDTrainer  # noqa: E402
from trl.experimental.gmpo import GMPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOTrainer  # noqa: E402
from trl.experimental.tpo import TPOTrainer  # noqa: E402
from trl.trainer.distillation_trainer import _chunked_divergence_loss  # noqa: E402
from trl.trainer.utils import FusedCausalLMOutput  # noqa: E402

from posttrain.losses import (  # noqa: E402
    Counts,
    alpha_length,
    aot,
    apo_down,
    apo_zero,
    apo_zero_unpaired,
    bco,
    bradley_terry,
    cispo,
    desensitised,
    dft,
    discopop,
    divergence,
    entropy_bonus,
    exo,
    gmpo,
    hinge,
    ipo,
    jsd,
    kl,
    kto,
    kto_kl,
    log_odds,
    logistic,
    nca,
    nll,
    policy_gradient,
    ratio,
    reduce_pairs,
    reduce_tokens,
    robust,
    sapo,
    segment_sum,
    sppo,
    vespo,
    wpo_weight,
)

TOLERANCE = 2e-6
"""Of the largest entry. TRL holds some settings, ORPO all, in float32."""
V, P, PROMPT, LENGTHS = 11, 4, 3, (5, 9, 3, 7, 8, 4, 9, 2, 6, 1, 4, 9)
BETA, SMOOTHING = 0.3, 0.1


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# P chosen rows, P rejected ones, P that are best (TPO). A prompt, a completion, padding.
IDS = torch.randint(V, (3 * P, PROMPT + max(LENGTHS)), generator=torch.Generator().manual_seed(0))
AT = torch.arange(IDS.shape[1])
ATTENTION = (PROMPT + torch.tensor(LENGTHS)[:, None] > AT).long()
COMPLETION = ATTENTION * (AT >= PROMPT)
LABELS = IDS.masked_fill(COMPLETION == 0, -100)
PAIRED = slice(2 * P)
INPUTS = {"input_ids": IDS[PAIRED], "attention_mask": ATTENTION[PAIRED], "completion_mask": COMPLETION[PAIRED]}
ADVANTAGES = draw(7, 2 * P)


class Table(nn.Module):
    """A language model that remembers one token. It answers as those do to which TRL has given its fused head."""

    is_gradient_checkpointing = False

    def __init__(self, logits_VV: Tensor) -> None:
        super().__init__()
        self.logits_VV = nn.Parameter(logits_VV)

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, fused_lm_head: bool = False, **_: Any
    ) -> FusedCausalLMOutput | SimpleNamespace:
        logits = self.logits_VV[input_ids]
        if not fused_lm_head or labels is None:
            return SimpleNamespace(logits=logits)
        logps, labels = logits[:, :-1].log_softmax(-1), labels[:, 1:]
        kept = labels != -100
        return FusedCausalLMOutput(
            log_probs=logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * kept,
            entropy=-(logps.exp() * logps).sum(-1) * kept,
            log_sum_sq_probs=(2 * logps.detach()).logsumexp(-1) * kept,
            mean_logits=logits[:, :-1].detach().mean(-1),
            is_top1=(logps.argmax(-1) == labels) & kept,
            label_mask=kept,
        )


def other(model: Table, seed: int, apart: float = 0.4) -> Table:
    """A model near to this one, a constant: its reference, or what it was when the completions were sampled."""
    return Table((model.logits_VV + apart * draw(seed, V, V).to(model.logits_VV.dtype)).detach()).requires_grad_(False)


class Trainer(SimpleNamespace):
    """TRL's methods of `kind` on the settings they read, and nothing else of a trainer."""

    def __init__(self, kind: type, model: Table, args: dict[str, Any] | None = None, **settings: Any) -> None:
        def same(x: Any, **_: Any) -> Any:
            return x

        super().__init__(
            kind=kind,
            model=model,
            args=SimpleNamespace(gradient_checkpointing_kwargs=None, report_to=[], **args or {}),
            state=SimpleNamespace(global_step=0),
            accelerator=SimpleNamespace(
                device=torch.device("cpu"), gather=same, gather_for_metrics=same, reduce=same, autocast=nullcontext,
                num_processes=1, is_main_process=False, sync_gradients=True, parallelism_config=None,
            ),
            aux_loss_enabled=False,
            _metrics=defaultdict(lambda: defaultdict(list)),
            _total_train_tokens=0,
            _tp_size=1,
            **settings,
        )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.kind, name)
        return found if isinstance(getattr_static(self.kind, name), staticmethod) else partial(found, self)


@dataclass
class Rows:
    """Our view of a batch under a model: all its tokens in one row."""

    model: Table
    rows: slice = field(default_factory=lambda: PAIRED)

    def __post_init__(self) -> None:
        self.out = self.model(IDS[self.rows], labels=LABELS[self.rows], fused_lm_head=True)
        self.logps_T, self.target_T = self.out.log_probs.flatten(), self.out.label_mask.flatten()
        # Of pairs the chosen side is sequence 2p and the rejected one 2p + 1, wherever they stand in the row.
        S = len(self.out.log_probs)
        order = torch.arange(S).view(-1, 2).T.flatten()
        self.sequence_T = order[:, None].expand(self.out.log_probs.shape).flatten()
        self.sums_S = segment_sum(self.logps_T, self.sequence_T, S)
        self.lengths_S = segment_sum(self.target_T.to(self.sums_S.dtype), self.sequence_T, S)
        self.counts = Counts(tokens=int(self.target_T.sum()), sequences=S, pairs=S // 2)

    def spread(self, values_S: Tensor) -> Tensor:
        """At each token the value of its row, rows in TRL's order."""
        return values_S[:, None].expand(self.out.log_probs.shape).flatten().to(self.logps_T.dtype)


Sides = tuple[Tensor, Tensor]
Case = Callable[[Table], tuple[Tensor, Tensor]]


def sides(values_S: Tensor) -> Sides:
    return values_S[0::2], values_S[1::2]


@dataclass
class Pairs:
    """What two sides can score."""

    now: Rows
    was: Rows

    def __post_init__(self) -> None:
        ratios_S = self.now.sums_S - self.was.sums_S
        self.ratios, self.mean_ratios = sides(ratios_S), sides(ratios_S / self.now.lengths_S)
        self.logps, self.mean_logps = sides(self.now.sums_S), sides(self.now.sums_S / self.now.lengths_S)
        self.ref_logps = sides(self.was.sums_S)


def mean(loss_P: Tensor) -> Tensor:
    return reduce_pairs(loss_P, Counts(pairs=P))


def chosen_nll(rows: Rows) -> Tensor:
    """Token mean over the first P rows, for every row of ours is one of a pair."""
    first_T = rows.spread(torch.arange(len(rows.out.log_probs)) < P).bool() & rows.target_T
    return reduce_tokens(nll(rows.logps_T), first_T, Counts(tokens=int(first_T.sum())))


# --- demonstrations


def sft(loss_type: str, ours: Callable[[Tensor], Tensor]) -> Case:
    def case(model: Table) -> tuple[Tensor, Tensor]:
        args = {"loss_type": loss_type, "average_tokens_across_devices": False}
        trainer = Trainer(SFTTrainer, model, args, compute_loss_func=None, label_smoother=None)
        inputs = {"input_ids": IDS[PAIRED], "attention_mask": ATTENTION[PAIRED], "labels": LABELS[PAIRED]}
        rows = Rows(model)
        return trainer.compute_loss(model, inputs), reduce_tokens(ours(rows.logps_T), rows.target_T, rows.counts)

    return case


# --- pairs, against a reference


def dpo(loss_type: str, ours: Callable[[Pairs], Tensor], **settings: Any) -> Case:
    def case(model: Table) -> tuple[Tensor, Tensor]:
        reference = other(model, 1)
        given = {
            "ref_model": reference, "loss_types": [loss_type], "loss_weights": [1.0], "beta": BETA,
            "label_smoothing": SMOOTHING, "ld_alpha": None, "use_weighting": False, "precompute_ref_logps": False,
            "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5,
        }  # fmt: skip
        trainer = Trainer(DPOTrainer, model, {"discopop_tau": 0.05}, **given | settings)
        return trainer._compute_loss(model, dict(INPUTS), False), mean(ours(Pairs(Rows(model), Rows(reference))))

    return case


def f_dpo(loss_type: str, kind: str, name: str, ours: Callable[..., Tensor], **options: float) -> Case:
    """TRL's shift of the scores is 1.16's; before, losses of means over tokens were others (not those of margins)."""

    def score(pairs: Pairs) -> Tensor:
        scores = [divergence(ratios_P, kind, **options) for ratios_P in pairs.ratios]
        if loss_type in ("ipo", "sigmoid_norm"):
            scores = [s_P / n_P for s_P, n_P in zip(scores, sides(pairs.now.lengths_S), strict=True)]
        return ours(*scores, beta=BETA)

    return dpo(loss_type, score, f_divergence_type=name, f_alpha_divergence_coef=options.get("alpha", 0.5))


def wpo(pairs: Pairs) -> Tensor:
    rows = pairs.now
    collision_T = rows.out.log_sum_sq_probs.flatten()
    weight_S = wpo_weight(rows.logps_T, collision_T, rows.target_T, rows.sequence_T, len(rows.sums_S))
    return logistic(*pairs.ratios, beta=BETA) * weight_S[0::2] * weight_S[1::2]


def ld_dpo(pairs: Pairs) -> Tensor:
    now_S, was_S = (desensitised(r.logps_T, r.target_T, r.sequence_T, alpha=0.4) for r in (pairs.now, pairs.was))
    return logistic(*sides(now_S - was_S), beta=BETA)


def aot_paired(pairs: Pairs) -> Tensor:
    margins, ref_margins = pairs.logps[0] - pairs.logps[1], pairs.ref_logps[0] - pairs.ref_logps[1]
    return aot(margins, ref_margins, beta=BETA, label_smoothing=SMOOTHING)


def nll_of_chosen(pairs: Pairs) -> Tensor:
    return chosen_nll(pairs.now).expand(P)


# --- pairs, without one


def reference_free(kind: type, ours: Callable[[Pairs], Tensor], **settings: Any) -> Case:
    """CPO and ORPO. `label_smoothing` counts for both of CPO's logistic losses, where DPO's ignores it."""

    def case(model: Table) -> tuple[Tensor, Tensor]:
        batch = {}
        for name, rows in (("chosen", slice(P)), ("rejected", slice(P, 2 * P))):
            batch |= {f"{name}_input_ids": IDS[rows], f"{name}_attention_mask": ATTENTION[rows]}
            batch |= {f"{name}_labels": LABELS[rows]}
        given = {"beta": BETA, "label_smoothing": SMOOTHING, "is_encoder_decoder": False, "pad_token_id": 0}
        trainer = Trainer(kind, model, **given | {"padding_value": 0, "simpo_gamma": 0.5, "alpha": 0.0} | settings)
        rows = Rows(model)
        return trainer.get_batch_loss_metrics(model, batch)[0], ours(Pairs(rows, rows))

    return case


def orpo(pairs: Pairs) -> Tensor:
    """TRL's likelihood is of prompt and chosen completion, every token that is no padding."""
    model = pairs.now.model
    out = model(IDS[:P], labels=IDS[:P].masked_fill(ATTENTION[:P] == 0, -100), fused_lm_head=True)
    target_T = out.label_mask.flatten()
    whole = reduce_tokens(nll(out.log_probs.flatten()), target_T, Counts(tokens=int(target_T.sum())))
    return whole + BETA * mean(logistic(*map(log_odds, pairs.mean_logps), beta=1.0))


def tpo(loss_type: str, ours: Callable[[Pairs], Tensor]) -> Case:
    def case(model: Table) -> tuple[Tensor, Tensor]:
        given = {"tpo_alpha": 0.7, "tpo_l_gamma": 0.5, "beta": BETA, "label_smoothing": SMOOTHING}
        trainer = Trainer(TPOTrainer, model, loss_type=loss_type, **given)
        inputs = {"input_ids": IDS, "attention_mask": ATTENTION, "completion_mask": COMPLETION}
        rows = Rows(model)
        best = model(IDS[2 * P :], labels=LABELS[2 * P :], fused_lm_head=True)
        best_T = best.label_mask.flatten()
        gold = reduce_tokens(nll(best.log_probs.flatten()), best_T, Counts(tokens=int(best_T.sum())))
        return trainer._compute_loss(model, inputs, False), mean(ours(Pairs(rows, rows))) + 0.7 * gold

    return case


# --- single completions


def unpaired(loss_type: str, seed: int, ours: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Case:
    """TRL takes z over a micro-batch; this one is the whole step. Completions under other prompts are drawn anew."""

    def case(model: Table) -> tuple[Tensor, Tensor]:
        reference = other(model, 1)
        strange = torch.randint(V, IDS[PAIRED].shape, generator=torch.Generator().manual_seed(seed))
        desirable_S = torch.arange(2 * P) % 3 != 0
        inputs = INPUTS | {"label": desirable_S, "KL_input_ids": strange}
        inputs |= {"KL_attention_mask": ATTENTION[PAIRED], "KL_completion_mask": COMPLETION[PAIRED]}
        trainer = Trainer(
            KTOTrainer, model, ref_model=reference, loss_type=loss_type, beta=BETA, desirable_weight=1.2,
            undesirable_weight=0.7, calculate_KL=loss_type == "kto", precompute_ref_logps=False,
        )  # fmt: skip
        labels = strange.masked_fill(COMPLETION[PAIRED] == 0, -100)
        now, was = (m(strange, labels=labels, fused_lm_head=True).log_probs.sum(-1) for m in (model, reference))
        rows, before = Rows(model), Rows(reference)
        order = rows.sequence_T.view(2 * P, -1)[:, 0]
        ratios_S = (rows.sums_S - before.sums_S)[order]
        loss_S = ours(ratios_S, desirable_S, kto_kl(now - was))
        return trainer._compute_loss(model, inputs, False), loss_S.mean()

    return case


def weighed_kto(ratios_S: Tensor, desirable_S: Tensor, z: Tensor) -> Tensor:
    return kto(ratios_S, desirable_S, z, beta=BETA, desirable_weight=1.2, undesirable_weight=0.7)


def apo_unpaired(ratios_S: Tensor, desirable_S: Tensor, _: Tensor) -> Tensor:
    return apo_zero_unpaired(ratios_S, desirable_S, beta=BETA) * torch.where(desirable_S, 1.2, 0.7).to(ratios_S.dtype)


# --- models that score


def reward(margin: bool, centring: float | None) -> Case:
    def case(model: Table) -> tuple[Tensor, Tensor]:
        rewards_S = model.logits_VV.flatten()[: 2 * P]
        margins_P = draw(3, P).abs()
        inputs = {"attention_mask": ATTENTION[PAIRED]} | ({"margin": margins_P} if margin else {})
        trainer = Trainer(RewardTrainer, model, {"center_rewards_coefficient": centring})
        theirs = trainer.compute_loss(lambda **_: SimpleNamespace(logits=rewards_S[:, None]), inputs)
        loss_P = bradley_terry(
            rewards_S[:P], rewards_S[P:], margin_P=margins_P if margin else 0.0, centring=centring or 0.0
        )
        return theirs, mean(loss_P)

    return case


# --- policies

PolicyLoss = Callable[..., Tensor]


def grpo(
    loss_type: str,
    ours: PolicyLoss,
    how: str,
    *,
    kind: type = GRPOTrainer,
    constant: float | None = None,
    level: str = "token",
    penalty: float = 0.0,
    corrected: bool = False,
    entropy: float = 0.0,
    **settings: Any,
) -> Case:
    """`corrected`: the KL penalty times the token's ratio, TRL's default since 1.16."""

    def case(model: Table) -> tuple[Tensor, Tensor]:
        old, reference = other(model, 2), other(model, 1)
        was, ref, rows = Rows(old), Rows(reference), Rows(model)
        given = {
            "loss_type": loss_type, "importance_sampling_level": level, "beta": penalty, "epsilon_low": 0.2,
            "epsilon_high": 0.3, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "use_vllm": False,
            "max_completion_length": 16, "current_gradient_accumulation_steps": 1, "use_adaptive_entropy": False,
            "_entropy_bonus_enabled": entropy > 0, "entropy_coef": entropy,
        }  # fmt: skip
        args = {
            "delta": settings.get("delta"), "use_bias_correction_kl": corrected, "steps_per_generation": 1,
            "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0,
            "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0,
        }  # fmt: skip
        trainer = Trainer(kind, model, args, **given | settings)
        completion = slice(PROMPT - 1, None)  # of log-probs, which begin at the second token
        inputs = {
            "prompt_ids": IDS[PAIRED, :PROMPT], "prompt_mask": ATTENTION[PAIRED, :PROMPT],
            "completion_ids": IDS[PAIRED, PROMPT:], "completion_mask": ATTENTION[PAIRED, PROMPT:],
            "advantages": ADVANTAGES, "num_items_in_batch": COMPLETION[PAIRED].sum(),
            "old_per_token_logps": was.out.log_probs[:, completion],
            "ref_per_token_logps": ref.out.log_probs[:, completion],
            "old_logps": was.out.log_probs.sum(1),
        }  # fmt: skip
        tokens = rows.logps_T, was.logps_T, rows.spread(ADVANTAGES), rows.target_T, rows.sequence_T
        loss_T = ours(*tokens)
        if penalty:
            kl_T = kl(rows.logps_T, ref.logps_T, rows.target_T)
            loss_T = loss_T + penalty * (kl_T * ratio(*tokens[:2], *tokens[3:]) if corrected else kl_T)
        loss = reduce_tokens(loss_T, rows.target_T, rows.counts, how=how, sequence_T=rows.sequence_T, constant=constant)
        if entropy:
            bonus_T = entropy_bonus(rows.out.entropy.flatten(), rows.target_T)
            loss = loss + entropy * reduce_tokens(bonus_T, rows.target_T, rows.counts)
        return trainer._compute_loss(model, inputs), loss

    return case


CLIPPED = partial(policy_gradient, clip_low=0.2, clip_high=0.3)


# --- from a teacher


def gkd(beta: float, temperature: float) -> Case:
    """GKD's own training leaves the temperature of this function at 1, whatever it samples at."""

    def case(model: Table) -> tuple[Tensor, Tensor]:
        student, teacher = (m(IDS).logits[:, :-1] for m in (model, other(model, 1)))
        labels = LABELS[:, 1:]
        theirs = GKDTrainer.generalized_jsd_loss(student, teacher, labels=labels, beta=beta, temperature=temperature)
        kept = labels != -100
        return theirs, jsd(student[kept], teacher[kept], beta=beta, temperature=temperature).mean()

    return case


def distillation(beta: float, temperature: float) -> Case:
    """TRL computes it in float32, so that what is small against its own terms would differ."""

    def case(model: Table) -> tuple[Tensor, Tensor]:
        teacher = other(model, 1, apart=2.0).logits_VV
        hidden, kept = one_hot(IDS[:, :-1], V).to(teacher.dtype), LABELS[:, 1:] != -100
        heads = model.logits_VV.T.contiguous(), teacher.T.contiguous()
        theirs, _, _ = _chunked_divergence_loss(hidden, hidden, *heads, kept, beta, temperature=temperature)
        student, logits = model.logits_VV[IDS[:, :-1]][kept], teacher[IDS[:, :-1]][kept]
        return theirs, jsd(student, logits, beta=beta, temperature=temperature).mean()

    return case


CASES: dict[str, Case] = {
    "nll": sft("nll", nll),
    "dft": sft("dft", dft),
    # TRL's logistic DPO ignores label_smoothing; cDPO is left in AOT, CPO and TPO.
    "dpo": dpo("sigmoid", lambda p: logistic(*p.ratios, beta=BETA)),
    "hinge": dpo("hinge", lambda p: hinge(*p.ratios, beta=BETA)),
    "ipo": dpo("ipo", lambda p: ipo(*p.mean_ratios, beta=BETA)),
    "exo": dpo("exo_pair", lambda p: exo(*p.ratios, beta=BETA, label_smoothing=SMOOTHING)),
    "nca": dpo("nca_pair", lambda p: nca(*p.ratios, beta=BETA)),
    "robust": dpo("robust", lambda p: robust(*p.ratios, beta=BETA, label_smoothing=SMOOTHING)),
    # TRL's has no running shift.
    "bco": dpo("bco_pair", lambda p: bco(*p.ratios, beta=BETA)),
    "sppo": dpo("sppo_hard", lambda p: sppo(*p.ratios, beta=BETA)),
    "aot": dpo("aot_unpaired", lambda p: aot(*p.ratios, beta=BETA, label_smoothing=SMOOTHING)),
    "aot_paired": dpo("aot", aot_paired),
    "apo_zero": dpo("apo_zero", lambda p: apo_zero(*p.ratios, beta=BETA)),
    "apo_down": dpo("apo_down", lambda p: apo_down(*p.ratios, beta=BETA)),
    "discopop": dpo("discopop", lambda p: discopop(*p.ratios, beta=BETA)),
    "dpo_norm": dpo("sigmoid_norm", lambda p: logistic(*p.mean_ratios, beta=BETA)),
    "dpo's nll": dpo("sft", nll_of_chosen),
    "ld_dpo": dpo("sigmoid", ld_dpo, ld_alpha=0.4),
    "wpo": dpo("sigmoid", wpo, use_weighting=True),
    "f_dpo forward_kl": f_dpo("sigmoid", "forward_kl", "forward_kl", logistic),
    "f_dpo js": f_dpo("hinge", "js", "js_divergence", hinge),
    "f_dpo js, means": f_dpo("sigmoid_norm", "js", "js_divergence", logistic),
    "f_dpo forward_kl, means": f_dpo("ipo", "forward_kl", "forward_kl", ipo),
    "f_dpo alpha": f_dpo("sigmoid", "alpha", "alpha_divergence", logistic, alpha=0.5),
    "f_dpo alpha 1": f_dpo("sigmoid", "alpha", "alpha_divergence", logistic, alpha=1.0),
    "f_dpo alpha, means": f_dpo("ipo", "alpha", "alpha_divergence", ipo, alpha=1.5),
    "cpo": reference_free(
        CPOTrainer,
        lambda p: mean(logistic(*p.logps, beta=BETA, label_smoothing=SMOOTHING)) + 0.8 * chosen_nll(p.now),
        loss_type="sigmoid", cpo_alpha=0.8,
    ),
    "cpo hinge": reference_free(
        CPOTrainer, lambda p: mean(hinge(*p.logps, beta=BETA)), loss_type="hinge", cpo_alpha=0.0
    ),
    "cpo ipo": reference_free(
        CPOTrainer, lambda p: mean(ipo(*p.mean_logps, beta=BETA)), loss_type="ipo", cpo_alpha=0.0
    ),
    # TRL's gamma is ours: it divides by beta and multiplies again. Its default adds CPO's likelihood, cpo_alpha = 1.
    "simpo": reference_free(
        CPOTrainer, lambda p: mean(logistic(*p.mean_logps, beta=BETA, gamma=0.5)),
        loss_type="simpo", cpo_alpha=0.0, label_smoothing=0.0,
    ),
    "alphapo": reference_free(
        CPOTrainer,
        lambda p: mean(logistic(*(alpha_length(x, alpha=0.25) for x in p.mean_logps), beta=BETA, gamma=0.5)),
        loss_type="simpo", cpo_alpha=0.0, label_smoothing=0.0, alpha=0.25,
    ),
    "orpo": reference_free(ORPOTrainer, orpo),
    "tpo": tpo("sigmoid", lambda p: logistic(*p.logps, beta=BETA, label_smoothing=SMOOTHING)),
    "tpo_l": tpo("tpo-l", lambda p: logistic(*p.mean_logps, beta=BETA, label_smoothing=SMOOTHING, gamma=0.5)),
    "kto": unpaired("kto", 3, weighed_kto),
    "kto, z held at 0": unpaired("kto", 7, weighed_kto),
    "apo_zero_unpaired": unpaired("apo_zero_unpaired", 3, apo_unpaired),
    "bradley_terry": reward(False, None),
    "bradley_terry, margin and centring": reward(True, 0.01),
    "grpo": grpo("grpo", CLIPPED, "sequence"),
    "bnpo": grpo("bnpo", CLIPPED, "token"),
    "dapo": grpo("dapo", CLIPPED, "token"),
    "dr_grpo": grpo("dr_grpo", CLIPPED, "constant", constant=16.0),
    "dual clip": grpo("grpo", partial(CLIPPED, ratio_cap=1.5), "sequence", delta=1.5),
    "gspo": grpo("grpo", partial(CLIPPED, level="sequence"), "sequence", level="sequence"),
    "luspo": grpo("luspo", CLIPPED, "constant", constant=1.0),
    # TRL's epsilon_high is the cap itself, where the paper has 1 + epsilon_high.
    "cispo": grpo("cispo", partial(cispo, cap=1.28), "token", epsilon_high=1.28),
    "cispo by sequence": grpo(
        "cispo", partial(cispo, cap=1.28, level="sequence"), "token", level="sequence", epsilon_high=1.28
    ),
    "sapo": grpo("sapo", sapo, "sequence"),
    "sapo by sequence": grpo("sapo", partial(sapo, level="sequence"), "sequence", level="sequence"),
    "vespo": grpo("vespo", vespo, "token"),
    "gmpo": grpo("grpo", partial(gmpo, clip=0.4), "sequence", kind=GMPOTrainer, epsilon_low=0.4, epsilon_high=0.4),
    "kl": grpo("dapo", CLIPPED, "token", penalty=0.1),
    "kl by sequence": grpo("grpo", CLIPPED, "sequence", penalty=0.1),
    "kl, corrected": grpo("dapo", CLIPPED, "token", penalty=0.1, corrected=True),
    "entropy": grpo("dapo", CLIPPED, "token", entropy=0.05),
    "rloo": grpo("rloo", partial(CLIPPED, level="product"), "sequence", kind=RLOOTrainer),
    "jsd": gkd(0.3, 1.0),
    "jsd, warm": gkd(0.5, 2.0),
    "forward_kl": gkd(0.0, 0.9),
    "reverse_kl": gkd(1.0, 0.9),
    "distillation jsd": distillation(0.3, 2.0),
    "distillation forward": distillation(0.0, 1.0),
    "distillation reverse": distillation(1.0, 0.7),
}  # fmt: skip
SINGLE = {name for name in CASES if "alpha" in name and name.startswith("f_dpo")}
"""TRL knows how to hold these in float32 alone."""


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, of the largest entry."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def main() -> int:
    print(f"{'loss':36}{'TRL':>14}  value apart  gradient apart")
    failed = []
    for name, case in CASES.items():
        model = Table(draw(5, V, V).to(torch.float32 if name in SINGLE else torch.float64))
        theirs, ours = case(model)
        gradients = [torch.autograd.grad(loss, model.logits_VV, retain_graph=True)[0] for loss in (ours, theirs)]
        found = apart(ours.detach(), theirs.detach()), apart(*gradients)
        good = max(found) <= TOLERANCE  # and so not NaN
        if not good:
            failed.append(name)
        print(f"{name:36}{theirs.item():14.8f}{found[0]:13.1e}{found[1]:16.1e}{'' if good else '  NOT EQUAL'}")
    print(f"{len(CASES) - len(failed)} of {len(CASES)} are equal to {TOLERANCE} of the largest entry")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
