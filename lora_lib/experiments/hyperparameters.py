"""Rank, alpha, scaling and learning rate, on all linear layers, and full fine-tuning beside them.

`python -m lora_lib.experiments.hyperparameters` takes about forty minutes on one core, in float32.
There are three seeds and no others to tune on: a run's rate is chosen by the other two seeds.
"""

import numpy as np

from lora_lib.experiments.claims import DOES_NOT, HOLDS, Verdict
from lora_lib.experiments.sweep import column, interval, main, read, select
from lora_lib.experiments.trial import trial

TASK = "instructions 6"
RANKS = (1, 4, 16, 64)
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
# alpha for a rank, and whether it is divided by sqrt(r) in place of r.
SCHEMES = {"alpha = r": (lambda r: r, False), "alpha = 2r": (lambda r: 2 * r, False),
           "alpha = 16": (lambda r: 16, False), "rsLoRA, alpha = 8": (lambda r: 8, True)}
FULL_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
SEEDS = range(3)
SETTING = {"name": TASK, "steps": 200, "batch_size": 8, "dtype": "float32"}


def points() -> list[dict]:
    grid = [{"targets": "full", "rank": 0, "alpha": 0, "lr": lr} for lr in FULL_RATES]
    for alpha, rslora in SCHEMES.values():
        grid += [{"targets": "all", "rank": r, "alpha": alpha(r), "lr": lr, "use_rslora": rslora}
                 for r in RANKS for lr in RATES]
    unique = {tuple(sorted(point.items())): point for point in grid}.values()
    return [SETTING | point | {"seed": seed} for seed in SEEDS for point in unique]


# ------------------------------------------------------------------------- what the runs say
def grid(scheme: str, rank: int = 0, what: str = "loss") -> np.ndarray:
    """One result of every run of a scheme, or of "full", at a rank: (seeds, rates)."""
    if scheme == "full":
        how, rates = {"targets": "full"}, FULL_RATES
    else:
        alpha, rslora = SCHEMES[scheme]
        how, rates = {"targets": "all", "rank": rank, "alpha": alpha(rank),
                      "use_rslora": rslora}, RATES
    rows = select(read("hyperparameters"), **how)
    return np.array([[column(select(rows, lr=lr, seed=seed), what)[0] for lr in rates]
                     for seed in SEEDS])


def best_rates(scheme: str, rank: int = 0) -> np.ndarray:
    """Each seed's best rate, (seeds,): the lowest point of a parabola through the least loss of
    the grid and its two neighbours, over log(rate). At an end of the grid it is that end.
    """
    rates = np.log(FULL_RATES if scheme == "full" else RATES)
    found = []
    for losses in grid(scheme, rank):
        i = int(losses.argmin())
        if 0 < i < len(rates) - 1:
            a, b, _ = np.polyfit(rates[i - 1:i + 2], losses[i - 1:i + 2], 2)
            found.append(-b / (2 * a))
        else:
            found.append(rates[i])
    return np.exp(found)


def at_end(scheme: str, rank: int) -> bool:
    """Whether a seed's least loss stands at an end of the grid of rates."""
    return bool(set(grid(scheme, rank).argmin(axis=1)) & {0, len(RATES) - 1})


def tuned(scheme: str, rank: int = 0, what: str = "loss") -> np.ndarray:
    """A result of each seed, (seeds,), at the rate of the least mean loss of the other seeds."""
    losses, values = grid(scheme, rank), grid(scheme, rank, what)
    return np.array([values[i, np.delete(losses, i, axis=0).mean(axis=0).argmin()]
                     for i in range(len(losses))])


def times(values) -> tuple[float, float, float]:
    """The geometric mean of ratios, and the ends of its 95 % interval."""
    mean, half = interval(np.log(values))
    return tuple(float(v) for v in np.exp([mean, mean - half, mean + half]))


def higher(scheme: str, rank: int) -> np.ndarray:
    """LoRA's best rate over that of full fine-tuning, seed by seed."""
    return best_rates(scheme, rank) / best_rates("full")


def drift(scheme: str) -> np.ndarray:
    """How much the best rate moves from the lowest rank to the highest, seed by seed, as a ratio.
    """
    return best_rates(scheme, RANKS[-1]) / best_rates(scheme, RANKS[0])


def at_full_rate(scheme: str, rank: int) -> np.ndarray:
    """The loss of each seed, (seeds,), at the rate that is best for full fine-tuning."""
    best = FULL_RATES[int(grid("full").mean(axis=0).argmin())]
    return grid(scheme, rank)[:, RATES.index(best)]


