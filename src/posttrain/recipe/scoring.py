"""Stages that make a model which scores text and writes none."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from posttrain.recipe.base import Misfit
from posttrain.recipe.blocks import GREEDY_GROUP, Optim, Sampling
from posttrain.recipe.rewards import Rewarded
from posttrain.recipe.stage import StageBase


class StepSampling(Rewarded, Sampling):
    """Labels of steps from what becomes of them (Math-Shepherd, Wang et al., 2312.08935): the stage's starting model
    writes solutions, and completes each of them from the end of each step; `rewards` say which come right."""

    prompts: int = Field(ge=1, description="How many prompts to write solutions to before training.")
    solutions: int = Field(4, ge=1, description="Solutions to each prompt.")
    n: int = Field(8, ge=1, description="Completions from the end of each step.")
    labels: Literal["soft", "hard"] = Field(
        "soft", description="A step's label: the share of its completions that come right, or whether any does."
    )

    @model_validator(mode="after")
    def _completions_differ(self) -> StepSampling:
        if self.temperature == 0:
            raise Misfit((("temperature",), GREEDY_GROUP))
        return self


class ScoringStage(StageBase):
    """What every stage has whose model scores answers and writes none."""

    optim: Optim = Field(default_factory=lambda: Optim(lr=1e-4), description="Optimiser and its schedule.")
    holdout: float = Field(
        0.1, ge=0, lt=1, description="Share of the rows kept out of training; accuracy is measured on them."
    )


class RewardModel(ScoringStage):
    """Bradley-Terry reward model (Ouyang et al., 2203.02155): one number for an answer, read at its last token."""

    kind: Literal["reward_model"] = Field(description="The method.")
    centring: float = Field(
        0.0, ge=0, description="Weight of (chosen + rejected reward)^2; keeps rewards around 0 (2312.09244: 0.01)."
    )

    @model_validator(mode="after")
    def _answers_end(self) -> RewardModel:
        if self.data.too_long == "truncate":
            raise Misfit(
                (("data", "too_long"), "a reward is read where an answer ends: none may be cut; take drop or error")
            )
        return self


class ProcessRewardModel(ScoringStage):
    """Process reward model (Lightman et al., 2305.20050): the chance that a solution is right so far, read at the last
    token of each step."""

    kind: Literal["process_reward_model"] = Field(description="The method.")
    separator: str = Field("\n", min_length=1, description="What stands between two steps of an answer.")
    rollouts: StepSampling | None = Field(
        None, description="Sample solutions and label their steps; without it the data must hold labelled steps."
    )
