"""What chapters 1 to 5 claim, measured again for the summary: one number a claim and seed.

`python -m lora_lib.experiments.foundations` takes three minutes on one core. A seed draws the test
images, the first weights, the adapters and the order. The learning rates are those of chapters 1
and 3, which did not choose them on test images.

The margins were written down before these seeds were run; five others, all with one split of the
images, were known. Accuracies within 0.03 are the same, as they always were in chapters 1 to 5. We
expected of the claims:
- a low-rank update is enough: holds; full fine-tuning's own update is of low rank: holds if 16 or
  32 directions are kept
- B, not A, must start at zero: does not hold
- a merged model takes the bare one's time, to 5 %: holds; a 16-bit merge keeps at least 0.95 of an
  update: holds if it has 1/16 of the weight's norm, and not at 1/1024
- two merged adapters lose less than 0.1 on the worse of their tasks: holds if one works on what the
  other gives it, and not for two tasks, in all layers or apart; undecided where each was trained
  with the other's images
- a LoRA step takes less than 0.95 of a full one's time: holds if the layers are wide
"""

import numpy as np

from lora_lib import costs
from lora_lib.experiments import sweep
from lora_lib.experiments.claims import HOLDS, Claim, Verdict, counted
from lora_lib.experiments.foundation_measures import CUTS, MEASURES, TEST
from lora_lib.experiments.intervals import by_seeds, of_shares, ratio
from lora_lib.experiments.sweep import column, main, read, select
from lora_lib.numpy import LoRALayer

SEEDS = range(5, 10)

ENOUGH = Claim("a low-rank update is enough for a new task", "1",
               "accuracy on turned digits, full minus rank 8", most=0.03)
LOW = Claim("the update that full fine-tuning makes is of low rank", "1",
            "accuracy lost by cutting it, by the directions kept of 128", most=0.03)
START = Claim("B, not A, must start at zero", "3",
              "accuracy, B = 0 minus A = 0, each at its own rate", 0.03)
FREE = Claim("merged, inference costs nothing extra", "4",
             "time of a call over the bare model's", 0.95, 1.05)
LOSSLESS = Claim("merging loses nothing", "4",
                 "share that is kept of an update merged in bfloat16, by its norm over the "
                 "weight's", 0.95)
STACK = Claim("adapters stack: train several, merge what you need", "4",
              "accuracy lost by merging two, on the worse of their tasks", most=0.1)
FASTER = Claim("a training step is faster", "5", "time of a LoRA step over a full one's", most=0.95)


def trial(what: str, seed: int) -> dict[str, float]:
    """The measure `what` with this seed. Raises KeyError for an unknown one."""
    return {"value": float(MEASURES[what](seed))}


def points() -> list[dict]:
    """Every measure with every seed."""
    return [{"what": what, "seed": seed} for what in MEASURES for seed in SEEDS]


def values(what: str) -> np.ndarray:
    """The kept values of a measure, by seed."""
    rows = [row for row in select(read("foundations"), what=what) if row["seed"] in SEEDS]
    return column(rows, "value")


def shown(what: str, form: str = ".2f") -> str:
    """The mean and its 95 % interval, written out."""
    return sweep.shown(values(what), form)


def verdicts() -> list[Verdict]:
    """The claims of chapters 1 to 5, in their order."""
    of = {name: values(name) for name in MEASURES}
    return [*_of_the_idea(of), *_of_the_layer(of), *_of_merging(of), *_of_training(of)]


