"""Worker processes for rules that may hang or crash: each answer has a time limit, and its process dies of it."""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import signal
import subprocess
import sys
from multiprocessing.connection import Connection, Pipe
from typing import Any

from posttrain.recipe.base import Block
from posttrain.records import Example, Failure, Score

SIZE = min(4, os.cpu_count() or 1)
STARTING = 120.0
"""Seconds in which a worker must be up and have imported what its rule needs."""
MEMORY = 4 * 2**30
"""Bytes of address space a worker may take."""


class Pool:
    """At most `SIZE` workers, started when they are needed. A thread that asks has a worker of its own meanwhile."""

    def __init__(self) -> None:
        self.idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        for _ in range(SIZE):
            self.idle.put(None)

    def ask(self, reward: Block, example: Example, text: str, seconds: float) -> Score:
        """The score that the rule of `reward` gives; none where that takes longer than `seconds` or ends the worker.

        Raises:
            Failure: no worker can be started.
        """
        worker, alive = self.idle.get(), None
        try:
            worker = worker or _Worker()
            score = worker.ask(reward, example, text, seconds)
            alive = worker
            return score
        except _Over as over:
            return Score(None, "error", why=str(over))
        finally:
            self.idle.put(alive)


@functools.cache
def pool() -> Pool:
    """That of this process."""
    return Pool()


class _Over(Exception):
    """The worker is no more; says why."""


class _Worker:
    """A fresh Python process, not a fork of this one, which may hold a model and threads."""

    def __init__(self) -> None:
        self.pipe, theirs = Pipe()
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve({theirs.fileno()})"
        with theirs:
            # A session of its own: Ctrl-C is for the run to answer, and a worker ends with the pipe to it.
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )

    def ask(self, reward: Block, example: Example, text: str, seconds: float) -> Score:
        try:
            self.pipe.send((reward, example, text, seconds))
            if not self.pipe.poll(STARTING):
                self.kill()
                raise Failure(f"a worker for rewards did not start within {STARTING:.0f} s; is the machine overloaded?")
            self.pipe.recv()  # from here on it is the rule that takes time
            if not self.pipe.poll(seconds):
                self.kill()
                raise _Over(f"took longer than {seconds:g} s")
            score: Score = self.pipe.recv()
            return score
        except (EOFError, ConnectionError):
            self.kill()
            raise _Over(f"ended its process ({_ending(self.process.returncode)})") from None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()


def serve(fileno: int) -> None:
    """What a worker does: score what comes through the pipe until there is nobody at its other end."""
    from posttrain.rewards.protocol import Rule, judged
    from posttrain.rewards.sources import RULES

    with contextlib.suppress(ImportError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    pipe: Connection[Any, Any] = Connection(fileno)
    rules: dict[str, Rule] = {}
    while True:
        try:
            reward, example, text, seconds = pipe.recv()
        except EOFError:
            return
        key = reward.model_dump_json()
        if key not in rules:
            rules[key] = RULES[reward.kind](reward)
        pipe.send(None)
        signal.setitimer(signal.ITIMER_REAL, seconds + 5)  # ends this process where nobody is left to kill it
        score = judged(rules[key], example, text)
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send(score)


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
