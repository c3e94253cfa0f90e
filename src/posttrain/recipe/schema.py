"""What a run is. Every key a recipe may hold, its type, default and meaning; nothing here imports torch.

The descriptions are the documentation: `posttrain explain KEY` prints them and `posttrain schema` turns them
into a JSON Schema for editors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.recipe.base import Block, Misfit
from posttrain.recipe.blocks import Model, Reference, Source
from posttrain.recipe.preference import OnlinePreference, Preference, SelfRewarding
from posttrain.recipe.rewards import STAGE, Rewarded
from posttrain.recipe.rl import Grpo, Ppo, RejectionSampling
from posttrain.recipe.scoring import ProcessRewardModel, RewardModel, ScoringStage
from posttrain.recipe.stage import StageBase
from posttrain.recipe.supervised import Constitutional, ContinuedPretraining, Distill, Sft

SCHEMA_VERSION = 1


Stage = Annotated[
    ContinuedPretraining
    | Sft
    | Distill
    | Constitutional
    | Preference
    | RewardModel
    | ProcessRewardModel
    | RejectionSampling
    | OnlinePreference
    | SelfRewarding
    | Grpo
    | Ppo,
    Field(discriminator="kind"),
]


def rewarded(stage: StageBase) -> tuple[tuple[str, ...], Rewarded | None]:
    """The block that says what sampled answers are worth, with its key; without one where it is the stage itself."""
    if isinstance(stage, Rewarded):
        return (), stage
    return next((((name,), block) for name, block in stage if isinstance(block, Rewarded)), ((), None))


def _models(stage: StageBase) -> Iterator[tuple[tuple[str | int, ...], str, str | None]]:
    """Every model and critic that the stage names: where, what, and the kind of stage that may have made it, if any."""
    if isinstance(stage, Ppo) and stage.critic:
        yield ("critic",), stage.critic, stage.kind
    for name, block in stage:
        if isinstance(block, Reference):
            yield (name, "source"), block.source, None
    path, scored = rewarded(stage)
    for i, reward in enumerate(scored.rewards if scored else ()):
        for key in ("source", "reference"):
            if source := getattr(reward, key, None):
                yield (*path, "rewards", i, key), source, SCORED_BY.get(reward.kind)


SCORED_BY = {"model": "reward_model", "process": "process_reward_model"}
"""The kind of stage that makes the model of a reward."""


def _no_stage(source: str, kind: str | None, earlier: Sequence[Stage]) -> str:
    """Why no stage of this `kind` is named by `source`; empty where one is, or `source` names none."""
    if not source.startswith(STAGE):
        return ""
    if kind is None:
        only = f"only the rewards {' and '.join(SCORED_BY)} take {STAGE}ID"
        return f"{only}; name a model, or the artifact of a run that is finished (RUN/stages/ID/artifact)"
    there = [stage.id for stage in earlier if stage.kind == kind]
    name = source.removeprefix(STAGE)
    if name in there:
        return ""
    return f"{name!r} is no earlier stage of kind {kind} (there are: {', '.join(there) or 'none'})"


class Suite(Block):
    id: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="Name of the suite in tables and gates.")
    role: Literal["trained", "neighbour"] = Field(
        description="trained: what the stages teach, on held-out items; neighbour: near it, to see what moved along."
    )
    source: Source = Field(description="Verifiable tasks; training drops every prompt that stands in here.")
    version: int = Field(1, ge=1, description="Raise it when the items or the scoring change.")


class Retention(Block):
    """How far the model moved from the base where it was not asked to: KL and drift on general prompts."""

    prompts: str = Field("builtin", description="`builtin`, or a text file with one prompt a line.")
    rows: int = Field(48, ge=2, description="How many prompts.")
    max_new_tokens: int = Field(32, ge=1, description="Length of the base's continuation that is compared.")


class Evals(Block):
    suites: tuple[Suite, ...] = Field((), description="Scored before the first and after every stage, greedily.")
    retention: Retention | None = Field(None, description="Measure drift from the base.")
    max_new_tokens: int = Field(64, ge=1, description="Longest answer in a suite, in tokens.")
    system: str | None = Field(None, description="System prompt of the suites' conversations.")


class Gate(Block):
    """A condition on the last stage's model. A gate that is not met makes the run exit 1, after its report."""

    suite: str = Field(description="Id of a suite, or `retention`.")
    measure: Literal["score", "gain", "unparsed", "kl"] = Field(
        description="score: accuracy; gain: accuracy above the base's; unparsed: share; kl: nats per token (retention)."
    )
    at_least: float | None = Field(None, description="Lowest value that passes.")
    at_most: float | None = Field(None, description="Highest value that passes.")
    sure: bool = Field(False, description="Compare the worse end of the 95 % interval in place of the estimate itself.")

    @model_validator(mode="after")
    def _bounded(self) -> Gate:
        if self.at_least is None and self.at_most is None:
            raise Misfit(((), "a gate needs at_least or at_most"))
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise Misfit((("at_least",), f"{self.at_least} is above at_most, {self.at_most}: nothing passes"))
        if (self.suite == "retention") != (self.measure == "kl"):
            raise Misfit((("measure",), "measure kl goes with suite retention, and only with it"))
        return self


