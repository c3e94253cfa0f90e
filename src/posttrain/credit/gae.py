"""Generalised advantage estimation: what a token is worth beyond what a critic expected."""

from __future__ import annotations

from collections.abc import Sequence


def gae(
    rewards: Sequence[float], values: Sequence[float], *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[list[float], list[float]]:
    """Advantages and returns of one episode's tokens (Schulman et al., 1506.02438).

    delta_t = r_t + gamma V_t+1 - V_t; A_t = delta_t + gamma lam A_t+1; return_t = A_t + V_t. Nothing comes after the
    last token: V is 0 there, also where a completion was cut off, for its score is of what stands there.
    """
    advantages: list[float] = []
    later = value = 0.0
    for reward, expected in reversed(list(zip(rewards, values, strict=True))):
        later = reward + gamma * value - expected + gamma * lam * later
        advantages.append(later)
        value = expected
    advantages.reverse()
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]
