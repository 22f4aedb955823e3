"""Intervals against scipy and statsmodels' published example, and how often they hold the truth."""

import math

import numpy as np
import pytest
from scipy import stats

from lora_lib.experiments import intervals as i

RATES = 1e-3 * 2.0 ** np.arange(6)


def held(draw, truth, runs=400):
    """The share of drawn data sets whose interval holds the truth."""
    found = [draw(np.random.default_rng(seed)) for seed in range(runs)]
    return np.mean([f.low <= truth <= f.high for f in found])


def test_over_seeds_it_is_students_t():
    values = np.array([0.1, 0.4, 0.3, 0.45, 0.2])
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = i.by_seeds(values)
    assert (found.middle, found.low, found.high) == pytest.approx((values.mean(), low, high))
    wide = i.by_seeds(values, 0.99)
    assert wide.low < found.low and wide.high > found.high


def test_one_seed_sets_no_end_and_bad_values_are_refused():
    assert i.by_seeds([0.3]) == i.Interval(0.3, -math.inf, math.inf)
    one = i.ratio([2.0])
    assert (one.middle, one.low, one.high) == (pytest.approx(2), 0, math.inf)
    for bad in ([], [math.nan, 1], [math.inf]):
        with pytest.raises(ValueError, match="finite"):
            i.by_seeds(bad)
    with pytest.raises(ValueError, match="above 0, got -1"):
        i.ratio([1, -1])
    with pytest.raises(ValueError, match="between 0 and 1"):
        i.of_shares([0.5], [1.2], 10)
    with pytest.raises(ValueError, match="low <= middle <= high"):
        i.Interval(2, 0, 1)


def test_a_ratio_is_the_same_either_way_up():
    found, other = i.ratio([0.5, 1, 4]), i.ratio([2, 1, 0.25])
    assert found.middle == pytest.approx(2 ** (1 / 3)) == pytest.approx(1 / other.middle)
    assert found.low == pytest.approx(1 / other.high)


def test_newcombes_example():
    """His table II, (a): 56/70 - 48/80 is 0.2, with the score interval 0.0524 to 0.3339."""
    found = i.of_shares([56 / 70], [48 / 80], 75)              # one seed: the counts would decide
    assert (found.low, found.high) == (-1, 1)
    low, high = i._wilson(0.8, 70, 0.95)
    other_low, other_high = i._wilson(0.6, 80, 0.95)
    assert 0.2 - math.hypot(0.8 - low, other_high - 0.6) == pytest.approx(0.0524, abs=1e-4)
    assert 0.2 + math.hypot(high - 0.8, 0.6 - other_low) == pytest.approx(0.3339, abs=1e-4)


def test_shares_that_are_all_one_still_have_a_width():
    found = i.of_shares([1, 1, 1], [1, 1, 1], 100)
    assert found.middle == 0 and 0.005 < found.high < 0.05 and found.low == -found.high


@pytest.mark.parametrize("p, q", [(0.97, 0.99), (0.6, 0.4), (0.999, 0.98)])
def test_shares_hold_the_truth(p, q):
    def draw(rng):
        return i.of_shares(rng.binomial(200, p, 3) / 200, rng.binomial(200, q, 3) / 200, 200)
    assert held(draw, p - q) >= 0.93


@pytest.mark.parametrize("bend", [0.05, 0.2])
@pytest.mark.parametrize("seeds", [3, 5])
def test_the_best_rate_is_held_and_so_is_the_ratio_of_two(bend, seeds):
    def curve(rng, best):
        noise = 0.02 * rng.standard_normal((seeds, 6)) + 0.1 * rng.standard_normal((seeds, 1))
        return bend * (np.arange(6) - best) ** 2 + noise
    assert held(lambda rng: i.best_rate(curve(rng, 2.3), RATES), 1e-3 * 2**2.3) >= 0.92
    two = lambda rng: i.rate_ratio(curve(rng, 3.4), RATES, curve(rng, 1.7), RATES)
    assert held(two, 2**1.7, 200) >= 0.92


