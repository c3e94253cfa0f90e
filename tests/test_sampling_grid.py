"""Attention of the decoding grid against plain softmax attention, one token at a time."""

from __future__ import annotations

import random

import pytest
import torch

from posttrain.forest.attention import Scoring, soften
from posttrain.sampling.grid import BLOCK, Cache, Decode, survivors

HKV, R, WIDTH = 2, 3, 8
H = HKV * R


def plain(query_HD, keys, values, position, scoring):
    """One query at `position`; keys and values [Hkv, K, d] of positions 0, 1, ..."""
    keys, values = keys[:, : position + 1].repeat_interleave(R, 0), values[:, : position + 1].repeat_interleave(R, 0)
    scores = torch.einsum("hd,hkd->hk", query_HD, keys) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    if scoring.window is not None:
        scores[:, : max(0, position + 1 - scoring.window)] = float("-inf")
    return torch.einsum("hk,hkd->hd", soften(scores[None, :, None], scoring.sinks)[0, :, 0], values)


@pytest.mark.parametrize("sinks", [None, torch.linspace(-2, 3, H)])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 4, 9, 40])
def test_attention_is_the_plain_one(window, softcap, sinks):
    """Prompts and rows of uneven lengths, rows of a prompt apart, several new tokens in some, one prompt unused."""
    scoring = Scoring(0.7, window, softcap, sinks)
    prompts, places = [5, 12, 7, 30], [1, 0, 1, 3, 1, 0]
    counts, written = [1, 3, 2, 1, 1, 4], [0, 3, 2, BLOCK - 1, 9, 1]
    torch.manual_seed(0)

    def random_pair(*shape):
        return torch.randn(*shape), torch.randn(*shape)

    prefix, suffix = Cache(), Cache()
    prefix.fit(len(prompts), max(prompts))
    told = [random_pair(HKV, n, WIDTH) for n in prompts]
    for i, pair in enumerate(told):
        prefix.enter(i, [(0, 3), (3, prompts[i])], {0: pair})
    suffix.fit(len(places), max(written))
    said = [random_pair(HKV, n + k, WIDTH) for n, k in zip(written, counts, strict=True)]
    for b, pair in enumerate(said):
        for room, new in zip(suffix.room(0, pair[0]), pair, strict=True):
            room[b, :, : written[b]] = new[:, : written[b]]

    layout = Decode(prefix, suffix, prompts, places, written, counts)
    query = torch.randn(1, H, sum(counts), WIDTH)
    key, value = (torch.cat([said[b][i][:, written[b] :] for b in range(len(places))], 1)[None] for i in range(2))
    got = layout.attend(0, query, key, value, scoring)
    t = 0
    for b, place in enumerate(places):
        keys, values = (torch.cat([told[place][i], said[b][i]], 1) for i in range(2))
        for q in range(counts[b]):
            position = prompts[place] + written[b] + q
            assert layout.position_T[t] == position
            torch.testing.assert_close(got[0, :, t], plain(query[0, :, t], keys, values, position, scoring))
            t += 1


def test_a_cache_keeps_what_it_is_asked_to():
    """Rooms that grow and shrink, sequences that leave and move: what stays holds its values."""
    rng, cache = random.Random(0), Cache()
    held: list[torch.Tensor] = []
    for _ in range(60):
        tokens = rng.choice((1, BLOCK, BLOCK + 1, 5 * BLOCK))
        new = torch.randn(HKV, tokens, WIDTH)
        cache.fit(len(held) + 1, max(tokens, *(x.shape[1] for x in held), 1))
        cache.enter(len(held), [(0, tokens)], {4: (new, -new)})
        held.append(new)
        alive = [rng.random() < 0.7 for _ in held]
        order = survivors(alive)
        assert sorted(order) == [i for i, a in enumerate(alive) if a]
        cache.keep(order)
        held = [held[i] for i in order]
        for i, x in enumerate(held):
            key, value = cache.layers[4]
            assert torch.equal(key[i, :, : x.shape[1]], x)
            assert torch.equal(value[i, :, : x.shape[1]], -x)


def test_few_move_when_some_leave():
    assert survivors([True, True]) == [0, 1]
    assert survivors([False, True, True, False]) == [2, 1]
    assert survivors([False, False]) == []
    for _ in range(200):
        alive = [random.random() < 0.6 for _ in range(9)]
        order = survivors(alive)
        assert sum(i != source for i, source in enumerate(order)) == alive[: len(order)].count(False)
