"""Stop strings: the window finds them at the same token as decoding everything does."""

from __future__ import annotations

import random

import pytest
from tiny import tiny_tokenizer
from tokenizers import decoders

from posttrain.sampling.stop import stopped

TOKENIZER = tiny_tokenizer()
FALLBACK = decoders.Sequence(
    [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
PIECES = (*"ab\u2581", "\u2581ab", "ba\u2581", "abababababab", *(f"<0x{byte:02X}>" for byte in "é€😀".encode()))


def by_bytes(ids) -> str:
    return TOKENIZER.decode(list(ids), skip_special_tokens=True)


def by_fallback(ids) -> str:
    """As Llama 2 and its kin: a broken run of byte tokens spoils its whole text, the first space is dropped."""
    return FALLBACK.decode([PIECES[i] for i in ids])


def first_stop(ids, hit) -> int | None:
    return next((n for n in range(1, len(ids) + 1) if hit(ids[:n])), None)


@pytest.mark.parametrize("decode", [by_bytes, by_fallback])
@pytest.mark.parametrize("seed", range(60))
def test_the_window_agrees_with_the_whole(decode, seed):
    rng = random.Random(seed)
    if decode is by_bytes:
        texts = ["the dog, the 42 ", "😀é", "é€", " a", "<|im_start|>", "\ufffd"]
        ids = [i for _ in range(25) for i in TOKENIZER.encode(rng.choice(texts), add_special_tokens=False)]
        ids = [i if rng.random() < 0.9 else rng.randrange(256) for i in ids]
    else:
        ids = [rng.randrange(len(PIECES)) for _ in range(60)]
    text = decode(ids)
    for _ in range(8):
        at = rng.randrange(len(text))
        stops = [text[at : at + rng.randint(1, 9)], "no such text in here", rng.choice(["😀", "e", " a", "b\ufffd"])]
        assert first_stop(ids, lambda head, s=stops: stopped(decode, head, s)) == first_stop(
            ids, lambda head, s=stops: any(stop in decode(head) for stop in s)
        )


def test_the_window_does_not_grow_with_the_text():
    sizes: list[int] = []

    def decode(ids):
        sizes.append(len(ids))
        return "x" * len(ids)

    assert not stopped(decode, [0] * 5000, ["stop", "end"])
    assert max(sizes) <= 8
