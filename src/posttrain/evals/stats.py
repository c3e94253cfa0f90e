"""What a number means and how sure it is. Pure functions on numbers; every interval is two-sided.

Conventions: rates and differences are shares (0..1), not percent. An interval is refused (`ValueError`) where
nothing can be said of the spread: fewer than 2 items, or fewer than 2 clusters.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, ndtri, stdtr, stdtrit


class Interval(NamedTuple):
    low: float
    high: float


class Paired(NamedTuple):
    """`after - before` on the same items."""

    diff: float
    """Mean difference."""
    interval: Interval
    p: float
    """Two-sided, of no difference: exact McNemar for binary scores, else the paired t-test."""
    mde: float
    """Smallest true difference that these items would have shown at 80 % power; see `mde`."""
    n: int
    gained: int
    """Items whose score rose."""
    lost: int
    """Items whose score fell."""


def _at_least_two(n: int, what: str = "items") -> None:
    if n < 2:
        raise ValueError(f"no interval from {n} {what}: at least 2 are needed")


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError("scores hold NaN or infinity; leave unscored items out and count them apart")
    return array


def wilson(k: int, n: int, level: float = 0.95) -> Interval:
    """Score interval of the rate k/n (Wilson, JASA 1927)."""
    _at_least_two(n)
    if not 0 <= k <= n:
        raise ValueError(f"{k} successes out of {n}")
    z = float(ndtri((1 + level) / 2))
    rate = k / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # The ends are exactly 0 at k = 0 and 1 at k = n; rounding must not say otherwise.
    return Interval(0.0 if k == 0 else centre - half, 1.0 if k == n else centre + half)


def mean_interval(values: ArrayLike, clusters: Sequence[Hashable] | None = None, level: float = 0.95) -> Interval:
    """Student-t interval of the mean of `values`.

    `clusters` names what each item shares with others (a document, a template): the standard error is then
    the cluster-robust one (Miller, "Adding error bars to evals", 2411.00640). Departures from the paper: the
    C/(C-1) small-sample factor and Student's t with C-1 degrees of freedom for C clusters, so that singleton
    clusters give the plain interval and equal-sized ones the interval of the cluster means.
    """
    x = _finite(values)
    _at_least_two(x.size)
    residuals = x - x.mean()
    if clusters is not None:
        if len(clusters) != x.size:
            raise ValueError(f"{x.size} values but {len(clusters)} cluster names")
        index: dict[Hashable, int] = {}
        codes = [index.setdefault(name, len(index)) for name in clusters]
        _at_least_two(len(index), "clusters")
        residuals = np.bincount(codes, weights=residuals)
    units = residuals.size
    error = math.sqrt(units / (units - 1) * float(residuals @ residuals)) / x.size
    half = float(stdtrit(units - 1, (1 + level) / 2)) * error
    return Interval(float(x.mean()) - half, float(x.mean()) + half)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p of McNemar's test: is a change as likely to be a gain as a loss?"""
    return min(1.0, 2 * float(bdtr(min(gained, lost), gained + lost, 0.5)))


def tango(gained: int, lost: int, n: int, level: float = 0.95) -> Interval:
    """Score interval of the difference (gained - lost) / n between paired rates (Tango, Stat. Med. 1998).

    It stays open when nothing, or everything, changed: +-z^2 / (n + z^2) where no item did.
    """
    _at_least_two(n)
    z = float(ndtri((1 + level) / 2))

    def compatible(d: float) -> bool:
        b = (2 * n - gained + lost) * d - gained - lost
        q = (math.sqrt(max(0.0, b * b + 8 * n * lost * d * (1 - d))) - b) / (4 * n)  # P(lost) if d is true
        return abs(gained - lost - n * d) <= z * math.sqrt(max(0.0, n * (2 * q + d * (1 - d))))

    def edge(outside: float) -> float:
        inside = (gained - lost) / n
        for _ in range(52):  # bisection, to the last bit of a share
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if compatible(middle) else (inside, middle)
        return (inside + outside) / 2

    return Interval(edge(-1.0), edge(1.0))


def mde(sd: float, n: int, level: float = 0.95, power: float = 0.8) -> float:
    """Minimum detectable effect: the true mean difference that n items with this deviation find with `power`.

    (t_{1-a/2} + t_{power}) sd / sqrt(n) with n-1 degrees of freedom (Bloom, Evaluation Review 1995).
    """
    _at_least_two(n)
    return float(stdtrit(n - 1, (1 + level) / 2) + stdtrit(n - 1, power)) * sd / math.sqrt(n)


def paired(before: ArrayLike, after: ArrayLike, level: float = 0.95) -> Paired:
    """Compare per-item scores of the same items, in the same order.

    Binary scores (all 0 or 1): exact McNemar p with Tango's score interval (see `tango`). The two are
    separate methods, the test being the more cautious, and may disagree at the edge of significance.
    Other scores: paired t-test and its interval.

    For binary scores the MDE takes the share of changed items as observed with one gain and one loss added,
    or the share that the effect itself implies where that is larger; above 1, n is too small to detect any.
    """
    x, y = _finite(before), _finite(after)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"before and after must be the same items: shapes {x.shape} and {y.shape}")
    n = x.size
    _at_least_two(n)
    difference = y - x
    diff, gained, lost = float(difference.mean()), int((difference > 0).sum()), int((difference < 0).sum())

    if np.isin(np.concatenate([x, y]), (0.0, 1.0)).all():
        changed = (gained + lost + 2) / (n + 2)
        # An effect d changes at least d n items: d = unit sqrt(max(changed, d)) solves to unit^2 below that.
        unit = mde(1.0, n, level)
        smallest = unit * max(math.sqrt(changed), unit)
        return Paired(diff, tango(gained, lost, n, level), mcnemar(gained, lost), smallest, n, gained, lost)

    sd = float(difference.std(ddof=1))
    p = 2 * float(stdtr(n - 1, -abs(diff) / (sd / math.sqrt(n)))) if sd > 0 else float(diff == 0)
    return Paired(diff, mean_interval(difference, level=level), p, mde(sd, n, level), n, gained, lost)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for testing all of them (Holm, Scand. J. Stat. 1979), in the order given."""
    order = sorted(range(len(ps)), key=ps.__getitem__)
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, c of them correct, hold a correct one (Chen et al., 2107.03374)."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"need 0 <= correct <= samples and 1 <= k <= samples, not correct={c}, samples={n}, k={k}")
    return 1.0 - math.prod(1 - k / i for i in range(n - c + 1, n + 1)) if n - c >= k else 1.0
