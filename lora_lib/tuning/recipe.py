"""Adapters for a causal model's answers, in one call: what chapter 10 and the command line run."""

from torch import nn

from lora_lib.torch.inject import inject
from lora_lib.tuning.data import Rows
from lora_lib.tuning.loop import fine_tune, warmup_cosine


def instruction_tune(model: nn.Module, rows: Rows, *, rank: int = 16, alpha: float = 32,
                     targets: str | list[str] = "all-linear", lr: float = 5e-4, steps: int = 200,
                     batch_size: int = 8, seed: int = 0, **options) -> list[float]:
    """Put adapters into a causal model and train them on what `encode` gave; every step's loss.

    `options` are `fine_tune`'s. Its precision "auto" is bfloat16 on a GPU that has it and float16
    with a scaled loss on one that has not, such as a T4. Load the base in float32 for either: its
    weights are cast as they are used, and sums between the layers stay exact.
    """
    inject(model, targets, rank, alpha, seed=seed)
    schedule = warmup_cosine(steps, warmup=steps // 20)
    return fine_tune(model, rows, steps=steps, batch_size=batch_size, lr=lr, schedule=schedule,
                     seed=seed, **options)
