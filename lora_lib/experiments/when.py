"""When LoRA is enough: style, instructions, a domain; then a new format and a far domain.

`python -m lora_lib.experiments.when` takes about forty minutes on one core, in float32. The rate
of each method on a task is the best of a grid on seeds 10 and 11; other seeds are compared.
"""

import numpy as np

from lora_lib.experiments.claims import DOES_NOT, HOLDS, Verdict
from lora_lib.experiments.sweep import (RESULTS, Row, column, grow, interval, main, read, select,
                                        shown)
from lora_lib.experiments.trial import base, made, measure, train, trial

# A method is (targets, rank); alpha is 2 * rank.
FULL, NARROW, THIN, BROAD, WIDE = METHODS = (
    ("full", 0), ("q,v", 8), ("all", 1), ("all", 8), ("all", 32))
NAMES = dict(zip(METHODS, ("full", "q,v, rank 8", "all linear, rank 1", "all linear, rank 8",
                           "all linear, rank 32")))
RATES = {FULL: (1e-3, 2e-3, 4e-3), WIDE: (2e-3, 4e-3, 8e-3)}         # where the grid begins
OTHER_RATES = (4e-3, 8e-3, 1.6e-2)
TUNING = (10, 11)

# Steps, batch size and the number of seeds compared, the same for all methods of a task.
SETTING = {
    "restyle 1": (200, 8, 5), "instructions 6": (200, 8, 5), "dialect 0.25": (100, 4, 3),
    "records 1": (300, 8, 5), "dialect 1.0": (100, 4, 3), "dialect 0.1": (100, 4, 3),
    "dialect 0.5": (100, 4, 3),
}
# These take the rate of a neighbour.
TUNED_ON = {"dialect 0.1": "dialect 0.25", "dialect 0.5": "dialect 1.0"}
SHARES = (0.1, 0.25, 0.5, 1.0)
STYLE, FOLLOW, DOMAIN, FAR, FORMAT = (
    "restyle 1", "instructions 6", "dialect 0.25", "dialect 1.0", "records 1")


def methods(task: str) -> list[tuple[str, int]]:
    """The methods that a task is measured with: rank 1 only where runs are short."""
    return [m for m in METHODS if m != THIN or task in (STYLE, FOLLOW)]


def _point(task, method, lr, seed, steps=None):
    return {"name": task, "targets": method[0], "rank": method[1], "alpha": 2 * method[1], "lr": lr,
            "steps": steps or SETTING[task][0], "batch_size": SETTING[task][1], "seed": seed,
            "dtype": "float32"}


def kept(task: str, method: tuple[str, int], **where) -> list[Row]:
    """The rows of a task and a method at its usual number of steps."""
    usual = {"name": task, "targets": method[0], "rank": method[1], "steps": SETTING[task][0]}
    return select(read("when") if (RESULTS / "when.csv").exists() else [], **usual | where)


def grid(task: str, method: tuple[str, int]) -> tuple[list[float], list[float]]:
    """The rates to try on the first tuning seed, and those tried, by their test loss, best first.

    The grid goes on at a side for as long as the best stands at its end.
    """
    loss = {row["lr"]: row["loss"] for row in kept(task, method, seed=TUNING[0])}
    rates = sorted({*RATES.get(method, OTHER_RATES), *loss})
    order = sorted(loss, key=loss.get)
    if set(rates) == set(loss):
        rates += [order[0] / 2] * (order[0] == rates[0]) + [order[0] * 2] * (order[0] == rates[-1])
    return rates, order


def close(task: str, method: tuple[str, int]) -> list[float]:
    """The best rate on the first tuning seed, and the second if its loss is within 5 %."""
    loss = lambda lr: kept(task, method, lr=lr, seed=TUNING[0])[0]["loss"]
    order = grid(task, method)[1][:2]
    return [lr for lr in order if loss(lr) <= 1.05 * loss(order[0])]


