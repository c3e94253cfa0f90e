"""Environments: episodes of several turns, with tools or another party, whose tokens a policy can learn from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from posttrain.environments.calculator import CALCULATOR
from posttrain.environments.protocol import Environment
from posttrain.environments.python import python
from posttrain.environments.tools import Tool, ToolUse
from posttrain.recipe.rl import ToolsEnvironment
from posttrain.rewards.sandbox import Limits

TOOLS: dict[str, Callable[[ToolsEnvironment], Tool]] = {
    "calculator": lambda block: CALCULATOR,
    "python": lambda block: python(Limits(seconds=block.timeout_s)),
}
"""The tools a recipe may name."""


def make(block: ToolsEnvironment) -> Callable[[], Environment]:
    """What makes the environment of each episode of a stage, whose rewards do the scoring."""
    return partial(ToolUse, tuple(TOOLS[name](block) for name in block.tools), plain=block.plain)
