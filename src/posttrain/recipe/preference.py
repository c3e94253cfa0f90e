"""Stages that learn from answers compared with each other, beforehand or while training goes on."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from posttrain.recipe.base import Misfit
from posttrain.recipe.blocks import GREEDY_GROUP, Optim, Reference, Sampling
from posttrain.recipe.objectives import OBJECTIVES, PARAMETERS, Divergence, Loss
from posttrain.recipe.rewards import Rewarded
from posttrain.recipe.stage import Rounds, SamplingStage, StageBase


class PairSampling(Rewarded, Sampling):
    n: int = Field(8, ge=2, description="Completions per prompt, ranked by `rewards`.")
    prompts: int = Field(ge=1, description="How many prompts to sample for before training.")

    @model_validator(mode="after")
    def _completions_differ(self) -> PairSampling:
        if self.temperature == 0:
            raise Misfit((("temperature",), GREEDY_GROUP))
        return self


class Preference(StageBase):
    """Learn from answers that were judged beforehand: pairs of a better and a worse one (DPO, Rafailov et al.,
    2305.18290, and what came after it), ranked lists, or single ones labelled good or bad. docs/preference.md has the
    losses and what each one reads; a parameter that is left out has the value of the loss's paper."""

    kind: Literal["preference"] = Field(description="The method.")
    optim: Optim = Field(default_factory=lambda: Optim(lr=5e-5), description="Optimiser and its schedule.")
    loss: Loss = Field("dpo", description="What is minimised; one value for each pair, list or answer.")
    reference: Reference | None = Field(None, description="The reference, in place of the stage's starting model.")
    beta: float | None = Field(
        None, gt=0, description="What scores are multiplied by: the strength of the pull towards the reference."
    )
    label_smoothing: float | None = Field(
        None, ge=0, lt=0.5, description="Share of labels taken to be flipped (cDPO, Mitchell 2023)."
    )
    gamma: float | None = Field(None, ge=0, description="Margin by which the chosen answer must win, after beta.")
    tau: float | None = Field(None, gt=0, le=1, description="How wide the mixture of discopop's two losses is.")
    divergence: Divergence | None = Field(
        None, description="f-divergence from the reference that scores come from (f-DPO, 2309.16240)."
    )
    alpha: float | None = Field(None, description="Of `divergence: alpha`, or of alphapo's reward.")
    length_alpha: float | None = Field(
        None, ge=0, le=1, description="Weight of tokens beyond the shorter answer's length (LD-DPO, 2409.06411)."
    )
    weighting: bool | None = Field(
        None, description="Weigh a pair by how likely the policy is to write it itself (WPO, 2406.11827)."
    )
    nll_weight: float | None = Field(
        None, ge=0, description="Weight of the best answer's per-token NLL (RPO, 2404.19733); guards its probability."
    )
    desirable_weight: float | None = Field(None, ge=0, description="Weight of answers that are labelled good.")
    undesirable_weight: float | None = Field(None, ge=0, description="Weight of answers that are labelled bad.")
    on_policy: PairSampling | None = Field(
        None,
        description="Sample pairs or lists from the stage's starting model and rank them by `rewards`; "
        "without it the data must hold pairs, or labelled answers.",
    )

    @model_validator(mode="after")
    def _fits_its_loss(self) -> Preference:
        objective = OBJECTIVES[self.loss]
        reads = objective.parameters(self.divergence)
        problems: list[tuple[tuple[str | int, ...], str]] = [
            ((name,), f"loss {self.loss} does not read it; it reads {', '.join(reads)}")
            for name in PARAMETERS
            if name not in reads and getattr(self, name) is not None
        ]
        if self.loss == "exo" and self.label_smoothing == 0:
            problems.append((("label_smoothing",), "must be above 0: loss exo takes its logarithm"))
        if self.desirable_weight == 0 and self.undesirable_weight == 0:
            problems.append((("desirable_weight",), "is 0, and so is undesirable_weight: nothing would be learned"))
        if self.reference is not None and not objective.reference:
            problems.append((("reference",), f"loss {self.loss} has no reference"))
        if self.on_policy is not None and objective.of == "answers":
            problems.append((("on_policy",), f"loss {self.loss} learns from labelled answers, not from ranked ones"))
        if self.on_policy is None and objective.of in ("lists", "triples"):
            what = f"missing; loss {self.loss} learns from {objective.of}, which are sampled"
            problems.append((("on_policy",), what))
        if self.batch_size < 2 and objective.whole_step:
            problems.append((("batch_size",), f"must be at least 2: loss {self.loss} compares the answers of a step"))
        if problems:
            raise Misfit(*problems)
        for name, value in reads.items():
            if getattr(self, name) is None:  # so that a record of the run says what was used
                object.__setattr__(self, name, value)
        return self

    @property
    def width(self) -> int:
        """Answers that one value of the loss is about."""
        sampled = self.on_policy.n if self.on_policy else 0
        return {"answers": 1, "pairs": 2, "triples": 3, "lists": sampled}[OBJECTIVES[self.loss].of]

    @property
    def parameters(self) -> dict[str, Any]:
        """What its loss reads."""
        return {name: getattr(self, name) for name in OBJECTIVES[self.loss].parameters(self.divergence)}


