"""Stages trained by Ray Train: workers that share a model by FSDP2, and rollout actors beside them.

The driver, which is the command that was typed, prepares, evaluates and reports as it always does. A stage's training
alone goes to the cluster: each worker loads the start model from where it is kept, gets the prepared data through the
object store, and takes the steps of `training.loop.train` together with the others. The run folder must be on a file
system that all nodes see: checkpoints, metrics and the trained weights are written there.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from safetensors.torch import load_file, save_file

from posttrain.cluster.rollouts import Pool, RolloutActor
from posttrain.cluster.sharded import shard
from posttrain.machine import peak_memory, tune
from posttrain.models.disk import write_text
from posttrain.models.policy import Policy
from posttrain.pipeline.stages import Job, Say, Trainer, learn
from posttrain.recipe.preference import Preference
from posttrain.recipe.rl import Rl
from posttrain.recipe.schema import Stage
from posttrain.recipe.stage import SamplingStage
from posttrain.recipe.supervised import Distill
from posttrain.records import Failure, Ledger, UserError
from posttrain.training.world import Distributed

LOCAL = "local"
RESTARTS = 8
"""How often one stage's workers are started again after a loss; then the command must be given again."""
WAIT = 0.2
"""Seconds between two looks at what the workers have to say."""
LOST = (RuntimeError, OSError, RayError)
"""What a worker meets where another one, or a node, is gone."""
TRAINED, TOKEN, RAY = "trained.safetensors", "token", "ray"
"""In a stage's folder while it is trained: the result, what shows that a node sees it, and Ray Train's own records."""


@dataclass(frozen=True)
class Layout:
    """What is asked of the cluster. Processors are Ray's: what an actor reserves, and how many threads it uses."""

    workers: int = 1
    worker_cpus: int = 1
    rollout_actors: int = 1
    rollout_cpus: float = 0.5
    """Less than one lets actors share a processor."""
    rollout_gpus: float = 0.5
    """Where the cluster has GPUs, and each worker one of its own."""
    shard_always: bool = False
    """Cut all weights over the workers within a step too, for a model that does not fit into each."""


