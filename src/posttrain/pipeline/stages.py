"""A stage: from its config, a starting model and data to a finished artifact. Skipped where that exists already."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from posttrain.data.chat import TOOLS_LEFT_OUT, Rendered, Renderer
from posttrain.data.prepare import Need, Prepared, prepare, prompted
from posttrain.data.steps import solution
from posttrain.environments import make
from posttrain.environments.episodes import EpisodeSampler
from posttrain.environments.protocol import Budget
from posttrain.evals.stats import wilson
from posttrain.machine import peak_memory
from posttrain.models.policy import Policy, outline
from posttrain.models.reward import fitting, reward_model
from posttrain.pipeline.folder import digest, read_json, write_json
from posttrain.pipeline.memory import fit
from posttrain.recipe.objectives import OBJECTIVES
from posttrain.recipe.preference import OnlinePreference, Preference, SelfRewarding
from posttrain.recipe.rewards import STAGE, Rewarded
from posttrain.recipe.rl import Grpo, RejectionSampling, Rl
from posttrain.recipe.schema import Stage
from posttrain.recipe.scoring import ProcessRewardModel, RewardModel, ScoringStage
from posttrain.recipe.stage import StageBase
from posttrain.recipe.supervised import Constitutional, ContinuedPretraining, Distill, Sft
from posttrain.records import Example, Ledger, UserError, derive
from posttrain.rewards import build
from posttrain.rewards.learned import located
from posttrain.rewards.protocol import Scorer
from posttrain.rewards.sources import lacking, proven
from posttrain.sampling.endpoint import EndpointSampler
from posttrain.sampling.local import LocalSampler
from posttrain.sampling.protocol import Sampler
from posttrain.training.batch import Method
from posttrain.training.constitutional import revise, revised
from posttrain.training.distill import DistillMethod, taught, teach, teacher_of
from posttrain.training.grpo import GrpoMethod
from posttrain.training.loop import train
from posttrain.training.online import OnlineMethod
from posttrain.training.oom import FEWER, enough_memory
from posttrain.training.ppo import PpoMethod
from posttrain.training.preference import (
    PreferenceMethod,
    judged_from_data,
    judged_on_policy,
    read_judged,
    referred,
    second_model,
    write_judged,
)
from posttrain.training.process_reward import (
    ProcessRewardMethod,
    labelled_solutions,
    one_label,
    read_solutions,
    verdicts,
    write_solutions,
)
from posttrain.training.rejection import RejectionMethod
from posttrain.training.reward import RewardMethod, ends, hold_out, preferred
from posttrain.training.rollouts import shared
from posttrain.training.self_rewarding import SelfRewardingMethod
from posttrain.training.sft import SftMethod
from posttrain.training.world import ALONE, World


@dataclass(frozen=True)
class Say:
    """How a run talks to whoever started it."""

    line: Callable[[str], None]
    step: Callable[[StageBase, dict[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """A stage's training, in a form that can be sent to other processes and machines."""

    stage: Stage
    load: Callable[[], Policy]
    """The model it starts from."""
    data: Prepared
    folder: Path
    seed: int


class Trainer(Protocol):
    """Where training takes place."""

    def __call__(self, job: Job, start: Policy, say: Say) -> tuple[Ledger, dict[str, Any]]:
        """Train `start`, which is what `job.load` gives, in place; returns the cost and facts worth recording."""


def train_here(job: Job, start: Policy, say: Say) -> tuple[Ledger, dict[str, Any]]:
    """In this process."""
    return learn(job, start, say, LocalSampler(start, Renderer(start.tokenizer, system=job.stage.data.system)))


def learn(job: Job, start: Policy, say: Say, sampler: Sampler, world: World = ALONE) -> tuple[Ledger, dict[str, Any]]:
    """The part of a `Trainer` that each worker of `world` calls with its `start`."""
    stage = job.stage
    method, before, facts = _method(job, start, sampler, world)
    ledger = train(start, method, stage, job.folder, job.seed, lambda row: say.step(stage, row), say.line, world)
    if isinstance(method, PpoMethod) and world.rank == 0:
        method.save(job.folder)
    return before + ledger, facts


