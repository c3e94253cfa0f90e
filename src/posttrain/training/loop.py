"""The one training loop: every method's steps, checkpoints, metrics and guards."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from posttrain.forest import Forest, hidden_states, pack
from posttrain.models.cost import training_flops_per_token
from posttrain.models.disk import write_text
from posttrain.models.memory import recomputing
from posttrain.models.policy import Policy
from posttrain.recipe.stage import StageBase
from posttrain.records import Failure, Ledger, UserError, derive
from posttrain.training import checkpoint, oracle
from posttrain.training.batch import Batch, Method, Metrics, Objective, Stateful, interval, passes
from posttrain.training.oom import FEWER, enough_memory, halving
from posttrain.training.optim import AdamW, adamw, clip, learning_rate, load_state, state_tensors
from posttrain.training.world import ALONE, World, local


class NonFinite(Failure):
    """A loss, a gradient or an updated weight was NaN or infinite."""


def train(
    policy: Policy,
    method: Method,
    stage: StageBase,
    folder: Path,
    seed: int,
    on_step: Callable[[dict[str, Any]], None] = lambda metrics: None,
    warn: Callable[[str], None] = lambda text: None,
    world: World = ALONE,
) -> Ledger:
    """Take `stage.steps` optimiser steps, from the last checkpoint in `folder` if there is one.

    Every worker of `world` calls this with the same arguments; each computes its share of a step's rows, and the
    leader writes `metrics.jsonl` (a row a step), `samples.jsonl` and `oracle.json` (what the check of the first step
    found). The policy is changed in place. On the CPU a run that was killed and continued with as many workers has
    the weights of one that was not, bit for bit.

    Raises:
        NonFinite: a loss or gradient with `nonfinite: stop`, a weight always; the last checkpoint is from before it.
        OutOfMemory: one unit of a batch does not fit in memory, or what is sampled.
        Failure: the packed pass disagrees with the plain one.
        UserError: the folder cannot be written.
    """
    leads = world.rank == 0
    parameters = trained(policy, method)
    optimizer = adamw(parameters.items(), stage.optim)
    checkpoints = folder / "checkpoints"
    start, ledger, budget = _restore(checkpoints, policy, method, optimizer, stage, warn, world)
    metrics_path, samples_path = folder / "metrics.jsonl", folder / "samples.jsonl"
    if leads:
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _keep_before(metrics_path, start)
            _keep_before(samples_path, start)
    checked = not stage.check_first_step
    every = interval(stage.checkpoint_every, method.period)
    with checkpoint.Writer(checkpoints, world, rows=(metrics_path, samples_path, folder)) as writer:
        for step in range(start, stage.steps):
            began = time.perf_counter()
            with enough_memory(f"while the rows of step {step} were made", FEWER):
                batch = method.batch(step)
            sizes = [sum(len(batch.rows[i]) for i in unit) for unit in batch.units]
            alone = world.size == 1  # workers cut a step alike, so that none may halve on its own
            if not checked and batch.rows:
                compare = partial(oracle.compare, policy, method, batch)
                advice = "Lower max_length, or set check_first_step: false"
                first = sizes[0] if alone else None
                report, _ = halving(compare, oracle.TOKENS, first, "the first step's check", advice, warn)
                checked = True
                if leads:
                    with _writing(folder):
                        write_text(folder / "oracle.json", json.dumps({"step": step, **report}))
            lr = learning_rate(step, stage.steps, stage.optim)
            for group in optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed(derive(seed, stage.id, "dropout", step))
            # Dropout here only: what is sampled or referred to is the policy, not a thinned one.
            with policy.adapter_dropout(), recomputing(policy.model, stage.activation_checkpointing):
                compute = partial(gradient, policy, method, batch, world)
                advice = "Lower tokens_per_forward or max_length, or set activation_checkpointing: true"
                largest = max(sizes, default=0) if alone else None
                (found, cost), budget = halving(compute, budget, largest, f"the steps from {step} on", advice, warn)
            norm = clip(parameters.values(), stage.optim.max_grad_norm).item()
            finite = math.isfinite(found["loss"]) and math.isfinite(norm)
            if not finite and stage.nonfinite == "stop":
                raise _nonfinite(folder, stage, step, f"loss {found['loss']}, gradient norm {norm}", batch)
            if finite and batch.rows:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            sound = all(local(p).isfinite().all() for p in parameters.values())
            if not all(world.gather(sound)):  # then skipping helps no more
                raise _nonfinite(folder, stage, step, "weights are NaN or infinite after it", batch)

            seconds = time.perf_counter() - began
            ledger += batch.ledger + cost + Ledger(seconds=seconds - batch.ledger.seconds)
            tokens = cost.trained_tokens + batch.ledger.generated_tokens
            row = {
                "step": step,
                **found,
                "lr": lr,
                "grad_norm": norm,
                **batch.metrics,
                "tokens": tokens,
                "skipped": int(not finite),
                "tokens_per_second": tokens / seconds,
                "seconds": seconds,
            }
            done = step + 1
            due = done % every == 0 and done < stage.steps
            if step % every < stage.checkpoint_every - every:
                writer.check()
            else:  # a step counts from its row on, and no more may be lost than checkpoint_every that count
                writer.wait()
            if leads:
                with _writing(folder):  # closed after each step: a checkpoint is never ahead of its rows
                    _append(metrics_path, [row])
                    _append(samples_path, ({"step": step, **sample} for sample in batch.samples))
                on_step(row)
            if due:
                tensors = {f"weights/{name}": p.detach() for name, p in parameters.items()}
                tensors |= {f"optimizer/{name}": t for name, t in state_tensors(optimizer).items()}
                own, carried = _carried(method)
                tensors |= {f"method/{name}": t for name, t in own.items()}
                state = {"ledger": asdict(ledger), "tokens_per_forward": budget, "method": carried}
                writer.save(done, tensors, state)
    return ledger


def trained(policy: Policy, objective: Objective) -> dict[str, Parameter]:
    """All that is trained, by name: the policy's weights and the method's own."""
    return policy.parameters() | (objective.parameters() if isinstance(objective, Stateful) else {})


def _carried(method: Method) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What a checkpoint must hold of it."""
    return method.state() if isinstance(method, Stateful) else ({}, {})


