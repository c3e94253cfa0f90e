"""Episodes in step with one another: all models' turns in one call of the sampler, all answers to them, and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal

from posttrain.data.chat import TOOLS_LEFT_OUT, Renderer
from posttrain.data.shapes import Malformed
from posttrain.environments.protocol import Budget, Environment, Episode
from posttrain.recipe.blocks import Sampling
from posttrain.records import Example, Failure, Ledger, Message, Rollout, Score, UserError, derive
from posttrain.rewards.pool import SIZE
from posttrain.rewards.protocol import broke, finite
from posttrain.sampling.protocol import Sampler


@dataclass
class _Going:
    """An episode on its way."""

    environment: Environment
    first: Rollout
    """Its first turn."""
    messages: tuple[Message, ...]
    limit: int
    """Tokens that it may have behind the prompt."""
    text: str = ""
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    target: list[bool] = field(default_factory=list)
    ended: Literal["done", "tokens", "seconds", "error"] | None = None
    why: str = ""

    @property
    def room(self) -> int:
        return self.limit - len(self.ids)

    def begun(self) -> Example:
        """What a sampler is asked for the next turn: the tokens so far stand as they are."""
        example = self.first.example
        return replace(example, begun=(*example.begun, *self.ids))

    def hear(self, turn: Rollout, renderer: Renderer) -> None:
        """Take in a turn of the model, as much of it as there is room for."""
        if turn.weights != self.first.weights or turn.prompt_ids != (*self.first.prompt_ids, *self.ids):
            raise Failure(
                f"{turn.example.id}: a turn was sampled with other weights or after other tokens than its own"
            )
        ids, logps = turn.ids[: self.room], turn.logps[: self.room]
        self.ids += ids
        self.logps += logps
        self.target += [True] * len(ids)
        whole = len(ids) == len(turn.ids)
        self.text = turn.text if whole else renderer.decode(ids)
        self.messages += ({"role": "assistant", "content": self.text},)
        if turn.finish == "length" or not whole:
            self.ended = "tokens"

    def answer(self) -> tuple[tuple[Message, ...], bool]:
        try:
            return self.environment.step(self.messages)
        except (UserError, Failure):
            raise
        except Exception as error:  # an environment may raise anything on what a model writes
            self.ended, self.why = "error", f"{type(error).__name__}: {error}"
            return (), False

    def tell(self, said: Sequence[Message], renderer: Renderer) -> None:
        """Put what is said to the model behind its turn, where that leaves room for another."""
        if not said:
            raise Failure(f"{self.first.example.id}: the environment has nothing to say and is not done")
        ids = renderer.following(self.ids[-1], said, self.first.example.tools)
        if len(ids) >= self.room:
            self.ended = "tokens"
            return
        self.ids += ids
        self.logps += [0.0] * len(ids)
        self.target += [False] * len(ids)

    def episode(self) -> Episode:
        rollout = replace(
            self.first,
            ids=tuple(self.ids),
            logps=tuple(self.logps),
            text=self.text,
            finish="stop" if self.ended == "done" else "length",
            target=tuple(self.target),
        )
        return Episode(rollout, self.messages, self.ended or "error", self.why)

    def scored(self) -> tuple[Episode, Score]:
        episode = self.episode()
        if self.ended == "error":
            return episode, Score(None, "error", why=self.why)
        try:
            return episode, finite(self.environment.reward(episode))
        except (UserError, Failure):
            raise
        except Exception as error:  # as may its reward
            return episode, broke(error)


@dataclass(frozen=True)
class EpisodeSampler:
    """A `Sampler` whose rollouts are episodes, each in an environment that `environment` makes for it.

    The first turns are exactly what `sampler(prompts, n, sampling, seed)` gives; `sampling.max_new_tokens` is the
    limit of one turn. The same call gives the same episodes, where neither the environment nor a limit on seconds
    brings chance in; but later turns are drawn by their place among the episodes that still go on, so a prompt's
    episodes depend on the others.

    Raises, whichever way it is asked:
        UserError: the chat template cannot show tools or roles of this environment.
        Failure: resets of one example differ, or the sampler does not go on where a turn has ended.
    """

    environment: Callable[[], Environment]
    sampler: Sampler
    renderer: Renderer
    budget: Budget

    def __call__(
        self, prompts: Sequence[Example], n: int, sampling: Sampling, seed: int
    ) -> tuple[list[Rollout], Ledger]:
        """For methods that learn from rollouts and score them by themselves.

        Raises:
            Failure: the environment raised, so there is nothing to score.
        """
        played, ledger = self._play(prompts, n, sampling, seed)
        for one in played:
            if one.ended == "error":
                raise Failure(f"{one.first.example.id}: the environment broke down: {one.why}")
        return [one.episode().rollout for one in played], ledger

    def scored(
        self, prompts: Sequence[Example], n: int, sampling: Sampling, seed: int
    ) -> tuple[list[tuple[Episode, Score]], Ledger]:
        """`n` episodes of each prompt, in the order of a sampler's completions, with what the environment gives them;
        one in which it raised is unscored."""
        played, ledger = self._play(prompts, n, sampling, seed)
        return [one.scored() for one in played], ledger

    def _play(self, prompts: Sequence[Example], n: int, sampling: Sampling, seed: int) -> tuple[list[_Going], Ledger]:
        began, budget, renderer = time.monotonic(), self.budget, self.renderer
        making = [[self.environment() for _ in range(n)] for _ in prompts]
        asked = [_reset(of_one, example) for of_one, example in zip(making, prompts, strict=True)]
        _check_tools(asked, renderer)
        turns, ledger = self.sampler(asked, n, _within(sampling, budget.tokens), seed)
        made = [one for of_one in making for one in of_one]
        all_ = [
            _Going(one, turn, turn.example.prompt, min(budget.tokens, budget.context - len(turn.prompt_ids)))
            for one, turn in zip(made, turns, strict=True)
        ]
        going, count = all_, 1
        with ThreadPoolExecutor(SIZE) as threads:
            while going:
                for one, turn in zip(going, turns, strict=True):
                    one.hear(turn, renderer)
                going = [one for one in going if one.ended is None]
                for one, (said, done) in zip(going, threads.map(_Going.answer, going), strict=True):
                    one.messages += tuple(said)
                    if done:
                        one.ended = "done"
                    elif one.ended is None and time.monotonic() - began >= budget.seconds:
                        one.ended = "seconds"
                    elif one.ended is None:
                        try:
                            one.tell(said, renderer)
                        except Malformed as error:
                            raise UserError(f"{one.first.example.id}: {error}") from None
                going = [one for one in going if one.ended is None]
                if going:
                    begun, room = [one.begun() for one in going], max(one.room for one in going)
                    turns, cost = self.sampler(begun, 1, _within(sampling, room), derive(seed, "turn", count))
                    ledger, count = ledger + cost, count + 1
        return all_, ledger


def _within(sampling: Sampling, room: int) -> Sampling:
    return sampling.model_copy(update={"max_new_tokens": min(sampling.max_new_tokens, room)})


def _reset(of_one: Sequence[Environment], example: Example) -> Example:
    first, *others = [environment.reset(example) for environment in of_one]
    if any(other != first for other in others):
        raise Failure(f"{example.id}: the environment asks it differently in different episodes")
    return first


def _check_tools(asked: Sequence[Example], renderer: Renderer) -> None:
    for example in asked:
        if example.tools:
            renderer.prompt_ids(example)
            if TOOLS_LEFT_OUT in renderer.notes:
                raise UserError(f"{example.id}: {TOOLS_LEFT_OUT}; or say `plain=True`")
