"""SmolLM2: rank, scaling and learning rate, on all linear layers, beside full fine-tuning.

`python -m lora_lib.experiments.smol_rates --workers 2` takes two hours on two cores. A
method's grid of rates goes on until its best is inside; after the first seed three rates do
(`lora_lib.experiments.sweep.narrowed`).
"""

from lora_lib.experiments import rates, widths
from lora_lib.experiments.claims import Verdict
from lora_lib.experiments.rates import DOUBLE, FIXED, FULL, RANKS, SCHEMES, Grid, times
from lora_lib.experiments.smol import trial
from lora_lib.experiments.sweep import by_seed, grow, narrowed, read_if_any, select

TASK, SEEDS, NAME = "instructions 6", (0, 1, 2), "smol_rates"
WIDTH = 576
# Where a grid begins, by alpha / r or alpha / sqrt(r); "full" for full fine-tuning.
BEGIN = {"full": (5e-5, 1e-4, 2e-4, 4e-4), 0.25: (2e-3, 4e-3, 8e-3, 1.6e-2),
         1.0: (1e-3, 2e-3, 4e-3, 8e-3), 2.0: (5e-4, 1e-3, 2e-3, 4e-3),
         4.0: (2.5e-4, 5e-4, 1e-3, 2e-3)}


def method(scheme: str, rank: int) -> dict:
    """The trial's arguments for a scheme at a rank. Two schemes with one scaling are one run."""
    if (scheme, rank) == FULL:
        return {"targets": "full", "rank": 0, "alpha": 0}
    return {"targets": "all", "rank": rank, "alpha": rank * scaling(scheme, rank)}


def scaling(scheme: str, rank: int) -> float:
    """What B A x is multiplied by."""
    alpha, root = SCHEMES[scheme]
    return alpha(rank) / (rank ** 0.5 if root else rank)


def rows(scheme: str, rank: int) -> list:
    """The runs that there are of a method."""
    return select(read_if_any(NAME), **method(scheme, rank))


def points() -> list[dict]:
    """Every method at every rate of its grid, as far as it is known by now, and LoRA with
    alpha = 2r at the rate that is best for full fine-tuning; a seed at a time."""
    methods = [FULL, *((scheme, rank) for scheme in SCHEMES for rank in RANKS)]
    found = [(m, seed, lr) for m in methods
             for seed, lr in narrowed(rows(*m), SEEDS, BEGIN[m[0] if m == FULL else scaling(*m)])]
    found += [((DOUBLE, rank), seed, Grid.of(rows(*FULL)).best) for rank in RANKS
              for seed in SEEDS if rows(*FULL)]
    return by_seed({"name": TASK, **method(*m), "lr": lr, "seed": seed} for m, seed, lr in found)


def grid(scheme: str, rank: int) -> Grid:
    """The runs of a method, for `lora_lib.experiments.rates`."""
    return Grid.of(rows(scheme, rank))


def verdicts() -> list[Verdict]:
    """The claims of `lora_lib.experiments.rates` on SmolLM2, and the law of the width's."""
    ratio = times(grid(FIXED, 16), grid(*FULL))
    return [*rates.judged(grid, "SmolLM2"), widths.as_predicted(ratio, WIDTH).on("SmolLM2")]


if __name__ == "__main__":
    grow(trial, points, NAME)