class Recipe(Block):
    schema_: Literal[1] = Field(alias="schema", description="Version of the recipe format.")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run.")
    seed: int = Field(0, ge=0, description="Every random choice of the run derives from it.")
    model: Model = Field(description="The model to start from.")
    stages: tuple[Stage, ...] = Field(min_length=1, description="What is done to it, in order.")
    evals: Evals = Field(default_factory=lambda: Evals(), description="What is measured before and after each stage.")
    gates: tuple[Gate, ...] = Field((), description="What must hold at the end.")

    @model_validator(mode="after")
    def _names_resolve(self) -> Recipe:
        problems: list[tuple[tuple[str | int, ...], str]] = []
        stages: list[str] = []
        writers = ["base"]  # what a stage can start from, an evaluation ask, a gate speak of
        for i, stage in enumerate(self.stages):
            if stage.id in ("base", *stages):
                problems.append((("stages", i, "id"), f"{stage.id!r} is taken; give each stage its own (not 'base')"))
            if stage.from_ is not None and stage.from_ not in ("base", *stages):
                earlier = ", ".join(("base", *stages))
                problems.append((("stages", i, "from"), f"{stage.from_!r} is no earlier stage (these are: {earlier})"))
            start = stage.from_ or (stages[-1] if stages else "base")
            if start in stages and start not in writers:
                there = ", ".join(writers)
                what = f"{start!r} is a reward model, which writes no text; start from another one (there are: {there})"
                problems.append((("stages", i, "from"), what))
            for path, source, kind in _models(stage):
                if what := _no_stage(source, kind, self.stages[:i]):
                    problems.append((("stages", i, *path), what))
            stages.append(stage.id)
            if not isinstance(stage, ScoringStage):
                writers.append(stage.id)
        suites: list[str] = []
        for i, suite in enumerate(self.evals.suites):
            if suite.id in ("retention", *suites):
                where = ("evals", "suites", i, "id")
                problems.append((where, f"{suite.id!r} is taken; give each suite its own (not 'retention')"))
            suites.append(suite.id)
        known = [*suites, *(["retention"] if self.evals.retention else [])]
        if self.gates and isinstance(self.stages[-1], ScoringStage):
            what = "gates speak of the last stage's model, and a reward model answers no suite; put that stage earlier"
            problems.append((("gates",), what))
        for i, gate in enumerate(self.gates):
            if gate.suite not in known:
                there = ", ".join(known) or "none"
                problems.append((("gates", i, "suite"), f"no suite {gate.suite!r} under evals (there are: {there})"))
        if problems:
            raise Misfit(*problems)
        return self