def stage_data(stage: StageBase, policy: Policy, held_out: frozenset[str]) -> Prepared:
    """The stage's rows, rendered for `policy` and the models made from it.

    Raises:
        UserError: the data cannot be used or says one thing alone, a reward fails its proof on it, no reward model can
            be made of such a policy, its template shows no tools, or another model cannot be its reference or teacher.
    """
    renderer = Renderer(policy.tokenizer, system=stage.data.system)
    context = policy.context
    if isinstance(stage, Distill):
        context = min(context, second_model(policy, stage, outline).context)
    data = prepare(stage.data, renderer, need=need(stage), held_out=held_out, context=context)
    if rewarded := _rewarded(stage):
        proven(rewarded.rewards, _by_task(data))
    if isinstance(stage, Rl) and stage.environment and not stage.environment.plain and TOOLS_LEFT_OUT in renderer.notes:
        raise UserError(f"stage {stage.id!r}: environment: {TOOLS_LEFT_OUT}, or set plain: true")
    if isinstance(stage, Preference) and stage.reference is not None:
        second_model(policy, stage, outline)
    if isinstance(stage, ScoringStage):
        hold_out(stage, data)
        fitting(policy, ends(data))
    if isinstance(stage, ProcessRewardModel) and stage.rollouts is None and (why := one_label(data)):
        raise UserError(f"stage {stage.id!r}: {why}, so there is nothing to tell apart; give steps of both kinds")
    return data


def run_stage(job: Job, say: Say, trainer: Trainer = train_here) -> None:
    """Train into `job.folder/artifact` and write `job.folder/stage.json`; do nothing where that is finished.

    Raises:
        UserError: the folder holds a stage with other inputs, or of what was sampled nothing can be learned.
    """
    stage, data, folder, seed = job.stage, job.data, job.folder, job.seed
    start = job.load()
    config = stage.model_dump(mode="json", by_alias=True)
    record = read_json(folder / "stage.json")
    inputs = {"model": start.digest(), "data": data.report["digest"], "config": digest([config, seed])}
    if record is not None and record["inputs"] != inputs:
        changed = ", ".join(name for name in inputs if record["inputs"][name] != inputs[name])
        raise UserError(
            f"{folder}: was made with other inputs (changed: {changed}), and what is finished is never rewritten; "
            "give the changed recipe another --out"
        )
    if record is not None and record["finished"]:
        say.line(f"{stage.id}: finished already")
        return
    began = record["started"] if record else time.time()
    record = {"id": stage.id, "kind": stage.kind, "from": stage.from_, "inputs": inputs, "data": data.report}
    record |= {"steps": stage.steps, "started": began, "finished": None}
    write_json(folder / "stage.json", record)
    for note in (*data.report["notes"], *_told(data)):
        say.line(f"{stage.id}: {note}")

    held: list[Rendered] = []
    before = Ledger()
    made: dict[str, Any] = {}
    if isinstance(stage, ProcessRewardModel) and stage.rollouts:
        data, before, made = _labelled(stage, data, start, folder, seed)
    if isinstance(stage, Distill) and stage.mode == "sequence":
        data, before, made = _taught(stage, data, start, folder, seed)
        job = replace(job, data=data)
    if isinstance(stage, Constitutional):
        data, before, made = _revised(stage, data, start, folder, seed)
        job = replace(job, data=data)
    if isinstance(stage, ScoringStage):
        head = ends(data), derive(seed, stage.id, "head")
        start = reward_model(start, *head)
        data, held = hold_out(stage, data)
        job = Job(stage, partial(_headed, job.load, *head), data, folder, seed)
    fitted = fit(stage, data, start, seed)[0] if stage.memory_gb else stage
    if fitted != stage:
        recomputed = ", activations recomputed" if fitted.activation_checkpointing else ""
        say.line(f"{stage.id}: passes of {fitted.tokens_per_forward} tokens{recomputed}, to stay in its memory_gb")
    ledger, facts = trainer(replace(job, stage=fitted), start, say)
    if check := read_json(folder / "oracle.json"):
        facts |= {"first_step": check}
    artifact = start.save(folder / "artifact")
    if held and isinstance(stage, ScoringStage):
        facts |= {"held_out": _held_out(start.model, held, stage)}
    ledger, facts = before + ledger, made | facts
    finished = time.time()
    record |= {
        "artifact": {"kind": artifact.kind, "path": "artifact", "digest": artifact.digest},
        "ledger": asdict(ledger),
        "finished": finished,
        "seconds": ledger.seconds,
        "peak_rss_bytes": peak_memory(),
        "facts": facts,
        "notes": data.report["notes"],
    }
    write_json(folder / "stage.json", record)
    _drop_checkpoints(folder)


def need(stage: StageBase) -> Need:
    if isinstance(stage, ContinuedPretraining):
        return "text"
    if isinstance(stage, Sft):
        return "completion"
    if isinstance(stage, Distill):
        if stage.mode == "off_policy":
            return "completion"
        return partial(prompted, lacks=lambda _: "", own=stage.mode == "on_policy" and stage.student_share < 1)
    if isinstance(stage, Constitutional | SelfRewarding):
        return partial(prompted, lacks=lambda _: "")
    if rewarded := _rewarded(stage):
        if isinstance(stage, Rl) and stage.environment is not None:
            return partial(prompted, lacks=lacking(rewarded.rewards), asked=make(stage.environment)().reset)
        own = isinstance(stage, Preference) and OBJECTIVES[stage.loss].of == "triples"
        return partial(prompted, lacks=lacking(rewarded.rewards), own=own)
    if isinstance(stage, Preference):
        return "label" if OBJECTIVES[stage.loss].of == "answers" else "pair"
    if isinstance(stage, ProcessRewardModel):
        return partial(solution, separator=stage.separator)
    return "pair"


