"""The Python door: the few objects that a training loop written by hand is made of.

They put together what the rooms offer and compute nothing themselves; the configured path runs the same functions.
"""

from __future__ import annotations

import inspect
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor

from posttrain.credit.batch import Counted
from posttrain.data import tasks
from posttrain.data.chat import Renderer
from posttrain.data.prepare import prompt_key
from posttrain.data.shapes import Malformed
from posttrain.forest import Forest, pack, token_logprobs
from posttrain.losses import Counts
from posttrain.models import policy as models
from posttrain.recipe.base import Block
from posttrain.recipe.blocks import Lora, Optim, Sampling
from posttrain.records import Example, Failure, Rollout, Score, UserError, derive
from posttrain.rewards.verifier import verify
from posttrain.sampling.local import LocalSampler
from posttrain.training.batch import chosen
from posttrain.training.optim import adamw, clip

B = TypeVar("B", bound=Block)


@dataclass(frozen=True, eq=False)
class Policy(models.Policy):
    """A model to train, with all that a loop asks of it."""

    seed: int = 0
    """Completions derive from it, where `sample` is given no seed of its own."""
    calls: Iterator[int] = field(default_factory=itertools.count, repr=False)

    @classmethod
    def of(cls, policy: models.Policy, seed: int = 0) -> Policy:
        """The same model and tokenizer, not a copy."""
        return cls(**{f.name: getattr(policy, f.name) for f in fields(models.Policy)}, seed=seed)

    @cached_property
    def renderer(self) -> Renderer:
        return Renderer(self.tokenizer)

    def sample(
        self,
        prompts: Sequence[Example | str],
        n: int = 1,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        max_new_tokens: int = 64,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> list[Rollout]:
        """`n` completions of each prompt, those of one prompt together and in the order of the prompts.

        A string is what a user says. Without `seed` every call draws afresh, yet the same program draws the same.

        Raises:
            UserError: a setting is out of range, there is no prompt, or one leaves no room for an answer.
        """
        if not prompts or n < 1:
            raise UserError(f"sample: {len(prompts)} prompts and n={n}; both must be at least 1")
        examples = [
            Example(f"prompt {i}", ({"role": "user", "content": p},)) if isinstance(p, str) else p
            for i, p in enumerate(prompts)
        ]
        sampling = _checked(
            Sampling,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            max_new_tokens=max_new_tokens,
            stop=stop,
        )
        if seed is None:
            seed = derive(self.seed, "sample", next(self.calls))
        return LocalSampler(self, self.renderer)(examples, n, sampling, seed)[0]

    def batch(self, examples: Sequence[Example]) -> Counted:
        """The examples' own completions as a batch whose assistant tokens are its targets.

        Raises:
            UserError: an example cannot be rendered, has nothing to learn, or is longer than the model's context.
        """
        rows = []
        for example in examples:
            try:
                rendered = self.renderer.render(example)
            except Malformed as error:
                raise UserError(f"{example.id}: {error}") from None
            for row in map(chosen, rendered):
                if not any(row.target):
                    raise UserError(f"{example.id}: no token of it can be trained on")
                if len(row) > self.context:
                    raise UserError(f"{example.id}: {len(row)} tokens, and the model's context is {self.context}")
                rows.append(row)
        return Counted(
            **vars(pack(rows)), counts=Counts(tokens=sum(sum(row.target) for row in rows), sequences=len(rows))
        )

    def logprobs(self, forest: Forest, temperature: float = 1.0) -> Tensor:
        """[T] log-probabilities of the target tokens in nats, 0 elsewhere: `token_logprobs`, in one forward pass.

        `temperature` is what the completions were sampled at. Empty for a batch without signal, whose loss is 0.
        """
        if not len(forest):
            return torch.zeros(0, requires_grad=torch.is_grad_enabled())
        return token_logprobs(self.model, forest, temperature)


def load(
    source: str,
    *,
    adapter: Lora | None = None,
    dtype: str = "float32",
    revision: str | None = None,
    chat_template: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Policy:
    """The model that `source` names: a directory, a hub id, a .gguf file, `pip:PACKAGE/FILE`, or what `save` wrote.

    `adapter` trains a low-rank adapter in place of all weights; its dropout fires inside
    `with policy.adapter_dropout():` and nowhere else. `chat_template` is `chatml` or a Jinja file, in place of the
    model's own. `seed` is of the adapter's first values and of the completions. `device` is `auto`, `cpu` or `cuda`.

    Raises:
        UserError: the source cannot be had or used.
    """
    policy = models.load(
        source,
        adapter=adapter,
        dtype=dtype,
        revision=revision,
        chat_template=chat_template,
        seed=seed,
        device=device,
    )
    return Policy.of(policy, seed)


@dataclass(frozen=True)
class Task:
    """Verifiable items without end, the same for the same seed."""

    name: str
    seed: int
    config: Mapping[str, Any]

    def examples(self, n: int) -> list[Example]:
        """The first `n` items, with their answers as completions."""
        return tasks.load(self.name.removeprefix(tasks.PREFIX), n, self.seed, self.config)

    def batches(self, size: int, *, steps: int, held_out: Sequence[Example] = ()) -> Iterator[list[Example]]:
        """`steps` lists of `size` items, none of which asks what `held_out` asks.

        Where that leaves too few of the first `size * steps`, they come again.
        """
        if size < 1 or steps < 1:
            raise UserError(f"batches: size {size} and {steps} steps; both must be at least 1")
        keys = {prompt_key(example) for example in held_out}
        kept = [example for example in self.examples(size * steps) if prompt_key(example) not in keys]
        if not kept:
            raise UserError(f"{self.name}: every item is among those held out; hold out fewer, or widen its config")
        items = itertools.cycle(kept)
        for _ in range(steps):
            yield list(itertools.islice(items, size))

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """What the task's verifier says of each."""
        return verify(rollouts)

    def accuracy(self, policy: Policy, examples: Sequence[Example], max_new_tokens: int = 24) -> float:
        """Share of the examples that the policy, decoding greedily, answers right."""
        scores = self.score(policy.sample(examples, temperature=0.0, max_new_tokens=max_new_tokens))
        return sum(score.outcome == "correct" for score in scores) / len(scores)


def task(name: str, *, seed: int = 0, **config: Any) -> Task:
    """The task `reasoning_gym/NAME`, with its generator's own parameters as keywords.

    Raises:
        UserError: there is no such task, or it does not take these parameters.
    """
    bare = name.removeprefix(tasks.PREFIX)
    if bare == name:
        raise UserError(f"{name}: no task; write {tasks.PREFIX}NAME (`posttrain tasks` lists them)")
    tasks.dataset(bare, config, seed=0, size=1)
    return Task(name, seed, config)


class AdamW:
    """`training.optim.adamw` at a constant rate, with the step around it.

    `settings` are those of a recipe's `optim` block: weight_decay, betas, eps, max_grad_norm.
    """

    def __init__(self, policy: models.Policy, lr: float, **settings: Any) -> None:
        self.optim = _checked(Optim, lr=lr, schedule="constant", warmup=0.0, **settings)
        self.parameters = policy.parameters()
        self.optimizer = adamw(self.parameters.items(), self.optim)

    def step(self, loss: Tensor) -> float:
        """Backward, clip, step, clear. Returns the gradient's norm before clipping; weights without one stay.

        Raises:
            Failure: the loss or the gradient is not finite; the weights are as they were.
        """
        loss.backward()
        norm = clip(self.parameters.values(), self.optim.max_grad_norm).item()
        finite = math.isfinite(loss.item()) and math.isfinite(norm)
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not finite:
            raise Failure(
                f"loss {loss.item()}, gradient norm {norm}: no step was taken; lower lr, or look at the batch"
            )
        return norm


def script(main: Callable[..., None]) -> None:
    """Call `main` with the command line's `key=value` arguments, each read as what its default is.

    A user's mistake is one line on stderr and exit code 2; training that breaks down one and exit code 1.
    """
    defaults = {name: p.default for name, p in inspect.signature(main).parameters.items()}
    try:
        main(**dict(_argument(argument, defaults) for argument in sys.argv[1:]))
    except (UserError, Failure) as error:
        print(error, file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)


def _argument(argument: str, defaults: Mapping[str, Any]) -> tuple[str, Any]:
    name, equals, value = argument.partition("=")
    if not equals or name not in defaults:
        known = " ".join(f"{name}={default}" for name, default in defaults.items())
        raise UserError(f"{argument}: not an argument; there are, with their defaults: {known}")
    kind = type(defaults[name])
    try:
        return name, kind(value)
    except ValueError:
        raise UserError(f"{argument}: {name} is of type {kind.__name__}, such as {defaults[name]}") from None


def _checked(block: type[B], **values: Any) -> B:
    """The recipe's block with these values; UserError where it refuses them."""
    try:
        return block(**values)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']} (given: {e['input']!r})" for e in error.errors())
        raise UserError("; ".join(problems)) from None
