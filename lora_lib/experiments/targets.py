"""The small model: which layers, every choice with as many numbers to train, on three tasks.

`python -m lora_lib.experiments.targets` takes 40 minutes on one core, in float32. Every seed draws
its examples and takes the rate that its own validation examples choose. Facts have none, for what
is learned by heart is what is asked: there, each seed takes the rate that learns them best. All
linear layers on instructions are those of `small_rates`.

Written down before the runs, when older ones were known, whose seeds shared their examples and
whose rates were chosen on the test. Losses within 0.02 nats a token are the same; of what is
forgotten, about 1 nat, within 0.1:
- nothing beats q and v (does not hold: all layers and q,k,v,o did on instructions, by 0.13 and
  0.12 ± 0.04; on lookup undecided, but against the MLP), nothing beats all linear layers
  (undecided: it was level with q and v on lookup, ± 0.15)
- feed-forward layers added to attention help (holds for facts, undecided otherwise)
- to look up, q alone is better than v alone (holds: 1.00 against 1.29); k alone is worse than q
  alone (holds on lookup, undecided on instructions); o alone is worse than q and than v (does not
  hold: it was the best of the four on both tasks)
- where both have learned the task equally well, all linear layers have forgotten more than q and v
  (does not hold; older runs compared each one's best rate and so could not tell)
"""

import math

import numpy as np

from lora_lib.experiments import small_rates, sweep
from lora_lib.experiments.claims import Claim, Verdict
from lora_lib.experiments.intervals import by_seeds
from lora_lib.experiments.rates import DOUBLE
from lora_lib.experiments.small_rates import SEEDS, SETTING
from lora_lib.experiments.smol_studies import FEED_FORWARD, QV, lora
from lora_lib.experiments.sweep import (Row, by_seed, column, grow, narrowed, read_if_any, select,
                                        table)
from lora_lib.experiments.trial import adapted, bits_known, redrawn, train
from lora_lib.tasks import BITS_PER_PERSON, Task, biographies
from lora_lib.torch import mean_loss

NAME, FACTS_NAME = "targets", "targets_facts"
LOOK, FOLLOW = TASKS = "lookup 3", "instructions 6"
PEOPLE = 30
FACTS = f"facts {PEOPLE}"
BUDGET = 29_184                          # numbers: all linear layers at rank 4
# The rank at which each choice comes nearest to the budget.
ALONE = {"q": 38, "k": 38, "v": 38, "o": 38}
TOGETHER = {"q,v": 19, "q,k,v,o": 10, "mlp": 7, "all": 4}
EQUAL = ALONE | TOGETHER
BEGIN = {LOOK: (2e-3, 4e-3, 8e-3), FOLLOW: (4e-3, 8e-3, 1.6e-2), FACTS: (4e-3, 8e-3, 1.6e-2)}
SAME = 0.02                              # nats a token

ALL = Claim("all linear layers are the targets to choose", "6",
            "loss in nats, all minus another choice at one budget", most=SAME)
LOOK_FOR = Claim("q decides what is looked for: to look up, adapt q rather than v", "6",
                 f"loss in nats, {LOOK}, v alone minus q alone at one budget", SAME)
K_LESS = Claim("k matters less than q", "6",
               "loss in nats, k alone minus q alone at one budget", SAME)
O_LESS = Claim("o matters less than q and v", "6",
               "loss in nats, o alone minus another alone at one budget", SAME)
CAREFUL = Claim("few targets, q and v, are the careful choice", "6",
                "loss on tales in nats where both reach one task loss, all minus q,v at one budget",
                0.1)


def facts(targets: str, rank: int, alpha: float, lr: float, people: int = PEOPLE,
          steps: int = 150, batch_size: int = 32, seed: int = 0,
          dtype: str = "float32") -> dict[str, float]:
    """Learn `people` made-up biographies by heart: the share of their bits that is known, and the
    loss in nats a token, which is also "valid", as nothing is held out."""
    model, pairs = adapted(targets, rank, alpha, seed=seed, dtype=dtype), biographies(people, seed)
    try:
        train(model, Task("biographies", pairs, pairs, pairs), lr=lr, steps=steps,
              batch_size=batch_size, seed=seed)
    except FloatingPointError:
        return {"known": -math.inf, "loss": math.inf, "valid": math.inf}
    loss = mean_loss(model, model.tokenizer, pairs)
    return {"known": bits_known(model, pairs) / (people * BITS_PER_PERSON), "loss": loss,
            "valid": loss}


def rows(task: str, targets: str) -> list[Row]:
    """The runs that there are of a choice."""
    how = lora(targets, EQUAL[targets])
    if task == FACTS:
        return select(read_if_any(FACTS_NAME), **how)
    others = small_rates.rows(DOUBLE, EQUAL["all"]) if (task, targets) == (FOLLOW, "all") else []
    return others + select(read_if_any(NAME), name=task, **how)


