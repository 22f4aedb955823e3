"""Where an effect lies: a middle and the ends of an interval, by a method that suits the quantity.

| quantity | method |
|---|---|
| a mean over seeds, or over paired differences | `by_seeds`: Student's t |
| a ratio | `ratio`: Student's t on its logarithm |
| a difference of two shares, as of right answers | `of_shares`: the wider of seeds and counts |
| the best rate of a grid, a ratio of two | `best_rate`, `rate_ratio`: a bootstrap of the curve |

The confidence is 95 % unless `confidence` says otherwise.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
DRAWS = 4000                                                # of a bootstrap


@dataclass(frozen=True)
class Interval:
    """The middle and both ends, in the effect's unit; infinite where the data set no end."""

    middle: float
    low: float
    high: float

    def __post_init__(self):
        if not self.low <= self.middle <= self.high:
            raise ValueError("an interval needs low <= middle <= high, got "
                             f"{self.low}, {self.middle}, {self.high}")

    def text(self, form: str = "+.2f") -> str:
        """Written out: "+0.47 (+0.42 to +0.52)"."""
        return f"{self.middle:{form}} ({self.low:{form}} to {self.high:{form}})"


def by_seeds(values, confidence: float = CONFIDENCE) -> Interval:
    """The mean over the seeds (n,) by Student's t. One seed sets no end on either side.

    Raises ValueError for no value, and for one that is not finite.
    """
    values = _finite(values)
    mean = float(values.mean())
    if len(values) == 1:
        return Interval(mean, -math.inf, math.inf)
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1)
                 / math.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


def ratio(values, confidence: float = CONFIDENCE) -> Interval:
    """The geometric mean of ratios (n,) by Student's t on their logarithms.

    Raises ValueError for a ratio that is not above 0.
    """
    values = _finite(values)
    if values.min() <= 0:
        raise ValueError(f"a ratio must be above 0, got {values.min()}")
    found = by_seeds(np.log(values), confidence)
    return Interval(*np.exp([found.middle, found.low, found.high]).tolist())


def of_shares(one, other, of: int, confidence: float = CONFIDENCE) -> Interval:
    """The difference of two shares, one - other, each (n,) over the seeds, of `of` items a seed.

    At each end the wider of Student's t over the paired differences and Newcombe's interval on the
    pooled counts (Statistics in Medicine 17, 873, 1998). Where all seeds score alike the first has
    no width; the second always has some. Raises ValueError for a share outside [0, 1].
    """
    one, other = _finite(one), _finite(other)
    if min(one.min(), other.min()) < 0 or max(one.max(), other.max()) > 1:
        raise ValueError(f"shares must be between 0 and 1, got {one} and {other}")
    seeds, items = by_seeds(one - other, confidence), of * len(one)
    p, q = float(one.mean()), float(other.mean())
    (p_low, p_high), (q_low, q_high) = (_wilson(share, items, confidence) for share in (p, q))
    low = p - q - math.hypot(p - p_low, q_high - q)
    high = p - q + math.hypot(p_high - p, q - q_low)
    return Interval(p - q, max(-1.0, min(low, seeds.low)), min(1.0, max(high, seeds.high)))


def best_rate(losses, rates, confidence: float = CONFIDENCE) -> Interval:
    """The rate of the least loss: losses (seeds, rates) -> a rate, in the unit of `rates`.

    The curve is the mean over the seeds. What a run has beyond its seed's and its rate's mean is
    noise; its spread is taken around the least loss, and every point of the curve is drawn anew,
    `DRAWS` times. Each drawn curve has its best rate (`lowest`); on a plateau these lie all over
    it, and where they stand at an end of the grid the data set no end there. A loss that is not
    finite, of a run that diverged, counts as the greatest that is; nan is a run that there is not.
    """
    curve, drawn = _curves(losses, seed=0)
    return _of_draws(best_rates(curve[None], rates)[0], lowest(drawn, rates), confidence)


def rate_ratio(losses, rates, other_losses, other_rates,
               confidence: float = CONFIDENCE) -> Interval:
    """How many times the best rate of `losses` (seeds, rates) is that of `other_losses`."""
    return _of_draws(*_ratios((losses, rates), (other_losses, other_rates), seed=0), confidence)


def rate_slope(sizes, pairs, confidence: float = CONFIDENCE) -> Interval:
    """The slope of log(ratio of best rates) against log(size), by least squares: sizes (n,), and
    for each a pair of (losses, rates), as of `rate_ratio`."""
    middles, draws = zip(*(_ratios(*pair, seed=2 * i) for i, pair in enumerate(pairs)))
    x = np.log(sizes) - np.log(sizes).mean()
    with np.errstate(divide="ignore", invalid="ignore"):
        slope, drawn = (x @ np.log(ratios) / (x @ x) for ratios in (middles, np.array(draws)))
    return _of_draws(slope, drawn, confidence, least=-math.inf)


