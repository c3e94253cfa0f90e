"""The local engine: one prefill for each distinct prompt, all completions decoded together.

A completion that is finished leaves the batch at once; when all completions of a prompt are finished, the next
waiting prompt takes its place.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from posttrain.forest.attention import NAME, Layout, attending, decoder, unsupported
from posttrain.forest.logprobs import head
from posttrain.forest.tree import Row, pack
from posttrain.models.cost import forward_flops_per_token
from posttrain.models.policy import Policy
from posttrain.recipe.schema import Sampling
from posttrain.records import Example, Ledger, Rollout, UserError
from posttrain.sampling.choose import choose, draws
from posttrain.sampling.grid import Decode, Grid, Prefill

ROWS = 128
"""Completions decoded together."""


class Renderer(Protocol):
    """The part of the chat renderer that sampling needs."""

    def prompt_ids(self, example: Example) -> tuple[int, ...]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass
class _Writing:
    """A completion on its way."""

    prompt: int
    index: int
    uniform: Tensor
    room: int
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish: str | None = None


class LocalSampler:
    def __init__(self, policy: Policy, renderer: Renderer, rows: int = ROWS) -> None:
        self.policy, self.renderer, self.rows = policy, renderer, rows

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Example], n: int, sampling: Sampling, seed: int
    ) -> tuple[list[Rollout], Ledger]:
        began, weights = time.perf_counter(), self.policy.digest()
        ids = [self.renderer.prompt_ids(example) for example in prompts]
        for example, prompt in zip(prompts, ids, strict=True):
            if len(prompt) >= self.policy.context:
                raise UserError(
                    f"{example.id}: the prompt has {len(prompt)} tokens and the model's context {self.policy.context}: "
                    "no room for an answer; shorten it, or drop it with data.max_length"
                )
        writing = [
            _Writing(
                p,
                k,
                draws(seed, p, k, sampling.max_new_tokens),
                min(sampling.max_new_tokens, self.policy.context - len(prompt)),
            )
            for p, prompt in enumerate(ids)
            for k in range(n)
        ]
        why = unsupported(self.policy.model)
        if why is None:
            computed = self._decode(ids, n, writing, sampling)
        else:
            warnings.warn(f"sampling recomputes the whole sequence for every token: {why}", stacklevel=2)
            computed = self._decode_naively(ids, writing, sampling)
        rollouts = [
            Rollout(
                prompts[w.prompt],
                w.prompt,
                ids[w.prompt],
                tuple(w.ids),
                tuple(w.logps),
                self._text(w.ids, sampling.stop),
                "stop" if w.finish == "stop" else "length",
                weights,
            )
            for w in writing
        ]
        generated = sum(len(w.ids) for w in writing)
        ledger = Ledger(
            prompt_tokens=computed,
            cached_tokens=sum(len(prompt) * n for prompt in ids) - computed,
            generated_tokens=generated,
            flops=(computed + generated)
            * forward_flops_per_token(
                self.policy.model.config,
                context=max(len(ids[w.prompt]) + len(w.ids) for w in writing),
                targets=generated / (computed + generated),
            ),
            seconds=time.perf_counter() - began,
        )
        return rollouts, ledger

    def _decode(self, ids: list[tuple[int, ...]], n: int, writing: list[_Writing], sampling: Sampling) -> int:
        """Fill `writing`; returns how many prompt tokens were computed. `writing` holds n entries a prompt."""
        places = max(1, min(len(ids), self.rows // n))
        grid = Grid(places, n)
        waiting = list(range(len(ids)))
        free = list(range(places))
        place_of: dict[int, int] = {}
        live: list[_Writing] = []
        computed = 0
        while waiting or live:
            if free and waiting and (not live or len(free) * 4 >= places):
                entering = [waiting.pop(0) for _ in range(min(len(free), len(waiting)))]
                taken = [free.pop(0) for _ in entering]
                place_of |= dict(zip(entering, taken, strict=True))
                logits_EV, tokens = self._prefill(grid, taken, [ids[p] for p in entering])
                computed += tokens
                new = [w for p in entering for w in writing[p * n : (p + 1) * n]]
                live += self._write(new, logits_EV.repeat_interleave(n, 0), sampling)
            else:
                p_B = torch.tensor([place_of[w.prompt] for w in live])
                g_B = torch.tensor([w.index for w in live])
                layout = Decode(grid, p_B, g_B)
                last = torch.tensor([w.ids[-1] for w in live])
                live = self._write(live, self._logits(last, layout.position_B, layout), sampling)
            busy = {w.prompt for w in live}
            for p in [p for p in place_of if p not in busy]:
                free.append(place_of.pop(p))
        return computed

    def _prefill(self, grid: Grid, places: list[int], ids: list[tuple[int, ...]]) -> tuple[Tensor, int]:
        """Logits after each prompt [E, V], and how many tokens that took (fewer than there are: they share)."""
        forest = pack([Row(prompt, (), ()) for prompt in ids])
        segment_at = {s.start: i for i, s in enumerate(forest.segments)}
        paths = []
        for start, _ in forest.spans:
            spans = [(forest.segments[i].start, forest.segments[i].stop) for i in forest.path(segment_at[start])]
            paths.append(torch.cat([torch.arange(a, b) for a, b in spans]))
        layout = Prefill(forest)
        ends = torch.tensor([stop - 1 for _, stop in forest.spans])
        logits_EV = self._logits(forest.ids_T, forest.position_T, layout, ends)
        grid.enter(places, paths, layout)
        return logits_EV, len(forest)

    def _logits(self, ids_T: Tensor, position_T: Tensor, layout: Layout, at: Tensor | None = None) -> Tensor:
        model = self.policy.model
        with attending(model, NAME):
            hidden_TD = (
                decoder(model)
                .get_decoder()(input_ids=ids_T[None], position_ids=position_T[None], use_cache=False, layout=layout)
                .last_hidden_state[0]
            )
        return head(model, hidden_TD if at is None else hidden_TD[at])

    def _write(self, rows: list[_Writing], logits_BV: Tensor, sampling: Sampling) -> list[_Writing]:
        """Add one token to each completion; returns those that go on."""
        uniform_B = torch.stack([w.uniform[len(w.ids)] for w in rows])
        ids_B, logps_B = choose(logits_BV, uniform_B, sampling)
        for w, token, logp in zip(rows, ids_B.tolist(), logps_B.tolist(), strict=True):
            w.ids.append(token)
            w.logps.append(logp)
            if token in self.policy.eos_ids or (sampling.stop and self._stopped(w.ids, sampling.stop)):
                w.finish = "stop"
            elif len(w.ids) >= w.room:
                w.finish = "length"
        return [w for w in rows if w.finish is None]

    def _stopped(self, ids: list[int], stops: Sequence[str]) -> bool:
        # A stop string of c characters ends within the last c tokens, and one more may hold its beginning.
        tail = self.renderer.decode(ids[-(max(map(len, stops)) + 1) :])
        return any(stop in tail for stop in stops)

    def _text(self, ids: list[int], stops: Sequence[str]) -> str:
        text = self.renderer.decode(ids)
        cuts = [at for stop in stops if (at := text.find(stop)) >= 0]
        return text[: min(cuts)] if cuts else text

    def _decode_naively(self, ids: list[tuple[int, ...]], writing: list[_Writing], sampling: Sampling) -> int:
        """One sequence and one full forward pass at a time: for models that cannot branch, and as the oracle."""
        model = decoder(self.policy.model)
        computed = 0
        for w in writing:
            while w.finish is None:
                sequence = torch.tensor([[*ids[w.prompt], *w.ids]])
                computed += sequence.shape[1] - len(w.ids)
                self._write([w], model(input_ids=sequence, use_cache=False).logits[0, -1:], sampling)
        return computed