class OnlinePreference(Rewarded, SamplingStage):
    """Learn preferences between answers that are sampled while training goes on and compared by `rewards`: online DPO
    (Guo et al., 2402.04792), Nash-MD (Munos et al., 2312.00886), XPO (Xie et al., 2405.21046)."""

    kind: Literal["online_preference"] = Field(description="The method.")
    loss: Literal["dpo", "ipo", "nash_md", "xpo"] = Field("dpo", description="What is minimised.")
    n: int = Field(2, ge=2, description="Completions per prompt, a best and a worst of which are a pair (dpo, ipo).")
    beta: float = Field(0.1, gt=0, description="Strength of the pull towards the reference.")
    mixture: float = Field(
        0.5, ge=0, le=1, description="nash_md: share of the reference in what the policy's answer is compared with."
    )
    alpha: float = Field(1e-5, ge=0, description="xpo: weight of exploration, away from the reference's own answers.")

    @property
    def sides(self) -> int:
        """Answers to a prompt that are learned from."""
        return 1 if self.loss == "nash_md" else 2

    @model_validator(mode="after")
    def _fits_its_loss(self) -> OnlinePreference:
        readers = {"n": ("dpo", "ipo"), "mixture": ("nash_md",), "alpha": ("xpo",)}
        problems: list[tuple[tuple[str | int, ...], str]] = [
            ((name,), f"loss {self.loss} does not read it; {' and '.join(losses)} alone do")
            for name, losses in readers.items()
            if self.loss not in losses and getattr(self, name) != type(self).model_fields[name].default
        ]
        if self.sampling.temperature == 0:
            problems.append((("sampling", "temperature"), GREEDY_GROUP))
        if problems:
            raise Misfit(*problems)
        return self


class Judging(Sampling):
    n: int = Field(3, ge=1, description="Judgements of each answer, whose grades are averaged.")
    max_new_tokens: int = Field(256, ge=1, description="Longest judgement, in tokens.")
    rubric: str | None = Field(
        None,
        min_length=1,
        description="What earns an answer its points, 0 to 5; null: the five that add up in the paper.",
    )


class SelfRewarding(Rounds):
    """The model grades its own answers and learns by DPO to prefer what it finds better, in rounds (Self-Rewarding,
    Yuan et al., 2401.10020); with `meta_judge` it learns to judge, too (Meta-Rewarding, Wu et al., 2407.19594)."""

    kind: Literal["self_rewarding"] = Field(description="The method.")
    n: int = Field(4, ge=2, description="Answers to each, a best and a worst of which are a pair.")
    judging: Judging = Field(default_factory=lambda: Judging(), description="How answers are graded.")
    meta_judge: bool = Field(
        False,
        description="Compare judgements, too, and learn to prefer the better ones: of each prompt those on the answer "
        "whose grades differ most.",
    )
    length_control: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="Share of the range of grades within which answers are equally good: the shortest of the best is "
        "preferred to the longest of the worst (Meta-Rewarding: up to 0.4).",
    )
    max_unscored: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Share of a round's answers of which no grade may be readable before the run stops.",
    )
    beta: float = Field(0.1, gt=0, description="Strength of the pull towards the round's first weights, its reference.")
    nll_weight: float = Field(
        0.0, ge=0, description="Weight of the preferred text's per-token NLL; guards its probability."
    )

    @property
    def learning(self) -> Preference:
        """What a round does with its pairs."""
        shared = {name: getattr(self, name) for name in StageBase.model_fields}
        own = {"kind": "preference", "steps": self.round_steps, "beta": self.beta, "nll_weight": self.nll_weight}
        return Preference.model_validate(shared | own)

    @model_validator(mode="after")
    def _judges(self) -> SelfRewarding:
        problems: list[tuple[tuple[str | int, ...], str]] = []
        if self.sampling.temperature == 0:
            problems.append((("sampling", "temperature"), GREEDY_GROUP))
        if self.judging.temperature == 0 and self.judging.n > 1:
            what = "must be 1 at temperature 0, where the judgements of an answer are all the same"
            problems.append((("judging", "n"), what))
        if self.meta_judge and self.judging.n == 1:
            problems.append((("judging", "n"), "must be at least 2 where judgements are compared (meta_judge)"))
        if problems:
            raise Misfit(*problems)
        return self