def gradient(
    policy: Policy, objective: Objective, batch: Batch, world: World, budget: int
) -> tuple[dict[str, Any], Ledger]:
    """Leave the step's gradient in the parameters; returns the loss and the metrics, and the cost.

    Its parts add up to the same however the step is cut into passes of at most `budget` tokens.
    """
    for parameter in trained(policy, objective).values():
        parameter.grad = None  # of an attempt for which there was too little memory
    found: list[Metrics] = []
    cost = Ledger()
    mine, idle = passes(batch.rows, batch.units, budget, world)
    left = len(mine) + idle
    for units in mine:
        left -= 1
        rows = [i for u in units for i in batch.units[u]]
        forest = pack([batch.rows[i] for i in rows])
        outputs = policy.run(objective.forward, forest, hidden_states, more=left > 0)
        loss, stats = objective.loss(batch, rows, forest, outputs)
        loss.backward()
        found.append({"loss": loss.item(), **stats})
        cost += _cost(policy, forest, sum(len(batch.rows[i]) for i in rows))
    for left in reversed(range(idle)):
        least = pack([min(batch.rows, key=len)])
        (policy.run(objective.forward, least, hidden_states, more=left > 0).sum() * 0).backward()
    if world.size > 1 and isinstance(objective, Stateful):
        _add_up(objective.parameters().values(), world)
    everyone = world.gather((found, cost))
    return _together([part for parts, _ in everyone for part in parts]), sum((c for _, c in everyone), Ledger())


def _add_up(parameters: Iterable[Parameter], world: World) -> None:
    """Weights that every worker has whole get the sum of all workers' gradients, the same on each."""
    for parameter in parameters:
        parts = [part for part in world.gather(parameter.grad) if part is not None]
        parameter.grad = torch.stack(parts).sum(0) if parts else None