def best_rate(task: str, method: tuple[str, int]) -> float:
    """The rate with the least mean loss, on both tuning seeds, of those that are `close`."""
    task = TUNED_ON.get(task, task)
    def loss(lr):
        rows = [row for row in kept(task, method, lr=lr) if row["seed"] in TUNING]
        return column(rows, "loss").mean()
    return min(close(task, method), key=loss)


def tuning() -> list[dict]:
    """The grid of every task and method, as far as it is known by now."""
    return [_point(task, method, lr, TUNING[0]) for task in SETTING if task not in TUNED_ON
            for method in methods(task) for lr in grid(task, method)[0]]


def finals() -> list[dict]:
    """The rates between which the second tuning seed decides."""
    return [_point(task, method, lr, TUNING[1]) for task in SETTING if task not in TUNED_ON
            for method in methods(task) if len(rates := close(task, method)) > 1 for lr in rates]


def comparison() -> list[dict]:
    """Every task with every method at its own rate."""
    return [_point(task, method, best_rate(task, method), seed) for task in SETTING
            for method in methods(task) for seed in range(SETTING[task][2])]


STEPS, SLOWER = (50, 100, 400), (0.125, 0.25, 0.5)


def forgetting() -> list[dict]:
    """The style task with fewer and more steps, and with smaller rates."""
    ways = [(factor, None) for factor in SLOWER] + [(1, steps) for steps in STEPS]
    return [_point(STYLE, method, factor * best_rate(STYLE, method), seed, steps)
            for seed in range(3) for factor, steps in ways for method in (FULL, NARROW, BROAD)]


def untrained(name: str, dtype: str = "float32") -> dict[str, float]:
    """The base on a task."""
    return measure(base(dtype), made(name))


def head(name: str, lr: float, frozen: bool, steps: int, batch_size: int, seed: int,
         dtype: str = "float32") -> dict[str, float]:
    """Full fine-tuning, where `frozen` of all but the embedding, which also is the output head."""
    model = base(dtype)
    model.model.embed_tokens.weight.requires_grad_(not frozen)
    train(model, made(name), lr=lr, steps=steps, batch_size=batch_size, seed=seed)
    return measure(model, made(name))


def heads(seeds=range(3)) -> list[dict]:
    return [{"name": task, "lr": best_rate(task, FULL), "frozen": True,
             "steps": SETTING[task][0], "batch_size": SETTING[task][1], "seed": seed}
            for seed in seeds for task in (FORMAT, FAR)]


# ------------------------------------------------------------------------- what the runs say
ENOUGH = 0.95


def compared(task: str, method: tuple[str, int]) -> list[Row]:
    """The runs of a method at its own rate, in the order of the seeds, without the tuning's."""
    rows = kept(task, method, lr=best_rate(task, method))
    return sorted((row for row in rows if row["seed"] in range(SETTING[task][2])),
                  key=lambda row: row["seed"])


def quality(task: str, method: tuple[str, int]) -> np.ndarray:
    """Right answers over those of full fine-tuning, seed by seed."""
    return column(compared(task, method), "match") / column(compared(task, FULL), "match")


def gain(task: str, method: tuple[str, int]) -> np.ndarray:
    """(base loss - loss) / (base loss - loss of full fine-tuning), seed by seed."""
    start = column(select(read("when_base"), name=task), "loss")
    return ((start - column(compared(task, method), "loss"))
            / (start - column(compared(task, FULL), "loss")))


def share(task: str, method: tuple[str, int]) -> np.ndarray:
    """What a task is judged by: its right answers or, where whole texts are learned, the gain."""
    return (gain if task.startswith("dialect") else quality)(task, method)


def enough(task: str, method: tuple[str, int]) -> bool:
    """Whether the mean share over the seeds reaches 0.95."""
    return bool(share(task, method).mean() >= ENOUGH)


