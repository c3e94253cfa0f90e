"""The keys of every stage, and of those that sample while they train."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from posttrain.recipe.base import Block, Misfit
from posttrain.recipe.blocks import Data, Optim, Sampling


class StageBase(Block):
    id: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="Name of the stage, and of its folder.")
    from_: str | None = Field(
        None, alias="from", description="Id of the stage whose model this one starts from; default: the one before."
    )
    data: Data = Field(description="What the stage learns from.")
    steps: int = Field(ge=1, description="Optimiser steps.")
    batch_size: int = Field(
        8,
        ge=1,
        description="Examples (sft, distill), pieces of text (continued_pretraining), pairs or what else the loss "
        "compares (preference, reward_model), or prompts (grpo, ppo, online_preference) in one step.",
    )
    tokens_per_forward: int = Field(
        1024,
        ge=16,
        description="Token budget of one forward pass; changes memory and speed, never the result "
        "(but for what an adapter's dropout drops).",
    )
    memory_gb: float | None = Field(
        None, gt=0, description="Memory the stage may take, in GB; tokens_per_forward is lowered until it fits."
    )
    activation_checkpointing: bool = Field(
        False, description="Keep no activations inside a layer but compute them again: less memory, a third more time."
    )
    check_first_step: bool = Field(
        True,
        description="Compare the packed forward and backward pass with the plain one before the first step, and the "
        "sampler's log-probabilities with the trainer's on the first answers that it samples.",
    )
    optim: Optim = Field(default_factory=lambda: Optim(), description="Optimiser and its schedule.")
    checkpoint_every: int = Field(
        10,
        ge=1,
        description="Most steps that a kill may cost; checkpoints begin a quarter sooner, to be on the disk by then.",
    )
    nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="On a NaN or infinite loss or gradient: stop the run, or skip the step and count it."
    )

    @field_validator("optim")
    @classmethod
    def _own_defaults(cls, optim: Optim) -> Optim:
        """A partly written block keeps this kind's defaults, not those of `Optim`."""
        own = cls.model_fields["optim"].get_default(call_default_factory=True)
        return optim.model_copy(update={k: getattr(own, k) for k in own.model_fields_set - optim.model_fields_set})


class SamplingStage(StageBase):
    """What every stage has that learns from its own samples while it draws them."""

    optim: Optim = Field(
        default_factory=lambda: Optim(lr=5e-5, schedule="constant"), description="Optimiser and its schedule."
    )
    sampling: Sampling = Field(default_factory=lambda: Sampling(), description="How completions are drawn.")


class Rounds(SamplingStage):
    """What every stage has that samples and learns by turns."""

    prompts: int = Field(ge=1, description="How many prompts to sample for in each round.")
    rounds: int = Field(
        1, ge=1, description="How often it is sampled, with the weights of then; rounds have equal shares of steps."
    )

    @property
    def round_steps(self) -> int:
        """Optimiser steps of a round."""
        return self.steps // self.rounds

    @model_validator(mode="after")
    def _equal_shares(self) -> Rounds:
        if self.steps % self.rounds:
            what = f"{self.steps} steps cannot be shared out evenly among {self.rounds} rounds"
            raise Misfit((("rounds",), what))
        return self
