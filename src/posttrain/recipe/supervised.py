"""Stages that learn what stands in the data or what a teacher says."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from posttrain.recipe.base import Misfit
from posttrain.recipe.blocks import Reference, Sampling
from posttrain.recipe.stage import StageBase


class ContinuedPretraining(StageBase):
    """Continued pre-training (Gururangan et al., 2004.10964): negative log-likelihood of raw text, each document for
    itself and without a chat template. A document longer than `data.max_length` or the model's context is cut into
    pieces, and nothing of it is left out."""

    kind: Literal["continued_pretraining"] = Field(description="The method.")

    @model_validator(mode="after")
    def _documents(self) -> ContinuedPretraining:
        problems: list[tuple[tuple[str | int, ...], str]] = []
        if self.data.system is not None:
            problems.append((("data", "system"), "raw text has no system prompt; leave it out"))
        if self.data.too_long != "drop":
            what = "a long document is cut into pieces, so none is too long; leave it out"
            problems.append((("data", "too_long"), what))
        if problems:
            raise Misfit(*problems)
        return self


class Sft(StageBase):
    """Supervised fine-tuning: the likelihood of the assistant's tokens, per target token of the step."""

    kind: Literal["sft"] = Field(description="The method.")
    loss: Literal["nll", "dft"] = Field(
        "nll",
        description="Negative log-likelihood, or that weighted by each token's own probability (dynamic fine-tuning, "
        "2508.05629), which learns less from what the model finds unlikely.",
    )


DISTILLS: dict[str, tuple[str, ...]] = {
    "sequence": ("sampling",),
    "off_policy": ("beta", "temperature"),
    "on_policy": ("beta", "temperature", "student_share", "sampling"),
}
"""Which keys of a distill stage each of its modes reads; those that it does not read must not be set."""


class Distill(StageBase):
    """Distillation (Hinton et al., 1503.02531): learn what a teacher would say next, from its own answers
    (sequence-level, Kim and Rush, 1606.07947) or from its distributions (GKD, Agarwal et al., 2306.13649)."""

    kind: Literal["distill"] = Field(description="The method.")
    teacher: Reference = Field(description="The model that is learned from.")
    mode: Literal["sequence", "off_policy", "on_policy"] = Field(
        "off_policy",
        description="sequence: fine-tune on answers that the teacher writes before training. off_policy: come near the "
        "teacher's next-token distributions along the data's answers. on_policy: along the student's own, too (GKD).",
    )
    beta: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Of the generalised Jensen-Shannon divergence: 0 is KL(teacher, student), which covers all that "
        "the teacher says, and 1 is KL(student, teacher), which keeps to what the teacher says (MiniLLM, 2306.08543).",
    )
    temperature: float = Field(1.0, gt=0, description="Both models' logits are divided by it in the divergence.")
    student_share: float = Field(
        0.5, gt=0, le=1, description="Share of the answers that the student writes itself; the others are the data's."
    )
    sampling: Sampling = Field(
        default_factory=lambda: Sampling(), description="How the teacher, or on-policy the student, writes answers."
    )

    @model_validator(mode="after")
    def _read(self) -> Distill:
        mine = DISTILLS[self.mode]
        problems: list[tuple[tuple[str | int, ...], str]] = [
            ((name,), f"mode: {self.mode} does not read it; it reads {', '.join(mine)}")
            for name in DISTILLS["on_policy"]
            if name not in mine
            and getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True)
        ]
        if problems:
            raise Misfit(*problems)
        return self


class Constitutional(StageBase):
    """The supervised half of Constitutional AI (Bai et al., 2212.08073): the model answers each prompt, says where its
    answer offends against a principle, writes it anew, and learns the last version."""

    kind: Literal["constitutional"] = Field(description="The method.")
    constitution: str = Field(
        description="Principles that an answer must keep to, one on each line; each revision goes by one, by seed."
    )
    rounds: int = Field(1, ge=1, description="How often an answer is criticised and revised before it is learned.")
    sampling: Sampling = Field(
        default_factory=lambda: Sampling(), description="How answers, critiques and revisions are drawn."
    )

    @property
    def principles(self) -> tuple[str, ...]:
        return tuple(line.strip() for line in self.constitution.splitlines() if line.strip())

    @model_validator(mode="after")
    def _has_principles(self) -> Constitutional:
        if not self.principles:
            raise Misfit((("constitution",), "holds no principle; write one on each line"))
        if re.fullmatch(r"\S+\.\w+|.+\.txt", only := self.constitution.strip()):
            raise Misfit((("constitution",), f"names a file, {only}; write the principles here, one on each line"))
        return self
