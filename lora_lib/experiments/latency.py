"""What an unmerged adapter and a high rank cost in time, at width 512, each over its counterpart.

`python -m lora_lib.experiments.latency` takes about a minute on one core, in float32.
"""

import copy

import numpy as np
import torch

from lora_lib.experiments.sweep import column, main, read
from lora_lib.experiments.timing import in_turn
from lora_lib.torch import LanguageModel, LanguageModelConfig, cross_entropy, inject, merge

SEEDS = range(5, 10)             # 0 to 4 were known when the margins were written down


def model(rank: int, seed: int) -> LanguageModel:
    """Two layers of width 512 with adapters on all linear layers."""
    return inject(LanguageModel(LanguageModelConfig(256, 512, 1408, 2, 8), seed=seed),
                  "all-linear", rank, 2 * rank, seed=seed)


def ratio(one, other, rounds: int) -> float:
    """The median time of calling one() over that of other(), called in turn."""
    times = in_turn({"one": one, "other": other}, rounds)
    return float(np.median(times["one"]) / np.median(times["other"]))


def trial(rank: int = 64, over: int = 8, rounds: int = 15, seed: int = 0) -> dict[str, float]:
    """"step": a training step at `rank` over one at `over`, 4 rows of 64 tokens; "call": one token,
    unmerged over merged, at rank `over`."""
    tokens = torch.randint(256, (4, 65), generator=torch.Generator().manual_seed(seed))

    def step_of(network):
        optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad])

        def step():
            cross_entropy(network(tokens[:, :-1]), tokens[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
        return step

    unmerged = model(over, seed).eval()
    merged = merge(copy.deepcopy(unmerged))
    with torch.no_grad():
        call = ratio(lambda: unmerged(tokens[:1, :1]), lambda: merged(tokens[:1, :1]), 10 * rounds)
    return {"step": ratio(step_of(model(rank, seed)), step_of(model(over, seed)), rounds),
            "call": call}


def values(what: str) -> np.ndarray:
    """The kept ratios "step" or "call", by seed."""
    return column([row for row in read("latency") if row["seed"] in SEEDS], what)


if __name__ == "__main__":
    main(trial, [{"seed": seed} for seed in SEEDS], "latency")
