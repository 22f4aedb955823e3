"""Run a trial at many points, keep every row in a CSV file, go on where it stopped; intervals."""

import argparse
import csv
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lora_lib.experiments.intervals import by_seeds
from lora_lib.files import atomic

RESULTS = Path(__file__).parent / "results"

Row = dict[str, str | float]


def run(trial: Callable[..., dict], points: Iterable[dict], path: Path, *,
        workers: int = 1) -> None:
    """Call trial(**point) at every point that `path` does not hold yet, and keep its results there.

    A row is the trial's arguments, defaults included, then its results, to six digits. They must
    name everything that the outcome depends on, the seed too, for that is how a point is found
    again. Rows of other points stay. The file is replaced atomically after every trial, its rows
    in the order of `points`. `trial` must be a module's function, as `workers` processes import it.
    """
    signature = inspect.signature(trial)
    points = [_complete(signature, point) for point in points]
    order = {_key(signature, point): i for i, point in enumerate(points)}
    rows = {_key(signature, row): row for row in (read(path) if path.exists() else [])}
    missing = [points[i] for key, i in order.items() if key not in rows]
    place = lambda row: order.get(_key(signature, row), len(order))
    with ProcessPoolExecutor(workers, get_context("spawn"), _one_thread) as pool:
        futures = {pool.submit(trial, **point): point for point in missing}
        try:
            for future in tqdm(as_completed(futures), initial=len(order) - len(missing),
                               total=len(order), unit="trial"):
                point = futures[future]
                rows[_key(signature, point)] = point | future.result()
                write(path, sorted(rows.values(), key=place))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def read(path: str | Path) -> list[Row]:
    """The rows of a CSV file that `run` wrote, numbers as floats; a bare name is in `RESULTS`."""
    path = RESULTS / f"{path}.csv" if isinstance(path, str) else path
    with open(path, newline="") as file:
        return [{name: _number(text) for name, text in row.items()}
                for row in csv.DictReader(file)]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Replace the CSV file at `path` by these rows, atomically."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with atomic(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _text(value) for name, value in row.items()} for row in rows)


def select(rows: Iterable[Row], **where) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in where.items())]


def column(rows: Iterable[Row], name: str) -> np.ndarray:
    """One column of the rows as an array. Raises ValueError when there is no row."""
    values = np.array([row[name] for row in rows])
    if not len(values):
        raise ValueError(f"no row to take {name!r} from")
    return values


def read_if_any(name: str) -> list[Row]:
    """The rows of results/`name`.csv, none before the first run."""
    return read(name) if (RESULTS / f"{name}.csv").exists() else []


def lacking(trial: Callable[..., dict], points: Iterable[dict], name: str) -> list[dict]:
    """The points that results/`name`.csv does not hold."""
    signature = inspect.signature(trial)
    held = {_key(signature, row) for row in read_if_any(name)}
    return [point for point in points if _key(signature, _complete(signature, point)) not in held]


def means(rows: Iterable[Row], what: str) -> dict[float, float]:
    """The mean of a result over the runs at each rate, {rate: mean}."""
    found: dict[float, list[float]] = {}
    for row in rows:
        found.setdefault(row["lr"], []).append(row[what])
    return {lr: float(np.mean(values)) for lr, values in found.items()}


def wider(rows: Iterable[Row], begin: Iterable[float], what: str = "valid") -> list[float]:
    """The rates of a grid, in order: those to begin with, those that have been run, and, when all
    of these have been, one more at the end where the least mean of `what` stands. Each is twice
    the one before. The mean of a rate is over the seeds that have been run there; one seed goes
    ahead of the others, so a grid that was inside may have to go on when they follow."""
    losses = means(rows, what)
    rates = sorted({*begin, *losses})
    if set(rates) == set(losses):
        best = min(losses, key=losses.get)
        rates = ([best / 2] * (best == rates[0]) + rates + [best * 2] * (best == rates[-1]))
    return rates


