"""Batch size at an equal number of examples; and whether a harder task needs a higher rank.

`python -m lora_lib.experiments.batches` takes about eight minutes on one core, in float32. As in
`hyperparameters`, whose rows it goes on from, a run's rate is chosen by the other two seeds.
"""

import numpy as np

from lora_lib.experiments.claims import DOES_NOT, HOLDS, Verdict
from lora_lib.experiments.hyperparameters import SETTING, TASK
from lora_lib.experiments.sweep import column, interval, main, read, select, shown
from lora_lib.experiments.trial import trial

SEEDS = range(3)
EXAMPLES = 1600
BATCHES = (2, 8, 32)                                   # with 800, 200 and 50 steps
# The rates to try, by targets, rank and batch size; a batch of 8 is in the other sweep.
RATES = {("full", 0, 2): (5e-4, 1e-3, 2e-3), ("full", 0, 32): (1e-3, 2e-3, 4e-3, 8e-3),
         ("all", 16, 2): (5e-4, 1e-3, 2e-3, 4e-3), ("all", 16, 32): (2e-3, 4e-3, 8e-3, 1.6e-2)}
EASY, HARD = "instructions 2", TASK
RANKS = (1, 4, 16)
EASY_RATES = {1: (4e-3, 8e-3, 1.6e-2), 4: (2e-3, 4e-3, 8e-3), 16: (1e-3, 2e-3, 4e-3)}


def points() -> list[dict]:
    batches = [{"name": TASK, "targets": targets, "rank": rank, "alpha": 2 * rank, "lr": lr,
                "batch_size": size, "steps": EXAMPLES // size}
               for (targets, rank, size), rates in RATES.items() for lr in rates]
    easy = [{"name": EASY, "targets": "all", "rank": rank, "alpha": 2 * rank, "lr": lr}
            for rank, rates in EASY_RATES.items() for lr in rates]
    return [SETTING | point | {"seed": seed} for seed in SEEDS for point in batches + easy]


# ------------------------------------------------------------------------- what the runs say
def losses(task: str, targets: str, rank: int, size: int = 8) -> dict[float, np.ndarray]:
    """The test losses of the seeds, by rate."""
    rows = select([*read("batches"), *read("hyperparameters")], name=task, targets=targets,
                  rank=rank, alpha=2 * rank, batch_size=size, steps=EXAMPLES // size,
                  use_rslora=0)
    return {lr: column(sorted(select(rows, lr=lr), key=lambda row: row["seed"]), "loss")
            for lr in sorted({row["lr"] for row in rows})}


def best_rate(*which) -> float:
    """The rate with the least mean loss."""
    found = losses(*which)
    return min(found, key=lambda lr: found[lr].mean())


def tuned(*which) -> np.ndarray:
    """The loss of each seed at the rate that is best for the other two."""
    found = losses(*which)
    table = np.array(list(found.values()))                                    # (rates, seeds)
    return np.array([table[np.delete(table, i, axis=1).mean(axis=1).argmin(), i]
                     for i in range(table.shape[1])])


def gain(task: str) -> np.ndarray:
    """How far the loss falls from rank 1 to rank 16, in nats per token, seed by seed."""
    return tuned(task, "all", RANKS[0]) - tuned(task, "all", RANKS[-1])


def verdicts() -> list[Verdict]:
    """A difference counts when it is above 0 beyond its 95 % interval over the seeds."""
    more = gain(HARD) - gain(EASY)
    mean, half = interval(more)
    return [Verdict("the more complex the task, the higher the rank that it needs", "7",
                    HOLDS if mean - half > 0 else DOES_NOT,
                    f"from rank 1 to 16 the loss falls by {shown(gain(EASY))} with two "
                    f"instructions, by {shown(gain(HARD))} with six; the difference {shown(more)}")]


if __name__ == "__main__":
    main(trial, points(), "batches")
