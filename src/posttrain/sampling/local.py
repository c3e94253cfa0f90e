"""The local engine: one prefill for each distinct prompt, all completions decoded together.

A completion that is finished leaves the batch at once, and waiting ones take the rows that are free: their prompts are
computed when the first of their completions begins, and forgotten when the last one ends.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from posttrain.forest.attention import NAME, Layout, attending, decoder, unsupported
from posttrain.forest.logprobs import head
from posttrain.forest.tree import Row, pack, split
from posttrain.models.cost import forward_flops_per_token
from posttrain.models.fused import folded
from posttrain.models.policy import Policy
from posttrain.recipe.blocks import Sampling
from posttrain.records import Example, Ledger, Rollout
from posttrain.sampling.choose import choose, uniforms
from posttrain.sampling.grid import Cache, Decode, Prefill, survivors
from posttrain.sampling.protocol import Renderer, completion_text, room
from posttrain.sampling.speculate import Lookup
from posttrain.sampling.stop import stopped

ROWS = 128
"""Completions decoded together."""
REFILL = 8
"""Waiting completions enter when one row in so many is free: a prefill for one short prompt costs a whole step."""
PREFILL = 2048
"""Tokens of one forward pass over prompts; a longer prompt has one to itself."""


@dataclass
class _Writing:
    """A completion on its way."""

    prompt: int
    index: int
    uniform: Tensor
    room: int
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None
    lookup: Lookup | None = None
    """The text so far, where tokens are drafted."""


@dataclass
class _Work:
    """What was computed, in tokens."""

    prompt_tokens: int = 0
    decoded_tokens: int = 0
    """Tokens of completions that were put in to get the next one; drafted ones that were not right count too."""
    logits: int = 0
    """Tokens after which logits were computed."""


class LocalSampler:
    """A `Sampler` of the policy's weights of now, in this process; at most `rows` completions are written at a time."""

    def __init__(self, policy: Policy, renderer: Renderer, rows: int = ROWS) -> None:
        self.policy, self.renderer, self.rows = policy, renderer, rows

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Example], n: int, sampling: Sampling, seed: int, first: int = 0
    ) -> tuple[list[Rollout], Ledger]:
        """`first` is the number of the first prompt, where these are a part of a larger call."""
        began, weights = time.perf_counter(), self.policy.digest()
        ids = [self.renderer.prompt_ids(example) for example in prompts]
        rooms = [
            room(example, len(prompt), sampling.max_new_tokens, self.policy.context)
            for example, prompt in zip(prompts, ids, strict=True)
        ]
        writing = [
            _Writing(p, k, uniforms(seed, first + p, k, sampling.max_new_tokens), rooms[p])
            for p in range(len(ids))
            for k in range(n)
        ]
        why = unsupported(self.policy.model)
        if why is None:
            with folded(self.policy.model):
                work = self._decode(ids, writing, sampling)
        else:
            warnings.warn(f"sampling recomputes the whole sequence for every token: {why}", stacklevel=2)
            work = self._decode_naively(ids, writing, sampling)
        rollouts = [
            Rollout(
                prompts[w.prompt],
                first + w.prompt,
                ids[w.prompt],
                tuple(w.ids),
                tuple(w.logps),
                completion_text(self.renderer.decode(w.ids), sampling.stop),
                w.finish or "length",
                weights,
            )
            for w in writing
        ]
        computed = work.prompt_tokens + work.decoded_tokens
        ledger = Ledger(
            prompt_tokens=work.prompt_tokens,
            cached_tokens=max(0, sum(len(prompt) * n for prompt in ids) - work.prompt_tokens),
            generated_tokens=sum(len(w.ids) for w in writing),
            flops=computed
            * forward_flops_per_token(
                self.policy.model.config,
                context=max(len(ids[w.prompt]) + len(w.ids) for w in writing),
                targets=work.logits / computed,
            ),
            seconds=time.perf_counter() - began,
        )
        return rollouts, ledger

    def _decode(self, ids: list[tuple[int, ...]], writing: list[_Writing], sampling: Sampling) -> _Work:
        """Fill `writing`. Row i of the batch is `live[i]` and sequence i of `suffix`; sequence p of `prefix` is the
        prompt `places[p]`.
        """
        # Prompts of like length together waste least room; the longest first, so that the room need not grow.
        waiting = deque(sorted(writing, key=lambda w: (-len(ids[w.prompt]), w.prompt, w.index)))
        prefix, suffix, work = Cache(), Cache(), _Work()
        suffix.fit(min(self.rows, len(writing)), 1)
        places: list[int] = []
        live: list[_Writing] = []
        first: dict[int, Tensor] = {}  # [V] logits after a prompt that still has waiting completions
        while waiting or live:
            free = self.rows - len(live)
            if waiting and (not live or free * REFILL >= self.rows):
                entering = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                new = sorted({w.prompt for w in entering} - first.keys())
                prefix.fit(len(places) + len(new), max(len(ids[p]) for p in (*places, *new)))
                first |= zip(new, self._prefill(prefix, len(places), [ids[p] for p in new], work), strict=True)
                places += new
                if sampling.speculate:
                    for w in entering:
                        w.lookup = Lookup(ids[w.prompt])
                live += entering
                self._write(entering, [[]] * len(entering), torch.stack([first[w.prompt] for w in entering]), sampling)
                first = {p: logits for p, logits in first.items() if waiting and waiting[0].prompt == p}
            else:
                drafts = [self._draft(w, sampling.speculate) for w in live]
                place_of = {p: i for i, p in enumerate(places)}
                layout = Decode(
                    prefix,
                    suffix,
                    prompts=[len(ids[p]) for p in places],
                    places=[place_of[w.prompt] for w in live],
                    lengths=[len(w.ids) - 1 for w in live],
                    counts=[1 + len(draft) for draft in drafts],
                    device=self.device,
                )
                fed_T = [token for w, draft in zip(live, drafts, strict=True) for token in (w.ids[-1], *draft)]
                logits_TV = self._logits(torch.tensor(fed_T, device=self.device), layout.position_T, layout)
                self._write(live, drafts, logits_TV, sampling)
                work.decoded_tokens += len(fed_T)
                work.logits += len(fed_T)
            order = survivors([w.finish is None for w in live])
            suffix.keep(order)
            live = [live[i] for i in order]
            needed = {w.prompt for w in live} | first.keys()
            order = survivors([p in needed for p in places])
            prefix.keep(order)
            places = [places[i] for i in order]
        return work

    def _prefill(self, prefix: Cache, at: int, ids: list[tuple[int, ...]], work: _Work) -> list[Tensor]:
        """Compute prompts and put them into `prefix` at `at` and after; returns the logits [V] that follow each."""
        rows = [Row(prompt, (), ()) for prompt in ids]
        after: dict[int, Tensor] = {}
        for members in split(rows, [(i,) for i in range(len(rows))], PREFILL):
            forest = pack([rows[i] for i in members]).to(self.device)
            segment_at = {s.start: i for i, s in enumerate(forest.segments)}
            layout = Prefill(forest)
            ends = torch.tensor([stop - 1 for _, stop in forest.spans], device=self.device)
            logits_EV = self._logits(forest.ids_T, forest.position_T, layout, ends)
            for i, (start, _), logits_V in zip(members, forest.spans, logits_EV, strict=True):
                path = [forest.segments[s] for s in forest.path(segment_at[start])]
                prefix.enter(at + i, [(s.start, s.stop) for s in path], layout.kept)
                after[i] = logits_V
            work.prompt_tokens += len(forest)
            work.logits += len(members)
        return [after[i] for i in range(len(ids))]

    def _draft(self, w: _Writing, limit: int) -> list[int]:
        """Not more than there is room for after the token that is sure to come."""
        return w.lookup.draft(min(limit, w.room - len(w.ids) - 1)) if w.lookup else []

    @property
    def device(self) -> torch.device:
        return decoder(self.policy.model).device

    def _logits(self, ids_T: Tensor, position_T: Tensor, layout: Layout, at: Tensor | None = None) -> Tensor:
        model = self.policy.model
        with attending(model, NAME):
            hidden_TD = (
                decoder(model)
                .get_decoder()(input_ids=ids_T[None], position_ids=position_T[None], use_cache=False, layout=layout)
                .last_hidden_state[0]
            )
        return head(model, hidden_TD if at is None else hidden_TD[at])

    def _write(self, rows: list[_Writing], drafts: list[list[int]], logits_TV: Tensor, sampling: Sampling) -> None:
        """Add one token to each completion, and one more for each draft that turned out right.

        `logits_TV` holds, row after row, those after the newest token and those after each drafted one.
        """
        uniform_T = torch.cat(
            [w.uniform[len(w.ids) : len(w.ids) + 1 + len(draft)] for w, draft in zip(rows, drafts, strict=True)]
        )
        ids_T, logps_T = choose(logits_TV, uniform_T.to(logits_TV.device), sampling)
        drawn = zip(ids_T.tolist(), logps_T.tolist(), strict=True)
        for w, draft in zip(rows, drafts, strict=True):
            mine = list(itertools.islice(drawn, 1 + len(draft)))
            for (token, logp), guess in itertools.zip_longest(mine, draft):
                w.ids.append(token)
                w.logps.append(logp)
                if w.lookup:
                    w.lookup.extend([token])
                if token in self.policy.eos_ids or (
                    sampling.stop and stopped(self.renderer.decode, w.ids, sampling.stop)
                ):
                    w.finish = "stop"
                elif len(w.ids) >= w.room:
                    w.finish = "length"
                if w.finish or token != guess:
                    break

    def _decode_naively(self, ids: list[tuple[int, ...]], writing: list[_Writing], sampling: Sampling) -> _Work:
        """One sequence and one full forward pass at a time: for models that cannot branch, and as the oracle."""
        model, work = decoder(self.policy.model), _Work()
        for w in writing:
            while w.finish is None:
                sequence = torch.tensor([[*ids[w.prompt], *w.ids]], device=self.device)
                work.prompt_tokens += len(ids[w.prompt])
                work.decoded_tokens += len(w.ids)
                work.logits += sequence.shape[1]
                self._write([w], [[]], model(input_ids=sequence, use_cache=False).logits[0, -1:], sampling)
        return work