def _of_the_idea(of):
    full_, low = of["full accuracy"], of["lora rank 8 accuracy"]
    directions = of["full change directions for 99 percent"]
    return [
        ENOUGH.judged(of_shares(full_, low, TEST), form="+.3f", note="accuracies: full "
                      f"{shown('full accuracy')}, rank 8 {shown('lora rank 8 accuracy')}, rank 1 "
                      f"{shown('lora rank 1 accuracy')}"),
        LOW.across(lambda c: {f"{rank}": of_shares(
            full_, of[f"full change cut to rank {rank} accuracy"], TEST, c) for rank in CUTS},
            condition="{} directions are kept", note="99 % of its energy takes "
            f"{min(directions):.0f} to {max(directions):.0f}"),
        counted("at rank 8 a 4096 x 4096 update has 65K numbers in place of 16.7M", "1",
                costs.lora_parameters(4096, 4096, 8) // 1000 == 65,
                f"{costs.lora_parameters(4096, 4096, 8):,} in place of "
                f"{costs.full_parameters(4096, 4096):,}"),
        counted("ranks 4, 8, 16, 64 train 32K, 65K, 131K, 524K numbers in a 4096 x 4096 layer", "7",
                [costs.lora_parameters(4096, 4096, r) // 1000 for r in (4, 8, 16, 64)]
                == [32, 65, 131, 524],
                ", ".join(f"{costs.lora_parameters(4096, 4096, r):,}" for r in (4, 8, 16, 64))),
    ]


def _of_the_layer(of):
    start = max(of["output change at the start"])
    return [
        counted("B projects down and A projects up", "2",
                LoRALayer(5, 7, 2).B.shape[0] < LoRALayer(5, 7, 2).B.shape[1],
                "A (r, k) projects down to r numbers, B (d, r) projects up"),
        counted("the backward pass hands g W to the layer below", "2",
                max(of["error of an input gradient without the adapter"]) < 1e-6,
                "the adapter's own path is left out: in a layer with ordinary A and B, "
                f"{shown('error of an input gradient without the adapter')} of the gradient's "
                "norm"),
        counted("with B = 0 the model starts exactly as pretrained", "3", start == 0,
                f"largest change of an output: {start:g}"),
        START.judged(of_shares(of["lora rank 8 accuracy"], of["accuracy trained from a zero"],
                               TEST), form="+.3f", note="accuracies: from both zero "
                     f"{shown('accuracy trained from both zero')}; on the old task at the start, "
                     f"both random, {shown('accuracy at the start with both random')}"),
    ]


def _of_merging(of):
    merged = max(of["merged against unmerged"])
    stacks = {"in all layers": "two in all layers",
              "90 degrees first, 180 last": "90 in the first layer and 180 in the last",
              "180 degrees first, 90 last": "180 in the first layer and 90 in the last",
              "trained with the other's images": "two trained with negatives",
              "one works on what the other gives it": "one that works on what the other gives"}
    return [
        counted("merged, the model computes the same", "4", merged < 1e-12,
                f"relative difference {10 ** np.ceil(np.log10(merged)):.0e} at most, in float64"),
        FREE.judged(ratio(column(read("bottleneck_speed"), "LoRA merged")), form=".2f"),
        LOSSLESS.across(lambda c: {f"1/{2**-e}": by_seeds(
            of[f"kept of an update of 2^{e} merged in bfloat16"], c) for e in (-4, -10)},
            form=".2f", condition="the update has {} of the weight's norm"),
        STACK.across(lambda c: {name: by_seeds(of[f"lost by merging {what}"], c)
                                for name, what in stacks.items()}),
    ]


def _of_training(of):
    shape, targets = costs.LLAMA_7B, ("q_proj", "v_proj")
    share = shape.lora_parameters(8, targets) / shape.parameters()
    size, size_all = (costs.adapter_bytes(shape, 8, t, 2) / 1e6 for t in (targets, "all-linear"))
    whole, low = (costs.memory(shape, batch=1, sequence=512, rank=r, target_modules=targets).total
                  for r in (None, 8))
    times = {"width 512, q and v": "lora on q and v at width 512",
             "width 96, all linear layers": "lora on all linear layers at width 96"}
    return [
        counted("about 0.1 % of the parameters are trained", "5", 3e-4 < share < 3e-3,
                f"{share:.2%} of a 7B Llama at rank 8 on q and v"),
        counted("memory is low", "5", low < whole / 2,
                f"7B, one row of 512 tokens: {low / 1e9:.0f} GB in place of {whole / 1e9:.0f} GB; "
                "counted in a run at width 512: "
                f"{shown('memory of lora on q and v at width 512')} of full"),
        FASTER.across(lambda c: {name: ratio(of[f"step time of {what}"], c)
                                 for name, what in times.items()},
                      form=".2f", condition="at {}"),
        Verdict("an adapter takes about 10 MB", "5", f"{HOLDS} if few layers are adapted",
                f"7B, rank 8, 16 bits: {size:.1f} MB on q and v, {size_all:.0f} MB on all linear "
                "layers", counted=True),
    ]


if __name__ == "__main__":
    main(trial, points(), "foundations")