@pytest.mark.parametrize("bend", [0.05, 0.2])
def test_it_is_held_where_later_seeds_have_three_rates_around_the_firsts_best(bend):
    def curve(rng, best):
        noise = 0.02 * rng.standard_normal((3, 6)) + 0.1 * rng.standard_normal((3, 1))
        losses = bend * (np.arange(6) - best) ** 2 + noise
        first = losses[0].argmin()
        losses[1:, np.abs(np.arange(6) - first) > 1] = math.nan
        return losses
    assert held(lambda rng: i.best_rate(curve(rng, 2.3), RATES), 1e-3 * 2**2.3) >= 0.92
    two = lambda rng: i.rate_ratio(curve(rng, 3.4), RATES, curve(rng, 1.7), RATES)
    assert held(two, 2**1.7, 200) >= 0.92


def test_a_seeds_own_height_is_not_taken_for_the_curves():
    losses = np.tile((np.arange(5) - 2.0) ** 2, (2, 1)) + np.array([[0.0], [9.0]])
    losses[1, [0, 4]] = math.nan                                # the second seed is far above
    noise = 0.001 * np.random.default_rng(0).standard_normal(losses.shape)
    found = i.best_rate(losses + noise, RATES[:5])
    assert found.middle == pytest.approx(4e-3, rel=0.01) and found.high < 4.2e-3
    with pytest.raises(ValueError, match="4 runs of 2 seeds"):
        i.best_rate([[1, 0, 1, 2], [math.nan, 5, math.nan, math.nan]], RATES[:4])


def test_a_slope_of_ratios_is_held():
    sizes = np.array([50, 100, 200, 400])

    def pair(rng, size):
        noise = lambda: 0.01 * rng.standard_normal((3, 6)) + 0.1 * rng.standard_normal((3, 1))
        best = 1.5 + 0.5 * np.log2(size / 50)
        return ((0.1 * (np.arange(6) - best) ** 2 + noise(), RATES),
                (0.1 * (np.arange(6) - 2.2) ** 2 + noise(), RATES))
    slope = lambda rng: i.rate_slope(sizes, [pair(rng, size) for size in sizes])
    assert held(slope, 0.5, 100) >= 0.9
    rng = np.random.default_rng(0)
    falling = (-np.arange(6.0) + 0.01 * rng.standard_normal((3, 6)), RATES)
    unknown = i.rate_slope(sizes, [pair(rng, size) for size in sizes[:3]] + [(falling, falling)])
    assert unknown.low == -math.inf and unknown.high == math.inf


def test_on_a_plateau_the_best_rate_is_anywhere():
    rng = np.random.default_rng(0)
    flat = [i.best_rate(0.02 * rng.standard_normal((3, 6)), RATES) for _ in range(100)]
    assert np.mean([found.high > 4 * found.low for found in flat]) > 0.9
    steep = i.best_rate((np.arange(6) - 2.0) ** 2 + 0.01 * rng.standard_normal((3, 6)), RATES)
    assert 3.5e-3 < steep.low < 4e-3 < steep.high < 4.5e-3


def test_a_best_rate_at_the_end_of_the_grid_has_no_end_there():
    falling = -np.arange(6.0) + 0.01 * np.random.default_rng(0).standard_normal((3, 6))
    found = i.best_rate(falling, RATES)
    assert found.middle == pytest.approx(RATES[-1]) and found.high == math.inf
    both = i.rate_ratio(falling, RATES, falling, RATES)
    assert both.low == 0 and both.high == math.inf              # nothing is known of the ratio


def test_a_run_that_diverged_counts_as_the_worst():
    losses = (np.arange(6) - 2.0) ** 2 + 0.01 * np.random.default_rng(0).standard_normal((3, 6))
    losses[0, 5] = math.inf
    assert i.best_rate(losses, RATES).middle == pytest.approx(4e-3, rel=0.05)
    with pytest.raises(ValueError, match=r"\(seeds, rates\).* got \(1, 6\)"):
        i.best_rate(losses[:1], RATES)
