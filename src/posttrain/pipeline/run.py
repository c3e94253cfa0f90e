"""A run: recipe in, measured and reported model out, in one folder that the same command continues."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from posttrain.data.chat import Renderer
from posttrain.data.prepare import prompt_key
from posttrain.evals import retention, suites
from posttrain.forest import Row
from posttrain.forest.attention import unsupported
from posttrain.forest.logprobs import check_head
from posttrain.models.disk import read_json, read_rows, write_json, write_rows, write_text
from posttrain.models.policy import Policy, load
from posttrain.monitors.checks import watch_evals, watch_held_out, watch_stage
from posttrain.pipeline.folder import alone, environment
from posttrain.pipeline.gates import decide
from posttrain.pipeline.progress import Progress
from posttrain.pipeline.stages import Job, Say, Trainer, run_stage, stage_data, train_here
from posttrain.recipe.load import load as load_recipe
from posttrain.recipe.load import resolved
from posttrain.recipe.schema import Recipe
from posttrain.recipe.scoring import ScoringStage
from posttrain.recipe.stage import StageBase
from posttrain.records import derive
from posttrain.report.render import render
from posttrain.rewards.verifier import verify
from posttrain.sampling.local import LocalSampler

BASE = "base"


@dataclass(frozen=True)
class Result:
    folder: Path
    report: Path
    gates: list[dict[str, Any]]
    ok: bool
    """Whether every gate was met."""
    summary: dict[str, Any]


def run(
    recipe_path: Path, overrides: Sequence[str] = (), out: Path | None = None, trainer: Trainer = train_here
) -> Result:
    """Do what the recipe says. Finished stages are skipped, an unfinished one goes on from its last checkpoint.

    `trainer` trains the stages; all else is done in this process.

    Raises:
        UserError: the recipe, its data or its model cannot be used, or the folder holds another run.
    """
    recipe = resolved(load_recipe(recipe_path, overrides), recipe_path.parent)
    folder = out or Path("runs") / recipe.name
    with alone(folder), Progress() as progress:
        say = Say(progress.line, progress.step)
        write_text(folder / "recipe.yaml", recipe_path.read_text(encoding="utf-8"))
        write_json(folder / "resolved.json", recipe.model_dump(mode="json", by_alias=True))
        write_json(folder / "environment.json", environment())
        _do(recipe, folder, say, trainer)
        evals = _collect(recipe, folder)
        write_json(folder / "evals.json", evals)
        write_json(folder / "monitors.json", {"rows": _watch(recipe, folder, evals)})
        gates = decide(recipe, evals)
        write_json(folder / "decisions.json", {"gates": gates})
        report = render(folder)
    summary = {"suites": evals["suites"], "comparisons": evals["comparisons"], "retention": evals["retention"]}
    return Result(folder, report, gates, all(gate["met"] for gate in gates), summary)


def _do(recipe: Recipe, folder: Path, say: Say, trainer: Trainer) -> None:
    """The stages, each measured when it is done. Every model is read back from where it was saved."""
    model = recipe.model

    def loader(name: str) -> Callable[[], Policy]:
        gc.collect()  # the model before this one may go now
        if name != BASE:
            return partial(
                load,
                str((folder / "stages" / name / "artifact").resolve()),
                adapter=model.adapter,
                dtype=model.dtype,
                device=model.device,
                compile=model.compile,
            )
        return partial(
            load,
            model.source,
            adapter=model.adapter,
            dtype=model.dtype,
            device=model.device,
            compile=model.compile,
            revision=model.revision,
            chat_template=model.chat_template,
            seed=derive(recipe.seed, "adapter"),
        )

    policy = loader(BASE)()
    if why := unsupported(policy.model):
        say.line(f"no shared prefixes: {why}")
    check_head(policy.model)
    exam = {suite.id: suites.items(suite) for suite in recipe.evals.suites}
    held_out = frozenset(prompt_key(example) for examples in exam.values() for example in examples)
    # All of it before anything slow: a mistake in the last stage's data is told now.
    data = {stage.id: stage_data(stage, policy, held_out) for stage in recipe.stages}
    measure = _Measure(recipe, folder, exam, policy.snapshot(), say)
    measure(BASE, policy)
    del policy  # its memory is needed
    before = BASE
    for stage in recipe.stages:
        start, place = loader(stage.from_ or before), (folder / "stages" / stage.id).resolve()
        run_stage(Job(stage, start, data.pop(stage.id), place, recipe.seed), say, trainer)
        if _writes(stage):
            measure(stage.id, loader(stage.id)())
        before = stage.id


def _writes(stage: StageBase) -> bool:
    """Whether its model writes text; a reward model is measured by its stage, on pairs."""
    return not isinstance(stage, ScoringStage)


class _Measure:
    """The suites and the drift of one stage's model, kept in `evals/<stage>.json` and `.jsonl`."""

    def __init__(
        self, recipe: Recipe, folder: Path, exam: dict[str, list[Any]], origin: dict[str, Tensor], say: Say
    ) -> None:
        self.recipe, self.folder, self.exam, self.origin, self.say = recipe, folder / "evals", exam, origin, say

    def __call__(self, stage: str, policy: Policy) -> None:
        evals, path = self.recipe.evals, self.folder / f"{stage}.json"
        digest = policy.digest()
        done = read_json(path)
        asked = evals.model_dump(mode="json")
        if done is not None and done["model"] == digest and done["evals"] == asked:
            return
        began = time.time()
        sampler = LocalSampler(policy, Renderer(policy.tokenizer, system=evals.system))
        found: dict[str, Any] = {"model": digest, "evals": asked, "suites": [], "retention": None}
        if self.exam:
            rows, _ = suites.answer(self.exam, evals, sampler, verify, derive(self.recipe.seed, "evals"))
            write_rows(self.folder / f"{stage}.jsonl", rows)
            found["suites"] = suites.summarise(rows, evals, stage, digest)
        if evals.retention:
            now = retention.continuations(LocalSampler(policy, Renderer(policy.tokenizer)), evals.retention)
            found["retention"] = {"stage": stage, "model": digest, **self._drift(stage, policy, now)}
        found["seconds"] = time.time() - began
        write_json(path, found)
        scores = ", ".join(f"{row['suite']} {row['score']:.1%}" for row in found["suites"] if row["score"] is not None)
        self.say.line(f"{stage}: {scores or 'no suites'} ({found['seconds']:.0f} s)")

    def _drift(self, stage: str, policy: Policy, now: list[Row]) -> dict[str, Any]:
        """From the base, whose continuations are kept from its own measurement, token by token."""
        path = self.folder / "retention.jsonl"
        if stage == BASE:
            write_rows(path, [asdict(row) for row in now])
            return {"kl": 0.0, "interval": [0.0, 0.0], "same": 1.0, "n": len(now)}
        said = [Row(*(tuple(kept[f]) for f in ("context", "completion", "target"))) for kept in read_rows(path)]
        return retention.drift(policy, self.origin, said, now)


def _collect(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """`evals.json` from the measurements of every stage."""
    names = [BASE, *(stage.id for stage in recipe.stages if _writes(stage))]
    found = {name: read_json(folder / "evals" / f"{name}.json") for name in names}
    comparisons: list[dict[str, Any]] = []
    if recipe.evals.suites:
        rows = {name: read_rows(folder / "evals" / f"{name}.jsonl") for name in names}
        before = BASE
        for stage in filter(_writes, recipe.stages):
            comparisons += suites.compare(rows, recipe.evals, stage.id, [BASE, stage.from_ or before])
            before = stage.id
    return {
        "suites": [row for name in names for row in found[name]["suites"]],
        "comparisons": comparisons,
        "retention": [found[name]["retention"] for name in names if found[name]["retention"]],
        "seconds": sum(found[name]["seconds"] for name in names),
    }


def _watch(recipe: Recipe, folder: Path, evals: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for stage in recipe.stages:
        place = folder / "stages" / stage.id
        rows += watch_stage(stage.id, stage.kind, read_rows(place / "metrics.jsonl"))
        if measured := read_json(place / "stage.json")["facts"].get("held_out"):
            rows.append(watch_held_out(stage.id, measured))
    return rows + watch_evals(evals)
