"""A stage: from its config, a starting model and data to a finished artifact. Skipped where that exists already."""

from __future__ import annotations

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
from posttrain.models.disk import read_json, write_json
from posttrain.models.policy import Policy, outline
from posttrain.models.reward import fitting, reward_model
from posttrain.pipeline.folder import digest
from posttrain.pipeline.memory import fit
from posttrain.recipe.objectives import OBJECTIVES
from posttrain.recipe.preference import OnlinePreference, Preference, SelfRewarding
from posttrain.recipe.rewards import STAGE
from posttrain.recipe.rl import Grpo, RejectionSampling, Rl, ToolsEnvironment
from posttrain.recipe.schema import Stage, rewarded
from posttrain.recipe.scoring import ProcessRewardModel, RewardModel, ScoringStage, StepSampling
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
from posttrain.training.own import Own
from posttrain.training.ppo import PpoMethod
from posttrain.training.preference import (
    PreferenceMethod,
    check_labels,
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
    _, scored = rewarded(stage)
    if scored:
        proven(scored.rewards, _by_task(data))
    if isinstance(stage, Rl) and stage.environment and not stage.environment.plain and TOOLS_LEFT_OUT in renderer.notes:
        raise UserError(f"stage {stage.id!r}: environment: {TOOLS_LEFT_OUT}, or set plain: true")
    if isinstance(stage, Preference) and stage.reference is not None:
        second_model(policy, stage, outline)
    if isinstance(stage, Preference) and OBJECTIVES[stage.loss].of == "answers":
        check_labels(stage, data.rows)
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
    data, before, made = _answered(stage, data, start, folder, seed)
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
    _, scored = rewarded(stage)
    rewards = scored.rewards if scored else ()
    match stage:
        case ContinuedPretraining():
            return "text"
        case Sft() | Distill(mode="off_policy"):
            return "completion"
        case Distill() | Constitutional() | SelfRewarding():
            own = isinstance(stage, Distill) and stage.mode == "on_policy" and stage.student_share < 1
            return partial(prompted, lacks=lambda _: "", own=own)
        case Rl(environment=ToolsEnvironment() as tools):
            return partial(prompted, lacks=lacking(rewards), asked=make(tools)().reset)
        case ProcessRewardModel(rollouts=None):
            return partial(solution, separator=stage.separator)
        case Preference(on_policy=None):
            return "label" if OBJECTIVES[stage.loss].of == "answers" else "pair"
        case RewardModel():
            return "pair"
    own = isinstance(stage, Preference) and OBJECTIVES[stage.loss].of == "triples"
    return partial(prompted, lacks=lacking(rewards), own=own)


def _once(
    path: Path, what: str, make: Callable[[], tuple[Ledger, dict[str, Any]]], world: World = ALONE
) -> tuple[Ledger, dict[str, Any]]:
    """Have `make` write `path`, unless it has: what that cost and what is worth recording, which stand beside it.

    All workers call this, and the leader writes.
    """
    record = path.with_suffix(".json")
    if not world.gather(record.is_file())[0]:
        with enough_memory(f"while {what}", FEWER):
            ledger, facts = make()
        if world.rank == 0:
            write_json(record, {"ledger": asdict(ledger), "facts": facts})
        world.gather(None)  # nobody reads before it is written
    made = read_json(record)
    return Ledger(**made["ledger"]), made["facts"]


def _answered(
    stage: Stage, data: Prepared, start: Policy, folder: Path, seed: int
) -> tuple[Prepared, Ledger, dict[str, Any]]:
    """The data with the answers that are written to it before training, what they cost, and what is worth recording."""
    renderer = Renderer(start.tokenizer, system=stage.data.system)
    sampler = Own(LocalSampler(start, renderer), start, stage)
    match stage:
        case ProcessRewardModel(rollouts=StepSampling()):
            path = folder / "solutions.jsonl"

            def label() -> tuple[Ledger, dict[str, Any]]:
                score = _scorer(stage, data, start, folder)
                solutions, ledger, facts = labelled_solutions(stage, data, sampler, score, renderer, seed)
                write_solutions(path, solutions)
                return ledger, facts

            told = _once(path, "solutions were sampled", label)
            return read_solutions(path, data.report), *told
        case Distill(mode="sequence"):
            path = folder / "taught.jsonl"

            def ask() -> tuple[Ledger, dict[str, Any]]:
                teacher = teacher_of(start, stage)
                ledger, facts = teach(stage, data, LocalSampler(teacher, renderer), seed, path)
                return ledger, facts | {"teacher": teacher.digest()}

            told = _once(path, "the teacher answered", ask)
            return taught(path, data), *told
        case Constitutional():
            path = folder / "revised.jsonl"
            told = _once(path, "answers were revised", lambda: revise(stage, data, sampler, seed, path))
            return revised(path, data), *told
    return data, Ledger(), {}


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
    match stage:
        case Sft() | ContinuedPretraining() | Constitutional() | Distill(mode="sequence"):
            return SftMethod(stage, data, seed), Ledger(), {}
        case Distill():
            teacher = teacher_of(start, stage)
            return DistillMethod(stage, data, start, teacher, sampler, seed), Ledger(), {"teacher": teacher.digest()}
        case RewardModel():
            return RewardMethod(stage, data, seed), Ledger(), {"pairs": sum(map(len, data.rows))}
        case ProcessRewardModel():
            return ProcessRewardMethod(stage, data, seed), Ledger(), {"solutions": sum(map(len, data.rows))}
        case Preference():
            path = folder / "judged.jsonl"
            make_pairs = partial(_judge, job, stage, start, sampler, world, path)
            ledger, facts = _once(path, "the pairs were made", make_pairs, world)
            judged = read_judged(path, len(data.rows))
            return PreferenceMethod(stage, data, seed, judged, start, world), ledger, facts
        case SelfRewarding():
            return SelfRewardingMethod(stage, data, start, sampler, folder, seed, world), Ledger(), {}
    score = _scorer(stage, data, start, folder, world)
    match stage:
        case OnlinePreference():
            return OnlineMethod(stage, data, start, sampler, score, seed, world), Ledger(), {}
        case RejectionSampling():
            return RejectionMethod(stage, data, start, sampler, score, folder, seed, world), Ledger(), {}
    renderer = Renderer(start.tokenizer, system=stage.data.system)
    if stage.endpoint is not None:
        sampler = EndpointSampler(start, renderer, stage.endpoint, folder / "served")
    if stage.environment is not None:
        budget = Budget(stage.environment.tokens, context=start.context)
        sampler = EpisodeSampler(make(stage.environment), sampler, renderer, budget)
    if isinstance(stage, Grpo):
        return GrpoMethod(stage, data, start, sampler, score, seed, world), Ledger(), {}
    ppo = PpoMethod(stage, data, start, sampler, score, seed, world)
    if stage.critic is not None:
        ppo.take(folder.parent / stage.critic.removeprefix(STAGE))
    return ppo, Ledger(), {}


def _judge(
    job: Job, stage: Preference, start: Policy, sampler: Sampler, world: World, path: Path
) -> tuple[Ledger, dict[str, Any]]:
    """Write the pairs of a preference stage with what the reference says of them."""
    data, ledger = job.data, Ledger()
    facts: dict[str, Any] = {}
    if stage.on_policy is None:
        judged = judged_from_data(start, stage, data, job.seed)
    else:
        score = _scorer(stage, data, start, job.folder, world)
        judged, ledger, facts = judged_on_policy(start, stage, data, sampler, score, job.seed)
    judged, by = referred(start, stage, judged, world)
    if world.rank == 0:
        write_judged(path, judged)
    return ledger, facts | by


def _scorer(stage: StageBase, data: Prepared, start: Policy, folder: Path, world: World = ALONE) -> Scorer:
    _, scored = rewarded(stage)
    assert scored is not None
    return build(
        [located(reward, folder.parent) for reward in scored.rewards],
        Renderer(start.tokenizer, system=stage.data.system),
        max_unscored=scored.max_unscored,
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
