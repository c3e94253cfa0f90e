"""Environments written for the `verifiers` package (Brown, 2025), played by our sampler.

Not run against the package, which is not among our dependencies: what is asked of an environment is its documented
protocol for custom multi-turn environments, and a stand-in with that protocol is what the tests play with.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from posttrain.environments.protocol import Episode
from posttrain.records import Example, Message, Score, UserError

_ASKED = ("init_state", "setup_state", "is_completed", "env_response", "rubric")


class Verifiers:
    """One episode of `env`, a chat environment of verifiers (a `MultiTurnEnv`, and so its single-turn and tool ones).

    Asked are `init_state(input, client, model)`, `setup_state(state)`, `is_completed(state)`,
    `env_response(messages, state)` and `rubric.score_rollout(state)`, plain or async; told are
    `state["trajectory"]`, one entry for each turn, and `state["completion"]`.

    Departures: there is no client, so an environment that asks a model itself must bring its own, and none that
    keeps something bound to one event loop from call to call works, for each call has a loop of its own. A turn is
    text: calls of native tools are not parsed for it. Rewards of whole groups are not had. The rubric itself makes a
    reward function that raises worth 0, which we cannot tell from a true 0.

    Raises:
        UserError: `env` lacks a part of the protocol.
    """

    def __init__(self, env: Any) -> None:
        if missing := [name for name in _ASKED if not hasattr(env, name)]:
            raise UserError(f"{type(env).__name__} is no multi-turn environment of verifiers: no {', '.join(missing)}")
        self.env = env
        self.state: Any = None

    def reset(self, example: Example) -> Example:
        asked = {
            "prompt": [dict(message) for message in example.prompt],
            "answer": example.answer or "",
            "task": example.task or "default",
            "info": dict(example.meta),
            "example_id": example.id,
        }
        self.state = _ask(self.env.init_state, asked, None, "policy")
        self.state = _ask(self.env.setup_state, self.state)
        self.prompt = len(example.prompt)
        return example

    def step(self, messages: Sequence[Message]) -> tuple[tuple[Message, ...], bool]:
        state, told = self.state, [dict(message) for message in messages]
        turn = {"prompt": told[:-1], "completion": told[-1:], "response": None, "tokens": None}
        state["trajectory"].append(turn | {"reward": None, "advantage": None, "extras": {}})
        if _ask(self.env.is_completed, state):
            return (), True
        said = _ask(self.env.env_response, told, state)
        if not isinstance(said, list | tuple):
            raise UserError(f"{type(self.env).__name__}: only environments whose messages are chat turns can be played")
        return tuple({**message} for message in said), bool(_ask(self.env.is_completed, state))

    def reward(self, episode: Episode) -> Score:
        """`state["reward"]`, with its metrics for parts; called correct from 1 on, which says no more than that."""
        state = self.state
        state["completion"] = [dict(message) for message in episode.messages[self.prompt :]]
        state["is_truncated"] = episode.ended != "done"
        _ask(self.env.rubric.score_rollout, state)
        value, metrics = state["reward"], state.get("metrics")
        parts = {name: float(part) for name, part in metrics.items()} if isinstance(metrics, Mapping) else {}
        return Score(value, "correct" if value is not None and value >= 1 else "wrong", parts=parts)


def _ask(function: Callable[..., Any], *args: Any) -> Any:
    """What a function gives, of either kind."""
    found = function(*args)
    if inspect.isawaitable(found):

        async def wait() -> Any:
            return await found

        return asyncio.run(wait())
    return found
