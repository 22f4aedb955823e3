"""Sweeps in which a method learns the facts about more and more people, until it is full."""

from dataclasses import dataclass, field

import numpy as np

from lora_lib.experiments.sweep import Row, means, read_if_any, select, wider

GROWTH = 1.05

Method = tuple[str, int]                        # a kind and its size, as ("LoRA", 4)


@dataclass(frozen=True)
class Filling:
    """The runs of results/`name`.csv, whose rows have a kind, a size, people, lr, steps, seed, and
    the bits "known" and "missing".

    A method's ladder of people begins at `first` and doubles until that brings 5 % more at most:
    then it is full, for this number of steps. Its rate is the best on the mean of the seeds
    `tuning`, which are not compared, with four times the first people: at fewer it would be one
    that fails where the ladder ends. Methods in `against` also run with the people `compared`, at
    the best rate for the most of these.
    """
    name: str
    steps: int
    seeds: tuple[int, ...]
    tuning: tuple[int, ...]
    people: tuple[int, ...]                                   # of the whole ladder
    begin: dict[Method, tuple[float, ...]]                    # where each method's grid begins
    first: dict[Method, int]
    against: tuple[Method, ...] = ()
    compared: tuple[int, ...] = field(default=())

    def rows(self, method: Method, **where) -> list[Row]:
        """The runs that there are of a method."""
        return select(read_if_any(self.name), kind=method[0], size=method[1], steps=self.steps,
                      **where)

    def grid(self, method: Method) -> int:
        """The people with whom the ladder's rate is chosen."""
        return 4 * self.first[method]

    def tuned(self, method: Method, people: int) -> list[Row]:
        """The runs of the tuning seeds."""
        return [row for row in self.rows(method, people=people) if row["seed"] in self.tuning]

    def rates(self, method: Method, people: int) -> list[float]:
        """The rates of the tuning seeds, as far as they are known by now."""
        return wider(self.tuned(method, people), self.begin[method], "missing")

    def best_rate(self, method: Method, people: int) -> float:
        """The rate at which the tuning seeds know most, on the mean."""
        missing = means(self.tuned(method, people), "missing")
        return min(missing, key=missing.get)

    def known(self, method: Method, people: int, *, lr: float | None = None) -> np.ndarray:
        """The bits known, seed by seed (seeds,), at the rate of the ladder or another.

        Raises ValueError unless every seed has run."""
        lr = self.best_rate(method, self.grid(method)) if lr is None else lr
        runs = {row["seed"]: row["known"] for row in self.rows(method, people=people, lr=lr)}
        if lacking := set(self.seeds) - runs.keys():
            raise ValueError(f"{method} with {people} people at {lr:g} has no seed {lacking}")
        return np.array([runs[seed] for seed in self.seeds])

    def comparison(self, method: Method, people: int) -> np.ndarray:
        """The bits known (seeds,) where methods are compared."""
        return self.known(method, people, lr=self.best_rate(method, max(self.compared)))

    def ladder(self, method: Method) -> tuple[int, ...]:
        """The numbers of people that have been run with every seed, from the first."""
        lr = self.best_rate(method, self.grid(method))
        return tuple(people for people in self.people if people >= self.first[method]
                     and {row["seed"] for row in self.rows(method, people=people, lr=lr)}
                     >= set(self.seeds))

    def full(self, method: Method) -> bool:
        """Whether twice as many people have brought 5 % more at most."""
        *_, less, more = (0, 0, *self.ladder(method))
        return less > 0 and (self.known(method, more).mean()
                             <= GROWTH * self.known(method, less).mean())

    def wanted(self, method: Method, grid: int) -> set[int]:
        """The numbers of people to run at the best rate of a grid."""
        found = set(self.compared if method in self.against and grid == max(self.compared) else ())
        if method in self.first and grid == self.grid(method):
            begin = self.people.index(self.first[method])
            count = max(2, len(self.ladder(method)) + (not self.full(method)))
            found |= set(self.people[begin:begin + count])
        return found

    def points(self) -> list[dict]:
        """The grids of every method; then, at the best rate, all seeds with twice as many people
        until it is full or the ladder ends."""
        found = []
        for method in self.begin:
            point = lambda people, lr, seed, method=method: {
                "people": people, "kind": method[0], "size": method[1], "lr": lr, "seed": seed}
            grids = ({self.grid(method)} if method in self.first else set()) | (
                {max(self.compared)} if method in self.against else set())
            for grid in sorted(grids):
                tried = [(lr, seed) for lr in self.rates(method, grid) for seed in self.tuning]
                found += [point(grid, lr, seed) for lr, seed in tried]
                if {(row["lr"], row["seed"]) for row in self.tuned(method, grid)} >= set(tried):
                    lr = self.best_rate(method, grid)
                    found += [point(people, lr, seed) for seed in self.seeds
                              for people in sorted(self.wanted(method, grid))]
        return found

    def capacity(self, method: Method) -> np.ndarray:
        """`most` of a method that is full. Raises ValueError while more people bring more."""
        if not self.full(method):
            raise ValueError(f"{method} is not full with {self.ladder(method)} people")
        return self.most(method)

    def most(self, method: Method) -> np.ndarray:
        """The bits known by each seed (seeds,) with the people of which most is known."""
        return max((self.known(method, people) for people in self.ladder(method)), key=np.mean)

    def slopes(self, numbers: dict[Method, int]) -> np.ndarray:
        """The slope of log(bits at saturation) on log(numbers trained), by least squares, of each
        seed (seeds,)."""
        bits = [self.capacity(method) for method in numbers]
        return np.polyfit(np.log(list(numbers.values())), np.log(bits), 1)[0]