def searched(task: str, which: str, rank: int) -> tuple[dict[float, float], list]:
    """From the sweep of chapter 6, alpha = 2 * rank: {rate: mean loss} on the two seeds that it
    tuned on, and the rows of the other seeds at the best of these rates, by seed.
    """
    rows = select(read("targets"), name=task, targets=which, rank=rank)
    tuning = [row for row in rows if row["seed"] in (10, 11)]
    losses = {lr: float(column(select(tuning, lr=lr), "loss").mean())
              for lr in sorted({row["lr"] for row in tuning})}
    chosen = [row for row in select(rows, lr=min(losses, key=losses.get)) if row["seed"] < 10]
    return losses, sorted(chosen, key=lambda row: row["seed"])


def rank_8() -> np.ndarray:
    """The losses at rank 8 with alpha = 16, on the same task and seeds."""
    return column([row for row in searched(TASK, "all", 8)[1] if row["seed"] in SEEDS], "loss")


SLACK = 1.05


def verdicts() -> list[Verdict]:
    """A ratio of rates differs from 1 when its interval leaves 1 out; a rate serves when the mean
    loss there is within 5 % of that at the scheme's own rate; a loss falls when the paired
    difference is above 0 beyond its interval.
    """
    shown = lambda values: "× {:.2g} ({:.2g} to {:.2g})".format(*times(values))
    span = f"rank {RANKS[0]} to {RANKS[-1]}"

    def normalizes(claim, scheme):
        _, low, high = times(drift(scheme))
        # half as far, in factors of two, as with no division at all
        less = abs(np.log(drift(scheme)).mean()) < abs(np.log(drift("alpha = 2r")).mean()) / 2
        word = HOLDS if low <= 1 <= high else (
            f"{HOLDS} if a drift of about two is allowed" if less else DOES_NOT)
        return Verdict(claim, "7", word, f"best rate, {span}: {scheme} {shown(drift(scheme))}; "
                                         f"alpha = 2r {shown(drift('alpha = 2r'))}")

    def up_to(works, word):                              # the ranks for which it holds
        good = [rank for rank in RANKS if works(rank)]
        if len(good) == len(RANKS):
            return HOLDS
        return f"{HOLDS} if the rank is {word(good)}" if good else DOES_NOT

    above = lambda rank: times(higher("alpha = 2r", rank))[1] > 1
    serves = lambda rank: (at_full_rate("alpha = 2r", rank).mean()
                           <= SLACK * tuned("alpha = 2r", rank).mean())
    mean, half = interval(rank_8() - tuned("alpha = 2r", RANKS[-1]))
    rates = "; ".join(f"rank {r} {shown(higher('alpha = 2r', r))}" for r in RANKS)
    losses = "; ".join(f"rank {r} {at_full_rate('alpha = 2r', r).mean():.2f} and "
                       f"{tuned('alpha = 2r', r).mean():.2f}" for r in RANKS)
    return [
        normalizes("dividing by r normalizes across ranks", "alpha = 16"),
        normalizes("dividing by sqrt(r) normalizes across ranks", "rsLoRA, alpha = 8"),
        Verdict("LoRA needs a higher learning rate than full fine-tuning", "7",
                up_to(above, lambda good: f"at most {max(good)} (alpha = 2r)"),
                f"best rate over that of full fine-tuning, alpha = 2r: {rates}"),
        Verdict("with a rate that worked for full fine-tuning, start with alpha = 2r", "7",
                up_to(serves, lambda good: f"at least {min(good)}"),
                f"loss there and at LoRA's own rate: {losses}"),
        Verdict("LoRA's rate lies between 0.0001 and 0.001", "7",
                HOLDS if all(1e-4 <= rate <= 1e-3 for r in RANKS
                             for rate in best_rates("alpha = 2r", r)) else DOES_NOT,
                "best rate in this small model, alpha = 2r: " + "; ".join(
                    f"rank {r} {times(best_rates('alpha = 2r', r))[0]:.4f}" for r in RANKS)),
        Verdict("start with rank 8; increase it if it underfits", "7",
                HOLDS if mean - half > 0 else DOES_NOT,
                f"loss, rank 8 minus rank {RANKS[-1]}: {mean:.2f} ± {half:.2f}"),
    ]


if __name__ == "__main__":
    main(trial, points(), "hyperparameters")
