"""Prompt lookup: guess the next tokens from what the same text says elsewhere, and let the model confirm them.

Leviathan et al. (2211.17192) accept a drafted token by chance, and draw another where they refuse it, in such a way
that what is written is distributed as the model's own text. Here the model draws the token of every position itself,
with the number that the completion's private stream holds for that position, and a drafted token stands if it is the
one drawn. A completion is then the same, token for token, with drafts and without; its distribution needs no further
proof. A draft is one sure guess here, for which their rule accepts no more often: both do with the probability that
the model gives to the guess.

Drafts are what followed the last occurrence of the newest tokens (prompt lookup decoding, Saxena 2023), in the prompt
or in the completion itself. The longest match wins; matches of one token are left out, they are seldom right.
"""

from __future__ import annotations

from collections.abc import Sequence

GRAMS = (3, 2)
"""Lengths of the token sequences looked up, in the order in which they are tried."""


class Lookup:
    """Where each short sequence of tokens last occurred in a text that grows."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}
        """From a sequence to the index of the token after it."""
        self.extend(ids)

    def extend(self, ids: Sequence[int]) -> None:
        for token in ids:
            # Noted only when a token follows: the newest tokens must not be found at their own place.
            for n in GRAMS:
                if len(self.ids) >= n:
                    self.after[tuple(self.ids[-n:])] = len(self.ids)
            self.ids.append(token)

    def draft(self, limit: int) -> list[int]:
        """Up to `limit` tokens that may come next."""
        for n in GRAMS:
            at = self.after.get(tuple(self.ids[-n:]))
            if at is not None:
                return self.ids[at : at + limit]
        return []
