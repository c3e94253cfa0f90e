"""Stop strings, found without decoding a completion again for each of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

BROKEN = "\ufffd"
"""What a decoder puts for bytes that are no whole character: one that is cut at either end of a window, or not
finished yet."""


def stopped(decode: Callable[[Sequence[int]], str], ids: Sequence[int], stops: Sequence[str]) -> bool:
    """Whether the newest of `ids` completes one of `stops`, given that the tokens before it complete none.

    Such a stop string ends in what the newest token changed, so all but as many characters as it has may be left out.
    How many tokens these are depends on the text (a character may take several tokens, a special token gives none):
    the window grows until the text before the newest token is long enough and whole from its first character on. It
    must hold one character more than the longest stop string, for a decoder may drop a space at its beginning.
    """
    need = max(map(len, stops))
    window = need + 2
    while window < len(ids):
        before = decode(ids[-window:-1]).rstrip(BROKEN)
        if len(before) > need and BROKEN not in before:
            break
        window *= 2
    text = decode(ids[-window:])
    return any(stop in text for stop in stops)
