"""What rates.js shows of a model's runs, as `lora_lib.experiments.rates` reads them."""

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from lora_lib.experiments.intervals import Interval, best_rate
from lora_lib.experiments.rates import FULL, Grid, times


def runs(grid: Callable[[str, int], Grid], ranks: Iterable[int], schemes: Mapping) -> list[dict]:
    """The test losses of full fine-tuning, then of each scheme at each rank, with their best rates.

    `schemes` are {name: (alpha of a rank, whether it is divided by sqrt(r))}. An end of an interval
    that the runs did not set is None, and so is the loss of a seed at a rate where it was not run.
    Raises ValueError for a method with too few runs.
    """
    full = grid(*FULL)
    found = [_one(full, full, scheme="full", rank=0, factor=1)]
    for scheme, (alpha, root) in schemes.items():
        found += [_one(grid(scheme, rank), full, scheme=scheme, rank=rank,
                       factor=alpha(rank) / (rank ** 0.5 if root else rank)) for rank in ranks]
    return found


def _one(grid, full, **which):
    losses = np.where(np.isnan(grid.test), None, grid.test)
    return which | {"rates": list(grid.rates), "losses": losses.tolist(),
                    "best": _ends(best_rate(*grid.curve)), "times": _ends(times(grid, full)),
                    "own": round(float(grid.own().mean()), 5)}


def _ends(found: Interval) -> list:
    """An interval to four digits; an end of 0 or infinity is outside of the grid."""
    return [float(f"{end:.4g}") if 0 < end < math.inf else None
            for end in (found.middle, found.low, found.high)]
