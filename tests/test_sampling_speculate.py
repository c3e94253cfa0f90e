"""Drafted tokens change how fast a completion is written, and nothing else."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
import torch
from test_sampling_local import PROMPTS, Words, ask, sharp
from tiny import ARCHS

from posttrain.recipe.blocks import Sampling
from posttrain.sampling import local
from posttrain.sampling.local import LocalSampler
from posttrain.sampling.speculate import GRAMS, Lookup


def looked_up(ids, limit):
    """`Lookup.draft` by reading the whole text."""
    for n in GRAMS:
        for at in range(len(ids) - n - 1, -1, -1):
            if ids[at : at + n] == ids[-n:]:
                return ids[at + n : at + n + limit]
    return []


def test_lookup_finds_the_last_occurrence_of_the_longest_match():
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(3) for _ in range(rng.randrange(30))]
        cut = rng.randrange(len(ids) + 1)
        lookup = Lookup(ids[:cut])
        lookup.extend(ids[cut:])
        assert lookup.draft(4) == looked_up(ids, 4)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("temperature", [0, 1.2])
def test_completions_are_the_same_token_for_token(arch, temperature):
    policy = sharp(arch)
    words = Words(policy.tokenizer)
    prompts = PROMPTS + ask("a b c a b c a b c a b c a b c")
    plain = Sampling(temperature=temperature, max_new_tokens=24, stop=("qu",))
    want, cost = LocalSampler(policy, words)(prompts, 3, plain, seed=5)
    for rows, speculate in ((128, 4), (5, 2)):
        sampling = plain.model_copy(update={"speculate": speculate})
        got, more = LocalSampler(policy, words, rows)(prompts, 3, sampling, seed=5)
        assert [(r.ids, r.text, r.finish) for r in got] == [(r.ids, r.text, r.finish) for r in want]
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(torch.tensor(a.logps), torch.tensor(b.logps), atol=1e-4, rtol=1e-4)
        assert more.generated_tokens == cost.generated_tokens
        assert more.flops >= cost.flops


def test_the_distribution_is_the_models_by_enumeration(monkeypatch):
    """A Markov chain over three tokens and the end, whose probabilities are quarters: with the uniform numbers of a
    completion running through all combinations of (1/8, 3/8, 5/8, 7/8), the share of completions that are a sequence
    is exactly the sequence's probability. The chain takes the model's place inside the real loop.
    """
    policy = sharp("llama")
    words, steps = Words(policy.tokenizer), 5
    (prompt,) = ask("abcabcabab")
    ids = words.prompt_ids(prompt)
    states = (*dict.fromkeys(ids), min(policy.eos_ids))[-4:]
    quarters = [[0, 2, 1, 1], [1, 0, 3, 0], [3, 1, 0, 0], [0, 4, 0, 0]]
    table_VV = torch.full((320, 320), float("-inf"))
    for state, row in zip(states, quarters, strict=True):
        for after, quarter in zip(states, row, strict=True):
            table_VV[state, after] = torch.tensor(quarter / 4).log()
    streams = list(itertools.product((0.125, 0.375, 0.625, 0.875), repeat=steps))
    monkeypatch.setattr(local, "uniforms", lambda seed, p, k, n: torch.tensor(streams[k], dtype=torch.float64))
    passes: list[int] = []

    def chain(self, ids_T, position_T, layout, at=None):
        passes.append(len(ids_T))
        return table_VV[ids_T if at is None else ids_T[at]]

    monkeypatch.setattr(LocalSampler, "_logits", chain)

    want: dict[tuple[int, ...], float] = {}

    def walk(written, p, state):
        if len(written) == steps or state in policy.eos_ids:
            want[written] = p
            return
        for after, quarter in zip(states, quarters[states.index(state)], strict=True):
            if quarter:
                walk((*written, after), p * quarter / 4, after)

    walk((), 1.0, ids[-1])
    for speculate in (0, 1, 3):
        passes.clear()
        sampling = Sampling(max_new_tokens=steps, speculate=speculate)
        rollouts, _ = LocalSampler(policy, words, rows=2048)([prompt], len(streams), sampling, seed=0)
        counts = Counter(r.ids for r in rollouts)
        assert {ids: n / len(streams) for ids, n in counts.items()} == want
        assert bool(speculate) == any(n > len(streams) for n in passes)  # drafts were put in at all
