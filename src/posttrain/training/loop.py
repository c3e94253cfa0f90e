"""The one training loop: every method's steps, checkpoints, metrics and guards."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from posttrain.forest import Forest, pack, split, token_logprobs
from posttrain.models.cost import training_flops_per_token
from posttrain.models.policy import Policy
from posttrain.recipe.schema import StageBase
from posttrain.records import Ledger, UserError, derive
from posttrain.training import checkpoint
from posttrain.training.batch import Batch, Method
from posttrain.training.optim import adamw, clip, learning_rate, load_state, state_tensors

TIMES = ("seconds", "tokens_per_second")
"""Metrics that a repeated run does not repeat."""


class NonFinite(UserError):
    """A loss or gradient was NaN or infinite."""


def train(
    policy: Policy,
    method: Method,
    stage: StageBase,
    folder: Path,
    seed: int,
    on_step: Callable[[dict[str, Any]], None] = lambda metrics: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Ledger:
    """Take `stage.steps` optimiser steps, from the last checkpoint in `folder` if there is one.

    Writes `metrics.jsonl` (a row a step), `samples.jsonl` and `checkpoints/`. The policy is changed in place. On
    the CPU a run that was killed and continued has the weights of one that was not, bit for bit.

    Raises:
        NonFinite: with `nonfinite: stop`; the last checkpoint is from before it.
        UserError: the folder cannot be written.
    """
    parameters = policy.parameters()
    optimizer = adamw(parameters.items(), stage.optim)
    checkpoints = folder / "checkpoints"
    start, ledger = _restore(checkpoints, policy, optimizer, warn)
    _keep_before(folder / "metrics.jsonl", start)
    _keep_before(folder / "samples.jsonl", start)
    saved = start
    with (
        open(folder / "metrics.jsonl", "a", encoding="utf-8") as metrics_file,
        open(folder / "samples.jsonl", "a", encoding="utf-8") as samples_file,
        policy.adapter_dropout(),
    ):
        for step in range(start, stage.steps):
            began = time.perf_counter()
            torch.manual_seed(derive(seed, stage.id, "dropout", step))
            batch = method.batch(step)
            lr = learning_rate(step, stage.steps, stage.optim)
            for group in optimizer.param_groups:
                group["lr"] = lr
            found, cost = _gradient(policy, method, batch, stage)
            norm = clip(parameters.values(), stage.optim.max_grad_norm).item()
            finite = math.isfinite(found["loss"]) and math.isfinite(norm)
            if not finite and stage.nonfinite == "stop":
                raise _nonfinite(folder, stage, step, found["loss"], norm, batch)
            if finite and batch.rows:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

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
            metrics_file.write(_line(row))
            for sample in batch.samples:
                samples_file.write(_line({"step": step, **sample}))
            on_step(row)
            done = step + 1
            if done % method.period == 0 and done - saved >= stage.checkpoint_every and done < stage.steps:
                metrics_file.flush()
                samples_file.flush()
                tensors = {f"weights/{name}": p.detach() for name, p in parameters.items()}
                tensors |= {f"optimizer/{name}": t for name, t in state_tensors(optimizer).items()}
                checkpoint.save(checkpoints, done, tensors, {"ledger": asdict(ledger)})
                saved = done
    return ledger


def _gradient(policy: Policy, method: Method, batch: Batch, stage: StageBase) -> tuple[dict[str, float], Ledger]:
    """Leave the step's gradient in the parameters; returns the loss and the method's metrics, and the cost."""
    found: dict[str, float] = {"loss": 0.0}
    cost = Ledger()
    for units in split(batch.rows, batch.units, stage.tokens_per_forward):
        rows = [i for u in units for i in batch.units[u]]
        forest = pack([batch.rows[i] for i in rows])
        logps_T = token_logprobs(policy.model, forest, method.temperature)
        loss, stats = method.loss(batch, rows, forest, logps_T)
        loss.backward()
        found["loss"] += loss.item()
        for name, value in stats.items():
            before = found.get(name)
            if name.endswith("_min"):
                found[name] = value if before is None else min(before, value)
            elif name.endswith("_max"):
                found[name] = value if before is None else max(before, value)
            else:
                found[name] = value + (before or 0.0)
        cost += _cost(policy, forest, sum(len(batch.rows[i]) for i in rows))
    return found, cost


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
    checkpoints: Path, policy: Policy, optimizer: torch.optim.Optimizer, warn: Callable[[str], None]
) -> tuple[int, Ledger]:
    found = checkpoint.load(checkpoints, warn)
    if found is None:
        return 0, Ledger()
    step, tensors, state = found
    parameters = policy.parameters()
    weights = {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
    if weights.keys() != parameters.keys():
        raise UserError(f"{checkpoints}: holds the weights of another model; choose another --out")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    load_state(
        optimizer,
        {name.removeprefix("optimizer/"): t for name, t in tensors.items() if name.startswith("optimizer/")},
    )
    return step, Ledger(**state["ledger"])


def _keep_before(path: Path, step: int) -> None:
    """Drop the rows of steps that will be taken again, and a line that a kill left half written."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] < step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    path.write_text("".join(kept), encoding="utf-8")


def _line(row: dict[str, Any]) -> str:
    """JSON knows no NaN: what could not be measured is null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(clean, ensure_ascii=False) + "\n"


def _nonfinite(folder: Path, stage: StageBase, step: int, loss: float, norm: float, batch: Batch) -> NonFinite:
    """The batch is kept for whoever wants to know why."""
    path = folder / f"nonfinite-step-{step}.json"
    rows = [{"context": r.context, "completion": r.completion, "target": r.target} for r in batch.rows]
    path.write_text(json.dumps({"step": step, "loss": str(loss), "grad_norm": str(norm), "rows": rows}))
    return NonFinite(
        f"stage {stage.id!r}, step {step}: loss {loss}, gradient norm {norm}. The weights before this step are safe; "
        f"its batch is in {path}. Lower optim.lr, or set nonfinite: skip to pass over such steps, and choose another --out"
    )


def peak_memory() -> int:
    """Most memory the process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