def _rewarded(stage: StageBase) -> Rewarded | None:
    """The block that says what answers to the stage's prompts are worth, where it samples them."""
    if isinstance(stage, Preference):
        return stage.on_policy
    if isinstance(stage, ProcessRewardModel):
        return stage.rollouts
    return stage if isinstance(stage, Rewarded) else None


def _labelled(
    stage: ProcessRewardModel, data: Prepared, start: Policy, folder: Path, seed: int
) -> tuple[Prepared, Ledger, dict[str, Any]]:
    """The labelled solutions that the stage samples, what they cost, and what is worth recording of them."""
    kept, cost = folder / "solutions.jsonl", folder / "solutions.json"
    if not cost.is_file():
        renderer = Renderer(start.tokenizer, system=stage.data.system)
        sampler, scorer = LocalSampler(start, renderer), _scorer(stage, data, start, folder)
        with enough_memory("while solutions were sampled", FEWER):
            solutions, ledger, facts = labelled_solutions(stage, data, sampler, scorer, renderer, seed)
        write_solutions(kept, solutions)
        write_json(cost, {"ledger": asdict(ledger), "facts": facts})
    made = read_json(cost)
    return read_solutions(kept, data.report), Ledger(**made["ledger"]), made["facts"]


def _taught(
    stage: Distill, data: Prepared, start: Policy, folder: Path, seed: int
) -> tuple[Prepared, Ledger, dict[str, Any]]:
    """The data with the teacher's answers, what they cost, and what is worth recording of them."""
    kept, cost = folder / "taught.jsonl", folder / "taught.json"
    if not cost.is_file():
        teacher = teacher_of(start, stage)
        sampler = LocalSampler(teacher, Renderer(start.tokenizer, system=stage.data.system))
        with enough_memory("while the teacher answered", FEWER):
            ledger, facts = teach(stage, data, sampler, seed, kept)
        write_json(cost, {"ledger": asdict(ledger), "facts": facts | {"teacher": teacher.digest()}})
    made = read_json(cost)
    return taught(kept, data), Ledger(**made["ledger"]), made["facts"]


def _revised(
    stage: Constitutional, data: Prepared, start: Policy, folder: Path, seed: int
) -> tuple[Prepared, Ledger, dict[str, Any]]:
    """The data with the model's revised answers, what they cost, and what is worth recording of them."""
    kept, cost = folder / "revised.jsonl", folder / "revised.json"
    if not cost.is_file():
        sampler = LocalSampler(start, Renderer(start.tokenizer, system=stage.data.system))
        with enough_memory("while answers were revised", FEWER):
            ledger, facts = revise(stage, data, sampler, seed, kept)
        write_json(cost, {"ledger": asdict(ledger), "facts": facts})
    made = read_json(cost)
    return revised(kept, data), Ledger(**made["ledger"]), made["facts"]


def _held_out(model: nn.Module, held: list[Rendered], stage: ScoringStage) -> dict[str, Any]:
    """How often a scoring model is right on rows it was not trained on; `chance` is what knowing nothing earns."""
    if isinstance(stage, RewardModel):
        right = preferred(model, held, stage.tokens_per_forward)
        return {**_share(sum(right), len(held)), "of": "pairs", "chance": 0.5}
    found = verdicts(model, held, stage.tokens_per_forward)
    accuracy = sum(verdict.right for verdict in found) / len(found)
    good = sum(verdict.good for verdict in found) / len(found)
    # Steps of one solution share their fate: the interval is what as many solutions, judged whole, would give.
    interval = _share(round(accuracy * len(held)), len(held))["interval"]
    return {"n": len(found), "accuracy": accuracy, "interval": interval, "of": "steps", "chance": max(good, 1 - good)}


def _share(k: int, n: int) -> dict[str, Any]:
    return {"n": n, "accuracy": k / n, "interval": list(wilson(k, n))}


def _headed(load: Callable[[], Policy], ends: set[int], seed: int) -> Policy:
    return reward_model(load(), ends, seed)


