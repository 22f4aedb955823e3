"""Why LoRA wants a rate about ten times as high: does the ratio grow as the root of the width?

`python -m lora_lib.experiments.widths --workers 2` pretrains small models of four widths, which it
keeps in the cache of `lora_lib`, and finds the best rate of full fine-tuning and of LoRA on each.

In the limit of wide layers, AdamW's best rate for a whole weight falls as 1 / width (muP, arXiv
2203.03466), and that of LoRA's A and B, at one rank, as 1 / sqrt(width) (arXiv 2602.06204 has such
a law). If so, their ratio grows as sqrt(width): the factor of ten that is found on real models, and
the much smaller one on small models, would be one law.

Written down before the runs that test it, with nothing fitted but one point, the small model's
(width 96, rank 16, alpha = 16, where LoRA's best rate was 0.0056, 2.8 times that of full
fine-tuning, in runs of an older sweep):
- the slope of log(ratio) against log(width), over small models of four widths, is 1/2: its interval
  lies within 0.25 and 0.75
- `predicted(384)`, MiniLM's ratio, and `predicted(576)`, SmolLM2's, are right within a factor of
  two
Coarse grids of chapters 10 and 14 were known: SmolLM2 at alpha = 2r had its best among 0.0005,
0.001, 0.002 for LoRA and among 0.00005, 0.0001, 0.0002 for full fine-tuning.
"""

from functools import partial

import torch

from lora_lib.experiments.claims import Claim, Verdict
from lora_lib.experiments.intervals import Interval, rate_slope
from lora_lib.experiments.rates import Grid, times
from lora_lib.experiments.sweep import by_seed, grow, narrowed, read_if_any, select
from lora_lib.experiments.trial import on_redrawn
from lora_lib.files import cache
from lora_lib.models import tales
from lora_lib.models.pretraining import pretrain
from lora_lib.torch import inject

BASE_WIDTH, BASE_RATIO, BASE_RATE = 96, 2.8, 5.6e-3
SLOPE = 1 / 2
WIDTHS, PRETRAINING = (48, 96, 192, 384), 2000
TASK, RANK, ALPHA, SEEDS, NAME = "instructions 6", 16, 16, range(5), "widths"

GROWS = Claim("the ratio of LoRA's best rate to that of full fine-tuning grows as sqrt(width)", "7",
              "slope of log(ratio) against log(width)", 0.25, 0.75)
PREDICTED = Claim("the law of the width predicts a real model's ratio", "7",
                  "ratio over the predicted one", 0.5, 2)


def predicted(width: int) -> float:
    """How many times LoRA's best rate is full fine-tuning's, by the law, at rank 16, alpha = 16."""
    return BASE_RATIO * (width / BASE_WIDTH) ** SLOPE


def start(width: int) -> float:
    """The rate to begin a search with, for LoRA with AdamW at a scaling of 1, by the law."""
    return BASE_RATE * (BASE_WIDTH / width) ** SLOPE


def as_predicted(found: Interval, width: int) -> Verdict:
    """Whether a ratio that was measured on a real model of this width is the predicted one."""
    law = predicted(width)
    return PREDICTED.judged(Interval(found.middle / law, found.low / law, found.high / law),
                            form=".2g", note=f"{found.text('.2g')} times, where {law:.2g} was "
                                             "predicted")


# The width of every dense language model, and LoRA's best rate, in the source that
# `lora_lib.experiments.ledger` calls TABLE; widths by the models' configurations. The constants
# above were fixed before this table was looked at, when it was known how often it has each rate.
PUBLISHED = {"Llama 3.2 1B": (2048, 1e-3), "Llama 3.2 3B": (3072, 1e-3),
             "Llama 3.1 8B": (4096, 3e-4), "Llama 3.1 8B Instruct": (4096, 3e-4),
             "Llama 3.1 70B": (8192, 3e-4), "Llama 3.3 70B Instruct": (8192, 3e-4),
             "Qwen3 4B Instruct": (2560, 1e-3), "Qwen3 8B": (4096, 1e-3),
             "Qwen3 8B Base": (4096, 1e-3), "Qwen3 32B": (5120, 3e-4),
             "Qwen3.5 4B": (2560, 3e-4), "Qwen3.5 27B": (5120, 3e-4)}


def base(width: int):
    """The small model of this width, pretrained at the first call and kept."""
    path = cache() / f"tales-{width}-{PRETRAINING}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        pretrain(path, width=width, steps=PRETRAINING, checkpoint=path.with_suffix(".run"))
    return tales.load(path)


def trial(width: int, method: str, lr: float, seed: int = 0, steps: int = 200,
          batch_size: int = 8) -> dict[str, float]:
    """Fine-tune a base of this width, "full" or "LoRA" on all linear layers, and measure."""
    model = base(width)
    if method == "LoRA":
        inject(model, "all-linear", RANK, ALPHA, seed=seed)
    return on_redrawn(model, TASK, lr=lr, steps=steps, batch_size=batch_size, seed=seed)


def rows(width: int, method: str) -> list:
    """The runs that there are."""
    return select(read_if_any(NAME), width=width, method=method)


def begin(width: int, method: str) -> list[float]:
    """Five rates around the small model's best one, carried to this width by the law."""
    middle = {"full": 2e-3 * BASE_WIDTH / width,
              "LoRA": start(width)}[method]
    return [float(f"{middle * 2.0**i:.6g}") for i in (-2, -1, 0, 1, 2)]


def points(widths=WIDTHS) -> list[dict]:
    """Both methods on every width at every rate of their grids, as far as they are known."""
    return by_seed({"width": width, "method": method, "lr": lr, "seed": seed}
                   for width in widths for method in ("full", "LoRA")
                   for seed, lr in narrowed(rows(width, method), SEEDS, begin(width, method)))


def grid(width: int, method: str) -> Grid:
    """The runs of a method on a width, at every rate."""
    return Grid.of(rows(width, method))


def ratio_at(width: int) -> Interval:
    """How many times LoRA's best rate is full fine-tuning's, on the small model of this width."""
    return times(grid(width, "LoRA"), grid(width, "full"))


def slope() -> Interval:
    """The slope of log(ratio) against log(width), by least squares over the widths."""
    return rate_slope(WIDTHS, [(grid(width, "LoRA").curve, grid(width, "full").curve)
                               for width in WIDTHS])


def judged() -> list[Verdict]:
    """The claim on the slope; those on real models stand with their runs."""
    return [GROWS.judged(slope(), note="; ".join(
        f"width {w}: {ratio_at(w).text('.2g')} times" for w in WIDTHS))]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for width in WIDTHS:                                        # the widest takes longest
        base(width)
        grow(trial, partial(points, [width]), NAME)
