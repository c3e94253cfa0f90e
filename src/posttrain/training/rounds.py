"""Rounds of sampling and learning: what a round samples is kept, and a continued run learns from the same."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from posttrain.models.disk import write_text
from posttrain.models.policy import Policy
from posttrain.records import Ledger, UserError
from posttrain.training.batch import Metrics
from posttrain.training.world import World

Rows = TypeVar("Rows")


def sampled_once(
    path: Path,
    begins: bool,
    policy: Policy,
    world: World,
    sample: Callable[[str], tuple[Rows, Metrics, Ledger]],
    write: Callable[[Path, Rows], None],
) -> dict[str, Any]:
    """See to it that the rows of a round stand in `path`; returns its record, which stands beside them: the digest of
    the `weights` that sampled them, the `metrics` of that and its `ledger`.

    Where the round `begins`, `sample` makes them and `write` keeps them; it is given the digest of the weights of now,
    and not asked if these very weights have sampled the round before. Later in the round they must be there. All
    workers call this; the leader writes.

    Raises:
        UserError: they are not.
    """
    record = path.with_suffix(".json")
    digest = policy.digest()
    made: dict[str, Any] | None = world.gather(json.loads(record.read_text()) if record.is_file() else None)[0]
    if begins and (made is None or made["weights"] != digest):
        rows, metrics, ledger = sample(digest)
        # JSON has no NaN: what could not be measured is left out.
        known = {k: v for k, v in metrics.items() if not (isinstance(v, float) and math.isnan(v))}
        made = {"weights": digest, "metrics": known, "ledger": dataclasses.asdict(ledger)}
        if world.rank == 0:
            write(path, rows)
            write_text(record, json.dumps(made))
        world.gather(None)  # nobody reads before it is written
    if made is None:
        raise UserError(f"{record}: is missing, and the checkpoint was learned from it; choose another --out")
    return made
