"""The rewards a recipe may name. What each computes stands in the file of its name in the room `rewards`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from posttrain.recipe.base import Block, Misfit


class RewardBase(Block):
    id: str | None = Field(
        None, pattern=r"^[a-z0-9][a-z0-9_-]*$", description="Name in metrics and messages; default: its kind."
    )
    weight: float = Field(1.0, ge=0, description="What it is multiplied by in the sum; 0 only watches.")
    gate: float | None = Field(
        None, description="An answer that this scores below earns at most 0 altogether, whatever the others say."
    )

    @property
    def name(self) -> str:
        return self.id or self.kind  # type: ignore[attr-defined]


class VerifierReward(RewardBase):
    """The check that belongs to a generated task, all or nothing."""

    kind: Literal["verifier"] = Field(description="The reward.")


class MathReward(RewardBase):
    """Whether a mathematical answer equals the reference answer (math-verify)."""

    kind: Literal["math"] = Field(description="The reward.")
    timeout_s: float = Field(5.0, gt=0, description="Seconds after which an answer counts as one not to be scored.")


class ExactReward(RewardBase):
    """Whether the answer is the reference answer, whatever its spacing."""

    kind: Literal["exact"] = Field(description="The reward.")
    ignore_case: bool = Field(False, description="Take capitals for small letters.")


class RegexReward(RewardBase):
    """Whether the whole answer matches a pattern (Python's re)."""

    kind: Literal["regex"] = Field(description="The reward.")
    pattern: str = Field(min_length=1, description="What the whole answer must match.")
    example: str = Field(min_length=1, description="An answer that matches: the pattern is proven on it.")
    timeout_s: float = Field(2.0, gt=0, description="Seconds after which an answer counts as one not to be scored.")


class JsonSchemaReward(RewardBase):
    """Whether the answer is JSON that a schema allows."""

    kind: Literal["json_schema"] = Field(description="The reward.")
    schema_: dict[str, Any] = Field(
        alias="schema", description="JSON Schema, of the keywords that docs/rewards.md has."
    )
    example: Any = Field(description="A value that it allows: the schema is proven on it.")


class FormatReward(RewardBase):
    """Whether an answer consists of one part in each of these tags, in this order, and of nothing else."""

    kind: Literal["format"] = Field(description="The reward.")
    tags: tuple[str, ...] = Field(("think", "answer"), min_length=1, description="Names of the tags.")

    @model_validator(mode="after")
    def _tags_differ(self) -> FormatReward:
        if len(set(self.tags)) < len(self.tags):
            raise Misfit((("tags",), "names one tag twice, and an answer has each but once"))
        if odd := [tag for tag in self.tags if not re.fullmatch(r"[\w.:-]+", tag)]:
            raise Misfit((("tags",), f"{odd[0]!r} is no name of a tag; take letters, digits, _ . : -"))
        return self


class LengthReward(RewardBase):
    """Soft punishment of overlong answers (DAPO, 2503.14476): 0, falling to -1 over the last `buffer` tokens."""

    kind: Literal["length"] = Field(description="The reward.")
    max_tokens: int = Field(ge=1, description="Length at which the punishment is whole, -1.")
    buffer: int = Field(ge=1, description="Tokens below it at which the punishment begins.")

    @model_validator(mode="after")
    def _begins(self) -> LengthReward:
        if self.buffer > self.max_tokens:
            raise Misfit(
                (("buffer",), f"{self.buffer} is above max_tokens, {self.max_tokens}: no answer is unpunished")
            )
        return self


class InstructionsReward(RewardBase):
    """Whether an answer keeps to all instructions on its form that a program can check (IFEval, 2311.07911)."""

    kind: Literal["instructions"] = Field(description="The reward.")
    checks: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Checks for every answer with their settings: `punctuation:no_comma: {}`; rows may name more.",
    )


class PythonReward(RewardBase):
    """Whether the Python code in an answer passes the unit tests of its row, run in a sandbox."""

    kind: Literal["python"] = Field(description="The reward.")
    timeout_s: float = Field(5.0, gt=0, description="Seconds for one answer's tests; slower code is wrong.")
    memory_mb: int = Field(512, ge=64, description="Memory for one answer's tests, MiB; code that needs more is wrong.")


SOURCE = "A directory, a hub id (owner/name), a .gguf file, or pip:PACKAGE/FILE."
STAGE = "stage:"
"""Before the id of an earlier stage of the recipe, whose reward model is meant."""


class ModelReward(RewardBase):
    """The number that a reward model gives an answer, in its own units."""

    kind: Literal["model"] = Field(description="The reward.")
    source: str = Field(description="The artifact of a reward_model stage, a sequence classifier, or stage:ID.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")


Aggregate = Literal["min", "product", "last", "mean"]


