"""Which layers: every choice of targets at one parameter budget and at one rank, on three tasks.

`python -m lora_lib.experiments.targets` takes about half an hour on one core, in float32. The rate
of each choice is the best of a grid on seeds 10 and 11; what is compared are the seeds 0 to 4.
"""

import numpy as np

from lora_lib.experiments.claims import DOES_NOT, HOLDS, Verdict
from lora_lib.experiments.sweep import column, interval, main, read, select, shown
from lora_lib.experiments.trial import adapted, bits_known, train, trial
from lora_lib.tasks import BITS_PER_PERSON, Task, biographies

TASKS = ("lookup 3", "instructions 6")
BUDGET = 29_184                          # numbers: all linear layers at rank 4
# The rank at which each choice comes nearest to the budget.
EQUAL = {"q": 38, "k": 38, "v": 38, "o": 38, "q,k": 19, "q,v": 19, "q,k,v,o": 10, "mlp": 7,
         "all": 4}
SAME = dict.fromkeys(("q,k", "q,v", "q,k,v,o", "mlp", "all"), 8)
RATES = (4e-3, 8e-3, 1.6e-2)
TUNING, SEEDS = (10, 11), tuple(range(5))
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


def _tuned(rows, task, targets, rank) -> dict[float, float]:
    """The mean test loss over the tuning seeds, by rate."""
    found = [row for row in select(rows, name=task, targets=targets, rank=rank)
             if row["seed"] in TUNING]
    return {lr: column(select(found, lr=lr), "loss").mean()
            for lr in sorted({row["lr"] for row in found})}


def best_rate(rows, task: str, targets: str, rank: int) -> float:
    """The rate with the least mean test loss over the tuning seeds."""
    losses = _tuned(rows, task, targets, rank)
    return min(losses, key=losses.get)


def widened(rows) -> list[dict]:
    """One rate further out for every choice whose best rate is the least or greatest tried."""
    points = []
    for task, targets, rank in configurations():
        tried, best = list(_tuned(rows, task, targets, rank)), best_rate(rows, task, targets, rank)
        further = {tried[0]: best / 2, tried[-1]: best * 2}
        if best in further:
            points += _points(task, targets, rank, further[best], TUNING)
    return points


def missing(points: list[dict]) -> list[dict]:
    """Those that have not been run."""
    rows = read("targets")
    return [p for p in points if not select(rows, **{k: p[k] for k in (
        "name", "targets", "rank", "lr", "seed")})]


def points(rows) -> list[dict]:
    """The comparison, at the best rates of the tuning."""
    return [point for task, targets, rank in configurations()
            for point in _points(task, targets, rank, best_rate(rows, task, targets, rank), SEEDS)]


