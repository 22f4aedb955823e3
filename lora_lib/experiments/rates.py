"""Rank, alpha, scaling and learning rate: the claims, judged alike on every model's runs.

A `Grid` has the runs of one method at all its rates. What a method reaches is the test loss of each
seed at the rate that is best on that seed's validation examples.

The margins were written down before SmolLM2's runs, with what we expected of them:
- a best rate that moves by less than two times, the step of the grid, over a sixteenfold rank has
  not moved (alpha / r: holds, as on the small model; alpha / sqrt(r): undecided)
- LoRA's best rate is above that of full fine-tuning (holds), and about ten times as high: 5 to 20
- losses within 0.02 nats are the same: alpha moves the best rate and nothing else (does not hold:
  at alpha / r a high rank learns less); the loss at alpha / sqrt(r) is below that at alpha / r by
  more than 0.01 nats at rank 64 (rsLoRA's claim; holds); a higher rank, 4 to 64, lowers the loss by
  more than 0.02 nats (undecided)
- a loss within 5 % of the best is good enough (with full fine-tuning's rate and alpha = 2r: does
  not hold)
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from lora_lib.experiments.claims import Claim, Verdict, untested
from lora_lib.experiments.intervals import Interval, best_rate, by_seeds, rate_ratio, ratio
from lora_lib.experiments.sweep import Row, table

RANKS = (4, 16, 64)
# alpha for a rank, and whether it is divided by sqrt(r) in place of r.
SCHEMES = {"alpha = 16": (lambda r: 16, False), "alpha = 2r": (lambda r: 2 * r, False),
           "rsLoRA, alpha = 8": (lambda r: 8, True)}
FIXED, DOUBLE, ROOT = SCHEMES
FULL = ("full", 0)

NORMAL = Claim("dividing by r normalizes across ranks", "7",
               "how many times the best rate at rank 64 is that at rank 4, alpha = 16", 1 / 2, 2)
NORMAL_ROOT = Claim("dividing by sqrt(r) normalizes across ranks", "7",
                    "how many times the best rate at rank 64 is that at rank 4, rsLoRA", 1 / 2, 2)
HIGHER = Claim("LoRA needs a higher learning rate than full fine-tuning", "7",
               "LoRA's best rate over full fine-tuning's, alpha = 16", 1)
TENFOLD = Claim("LoRA's best rate is about ten times that of full fine-tuning", "7",
                "LoRA's best rate over full fine-tuning's, rank 16, alpha = 16", 5, 20)
USUAL = Claim("LoRA's rate lies between 0.0001 and 0.001", "7", "best rate, alpha = 2r", 1e-4, 1e-3)
FROM_FULL = Claim("with a rate that worked for full fine-tuning, start with alpha = 2r", "7",
                  "loss at full fine-tuning's best rate over that at LoRA's own", 0, 1.05)
ONLY_RATE = Claim("alpha moves the best rate and nothing else", "7",
                  "loss in nats at rank 64, each at its own rate, alpha = 16 minus alpha = 2r",
                  -0.02, 0.02)
ROOT_LEARNS = Claim("at a high rank, dividing by sqrt(r) learns more than dividing by r", "7",
                    "loss in nats at rank 64, each at its own rate, alpha = 16 minus rsLoRA", 0.01)
MORE_RANK = Claim("if rank 4 underfits, a higher rank helps", "7",
                  "loss in nats, each at its own rate, rank 4 minus rank 64", 0.02)


@dataclass(frozen=True)
class Grid:
    """The runs of one method: its rates (n,), and the losses (seeds, n) on validation and test,
    nan where a seed has not been run."""

    rates: tuple[float, ...]
    valid: np.ndarray
    test: np.ndarray

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "Grid":
        """The runs in these rows of one method."""
        rows = list(rows)
        lrs, valid = table(rows, "valid", every=False)
        return cls(lrs, valid, table(rows, "loss", every=False)[1])

    @property
    def shared(self) -> np.ndarray:
        """The rates (n,) that every seed has: whether each is one. Raises ValueError for none."""
        shared = ~np.isnan(self.valid).any(axis=0)
        if not shared.any():
            raise ValueError(f"no rate of {self.rates} has been run by every seed")
        return shared

    @property
    def best(self) -> float:
        """The rate of the least mean loss on validation, of those that every seed has."""
        return self.rates[np.where(self.shared, self.valid, np.inf).mean(axis=0).argmin()]

    def own(self) -> np.ndarray:
        """The test loss of each seed (seeds,) at the rate that its validation examples choose, of
        those that every seed has."""
        chosen = np.where(self.shared, self.valid, np.inf).argmin(axis=1)
        return self.test[np.arange(len(self.test)), chosen]

    def at(self, rate: float) -> np.ndarray:
        """The test loss of each seed (seeds,) at this rate.

        Raises ValueError where a seed has not been run there.
        """
        here = self.shared & np.isclose(self.rates, rate)
        if not here.any():
            raise ValueError(f"not every seed has been run at {rate:g}")
        return self.test[:, here.argmax()]

    @property
    def curve(self) -> tuple[np.ndarray, tuple[float, ...]]:
        """What `lora_lib.experiments.intervals` asks for: the losses and their rates."""
        return self.valid, self.rates


def times(one: Grid, other: Grid, **options) -> Interval:
    """How many times one method's best rate is another's."""
    return rate_ratio(*one.curve, *other.curve, **options)


def judged(grid: Callable[[str, int], Grid], model: str) -> list[Verdict]:
    """The claims on one model: grid(scheme, rank) or grid("full", 0) gives its runs."""
    full = grid(*FULL)
    ranks = lambda of: lambda confidence: {f"rank {r}": of(r, confidence) for r in RANKS}
    low, high, high_root, high_double = (
        grid(FIXED, 4), grid(FIXED, 64), grid(ROOT, 64), grid(DOUBLE, 64))
    usual = USUAL.across(ranks(lambda r, c: best_rate(*grid(DOUBLE, r).curve, confidence=c)),
                         form=".2g") if model != "small" else untested(
        USUAL.text, USUAL.chapter, f"the sentence is about models of billions of numbers; in this "
        f"one, of width 96, the best rate at rank 16 is "
        f"{best_rate(*grid(DOUBLE, 16).curve).text('.2g')}")
    found = [
        NORMAL.judged(times(high, low), form=".2g"),
        NORMAL_ROOT.judged(times(high_root, grid(ROOT, 4)), form=".2g"),
        HIGHER.across(ranks(lambda r, c: times(grid(FIXED, r), full, confidence=c)), form=".2g"),
        TENFOLD.judged(times(grid(FIXED, 16), full), form=".2g"),
        usual,
        FROM_FULL.across(ranks(lambda r, c: ratio(
            grid(DOUBLE, r).at(full.best) / grid(DOUBLE, r).own(), c)), form=".2f"),
        ONLY_RATE.judged(by_seeds(high.own() - high_double.own()), form="+.3f"),
        ROOT_LEARNS.judged(by_seeds(high.own() - high_root.own()), form="+.3f"),
        MORE_RANK.across(lambda c: {s: by_seeds(grid(s, 4).own() - grid(s, 64).own(), c)
                                    for s in SCHEMES}, form="+.3f"),
    ]
    return [verdict.on(model) for verdict in found]