class ProcessReward(RewardBase):
    """The chance that an answer's steps are good, by a process reward model, made one number."""

    kind: Literal["process"] = Field(description="The reward.")
    source: str = Field(description="The artifact of a process_reward_model stage, or stage:ID.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    aggregate: Aggregate = Field("min", description="What is made of the steps' chances.")
    separator: str = Field("\n", min_length=1, description="What stands between two steps, as in the model's training.")


class JudgeReward(RewardBase):
    """The grade that a language model gives an answer, 0 to 1, or its share of wins over the others of its group."""

    kind: Literal["judge"] = Field(description="The reward.")
    source: str = Field(description=f"The model that judges. {SOURCE}")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    rubric: str | None = Field(
        None, min_length=1, description="What a good answer is, or principles it keeps to; null: a general one."
    )
    compare: bool = Field(
        False, description="Set each answer against every other to its prompt, in both orders, in place of a grade."
    )
    low: int = Field(1, ge=0, description="The worst grade.")
    high: int = Field(10, ge=1, description="The best grade.")
    max_new_tokens: int = Field(256, ge=1, description="Longest judgement, in tokens.")

    @model_validator(mode="after")
    def _grades_differ(self) -> JudgeReward:
        if self.low >= self.high:
            raise Misfit((("high",), f"{self.high} is not above low, {self.low}"))
        return self


class ImplicitReward(RewardBase):
    """beta log(model / reference) of an answer: the reward that a model trained by DPO implies (2305.18290)."""

    kind: Literal["implicit"] = Field(description="The reward.")
    source: str = Field(description=f"The model that was trained. {SOURCE}")
    reference: str = Field(description="What it was trained from, in the same forms.")
    beta: float = Field(0.1, gt=0, description="What the log-ratio is multiplied by.")

    @model_validator(mode="after")
    def _models_differ(self) -> ImplicitReward:
        if self.reference == self.source:
            what = "is the model itself, so every answer would earn 0; name what the model was trained from"
            raise Misfit((("reference",), what))
        return self


class MajorityReward(RewardBase):
    """Whether an answer is the one that most answers to its prompt give; no reference answer is needed (TTRL,
    2504.16084)."""

    kind: Literal["majority"] = Field(description="The reward.")
    by: Literal["answer", "math"] = Field(
        "answer", description="How an answer is read out of a text: as `verifier` reads it, or as `math` does."
    )


How = Literal["mean", "worst", "penalised"]


class EnsembleReward(RewardBase):
    """Several rewards taken for one, against errors that they do not share (Coste et al., 2310.02743)."""

    kind: Literal["ensemble"] = Field(description="The reward.")
    of: tuple[str, ...] = Field(min_length=2, description="Names of its members, which count through it alone.")
    how: How = Field(
        "mean", description="Their mean, the lowest, or the mean less `penalty` times their standard deviation."
    )
    penalty: float = Field(1.0, ge=0, description="What disagreement costs where `how` is penalised.")


Reward = Annotated[
    VerifierReward
    | MathReward
    | ExactReward
    | RegexReward
    | JsonSchemaReward
    | FormatReward
    | LengthReward
    | InstructionsReward
    | PythonReward
    | ModelReward
    | ProcessReward
    | JudgeReward
    | ImplicitReward
    | MajorityReward
    | EnsembleReward,
    Field(discriminator="kind"),
]


class Rewarded(Block):
    """What every block has under which answers are scored."""

    rewards: tuple[Reward, ...] = Field(
        default_factory=lambda: (VerifierReward(kind="verifier"),),
        min_length=1,
        description="What an answer is worth: the weighted sum of these.",
    )
    max_unscored: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Share of a batch's answers that may be impossible to score before the run stops; those are left "
        "out, never taken for 0. A batch in which none has a score always stops it.",
    )

    @model_validator(mode="after")
    def _names_fit(self) -> Rewarded:
        problems: list[tuple[tuple[str | int, ...], str]] = []
        singles = {reward.name: reward for reward in self.rewards if not isinstance(reward, EnsembleReward)}
        seen: set[str] = set()
        for i, reward in enumerate(self.rewards):
            if reward.name in seen:
                problems.append((("rewards", i, "id"), f"{reward.name!r} is taken; give each reward its own"))
            seen.add(reward.name)
            if _compares(reward) and getattr(self, "n", 2) == 1:
                what = f"{reward.name!r} compares the answers to a prompt with each other, and n is 1: take 2 or more"
                problems.append((("rewards", i), what))
            if isinstance(reward, EnsembleReward) and len(set(reward.of)) < len(reward.of):
                problems.append((("rewards", i, "of"), "names one reward twice"))
            for member in reward.of if isinstance(reward, EnsembleReward) else ():
                if member not in singles:
                    there = ", ".join(singles) or "none"
                    problems.append((("rewards", i, "of"), f"no single reward {member!r} here (there are: {there})"))
                elif "weight" in singles[member].model_fields_set:
                    what = f"{member!r} counts through the ensemble alone; leave its weight out"
                    problems.append((("rewards", i, "of"), what))
        members = {name for reward in self.rewards if isinstance(reward, EnsembleReward) for name in reward.of}
        if not any(reward.weight for reward in self.rewards if reward.name not in members):
            what = "every one has weight 0 and only watches, so all answers would earn the same; give one a weight"
            problems.append((("rewards",), what))
        if problems:
            raise Misfit(*problems)
        return self


def _compares(reward: Reward) -> bool:
    """Whether it says nothing of an answer alone."""
    return isinstance(reward, MajorityReward) or (isinstance(reward, JudgeReward) and reward.compare)
