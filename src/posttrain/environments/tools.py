"""Tools a model may call before it answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from posttrain.environments.protocol import Episode
from posttrain.records import Example, Message, Score
from posttrain.rewards.json_schema import problems
from posttrain.rewards.protocol import Scorer
from posttrain.rewards.text import unfenced
from posttrain.rewards.verifier import verify

LONGEST = 2000
"""Characters of what a tool says; the rest is cut, and said to be."""
MOST = 4
"""Calls in one turn; further ones are refused."""

_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_PLAIN = """\
You can call these tools:
{tools}
To call one, write only <tool_call>{{"name": ..., "arguments": {{...}}}}</tool_call>. What it says comes back in \
<tool_response></tool_response>. When you know the answer, write it without a call."""


@dataclass(frozen=True)
class Tool:
    """What a model may call, and what the call runs."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON Schema of its arguments, an object."""
    run: Callable[..., str]
    """Arguments by name to what it says. What it raises is told to the model too. It needs limits of its own, and runs
    in threads."""

    @property
    def described(self) -> dict[str, Any]:
        """As chat templates take it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Call:
    """A tool, by its name, and what it is given."""

    name: str
    arguments: Mapping[str, Any]


def calls(text: str) -> list[Call | str]:
    """The tool calls in a turn, each as a call or as what is wrong with it; none where the turn is an answer.

    A call is <tool_call>{"name": ..., "arguments": {...}}</tool_call>, as the templates of Hermes, Qwen and our chatml
    write it; the last one may lack its end, which a stop string may have taken. Without any tag a turn that is nothing
    but such an object, perhaps fenced, is a call too, with `parameters` for `arguments` as Llama 3 has it.
    """
    if found := _CALL.findall(text):
        return [_call(part) for part in found]
    bare = unfenced(text)
    if bare.startswith("{") and isinstance(call := _call(bare), Call):
        return [call]
    return []


def _call(text: str) -> Call | str:
    try:
        value = json.loads(text)
        arguments = value.get("arguments", value.get("parameters")) if isinstance(value, dict) else None
        if isinstance(arguments, str):  # JSON in JSON, as in OpenAI's messages
            arguments = json.loads(arguments)
    except (ValueError, RecursionError):
        return "a call must be one JSON object"
    if not isinstance(arguments, dict) or not isinstance(value.get("name"), str):
        return 'a call must be {"name": ..., "arguments": {...}}'
    return Call(value["name"], arguments)


@dataclass(frozen=True)
class ToolUse:
    """An episode goes on while the model calls tools; its first turn without a call is the answer, which is scored.

    Args:
        tools: what may be called.
        score: of the episode's rollout, whose text is the last turn; by default that of generated tasks.
        plain: for models whose chat template shows no tools, SmolLM2's for one. They are then described in the system
            message, and answer in the user's turn between <tool_response> tags. Otherwise both are the template's
            business: the example's `tools`, and messages of the role `tool`.
    """

    tools: tuple[Tool, ...]
    score: Scorer = verify
    plain: bool = False

    def reset(self, example: Example) -> Example:
        described = [tool.described for tool in self.tools]
        if not self.plain:
            return replace(example, tools=(*example.tools, *described))
        text = _PLAIN.format(tools="\n".join(json.dumps(tool["function"]) for tool in described))
        prompt = example.prompt
        if prompt and prompt[0]["role"] == "system":
            text, prompt = f"{prompt[0]['content']}\n\n{text}", prompt[1:]
        return replace(example, prompt=({"role": "system", "content": text}, *prompt))

    def step(self, messages: Sequence[Message]) -> tuple[tuple[Message, ...], bool]:
        asked = calls(str(messages[-1]["content"]))
        said = [self._said(call) if k < MOST else f"error: not more than {MOST} calls" for k, call in enumerate(asked)]
        if not self.plain:
            names = [call.name if isinstance(call, Call) else "" for call in asked]
            pairs = zip(names, said, strict=True)
            return tuple({"role": "tool", "name": name, "content": text} for name, text in pairs), not asked
        text = "\n".join(f"<tool_response>\n{text}\n</tool_response>" for text in said)
        return ({"role": "user", "content": text},) if asked else (), not asked

    def reward(self, episode: Episode) -> Score:
        return self.score([episode.rollout])[0]

    def _said(self, call: Call | str) -> str:
        if isinstance(call, str):
            return f"error: {call}"
        tool = next((tool for tool in self.tools if tool.name == call.name), None)
        if tool is None:
            return f"error: no tool {call.name[:40]!r}; there are {', '.join(tool.name for tool in self.tools)}"
        if wrong := next(problems(dict(call.arguments), tool.parameters), None):
            return f"error: {wrong}"
        try:
            text = tool.run(**call.arguments)
        except Exception as error:  # a tool may raise anything on what a model writes
            text = f"error: {type(error).__name__}: {error}"
        return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... (cut)"