# ------------------------------------------------------------------------------- facts to memorize
PEOPLE, FACTS_RATES = 30, (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
FACT_CHOICES = ("q,k", "q,v", "q,k,v,o", "mlp", "all")


def facts(targets: str, rank: int, alpha: float, lr: float, people: int = PEOPLE,
          steps: int = 200, batch_size: int = 32, seed: int = 0,
          dtype: str = "float32") -> dict[str, float]:
    """Learn `people` made-up biographies by heart; the share of their bits that is known."""
    model, pairs = adapted(targets, rank, alpha, seed=seed, dtype=dtype), biographies(people, seed)
    train(model, Task("biographies", pairs, pairs, pairs), lr=lr, steps=steps,
          batch_size=batch_size, seed=seed)
    return {"known": bits_known(model, pairs) / (people * BITS_PER_PERSON)}


def facts_points(seeds, rates) -> list[dict]:
    return [{"targets": t, "rank": EQUAL[t], "alpha": 2 * EQUAL[t], "lr": lr, "seed": seed}
            for t in FACT_CHOICES for lr in rates(t) for seed in seeds]


def best_facts_rate(rows, targets: str) -> float:
    """The rate with which most is known, with the tuning seed 10."""
    return max(select(rows, targets=targets, seed=10), key=lambda row: row["known"])["lr"]


# ---------------------------------------------------------------------------------- the verdicts
def compared(task: str, targets: str, rank: int, what: str = "loss") -> np.ndarray:
    """A measure of one choice at its best rate, by seed 0 to 4."""
    rows = read("targets")
    found = select(rows, name=task, targets=targets, rank=rank,
                   lr=best_rate(rows, task, targets, rank))
    return column([row for row in found if row["seed"] in SEEDS], what)


def known(targets: str) -> np.ndarray:
    """The share of the facts' bits that one choice knows at its best rate, by seed."""
    rows = read("targets_facts")
    found = select(rows, targets=targets, lr=best_facts_rate(rows, targets))
    return column([row for row in found if row["seed"] in SEEDS], "known")


def _greater(one, other) -> bool:
    """Whether one is greater, seed by seed, beyond the 95 % interval of the difference."""
    mean, half = interval(one - other)
    return mean - half > 0


def verdicts() -> list[Verdict]:
    """The claims on targets, each judged on paired differences over five seeds."""
    look, follow = TASKS
    loss = {(task, t): compared(task, t, EQUAL[t]) for task in TASKS for t in EQUAL}
    match = {(task, t): compared(task, t, EQUAL[t], "match") for task in TASKS for t in EQUAL}

    def by_task(claim, holds, text):
        """A verdict from {task: whether it holds there}."""
        names = {look: "looking up", follow: "following instructions"}
        there = [names[task] for task in TASKS if holds[task]]
        verdict = (HOLDS if len(there) == len(TASKS) else
                   f"{HOLDS} if the task is {there[0]}" if there else DOES_NOT)
        return Verdict(claim, "6", verdict, text)

    def losses(*choices):
        return "; ".join(f"{task}: " + ", ".join(f"{t} {shown(loss[task, t])}" for t in choices)
                         for task in TASKS)

    facts = {t: known(t) for t in FACT_CHOICES}
    tales = {(task, t): compared(task, t, 8, "tales") for task in TASKS for t in ("q,v", "all")}
    return [
        by_task("q and v are the targets to choose",
                {task: all(not _greater(loss[task, "q,v"], loss[task, t])
                           for t in ("q,k,v,o", "mlp", "all")) for task in TASKS},
                "test loss at one budget; " + losses("q,v", "q,k", "q,k,v,o", "mlp", "all")),
        Verdict("q decides what is looked for: to look up, adapt q rather than v", "6",
                HOLDS if _greater(match[look, "q"], match[look, "v"]) else DOES_NOT,
                f"right answers, {look}: q alone {shown(match[look, 'q'])}, v alone "
                f"{shown(match[look, 'v'])}; {follow}: {shown(match[follow, 'q'])} and "
                f"{shown(match[follow, 'v'])}"),
        by_task("k matters less than q",
                {task: _greater(loss[task, "k"], loss[task, "q"]) for task in TASKS},
                "test loss, one projection alone; " + losses("q", "k")),
        by_task("o matters less than q and v",
                {task: _greater(loss[task, "o"], loss[task, "q"])
                 and _greater(loss[task, "o"], loss[task, "v"]) for task in TASKS},
                "test loss, one projection alone; " + losses("q", "v", "o")),
        Verdict("feed-forward layers help to learn facts", "6",
                HOLDS if all(_greater(facts["mlp"], facts[t]) for t in ("q,v", "q,k,v,o"))
                else DOES_NOT,
                "share of the facts known, at one budget: "
                + ", ".join(f"{t} {shown(facts[t])}" for t in FACT_CHOICES)),
        by_task("few targets, q and v, are the careful choice",
                {task: _greater(tales[task, "all"], tales[task, "q,v"]) for task in TASKS},
                "loss on the old task afterwards, rank 8; " + "; ".join(
                    f"{task}: q,v {shown(tales[task, 'q,v'])}, all {shown(tales[task, 'all'])}"
                    for task in TASKS)),
    ]


if __name__ == "__main__":
    main(trial, tuning(), "targets")
    while further := missing(widened(read("targets"))):
        main(trial, further, "targets")
    main(trial, points(read("targets")), "targets")
    main(facts, facts_points([10], lambda t: FACTS_RATES), "targets_facts")
    rows = read("targets_facts")
    main(facts, facts_points(SEEDS, lambda t: [best_facts_rate(rows, t)]), "targets_facts")