def forgotten(method: tuple[str, int], rates: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The loss on tales after the style task: LoRA's, and full fine-tuning's when as good at it.

    Full fine-tuning is slowed down until its loss on the task is LoRA's, by a smaller rate or, if
    not `rates`, by fewer steps: its loss on tales is interpolated between the runs there are,
    without those that another beats at both.
    """
    usual, best = SETTING[STYLE][0], best_rate(STYLE, FULL)
    ours = [row for row in compared(STYLE, method) if row["seed"] in range(3)]
    theirs = []
    for row in ours:
        full = select(read("when"), name=STYLE, targets="full", seed=row["seed"])
        full = [r for r in full if r["lr"] <= best and (r["steps"] == usual if rates
                                                        else r["lr"] == best)]
        full = sorted(full, key=lambda r: r["loss"])
        full = [r for i, r in enumerate(full) if all(r["tales"] < q["tales"] for q in full[:i])]
        theirs.append(np.interp(row["loss"], column(full, "loss"), column(full, "tales")))
    return column(ours, "tales"), np.array(theirs)


def verdicts() -> list[Verdict]:
    """A method is good for a task if it is `enough`; full fine-tuning's share is 1."""
    ways = {NARROW: HOLDS, BROAD: f"{HOLDS} if all linear layers are adapted",
            WIDE: f"{HOLDS} if all linear layers are adapted at rank 32"}

    def effect(task, open=()):
        """The shares; and whether those `open` are below the line only as far as the mean tells."""
        near = [m for m in open if share(task, m).mean() < ENOUGH <= sum(interval(share(task, m)))]
        return "share of full fine-tuning's quality: " + ", ".join(
            f"{NAMES[m]} {shown(share(task, m))}" for m in methods(task) if m != FULL) + (
            f"; open, as the interval of {NAMES[near[-1]]} includes {ENOUGH}" if near else "")

    def good(claim, task):
        verdict = next((verdict for m, verdict in ways.items() if enough(task, m)), DOES_NOT)
        return Verdict(claim, "8", verdict, effect(task, ways if verdict == DOES_NOT else ()))

    def more(claim, task):
        verdict = DOES_NOT if enough(task, NARROW) else f"{HOLDS} if only q and v are adapted"
        return Verdict(claim, "8", verdict if enough(task, BROAD) else HOLDS, effect(task, [BROAD]))

    reached = {m: [task for task in SETTING if enough(task, m)] for m in ways}
    most = max(ways, key=lambda m: len(reached[m]))
    others = ", ".join(task for task in SETTING if task not in reached[most])
    some = DOES_NOT if not reached[most] else (
        f"{HOLDS} if q and v are adapted" if most == NARROW else ways[most]) + f", not on: {others}"
    every = next((verdict for m, verdict in ways.items() if len(reached[m]) == len(SETTING)), some)
    ours, theirs = forgotten(BROAD)
    above = lambda values: interval(values)[0] - interval(values)[1] > 0
    best = {task: column(compared(task, FULL), "tales") - column(compared(task, BROAD), "tales")
            for task in (STYLE, FOLLOW, DOMAIN, FORMAT, FAR)}
    fewer = [task for task, difference in best.items() if above(difference)]
    equal = above(theirs - ours)
    less = HOLDS if equal and len(fewer) == len(best) else (
        f"{HOLDS} if each has its best rate, after: {', '.join(fewer)}" if fewer else DOES_NOT)
    return [
        good("good for style", STYLE),
        good("good for instruction following", FOLLOW),
        good("good for a domain", DOMAIN),
        more("might need more for a very different output format", FORMAT),
        more("might need more for an extreme domain shift", FAR),
        Verdict("95 to 100 % of the quality of full fine-tuning", "8", every,
                f"reached on, of {len(SETTING)} tasks: " + ", ".join(
                    f"{NAMES[m]} {len(tasks)}" for m, tasks in reached.items())),
        Verdict("LoRA forgets less than full fine-tuning", "8", less,
                "loss on tales, full minus LoRA: " + ", ".join(
                    f"{task} {shown(difference)}" for task, difference in best.items())
                + f"; {STYLE} at equal loss on the task {shown(theirs - ours)}"),
    ]


if __name__ == "__main__":
    main(untrained, [{"name": task} for task in SETTING], "when_base")
    grow(trial, tuning, "when")
    main(trial, finals(), "when")
    main(trial, comparison(), "when")
    main(trial, forgetting(), "when")
    main(head, heads(), "when_head")
