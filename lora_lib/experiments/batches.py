"""The small model: does LoRA suffer from large batches, and does a harder task want more rank?

`python -m lora_lib.experiments.batches` takes about twenty-five minutes on one core, in float32. As
many examples are seen with every batch. Runs with a batch of 8 are those of `small_rates`.

Written down before the runs, when older ones were known, whose seeds shared their examples and
whose rates were chosen on the test (rank 16 saved 0.16 more on the harder task; LoRA fell back no
further than full fine-tuning from a batch of 2 to one of 32):
- from batches of 2 to 32, LoRA falls behind full fine-tuning by more than 0.02 nats (does not hold)
- rank 16 saves more over rank 1 with six instructions than with two, by more than 0.02 (holds)
"""

import numpy as np

from lora_lib.experiments import small_rates
from lora_lib.experiments.claims import Claim, Verdict
from lora_lib.experiments.intervals import by_seeds
from lora_lib.experiments.rates import DOUBLE, FULL, Grid
from lora_lib.experiments.small_rates import SEEDS, SETTING, TASK
from lora_lib.experiments.sweep import by_seed, grow, narrowed, read_if_any, select
from lora_lib.experiments.trial import redrawn

NAME, EXAMPLES = "batches", 1600
SIZES, RANK = (2, 8, 32), 16
EASY, HARD = "instructions 2", TASK
LOW, HIGH = 1, 16                                                # the ranks of the second question
# Where the grids begin, by method, task and batch size.
BEGIN = {("full", TASK, 2): (2.5e-4, 5e-4, 1e-3, 2e-3),
         ("full", TASK, 32): (1e-3, 2e-3, 4e-3, 8e-3),
         (16, TASK, 2): (5e-4, 1e-3, 2e-3, 4e-3), (16, TASK, 32): (2e-3, 4e-3, 8e-3, 1.6e-2),
         (1, EASY, 8): (4e-3, 8e-3, 1.6e-2, 3.2e-2), (16, EASY, 8): (1e-3, 2e-3, 4e-3, 8e-3)}

BATCH = Claim("LoRA pays more than full fine-tuning for a large batch", "7",
              "loss in nats, LoRA minus full, at batches of 32 minus that at 2", 0.02)
COMPLEX = Claim("the more complex the task, the higher the rank that it needs", "7",
                "loss in nats that rank 16 saves over rank 1, with six instructions minus with two",
                0.02)


def setting(method, task: str, size: int) -> dict:
    """The trial's arguments for a rank with alpha = 2 r, or "full", but the rate and the seed."""
    how = (small_rates.method(*FULL) if method == "full"
           else small_rates.method(DOUBLE, method))
    return SETTING | how | {"name": task, "batch_size": size, "steps": EXAMPLES // size}


def rows(method, task: str, size: int) -> list:
    """The runs that there are."""
    if (task, size) == (TASK, 8):
        return small_rates.rows(*FULL) if method == "full" else small_rates.rows(DOUBLE, method)
    return select(read_if_any(NAME), **setting(method, task, size))


def points() -> list[dict]:
    """Every method at every rate of its grid, as far as it is known by now."""
    return by_seed(setting(*which) | {"lr": lr, "seed": seed} for which, begin in BEGIN.items()
                   for seed, lr in narrowed(rows(*which), SEEDS, begin))


def grid(method, task: str = TASK, size: int = 8) -> Grid:
    """The runs of a rank with alpha = 2 r, or of "full", at every rate."""
    return Grid.of(rows(method, task, size))


def behind(size: int) -> np.ndarray:
    """How far LoRA stays behind full fine-tuning, in nats a token, seed by seed."""
    return grid(RANK, size=size).own() - grid("full", size=size).own()


def saves(task: str) -> np.ndarray:
    """How far the loss falls from rank 1 to rank 16, in nats a token, seed by seed."""
    return grid(LOW, task).own() - grid(HIGH, task).own()


def verdicts() -> list[Verdict]:
    """The two claims."""
    return [BATCH.judged(by_seeds(behind(SIZES[-1]) - behind(SIZES[0])), form="+.3f"),
            COMPLEX.judged(by_seeds(saves(HARD) - saves(EASY)), form="+.3f",
                           note="; ".join(f"{task}: {by_seeds(saves(task)).text('+.3f')}"
                                          for task in (EASY, HARD)))]


if __name__ == "__main__":
    grow(redrawn, points, NAME)