def lowest(curves, rates) -> np.ndarray:
    """Each curve's best rate: curves (n, rates) -> (n,), by the parabola over log(rate) through the
    least loss and its neighbours. At the ends of the grid it is 0 or infinite: it is outside."""
    curves, logs = np.asarray(curves, float), np.log(np.asarray(rates, float))
    least = curves.argmin(axis=1)
    found = np.where(least == 0, 0.0, math.inf)
    rows = np.flatnonzero((least > 0) & (least < len(logs) - 1))
    around = least[rows, None] + np.array([-1, 0, 1])
    (x0, x1, x2), (y0, y1, y2) = logs[around].T, np.take_along_axis(curves[rows], around, 1).T
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)      # the slopes on both sides
    bend = (right - left) / (x2 - x0)
    found[rows] = np.exp((x0 + x1) / 2 - left / (2 * np.where(bend > 0, bend, math.inf)))
    return found


def best_rates(losses, rates) -> np.ndarray:
    """Each seed's own best rate: losses (seeds, rates) -> (seeds,), an end of the grid where it is
    outside."""
    return np.clip(lowest(losses, rates), min(rates), max(rates))


def _ratios(one, other, seed):
    """The ratio of the best rates of two (losses, rates), and what it might have been (DRAWS,)."""
    (curve, drawn), (below, below_drawn) = _curves(one[0], seed), _curves(other[0], seed + 1)
    middle = best_rates(curve[None], one[1])[0] / best_rates(below[None], other[1])[0]
    with np.errstate(divide="ignore", invalid="ignore"):          # both outside: nan, unknown
        return middle, lowest(drawn, one[1]) / lowest(below_drawn, other[1])


def _curves(losses, seed):
    """The mean curve (rates,), and `DRAWS` curves (DRAWS, rates) that it might have been.

    Where all seeds have all rates, the curve is their mean. Where some have not, what a seed has
    beyond the others, at the rates around the least loss, is taken from all that it has.
    """
    losses = np.asarray(losses, float)
    if losses.ndim != 2 or losses.shape[0] < 2 or losses.shape[1] < 3:
        raise ValueError("losses must be (seeds, rates) with at least two seeds and three rates, "
                         f"got {losses.shape}")
    losses = np.where(np.isinf(losses), losses[np.isfinite(losses)].max(), losses)
    ran = ~np.isnan(losses)
    counts = ran.sum(axis=0)
    means = np.array([losses[here, i].mean() for i, here in enumerate(ran.T)])
    least = int(np.where(counts == counts.max(), means, math.inf).argmin())
    around = slice(max(0, least - 1), least + 2)
    seeds, rates = np.nonzero(ran[:, around])
    found = losses[:, around][seeds, rates]
    which = np.hstack([np.eye(len(losses))[seeds], np.eye(3)[rates]])         # a seed's, a rate's
    parts = np.linalg.lstsq(which, found, rcond=None)[0]
    beyond = parts[:len(losses)] - parts[:len(losses)].mean()
    noise, freedom = found - which @ parts, len(found) - np.linalg.matrix_rank(which)
    if freedom < 1:
        raise ValueError("too few runs around the least loss to know their noise: "
                         f"{len(found)} runs of {len(losses)} seeds")
    curve = np.array([(losses[here, i] - beyond[here]).mean() for i, here in enumerate(ran.T)])
    rng = np.random.default_rng(seed)
    scale = np.sqrt((noise ** 2).sum() / rng.chisquare(freedom, (DRAWS, 1)) / counts)
    return curve, curve + scale * rng.standard_normal((DRAWS, len(curve)))


def _of_draws(middle, draws, confidence, least=0.0):
    """The middle of the draws; a draw of which nothing is known may be at either end."""
    low, high = (np.quantile(np.where(np.isnan(draws), end, draws), at, method=way)
                 for end, at, way in ((least, (1 - confidence) / 2, "lower"),
                                      (math.inf, (1 + confidence) / 2, "higher")))
    return Interval(float(middle), min(float(low), middle), max(float(high), middle))


def _wilson(share, n, confidence):
    z = stats.norm.ppf((1 + confidence) / 2)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def _finite(values):
    values = np.atleast_1d(np.asarray(values, float))
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"an interval needs values that are finite, got {values}")
    return values
