"""Statistics: hand-worked fixtures, coverage by simulation, identities."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from posttrain.evals.stats import (
    Interval,
    holm,
    mcnemar,
    mde,
    mean_interval,
    paired,
    pass_at_k,
    tango,
    wilson,
)

SIMULATIONS = 2000


def coverage(intervals: list[Interval], truth: float) -> float:
    return float(np.mean([i.low <= truth <= i.high for i in intervals]))


# Hand-worked


def test_wilson_by_hand() -> None:
    # z^2 = 3.841459: centre (0.7 + 0.192073) / 1.384146, half 1.959964 sqrt(0.021 + 0.0096036) / 1.384146
    assert wilson(7, 10) == pytest.approx((0.39677, 0.89221), abs=2e-5)
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=2e-5)
    assert wilson(0, 10).low == 0.0
    assert wilson(10, 10).high == 1.0


def test_mean_interval_by_hand() -> None:
    # 1 2 3 4: mean 2.5, sd sqrt(5/3), t_{.975, 3} = 3.182446
    half = 3.182446 * math.sqrt(5 / 3 / 4)
    assert mean_interval([1, 2, 3, 4]) == pytest.approx((2.5 - half, 2.5 + half), abs=1e-5)
    # Clusters {1, 1}, {3, 3}: means 1 and 3, standard error of their mean 1, t_{.975, 1} = 12.7062
    assert mean_interval([1, 1, 3, 3], clusters="aabb") == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-4)


def test_mcnemar_by_hand() -> None:
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(1, 4) == pytest.approx(2 * (1 + 5) / 32)
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(0, 0) == 1.0


@pytest.mark.parametrize(("gained", "n"), [(1, 44), (6, 10), (120, 200)])
def test_tango_by_hand_without_losses(gained: int, n: int) -> None:
    # lost = 0, d above gained/n: the constrained P(lost) is 0, the variance n d (1 - d): Wilson's upper end.
    assert tango(gained, 0, n).high == pytest.approx(wilson(gained, n).high, abs=1e-9)


def test_tango_where_nothing_and_where_everything_changed() -> None:
    z2 = scipy_stats.norm.ppf(0.975) ** 2
    assert tango(0, 0, 50) == pytest.approx((-z2 / (50 + z2), z2 / (50 + z2)), abs=1e-9)
    assert tango(50, 0, 50).high == pytest.approx(1.0, abs=1e-12)
    assert tango(50, 0, 50).low < 1.0


def test_paired_binary_by_hand() -> None:
    before = [0] * 6 + [1] + [1] * 3
    after = [1] * 6 + [0] + [1] * 3
    result = paired(before, after)
    assert (result.n, result.gained, result.lost) == (10, 6, 1)
    assert result.diff == pytest.approx(0.5)
    assert result.p == pytest.approx(2 * (1 + 7) / 128)
    assert result.interval == tango(6, 1, 10)


def test_paired_scores_are_the_t_test() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.random(30), rng.random(30) + 0.1
    result, reference = paired(before, after), scipy_stats.ttest_rel(after, before)
    assert result.p == pytest.approx(reference.pvalue)
    assert result.interval == pytest.approx(tuple(reference.confidence_interval()))
    assert result.gained + result.lost == 30


def test_paired_without_any_spread() -> None:
    assert paired([0.5, 0.5, 0.2], [0.5, 0.5, 0.2]).p == 1.0
    assert paired([0.25, 0.5], [0.5, 0.75]).p == 0.0


def test_holm_by_hand() -> None:
    # sorted .01 .02 .04 -> 3*.01, 2*.02, 1*.04, then made monotone
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)
    assert pass_at_k(5, 0, 3) == 0.0
    assert pass_at_k(5, 3, 3) == 1.0


# Identities


@given(n=st.integers(2, 40), data=st.data())
def test_pass_at_k_is_the_share_of_subsets(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    assert pass_at_k(n, c, k) == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k), abs=1e-12)
    assert pass_at_k(n, c, 1) == pytest.approx(c / n)


@given(n=st.integers(2, 300), data=st.data())
def test_wilson_holds_the_rate_and_is_symmetric(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    assert (1 - high, 1 - low) == pytest.approx(wilson(n - k, n))


@given(n=st.integers(2, 300), data=st.data())
def test_tango_is_antisymmetric_and_inverts_the_score_test(n: int, data: st.DataObject) -> None:
    gained = data.draw(st.integers(0, n))
    lost = data.draw(st.integers(0, n - gained))
    low, high = tango(gained, lost, n)
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    assert (-high, -low) == pytest.approx(tango(lost, gained, n), abs=1e-9)
    # Zero is outside exactly where the asymptotic McNemar test rejects.
    chi2 = (gained - lost) ** 2 / (gained + lost) if gained + lost else 0.0
    assert (low > 0 or high < 0) == (chi2 > scipy_stats.chi2.ppf(0.95, 1))


def test_singleton_and_equal_clusters() -> None:
    values = np.random.default_rng(1).random(24)
    assert mean_interval(values, clusters=range(24)) == pytest.approx(mean_interval(values))
    names = np.repeat(np.arange(8), 3).tolist()
    assert mean_interval(values, clusters=names) == pytest.approx(mean_interval(values.reshape(8, 3).mean(1)))


# What the words "95 %" and "80 % power" promise


def test_wilson_covers() -> None:
    rng = np.random.default_rng(3)
    hits = [coverage([wilson(int(k), 400) for k in rng.binomial(400, p, SIMULATIONS)], p) for p in (0.1, 0.5, 0.8)]
    assert hits == pytest.approx([0.95] * 3, abs=0.015)


def test_mean_intervals_cover() -> None:
    rng = np.random.default_rng(4)
    plain = [mean_interval(x) for x in rng.normal(1.0, 2.0, (SIMULATIONS, 8))]
    assert coverage(plain, 1.0) == pytest.approx(0.95, abs=0.015)

    names = np.repeat(np.arange(20), 5).tolist()
    shared = np.repeat(rng.normal(size=(SIMULATIONS, 20)), 5, axis=1)
    items = shared + rng.normal(size=shared.shape)
    assert coverage([mean_interval(x, names) for x in items], 0.0) == pytest.approx(0.95, abs=0.015)
    assert coverage([mean_interval(x) for x in items], 0.0) < 0.8, "the fixture has no clustering to correct"


@pytest.mark.parametrize(("up", "down"), [(0.3, 0.1), (0.1, 0.1), (0.6, 0.02), (0.02, 0.02), (0.9, 0.02)])
def test_paired_binary_covers_also_near_the_borders(up: float, down: float) -> None:
    counts = np.random.default_rng(5).multinomial(200, [up, down, 1 - up - down], SIMULATIONS)
    intervals = [tango(int(gained), int(lost), 200) for gained, lost, _ in counts]
    assert coverage(intervals, up - down) == pytest.approx(0.95, abs=0.015)


def test_p_values_keep_their_level() -> None:
    counts = np.random.default_rng(7).multinomial(150, [0.15, 0.15, 0.7], SIMULATIONS)
    assert np.mean([mcnemar(int(up), int(down)) <= 0.05 for up, down, _ in counts]) <= 0.055


def test_mde_is_found_four_times_in_five() -> None:
    rng = np.random.default_rng(8)
    effect = mde(1.0, 30)
    p = scipy_stats.ttest_1samp(rng.normal(effect, 1.0, (SIMULATIONS, 30)), 0.0, axis=1).pvalue
    assert np.mean(p < 0.05) == pytest.approx(0.8, abs=0.03)

    # Binary, nothing changed in the pilot: a one-sided change of the size named is found by the exact test.
    same = np.zeros(200)
    counts = rng.binomial(200, paired(same, same).mde, SIMULATIONS)
    assert np.mean([mcnemar(int(g), 0) < 0.05 for g in counts]) == pytest.approx(0.8, abs=0.05)


# Refusals


@pytest.mark.parametrize(
    "refused",
    [
        lambda: wilson(1, 1),
        lambda: wilson(5, 4),
        lambda: mean_interval([1.0]),
        lambda: mean_interval([1.0, 2.0], clusters=["a", "a"]),
        lambda: mean_interval([1.0, 2.0], clusters=["a"]),
        lambda: mean_interval([1.0, math.nan]),
        lambda: paired([1], [0]),
        lambda: paired([1, 0], [0]),
        lambda: paired([1, 0, math.nan], [0, 1, 1]),
        lambda: mde(1.0, 1),
        lambda: pass_at_k(3, 4, 1),
        lambda: pass_at_k(3, 1, 4),
    ],
)
def test_refusals(refused) -> None:
    with pytest.raises(ValueError, match=r"."):
        refused()


def test_general_prompts(repo_root) -> None:
    lines = (repo_root / "src/posttrain/evals/prompts.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(lines)) == 64
    assert all(line == line.strip() and line for line in lines)