def points(choices=EQUAL) -> list[dict]:
    """Each choice at every rate of its grid on both tasks, as far as it is known by now."""
    return by_seed(SETTING | {"name": task} | lora(t, EQUAL[t]) | {"lr": lr, "seed": seed}
                   for task in TASKS for t in choices if (task, t) != (FOLLOW, "all")
                   for seed, lr in narrowed(rows(task, t), SEEDS, BEGIN[task]))


def facts_points() -> list[dict]:
    """Every choice at every rate of its grid on the facts, as far as it is known by now."""
    return by_seed(lora(t, EQUAL[t]) | {"lr": lr, "seed": seed} for t in TOGETHER
                   for seed, lr in narrowed(rows(FACTS, t), SEEDS, BEGIN[FACTS]))


def chosen(task: str, targets: str) -> list[Row]:
    """Each seed's run, in order, at its own rate: the least loss on its validation examples."""
    return sweep.chosen(rows(task, targets))


def reached(task: str, targets: str) -> np.ndarray:
    """The test loss of every seed (seeds,) at its own rate."""
    return column(chosen(task, targets), "loss")


def known(targets: str) -> np.ndarray:
    """The share of the facts' bits that every seed (seeds,) knows at its own rate."""
    return column(chosen(FACTS, targets), "known")


# ------------------------------------------------- what is forgotten where as much has been learned
FRONT = ("q,v", "all")


def front(task: str, targets: str) -> tuple[np.ndarray, np.ndarray]:
    """The losses on the task and on tales (seeds, n), rates in order: more learned, more lost."""
    runs = rows(task, targets)
    return table(runs, "loss")[1], table(runs, "tales")[1]


def crossing(losses, tales, level: float) -> float:
    """The loss on tales where a front first comes down to this task loss: (n,), (n,) -> nats,
    between two rates by a straight line; nan where the least rate is below it already, so that the
    front must go on to lower rates. Raises ValueError where it stays above."""
    reach = np.flatnonzero(np.asarray(losses) <= level)
    if not len(reach):
        raise ValueError(f"no rate reaches a loss of {level:.3f}, the least is {min(losses):.3f}")
    i = reach[0]
    if i == 0:
        return math.nan
    part = (losses[i - 1] - level) / (losses[i - 1] - losses[i])
    return float(tales[i - 1] + part * (tales[i] - tales[i - 1]))


def crossings(task: str, targets: str) -> np.ndarray:
    """The loss on tales of each seed (seeds,) at the task loss that both q,v and all reach: the
    greater of what each has at its own rate, and `SAME` above it."""
    levels = np.max([reached(task, t) for t in FRONT], axis=0) + SAME
    return np.array([crossing(*curve, level)
                     for *curve, level in zip(*front(task, targets), levels)])


def lower_points() -> list[dict]:
    """A lower rate for all seeds of a front that does not begin above the common loss."""
    lower = [(task, t, table(rows(task, t), "loss")[0][0] / 2) for task in TASKS for t in FRONT
             if np.isnan(crossings(task, t)).any()]
    return by_seed(SETTING | {"name": task} | lora(t, EQUAL[t]) | {"lr": lr, "seed": seed}
                   for task, t, lr in lower for seed in SEEDS
                   if not select(rows(task, t), lr=lr, seed=seed))


# ---------------------------------------------------------------------------------- the verdicts
def _minus(task, one, other, confidence):
    return by_seeds(reached(task, one) - reached(task, other), confidence)


def together() -> list[Verdict]:
    """The claims on the choices to choose from, on paired differences over the seeds."""
    against = lambda one: lambda confidence: {
        f"{task}, {t}": _minus(task, one, t, confidence)
        for task in BEGIN for t in TOGETHER if t != one}
    return [
        QV.across(against("q,v"), form="+.3f", condition="compared on {}"),
        ALL.across(against("all"), form="+.3f", condition="compared on {}"),
        FEED_FORWARD.across(lambda c: {task: _minus(task, "q,k,v,o", "all", c) for task in BEGIN},
                            form="+.3f", condition="the task is {}"),
    ]


def alone() -> list[Verdict]:
    """The claims on one projection alone."""
    return [
        LOOK_FOR.judged(by_seeds(reached(LOOK, "v") - reached(LOOK, "q")), form="+.3f"),
        K_LESS.across(lambda c: {task: _minus(task, "k", "q", c) for task in TASKS},
                      form="+.3f", condition="the task is {}"),
        O_LESS.across(lambda c: {f"{task}, {t}": _minus(task, "o", t, c)
                                 for task in TASKS for t in ("q", "v")},
                      form="+.3f", condition="compared on {}"),
    ]


def careful() -> Verdict:
    """The claim on what few targets forget."""
    return CAREFUL.across(
        lambda c: {task: by_seeds(crossings(task, "all") - crossings(task, "q,v"), c)
                   for task in TASKS}, condition="the task is {}")


def verdicts() -> list[Verdict]:
    """Every claim on targets."""
    return [*together(), *alone(), careful()]


if __name__ == "__main__":
    grow(redrawn, lambda: points(TOGETHER), NAME)
    grow(facts, facts_points, FACTS_NAME)
    grow(redrawn, lambda: points(ALONE), NAME)
    while lower := lower_points():
        grow(redrawn, lambda: lower, NAME)
