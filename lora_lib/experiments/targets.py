"""Which layers: every choice of targets at one parameter budget and at one rank, on three tasks.

`python -m lora_lib.experiments.targets` takes about half an hour on one core, in float32. The rate
of each choice is the best of a grid on seeds 10 and 11; what is compared are the seeds 0 to 4.
"""

from lora_lib.experiments.sweep import column, main, read, select
from lora_lib.experiments.trial import trial

TASKS = ("lookup 3", "instructions 6")
BUDGET = 29_184                          # numbers: all linear layers at rank 4
# The rank at which each choice comes nearest to the budget.
EQUAL = {"q": 38, "k": 38, "v": 38, "o": 38, "q,k": 19, "q,v": 19, "q,k,v,o": 10, "mlp": 7,
         "all": 4}
SAME = dict.fromkeys(("q,k", "q,v", "q,k,v,o", "mlp", "all"), 8)
RATES = (4e-3, 8e-3, 1.6e-2)
TUNING, SEEDS = (10, 11), range(5)
SETTING = {"steps": 200, "batch_size": 8, "dtype": "float32"}


def _points(task, targets, rank, lr, seeds):
    return [{"name": task, "targets": targets, "rank": rank, "alpha": 2 * rank, "lr": lr,
             "seed": seed, **SETTING} for seed in seeds]


def configurations() -> list[tuple[str, str, int]]:
    """Every (task, targets, rank), without repeats."""
    pairs = dict.fromkeys([*EQUAL.items(), *SAME.items()])
    return [(task, targets, rank) for task in TASKS for targets, rank in pairs]


def tuning() -> list[dict]:
    return [point for task, targets, rank in configurations() for lr in RATES
            for point in _points(task, targets, rank, lr, TUNING)]


def best_rate(rows, task: str, targets: str, rank: int) -> float:
    """The rate with the least mean test loss over the tuning seeds."""
    def loss(lr):
        found = select(rows, name=task, targets=targets, rank=rank, lr=lr)
        return column([row for row in found if row["seed"] in TUNING], "loss").mean()
    return min(RATES, key=loss)


def points() -> list[dict]:
    """The comparison: needs the rows of `tuning`."""
    rows = read("targets")
    return [point for task, targets, rank in configurations()
            for point in _points(task, targets, rank, best_rate(rows, task, targets, rank), SEEDS)]


if __name__ == "__main__":
    main(trial, tuning(), "targets")
    main(trial, points(), "targets")
