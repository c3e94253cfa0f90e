"""Rewards: what an answer is worth. `TABLE` is all there are, with where each comes from."""

from __future__ import annotations

from posttrain.rewards.verifier import VERIFIERS, Entry

__all__ = ["TABLE", "Entry"]

TABLE: dict[str, Entry] = {**VERIFIERS}