def narrowed(rows: Iterable[Row], seeds: Sequence[int], begin: Iterable[float],
             what: str = "valid") -> list[tuple[int, float]]:
    """The seeds and rates of one method: the first seed has the whole grid, from `begin` until its
    best is inside. The others have three rates, around the first one's best, and go on as all do
    while the least mean over the seeds stands at an end of the rates that all have."""
    rows = list(rows)
    whole = wider(select(rows, seed=seeds[0]), begin, what)
    found = [(seeds[0], rate) for rate in whole]
    first = {row["lr"]: row[what] for row in select(rows, seed=seeds[0])}
    if set(whole) != set(first):
        return found
    best = min(first, key=first.get)
    near = [rate for rate in whole if best / 3 < rate < best * 3]
    return found + [(seed, rate) for seed in seeds
                    for rate in wider(shared(rows, seeds), near, what)
                    if (seed, rate) not in found]


def shared(rows: Iterable[Row], seeds: Iterable[float] | None = None) -> list[Row]:
    """The rows at the rates that all these seeds have, by default those of the rows."""
    rows = list(rows)
    having: dict[float, set[float]] = {}
    for row in rows:
        having.setdefault(row["lr"], set()).add(row["seed"])
    wanted = set(seeds) if seeds is not None else {row["seed"] for row in rows}
    return [row for row in rows if wanted <= having[row["lr"]]]


def chosen(rows: Iterable[Row]) -> list[Row]:
    """Each seed's row, in order, at the rate that its own validation examples choose, "valid", of
    those that every seed has; the lowest of equals."""
    rows = shared(rows)
    return [min(select(rows, seed=seed), key=lambda row: (row["valid"], row["lr"]))
            for seed in sorted({row["seed"] for row in rows})]


def by_seed(points: Iterable[dict]) -> list[dict]:
    """The points without repeats, a seed at a time, otherwise in their order."""
    once = {tuple(sorted(point.items())): point for point in points}
    return sorted(once.values(), key=lambda point: point["seed"])


def table(rows: Iterable[Row], what: str, *,
          every: bool = True) -> tuple[tuple[float, ...], np.ndarray]:
    """The rates (n,) at which every seed has run, in order, and a result of theirs (seeds, n). If
    not `every`, the rates of any seed, and nan where another has no row.

    Raises ValueError when there is none.
    """
    found = {(row["seed"], row["lr"]): row[what] for row in (shared(rows) if every else rows)}
    if not found:
        raise ValueError(f"no rate at which every seed has {what!r}")
    seeds, rates = (sorted({key[i] for key in found}) for i in (0, 1))
    return tuple(rates), np.array([[found.get((seed, lr), math.nan) for lr in rates]
                                   for seed in seeds])


def interval(values) -> tuple[float, float]:
    """The mean, and the half-width of its 95 % interval by Student's t over the seeds.

    Raises ValueError for fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"an interval needs at least two values, got {len(values)}")
    found = by_seeds(values)
    return found.middle, found.high - found.middle


def shown(values, form: str = ".2f") -> str:
    """The mean and the half-width of its interval, written out: "0.47 ± 0.05"."""
    mean, half = interval(values)
    return f"{mean:{form}} ± {half:{form.lstrip('+')}}"


def main(trial: Callable[..., dict], points: Iterable[dict], name: str) -> None:
    """The command line of an experiment: run its sweep into results/`name`.csv."""
    parser = argparse.ArgumentParser(description=inspect.getmodule(trial).__doc__)
    parser.add_argument("--workers", type=int, default=1, help="how many processes, one core each")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.csv")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    run(trial, points, args.out, workers=args.workers)


def grow(trial: Callable[..., dict], points: Callable[[], list[dict]], name: str) -> None:
    """`main` for points that depend on the rows so far, such as grids that may have to go on."""
    done = None
    while (wanted := points()) != done:
        main(trial, wanted, name)
        done = wanted


def _one_thread():
    import torch
    torch.set_num_threads(1)


def _complete(signature, point):
    """The point with the trial's defaults for what it does not name."""
    bound = signature.bind(**point)
    bound.apply_defaults()
    return dict(bound.arguments)


def _key(signature, row):
    return tuple(_text(row.get(name)) for name in signature.parameters)


def _text(value):
    """A number to six digits, a whole one to all of them."""
    if not isinstance(value, (int, float)):
        return str(value)
    return f"{value:.15g}" if float(value).is_integer() else f"{value:.6g}"


def _number(text):
    try:
        return float(text)
    except ValueError:
        return text