def _method(job: Job, start: Policy, sampler: Sampler, world: World) -> tuple[Method, Ledger, dict[str, Any]]:
    """The stage's method, what preparing it cost, and what is worth recording of that."""
    stage, data, folder, seed = job.stage, job.data, job.folder, job.seed
    if isinstance(stage, Sft | ContinuedPretraining | Constitutional):
        return SftMethod(stage, data, seed), Ledger(), {}
    if isinstance(stage, Distill):
        if stage.mode == "sequence":
            return SftMethod(stage, data, seed), Ledger(), {}
        teacher = teacher_of(start, stage)
        return DistillMethod(stage, data, start, teacher, sampler, seed), Ledger(), {"teacher": teacher.digest()}
    if isinstance(stage, RewardModel):
        return RewardMethod(stage, data, seed), Ledger(), {"pairs": sum(map(len, data.rows))}
    if isinstance(stage, ProcessRewardModel):
        return ProcessRewardMethod(stage, data, seed), Ledger(), {"solutions": sum(map(len, data.rows))}
    if isinstance(stage, Rl):
        if stage.endpoint is not None:
            renderer = Renderer(start.tokenizer, system=stage.data.system)
            sampler = EndpointSampler(start, renderer, stage.endpoint, folder / "served")
        if stage.environment is not None:
            renderer = Renderer(start.tokenizer, system=stage.data.system)
            budget = Budget(stage.environment.tokens, context=start.context)
            sampler = EpisodeSampler(make(stage.environment), sampler, renderer, budget)
        score = _scorer(stage, data, start, folder, world)
        if isinstance(stage, Grpo):
            return GrpoMethod(stage, data, start, sampler, score, seed, world), Ledger(), {}
        ppo = PpoMethod(stage, data, start, sampler, score, seed, world)
        if stage.critic is not None:
            ppo.take(folder.parent / stage.critic.removeprefix(STAGE))
        return ppo, Ledger(), {}
    if isinstance(stage, OnlinePreference):
        score = _scorer(stage, data, start, folder, world)
        return OnlineMethod(stage, data, start, sampler, score, seed, world), Ledger(), {}
    if isinstance(stage, RejectionSampling):
        score = _scorer(stage, data, start, folder, world)
        return RejectionMethod(stage, data, start, sampler, score, folder, seed, world), Ledger(), {}
    if isinstance(stage, SelfRewarding):
        return SelfRewardingMethod(stage, data, start, sampler, folder, seed, world), Ledger(), {}
    kept, cost = folder / "judged.jsonl", folder / "judged.json"
    if not world.gather(cost.is_file())[0]:
        facts: dict[str, Any] = {}
        with enough_memory("while the pairs were made", FEWER):
            if stage.on_policy is None:
                ledger, judged = Ledger(), judged_from_data(start, stage, data, seed)
            else:
                scored = _scorer(stage, data, start, folder, world)
                judged, ledger, facts = judged_on_policy(stage, data, sampler, scored, seed)
            judged, by = referred(start, stage, judged, world)
        if world.rank == 0:
            write_judged(kept, judged)
            write_json(cost, {"ledger": asdict(ledger), "facts": facts | by})
        world.gather(None)  # nobody reads before it is written
    judged = read_judged(kept, len(data.rows))
    made = json.loads(cost.read_text())
    return PreferenceMethod(stage, data, seed, judged, start, world), Ledger(**made["ledger"]), made["facts"]


def _scorer(stage: StageBase, data: Prepared, start: Policy, folder: Path, world: World = ALONE) -> Scorer:
    rewarded = _rewarded(stage)
    assert rewarded is not None
    return build(
        [located(reward, folder.parent) for reward in rewarded.rewards],
        Renderer(start.tokenizer, system=stage.data.system),
        max_unscored=rewarded.max_unscored,
        examples=[row.example for rows in data.rows for row in rows],
        among=partial(shared, world=world),
    )


def _by_task(data: Prepared) -> dict[str, list[Example]]:
    """What there is to prove a rule on: the examples of each generated task, and of each other source."""
    groups: dict[str, list[Example]] = {}
    for source, rows in zip(data.report["sources"], data.rows, strict=True):
        for row in rows:
            groups.setdefault(row.example.task or source["source"], []).append(row.example)
    return groups


def _told(data: Prepared) -> list[str]:
    """What was read, in a line for each source."""
    lines = []
    for source in data.report["sources"]:
        lost = {k: source[k] for k in ("bad", "too_long", "truncated", "held_out", "duplicates") if source.get(k)}
        told = "".join(f", {n} {what.replace('_', ' ')}" for what, n in lost.items())
        lines.append(f"{source['source']}: {source['shape']} ({source['reason']}), {source['used']} rows used{told}")
        lines += [f"  {bad}" for bad in source.get("bad_rows", [])[:5]]
    return lines


def _drop_checkpoints(folder: Path) -> None:
    """The artifact is safe on disk; the checkpoints that led to it are several times its size."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    shutil.rmtree(folder / "served", ignore_errors=True)
