"""Post-training, from a base model to one that can be trusted with a job. `import posttrain as pt` is the Python door.

Importing it costs nothing: a name loads what it needs, torch included, when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain import credit as credit
    from posttrain import losses as losses
    from posttrain.door import AdamW as AdamW
    from posttrain.door import Policy as Policy
    from posttrain.door import Task as Task
    from posttrain.door import load as load
    from posttrain.door import script as script
    from posttrain.door import task as task
    from posttrain.forest import Forest as Forest
    from posttrain.forest import Row as Row
    from posttrain.forest import pack as pack
    from posttrain.recipe.blocks import Lora as Lora
    from posttrain.records import Example as Example
    from posttrain.records import Failure as Failure
    from posttrain.records import Rollout as Rollout
    from posttrain.records import Score as Score
    from posttrain.records import UserError as UserError
    from posttrain.records import derive as derive

    __version__: str

ROOMS = ("credit", "losses")
"""Whole rooms that are part of the door."""

NAMES = {
    "AdamW": "posttrain.door",
    "Policy": "posttrain.door",
    "Task": "posttrain.door",
    "load": "posttrain.door",
    "script": "posttrain.door",
    "task": "posttrain.door",
    "Forest": "posttrain.forest",
    "Row": "posttrain.forest",
    "pack": "posttrain.forest",
    "Lora": "posttrain.recipe.blocks",
    "Example": "posttrain.records",
    "Failure": "posttrain.records",
    "Rollout": "posttrain.records",
    "Score": "posttrain.records",
    "UserError": "posttrain.records",
    "derive": "posttrain.records",
}
"""Where each name of the door comes from."""


def __getattr__(name: str) -> Any:
    if name in NAMES:
        return getattr(importlib.import_module(NAMES[name]), name)
    if name in ROOMS:
        return importlib.import_module(f"posttrain.{name}")
    if name == "__version__":
        from importlib.metadata import version

        return version("posttrain")
    raise AttributeError(f"module 'posttrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*NAMES, *ROOMS, "__version__"])
