"""Python as a tool: each call a program of its own in the sandbox."""

from __future__ import annotations

from posttrain.environments.tools import Tool
from posttrain.rewards import sandbox


def python(limits: sandbox.Limits = sandbox.DEFAULT) -> Tool:
    """Runs a program and says what it printed, and the last line of its error. Nothing is kept from call to call.

    What the sandbox is good for, and what it is not: rewards/sandbox.py.
    """

    def run(code: str) -> str:
        ran = sandbox.run(code, limits=limits)
        said = ran.stdout.decode(errors="replace").rstrip("\n")
        if ran.ended == "timeout":
            wrong = f"error: took longer than {limits.seconds:g} s"
        elif ran.ended == "signal":
            wrong = f"error: ended by signal {ran.code}"
        elif ran.code:
            last = ran.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            wrong = f"error: {last or f'exit code {ran.code}'}"
        else:
            wrong = "" if said else "(nothing was printed)"
        return "\n".join(filter(None, (said, wrong)))

    return Tool(
        "python",
        "Runs a Python program and returns what it prints. Nothing is kept from one call to the next.",
        {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
        run,
    )
