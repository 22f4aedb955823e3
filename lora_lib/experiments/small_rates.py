"""The small model: rank, scaling and learning rate, on all linear layers, beside full fine-tuning.

`python -m lora_lib.experiments.small_rates` takes an hour on one core, in float32.
A seed draws the examples, the adapter and the order; rates are chosen on validation examples. The
claims and their margins are in `lora_lib.experiments.rates`.
"""

from lora_lib.experiments import rates
from lora_lib.experiments.claims import Verdict
from lora_lib.experiments.rates import FULL, Grid
from lora_lib.experiments.sweep import by_seed, grow, narrowed, read_if_any, select
from lora_lib.experiments.trial import redrawn

TASK, NAME = "instructions 6", "small_rates"
RANKS = (1, *rates.RANKS)
SCHEMES = {"alpha = r": (lambda r: r, False)} | rates.SCHEMES
FULL_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)                      # where the grids begin
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
SEEDS = range(5)
SETTING = {"name": TASK, "steps": 200, "batch_size": 8, "dtype": "float32"}


def method(scheme: str, rank: int = 0) -> dict:
    """The trial's arguments for a scheme at a rank, or for "full"."""
    if scheme == "full":
        return {"targets": "full", "rank": 0, "alpha": 0}
    alpha, root = SCHEMES[scheme]
    return {"targets": "all", "rank": rank, "alpha": alpha(rank), "use_rslora": root}


def rows(scheme: str, rank: int = 0) -> list:
    """The runs that there are of a method."""
    return select(read_if_any(NAME), **method(scheme, rank))


def points() -> list[dict]:
    """Every method at every rate of its grid, as far as it is known by now, and LoRA at the rate
    that is best for full fine-tuning."""
    methods = [FULL, *((scheme, rank) for scheme in SCHEMES for rank in RANKS)]
    found = [(m, seed, lr) for m in methods
             for seed, lr in narrowed(rows(*m), SEEDS, FULL_RATES if m == FULL else RATES)]
    found += [((scheme, rank), seed, Grid.of(rows(*FULL)).best) for scheme in SCHEMES
              for rank in RANKS for seed in SEEDS if rows(*FULL)]
    return by_seed(SETTING | method(*m) | {"lr": lr, "seed": seed} for m, seed, lr in found)


def grid(scheme: str, rank: int = 0) -> Grid:
    """The runs of a scheme at a rank, or of "full", at every rate."""
    return Grid.of(rows(scheme, rank))


def verdicts() -> list[Verdict]:
    """The claims of `lora_lib.experiments.rates` on the small model."""
    return rates.judged(grid, "small")


if __name__ == "__main__":
    grow(redrawn, points, NAME)
