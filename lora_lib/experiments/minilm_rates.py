"""MiniLM, 384 wide: LoRA's best rate over that of full fine-tuning, which a law had predicted.

`python -m lora_lib.experiments.minilm_rates` takes about twenty minutes on one core. The task is
that of `lora_lib.experiments.real`, the liked words; a seed draws the test words, the adapter and
the order, and the validation words choose the rates. The law, the prediction and its margin are in
`lora_lib.experiments.widths`.
"""

import math

import torch
import torch.nn.functional as F

from lora_lib.experiments import widths
from lora_lib.experiments.claims import Verdict
from lora_lib.experiments.intervals import Interval
from lora_lib.experiments.rates import Grid, times
from lora_lib.experiments.real import classifier, in_parts, train, words
from lora_lib.experiments.sweep import by_seed, grow, narrowed, read_if_any, select
from lora_lib.words import split

WIDTH, SEEDS, NAME = 384, range(5), "minilm_rates"
BEGIN = {"full": (3e-5, 6e-5, 1.2e-4, 2.4e-4, 4.8e-4), "LoRA": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)}


def trial(method: str, lr: float, seed: int = 0, steps: int = 120,
          batch_size: int = 32) -> dict[str, float]:
    """Train "full" or "LoRA", rank 16 with alpha = 16; the losses on validation and test words."""
    model = classifier(method, widths.RANK, widths.ALPHA, seed)
    parts, (_, ids, liked) = split(words()[0], seed), words()
    try:
        train(model, parts.train, rate=lr, steps=steps, batch_size=batch_size, seed=seed)
    except FloatingPointError:
        return {"valid": math.inf, "loss": math.inf}
    loss = lambda rows: F.cross_entropy(in_parts(model, ids[rows]), liked[rows]).item()
    return {"valid": loss(parts.validation), "loss": loss(parts.test)}


def rows(method: str) -> list:
    """The runs that there are."""
    return select(read_if_any(NAME), method=method)


def points() -> list[dict]:
    """Both methods at every rate of their grids, as far as they are known."""
    return by_seed({"method": method, "lr": lr, "seed": seed} for method, begin in BEGIN.items()
                   for seed, lr in narrowed(rows(method), SEEDS, begin))


def ratio() -> Interval:
    """How many times LoRA's best rate is full fine-tuning's."""
    return times(Grid.of(rows("LoRA")), Grid.of(rows("full")))


def verdicts() -> list[Verdict]:
    """Whether the law predicted it."""
    return [widths.as_predicted(ratio(), WIDTH).on("MiniLM")]


if __name__ == "__main__":
    torch.set_num_threads(1)
    grow(trial, points, NAME)
