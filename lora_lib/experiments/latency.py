"""What an unmerged adapter and a high rank cost in time, at width 512, each over its counterpart.

`python -m lora_lib.experiments.latency` takes about a minute on one core, in float32.
"""

import copy
import time
from collections.abc import Callable

import numpy as np
import torch

from lora_lib.experiments.sweep import column, main, read
from lora_lib.torch import LanguageModel, LanguageModelConfig, cross_entropy, inject, merge

SEEDS = range(5, 10)             # 0 to 4 were known when the margins were written down


def model(rank: int, seed: int) -> LanguageModel:
    """Two layers of width 512 with adapters on all linear layers."""
    return inject(LanguageModel(LanguageModelConfig(256, 512, 1408, 2, 8), seed=seed),
                  "all-linear", rank, 2 * rank, seed=seed)


def medians(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """The median seconds of each call, without the first fifth, each round in an order of its own.

    In one order for all rounds a call would always find the cache as the same other one left it.
    It is the processor's time: on one thread that is the time on a free core, and what else the
    machine does is not in it.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        for name in rng.permutation(list(calls)):
            begin = time.process_time()
            calls[name]()
            taken[name].append(time.process_time() - begin)
    return {name: float(np.median(times[rounds // 5:])) for name, times in taken.items()}


def ratio(one, other, rounds: int) -> float:
    """The median time of calling one() over that of other(), called in turn."""
    times = medians({"one": one, "other": other}, rounds)
    return times["one"] / times["other"]


def stepper(model, inputs, labels) -> Callable[[], None]:
    """A training step of what is trainable in a model, with AdamW, to be called again and again."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step():
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def trial(rank: int = 64, over: int = 8, rounds: int = 15, seed: int = 0) -> dict[str, float]:
    """"step": a training step at `rank` over one at `over`, 4 rows of 64 tokens; "call": one token,
    unmerged over merged, at rank `over`."""
    tokens = torch.randint(256, (4, 65), generator=torch.Generator().manual_seed(seed))
    steps = [stepper(model(r, seed), tokens[:, :-1], tokens[:, 1:]) for r in (rank, over)]
    unmerged = model(over, seed).eval()
    merged = merge(copy.deepcopy(unmerged))
    with torch.no_grad():
        call = ratio(lambda: unmerged(tokens[:1, :1]), lambda: merged(tokens[:1, :1]), 10 * rounds)
    return {"step": ratio(*steps, rounds), "call": call}


def values(what: str) -> np.ndarray:
    """The kept ratios "step" or "call", by seed."""
    return column([row for row in read("latency") if row["seed"] in SEEDS], what)


if __name__ == "__main__":
    main(trial, [{"seed": seed} for seed in SEEDS], "latency")
