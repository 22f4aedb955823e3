"""Rank, alpha, scaling and learning rate, on all linear layers, and full fine-tuning beside them.

`python -m lora_lib.experiments.hyperparameters` takes about forty minutes on one core, in float32.
"""

from lora_lib.experiments.sweep import main
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


if __name__ == "__main__":
    main(trial, points(), "hyperparameters")