def _together(parts: Sequence[Metrics]) -> dict[str, Any]:
    """Parts of a step's metrics as one: added up, counts one by one, but for those that end in _min and _max."""
    names = dict.fromkeys(["loss", *(name for part in parts for name in part)])
    return {name: _one(name, [part[name] for part in parts if name in part]) for name in names}


def _one(name: str, values: Sequence[Any]) -> Any:
    if values and isinstance(values[0], Mapping):
        labels = dict.fromkeys(label for counts in values for label in counts)
        return {label: sum(counts.get(label, 0) for counts in values) for label in labels}
    return {"_min": min, "_max": max}.get(name[-4:], sum)(values)


def _cost(policy: Policy, forest: Forest, unrolled: int) -> Ledger:
    targets, context = int(forest.target_T.sum()), int(forest.position_T.max()) + 1
    lora = policy.adapter is not None
    each = training_flops_per_token(policy.model.config, lora, context, targets / len(forest))
    return Ledger(
        trained_tokens=len(forest),
        shared_tokens=unrolled - len(forest),
        target_tokens=targets,
        flops=each * len(forest),
    )


def _restore(
    checkpoints: Path,
    policy: Policy,
    method: Method,
    optimizer: AdamW,
    stage: StageBase,
    warn: Callable[[str], None],
    world: World,
) -> tuple[int, Ledger, int]:
    """The step to go on from, what was spent until there, and the tokens of a pass."""
    found = checkpoint.load(checkpoints, warn, world)
    if found is None:
        return 0, Ledger(), stage.tokens_per_forward
    step, stored, state = found
    weights = {f"weights/{name}": p for name, p in trained(policy, method).items()}
    if {n: form for n, form in stored.forms.items() if n.startswith("weights/")} != _forms(weights):
        raise UserError(f"{checkpoints}: holds the weights of another model or adapter; choose another --out")
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(stored.like(name, parameter))
    moments = {}
    for name, (shape, _) in stored.forms.items():
        if name.startswith("optimizer/"):
            path = name.removeprefix("optimizer/")
            like = weights.get(f"weights/{path.rpartition('/')[0]}") if shape else None
            moments[path] = stored.read(name) if like is None else stored.like(name, like)
    load_state(optimizer, moments)
    if isinstance(method, Stateful):
        own, _ = _carried(method)
        method.restore({name: stored.like(f"method/{name}", t) for name, t in own.items()}, state["method"])
    return step, Ledger(**state["ledger"]), state["tokens_per_forward"]


def _forms(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (t.shape, t.dtype) for name, t in tensors.items()}


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """What the disk refuses, said as the user's error it is."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}). Make room or choose another --out, then run the same "
            "command: checkpoints are intact"
        ) from error


def _keep_before(path: Path, step: int) -> None:
    """Drop the rows of steps that will be taken again, and a line that a kill left half written."""
    kept = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] < step:
            kept.append(line.decode() + "\n")
    write_text(path, "".join(kept))


def _append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(map(_line, rows))


def _line(row: dict[str, Any]) -> str:
    """JSON knows no NaN: what could not be measured is null. ASCII, for what a model writes may break a line."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(clean) + "\n"


def _nonfinite(folder: Path, stage: StageBase, step: int, what: str, batch: Batch) -> NonFinite:
    """The batch is kept for whoever wants to know why."""
    path = folder / f"nonfinite-step-{step}.json"
    rows = [{"context": r.context, "completion": r.completion, "target": r.target} for r in batch.rows]
    try:
        write_text(path, json.dumps({"step": step, "what": what, "rows": rows}))
        kept = f"its batch is in {path}"
    except UserError as error:
        kept = f"its batch is lost: {error}"
    return NonFinite(
        f"stage {stage.id!r}, step {step}: {what}. Checkpoints are from before this step; {kept}. Lower optim.lr, or "
        "set nonfinite: skip to pass over steps whose loss or gradient is not finite, and choose another --out"
    )