@contextmanager
def cluster(address: str, layout: Layout) -> Iterator[Trainer]:
    """A trainer on the Ray cluster at `address` (`local`: one that is started here and ends with the block).

    Raises:
        UserError: it cannot be reached, or is smaller than what is asked of it.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    needed = layout.workers * layout.worker_cpus + layout.rollout_actors * layout.rollout_cpus
    # What actors print stays in Ray's own logs (ray/session_latest/logs): what matters comes by the desk.
    settings: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == LOCAL:
        processors = os.cpu_count() or 1
        if layout.workers * layout.worker_cpus > processors:
            raise UserError(
                f"--cluster local: {layout.workers} workers of {layout.worker_cpus} processors are more than the "
                f"{processors} of this machine; ask for fewer"
            )
        settings |= {"num_cpus": math.ceil(needed)}
    try:
        if address != LOCAL:  # Ray itself tries for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, **settings)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--cluster {address}: no Ray cluster is there ({error}). Run `ray start --head --port 6379` on the first "
            "machine and give ADDRESS:6379, or use --cluster local"
        ) from error
    try:
        there = ray.cluster_resources()
        gpus = there.get("GPU", 0) > 0
        wanted = {"CPU": needed} | (
            {"GPU": layout.workers + layout.rollout_actors * layout.rollout_gpus} if gpus else {}
        )
        for kind, amount in wanted.items():
            if there.get(kind, 0) < amount:
                raise UserError(
                    f"--cluster {address}: {layout.workers} workers and {layout.rollout_actors} rollout actors need "
                    f"{amount:g} {kind}s, and it has {there.get(kind, 0):g}; ask for fewer or add nodes"
                )
        yield partial(_train, layout, gpus)
    finally:
        ray.shutdown()


def _train(layout: Layout, gpus: bool, job: Job, start: Policy, say: Say) -> tuple[Ledger, dict[str, Any]]:
    """A `Trainer`: the workers train, and `start` gets the weights that they wrote."""
    check([job.stage], layout)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    desk = Desk.options(num_cpus=0, scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    actors = _actors(layout, gpus, job)
    token = uuid.uuid4().hex
    write_text(job.folder / TOKEN, token)
    config = {"job": ray.put(job), "actors": actors, "desk": desk, "token": token, "layout": layout}
    resources = {"CPU": layout.worker_cpus} | ({"GPU": 1} if gpus else {})
    trainer = TorchTrainer(
        _work,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=layout.workers, use_gpu=gpus, resources_per_worker=resources, placement_strategy="PACK"
        ),
        run_config=RunConfig(
            name=RAY,
            storage_path=str(job.folder),
            failure_config=FailureConfig(max_failures=RESTARTS),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        done = _fit(trainer, desk, job, say)
    finally:
        for actor in actors:
            ray.kill(actor)
        shutil.rmtree(job.folder / RAY, ignore_errors=True)
    path = job.folder / TRAINED
    with torch.no_grad():
        trained = load_file(path)
        for name, parameter in start.parameters().items():
            parameter.copy_(trained[name])
    path.unlink()
    (job.folder / TOKEN).unlink()
    return done


def check(stages: Sequence[Stage], layout: Layout) -> None:
    """Refuse what cannot be trained so: to be asked before the first stage, for the last one may come hours later.

    Raises:
        UserError: rollouts of a stage come from elsewhere than actors, or there is no actor for them.
    """
    for stage in stages:
        if isinstance(stage, Rl) and stage.endpoint is not None:
            raise UserError(f"stage {stage.id!r}: on a cluster rollouts come from its actors; leave `endpoint` out")
        if isinstance(stage, Rl) and stage.environment is not None:
            raise UserError(f"stage {stage.id!r}: episodes are played in one process; leave --cluster or `environment`")
        if _samples(stage) and not layout.rollout_actors:
            raise UserError(f"stage {stage.id!r} samples: --rollout-actors must be 1 or more")


def _samples(stage: Stage) -> bool:
    """Whether workers ask for completions while they train, or before they begin."""
    return bool(
        isinstance(stage, SamplingStage)
        or (isinstance(stage, Preference) and stage.on_policy)
        or (isinstance(stage, Distill) and stage.mode == "on_policy")
    )


def _actors(layout: Layout, gpus: bool, job: Job) -> list[Any]:
    if not _samples(job.stage):
        return []
    kind = RolloutActor.options(  # type: ignore[attr-defined]
        num_cpus=layout.rollout_cpus, num_gpus=layout.rollout_gpus if gpus else 0, scheduling_strategy="SPREAD"
    )
    return [kind.remote(job.load, job.stage.data.system) for _ in range(layout.rollout_actors)]


def _fit(trainer: TorchTrainer, desk: Any, job: Job, say: Say) -> tuple[Ledger, dict[str, Any]]:
    """Run it in a thread, so that what the workers say is passed on meanwhile and Ctrl-C ends it here."""
    found: list[Any] = []

    def fit() -> None:
        try:
            found.append(trainer.fit().return_value)
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    while True:
        ended = not thread.is_alive()
        for kind, value in ray.get(desk.take.remote()):
            if kind == "error":
                raise value
            if kind == "step":
                say.step(job.stage, value)
            else:
                say.line(value)
        if ended:
            break
        thread.join(WAIT)
    (result,) = found
    if isinstance(result, BaseException):
        raise Failure(
            f"stage {job.stage.id!r}: the workers were lost {RESTARTS + 1} times, or could not be placed: {result}. "
            "The same command goes on from the last checkpoint"
        ) from result
    done: tuple[Ledger, dict[str, Any]] = result
    return done


@ray.remote(max_restarts=0)
class Desk:
    """Where the leading worker leaves what the driver is to hear."""

    def __init__(self) -> None:
        self.said: list[tuple[str, Any]] = []

    def tell(self, kind: str, value: Any) -> None:
        self.said.append((kind, value))

    def take(self) -> list[tuple[str, Any]]:
        said, self.said = self.said, []
        return said


def _work(config: dict[str, Any]) -> tuple[Ledger, dict[str, Any]]:
    """What each worker runs, from the beginning again after a loss; the loop goes on from the last checkpoint.

    Ray starts the workers again after any exception. What would only happen again is told, and the driver stops.
    """
    desk = config["desk"]
    try:
        return _learn(ray.get(config["job"]), config, desk)
    except LOST:
        raise
    except Exception as error:
        ray.get(desk.tell.remote("error", error))
        raise


def _learn(job: Job, config: dict[str, Any], desk: Any) -> tuple[Ledger, dict[str, Any]]:
    world = Distributed()
    seen = (job.folder / TOKEN).is_file() and (job.folder / TOKEN).read_text() == config["token"]
    if not all(world.gather(seen)):
        raise UserError(f"{job.folder}: not every node sees this folder; put --out on a file system that all share")
    tune()
    policy = shard(job.load(), world, config["layout"].shard_always)
    say = Say(_teller(desk, "line", world.rank), lambda _, row: _teller(desk, "step", world.rank)(row))
    pool = Pool(config["actors"], policy, world)
    ledger, facts = learn(job, policy, say, pool, world)
    trained = policy.weights()
    if world.rank == 0:
        save_file({name: t.contiguous() for name, t in trained.items()}, job.folder / f"{TRAINED}.part")
        os.replace(job.folder / f"{TRAINED}.part", job.folder / TRAINED)
    peak = max(world.gather(peak_memory()))
    return ledger, facts | {"workers": world.size, "worker_peak_rss_bytes": peak}


def _teller(desk: Any, kind: str, rank: int) -> Callable[[Any], None]:
    def tell(value: Any) -> None:
        if rank == 0:
            desk.tell.remote(kind, value)

    return tell
