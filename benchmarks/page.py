"""Write book/speed.md and its picture from the newest results of benchmarks/run.py.

    python -m benchmarks.page
"""

import json
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402  (after the backend)
import numpy as np  # noqa: E402

from benchmarks.run import RESULTS  # noqa: E402
from lora_lib import plots  # noqa: E402
from lora_lib.experiments.sweep import read, select  # noqa: E402
from lora_lib.files import atomic  # noqa: E402

BOOK = Path(__file__).parents[1] / "book"
LEAST = 0.005       # an overhead below this share of the frozen layer's time is taken for this one

TEXT = """\
# How fast it is

{lead}

What does an adapter cost beside the frozen layer that it sits on, and beside other people's
adapters? One command measured everything on this page, in one run, and wrote the page itself:
`make benchmark`. [Chapter 13](13_making_it_fast.ipynb) explains what makes the difference.

The methods are called in turn, round after round, so that a machine that slows down slows all of
them. A figure is a median. A ratio is the median of the ratios within each round.

{machine}

## The targets

They were set before the library's layer was written. *Overhead* is the time above the frozen
layer's, for forward and backward.

{targets}

{missed}

## One layer

Forward and backward of one square layer, as a multiple of the frozen layer's time, in float32.
*Formula* is the equation as one would write it down, *full* is full
fine-tuning. PEFT keeps its matrices in float32, whatever the
weight is; loralib has them in the weight's dtype.

![Two heat maps of the time over the frozen layer's: lora_lib's cells are nearer to one than
PEFT's, most of all for wide layers and many tokens](_static/speed.png)

{layer}

## Queries, keys and values of one input

*Products* are the matrix products of three adapted layers alone, without casts, biases, new memory
and autograd: no order of these products takes less.

{shared}

What autograd keeps for backward, beside the parameters, for `256` tokens:

{bytes}

## A product of few columns

The gradient of B (width `1024`), $g^T u$, as the transpose of $u^T g$: the time over that of the
product itself. The library takes the transpose where it is the faster one here.

{thin}

## Inference

Without gradients, in float32. *Merged* is a `LoRALinear` whose update is in its weight; *replaced*
is the plain layer that `merge(model)` leaves behind.

{inference}

## A model's step

The course's small language model, `16` rows of `64` tokens: forward, backward, and AdamW, over
PEFT's time for the same. *Frozen* has no adapter and only passes gradients on, so it is what an
adapter that took no time would leave.

{model}

{runs}

## Files, NumPy, imports

A model of `336` linear layers, all adapted. Saving here hashes the base's weights, so that
loading can tell whether it is the same one, and waits until the file is on the disk; PEFT does
neither.

{files}

The NumPy layer's forward and backward over the time of its matrix products alone, in arrays made
beforehand:

{numpy}

A new process that imports:

{imports}

{gpu}
"""


LEAD = """\
What do you gain? A training run of SmolLM2 takes {time} of the time that it takes with PEFT under
transformers' Trainer, and {above} of the memory above the model. The losses are the same, step by
step.

![Two panels of bars, time and memory above the model, for lora_lib, PEFT under Trainer and PEFT
under SFTTrainer: lora_lib's bars are the shortest in both](_static/gain.png)

Most of this comes from [work that need not be done](#a-whole-training-run). One layer by itself gains
less, and some of the targets that were set for it were missed."""
RUNS = """\
## A whole training run

SmolLM2-135M learns tool calls ([chapter 10](10_real_model.ipynb)) with adapters of rank `8` on all
linear layers: `{steps}` steps of `8` rows, the same rows in the same order, the same first A, AdamW
at a constant rate, float32. PEFT trains under transformers' Trainer, and under TRL's SFTTrainer, as
their documentation shows it. Two rows at a time, with the gradients of a batch's four parts summed,
take less memory; both sides have a row for that. Every run is a process of its own, the methods take
turns, `{rounds}` rounds: `python -m benchmarks.runs`.

{table}

*Peak* is the most that the process held; *above the model* is how much of it came after the model was
loaded. Step by step, the losses of all methods differ by at most `{apart}`.

Over PEFT under Trainer with whole batches:

{targets}

{parts}

Where does the time go? Not into adapters. `{prompt}` of the tokens in a batch are the same system
message in every row, which goes through the model once here; the head's `49,152` logits are made for
`{learned}` of the tokens, those with a label. What is left is the frozen layers' own products. Data
without a common beginning and with long answers gain less.

{machine}
"""
NO_RUNS = """\
## A whole training run

Not measured yet: `python -m benchmarks.runs`.
"""
NO_GPU = """\
## On a GPU

None has been measured yet. The same command measures one where there is one.
"""
GPU = """\
## On a GPU

The same command on a GPU, timed by CUDA events: once as Python calls it, once more as captured CUDA
graphs, which leave Python out. The targets above were set for a processor.

{machine}

{calls} So look at the graphs for what the arithmetic costs, and at the other tables for what a loop
in Python waits for.

One layer, forward and backward, rank `8`, over the frozen layer; first as graphs, then from Python.
{kernel}

{layers}

Queries, keys and values of one input, as graphs and from Python:

{shared}

A step of the language model over PEFT's, as graphs and from Python:

{model}

The transpose that saves time on a processor (above) takes {thin} times as long as the product itself
here, as graphs; the library leaves it out on a GPU.
"""


def newest(device: str = "cpu", results: Path = RESULTS) -> Path | None:
    """The folder of the last full run on a device, or None."""
    return max((path for path in results.iterdir() if (path / "machine.json").exists()
                and about(path)["device"] == device), default=None)


def about(folder: Path) -> dict:
    return json.loads((folder / "machine.json").read_text())


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [header, ["---"] * len(list(header)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(value, form: str = "") -> str:
    return f"`{value:{form}}`"


def one(rows, method, **where):
    """The one row of a method at a point."""
    found = select(rows, method=method, **where)
    if len(found) != 1:
        raise ValueError(f"expected one row of {method!r} at {where}, found {len(found)}")
    return found[0]


def seconds(value: float) -> str:
    for unit, size in (("s", 1), ("ms", 1e-3)):
        if value >= size:
            return f"`{value / size:.3g}` {unit}"
    return f"`{value / 1e-6:.3g}` µs"


def overheads(rows, method, **where) -> np.ndarray:
    """What a method takes above the frozen layer, at every point of the grid, at least LEAST."""
    ratios = [row["ratio"] for row in select(rows, what="step", method=method, **where)]
    return np.maximum(np.array(ratios) - 1, LEAST)


def slower(rows) -> list[str]:
    """Where, beyond the noise, PEFT or loralib is faster: their upper quartile is below our lower."""
    found = []
    for ours in select(rows, what="step", method="lora_lib", dtype="float32"):
        point = {key: ours[key] for key in ("what", "dtype", "size", "rank", "tokens")}
        for other in ("PEFT", "loralib"):
            if one(rows, other, **point)["ratio_high"] < ours["ratio_low"]:
                found.append(f"width `{ours['size']:.0f}`, rank `{ours['rank']:.0f}`, "
                             f"`{ours['tokens']:.0f}` tokens: {other} "
                             f"`{one(rows, other, **point)['ratio']:.2f}`, "
                             f"lora_lib `{ours['ratio']:.2f}`")
    return found


def targets(rows, kept) -> list[tuple[str, str, bool]]:
    """(target, what was measured, whether it is reached)."""
    ratio = overheads(rows, "lora_lib", dtype="float32") / overheads(rows, "PEFT", dtype="float32")
    mean = float(np.exp(np.log(ratio).mean()))
    behind = slower(rows)
    found = [
        ("One layer, float32: overhead at most `0.5` of PEFT's, as a geometric mean over the grid",
         code(mean, ".2f"), mean <= 0.5),
        ("One layer, float32: nowhere slower than PEFT or loralib beyond the noise",
         f"slower at {code(len(behind))} of {code(len(ratio))} points", not behind)]
    for size, limit in ((2048, 1.05), (512, 1.15), (256, 1.35)):
        value = one(rows, "lora_lib", what="shared", dtype="float32", size=size, tokens=256)
        found.append((f"q, k and v of one x, float32, width {code(size)}: at most {code(limit)} of "
                      "frozen", code(value["ratio"], ".2f"), value["ratio"] <= limit))
    half = {"what": "shared", "dtype": "bfloat16", "size": 2048, "tokens": 256}
    ours, peft = (one(rows, name, **half) for name in ("lora_lib", "PEFT"))
    over = ours["seconds"] / peft["seconds"]
    found += [("The same in bfloat16, width `2048`: at most `1.07` of frozen",
               code(ours["ratio"], ".2f"), ours["ratio"] <= 1.07),
              ("The same: at most `0.5` of PEFT's time", code(over, ".2f"), over <= 0.5)]
    sizes = {name: sum(row["bytes"] for row in select(kept, dtype="bfloat16", size=2048,
                                                      method=name)) for name in ("lora_lib", "PEFT")}
    least = 256 * (2048 + 3 * 8) * 2
    share = sizes["lora_lib"] / sizes["PEFT"]
    found += [("The same: x and x A^T are all that is kept for backward, about a sixth of PEFT's",
               f"`{sizes['lora_lib'] / 1e6:.2f}` MB of `{sizes['PEFT'] / 1e6:.2f}` MB",
               sizes["lora_lib"] <= least and share <= 1 / 5.8)]
    merged = [row for row in select(rows, what="inference", method="merged and replaced")]
    worst = max(merged, key=lambda row: abs(row["ratio"] - 1))
    found += [("Merged inference takes `1.00` of the plain layer's time",
               f"`{min(r['ratio'] for r in merged):.2f}` to `{max(r['ratio'] for r in merged):.2f}`",
               abs(worst["ratio"] - 1) < 0.05)]
    for dtype, limit in (("bfloat16", 0.8), ("float32", 1)):
        values = [one(rows, "lora_lib", what="model", dtype=dtype, targets=t)["ratio"]
                  for t in ("all", "q, v")]
        found.append((f"A step of the language model, {dtype}: at most {code(limit)} of PEFT's",
                      f"{code(values[0], '.2f')} on all linear layers, {code(values[1], '.2f')} on "
                      "q and v", max(values) <= limit))
    worst = max(row["ratio"] for row in select(rows, what="numpy", method="lora_lib.numpy"))
    imports = one(rows, "lora_lib", what="import")["seconds"]
    return found + [("NumPy's layer: at most `1.1` of its products' time", code(worst, ".2f"),
                     worst <= 1.1),
                    ("`import lora_lib`, without torch: below `0.3` s", seconds(imports),
                     imports < 0.3)]


def missed(rows) -> str:
    """Where a target is not reached: the floor, from the same run."""
    half = {"what": "shared", "dtype": "bfloat16", "size": 2048, "tokens": 256}
    alone, peft = (one(rows, name, **half)["ratio"] for name in ("products", "PEFT"))
    frozen = one(rows, "frozen", what="model", dtype="bfloat16", targets="q, v")["ratio"]
    text = (f"How low can it go? In bfloat16 at width `2048`, the frozen layers alone take "
            f"{code(1 / peft, '.2f')} of PEFT's time, and the bare products of layers with adapters "
            f"{code(alone, '.2f')} of the frozen layers'. These products write into memory that is "
            "there; a layer also asks for new memory, adds biases, casts A and B, and goes "
            f"through autograd, and that is the rest. In the language model, {code(frozen, '.2f')} "
            "of PEFT's step with adapters on q and v would be left if they took no time at all.")
    if behind := slower(rows):
        text += ("\n\nThe points where another is faster, beyond the noise:\n\n"
                 + "\n".join(f"- {line}" for line in behind))
    return text


def matrix(rows, what, methods, keys, **where) -> str:
    """A table of ratios: a line for each point, a column for each method."""
    points = [{key: row[key] for key in keys}
              for row in select(rows, what=what, method=methods[0], **where)]
    lines = []
    for point in points:
        base = one(rows, "frozen", what=what, **where, **point)
        cells = [one(rows, m, what=what, **where, **point)["ratio"] for m in methods]
        lines.append([*(code(v, ".0f") if isinstance(v, float) else str(v)
                        for v in point.values()), seconds(base["seconds"]),
                      *(code(c, ".2f") for c in cells)])
    return table([*keys, "frozen", *methods], lines)


def thin(rows) -> str:
    """A line for each dtype and number of tokens, a column for each rank."""
    found = select(rows, what="thin", method="(u^T g)^T")
    ranks = sorted({row["rank"] for row in found})
    points = list(dict.fromkeys((row["dtype"], row["tokens"]) for row in found))
    return table(["dtype", "tokens", *(f"rank {code(rank, '.0f')}" for rank in ranks)],
                 [[dtype, code(n, ".0f"),
                   *(code(one(found, "(u^T g)^T", dtype=dtype, tokens=n, rank=rank)["ratio"], ".2f")
                     for rank in ranks)] for dtype, n in points])


def picture(rows, path: Path) -> None:
    """The ratio to the frozen layer over the grid, ours and PEFT's."""
    grid = select(rows, what="step", dtype="float32")
    sizes, ranks, tokens = (sorted({row[key] for row in grid}) for key in ("size", "rank", "tokens"))
    lines = [(size, n) for size in sizes for n in tokens]
    with plots.panels(2, width=4.6, height=3.8) as axes:
        for method, ax in zip(("lora_lib", "PEFT"), axes):
            values = [[one(grid, method, size=size, tokens=n, rank=rank)["ratio"] for rank in ranks]
                      for size, n in lines]
            plots.heatmap(values, rows=[f"{size:.0f} x {n:.0f}" for size, n in lines],
                          columns=[f"{rank:.0f}" for rank in ranks], xlabel="rank",
                          ylabel="width x tokens", title=method, unit="time over frozen", ax=ax)
            ax.images[0].set_clim(1, 4)
        plt.gcf().savefig(path)
    plt.close("all")


METHODS = ["lora_lib", "PEFT", "loralib", "formula", "full"]


def machine(folder: Path) -> str:
    return table(["", ""], [[key, code(value)] for key, value in about(folder).items() if value])


def steps(rows, what="model", dtypes=("float32", "bfloat16")) -> str:
    """A step of the language model, over PEFT's."""
    methods = ("lora_lib", "PEFT", "full", "frozen")
    return table(["dtype", "adapters on", *methods],
                 [[dtype, name, *(code(one(rows, m, what=what, dtype=dtype, targets=name)["ratio"],
                                       ".2f") for m in methods)]
                  for dtype in dtypes for name in ("q, v", "all")])


def calls(rows) -> str:
    """What a call costs beside the work: a small layer and a large one, from Python and as graphs."""
    took = lambda what, size, tokens: one(rows, "frozen", what=what, dtype="float16", size=size,
                                          tokens=tokens, rank=8)["seconds"]
    small, large = (256, 1), (4096, 128)
    python, graph = (took(what, *large) / took(what, *small) for what in ("step", "step graph"))
    return (f"Called from Python, layers wait for calls more than for products. In float16, a frozen "
            f"layer of width {code(large[0])} with {code(large[1])} tokens takes "
            f"{code(python, '.1f')} times as long as one of width {code(small[0])} with "
            f"{code(small[1])}; as graphs, which are {seconds(took('step graph', *small))} and "
            f"{seconds(took('step graph', *large))}, {code(graph, '.1f')} times.")


def of_the_kernel(rows) -> str:
    """Where the Triton kernel is the faster of our two layers, if anywhere."""
    over = [row["seconds"] / one(rows, "lora_lib", **{key: row[key] for key in (
        "what", "dtype", "size", "rank", "tokens")})["seconds"]
        for row in select(rows, what="step graph", method="kernel")]
    return (f"*Kernel* is the whole layer as one Triton kernel, `lora_lib.torch.kernel`. As graphs "
            f"it is faster than lora_lib's layer, which leaves products to torch, at "
            f"{code(sum(ratio < 1 for ratio in over))} of {code(len(over))} points, rank `8` and "
            f"others, and takes {code(np.median(over), '.1f')} times as long in the median.")


def gpu(folder: Path) -> str:
    """What a GPU's run says, eager and as graphs."""
    rows = read(folder / "times.csv")
    both = lambda make: "\n\n".join(make(suffix) for suffix in (" graph", ""))
    methods = [*METHODS, "kernel"]
    return GPU.format(
        machine=machine(folder), calls=calls(rows), kernel=of_the_kernel(rows),
        thin=" to ".join(code(value, ".2f") for value in np.quantile(
            [row["ratio"] for row in select(rows, what="thin graph", method="(u^T g)^T")], [0, 1])),
        layers=both(lambda s: matrix(rows, "step" + s, methods, ["dtype", "size", "tokens"],
                                     rank=8)),
        shared=both(lambda s: matrix(rows, "shared" + s, methods, ["dtype", "size", "tokens"])),
        model=both(lambda s: steps(rows, "model" + s, ("float32", "float16"))))


def newest_runs(results: Path = RESULTS) -> Path | None:
    """The folder of the last whole training runs, or None."""
    return max((path.parent for path in results.glob("runs-*/about.json")), default=None)


def over(rows, method: str, key: str, other: str = "PEFT, Trainer") -> float:
    """What a method's runs took over another's, the median over the rounds."""
    first = lambda name: select(rows, method=name, step=0)
    return float(np.median([a[key] / b[key] for a, b in zip(first(method), first(other))]))


def lead(folder: Path | None) -> str:
    """What the page says first."""
    if folder is None:
        return NO_RUNS.split("\n\n")[1].rstrip()
    rows = read(folder / "runs.csv")
    return LEAD.format(**{name: code(over(rows, "lora_lib", key), ".2f")
                          for name, key in (("time", "seconds"), ("above", "above"))})


def gain(rows, path: Path) -> None:
    """Whole training runs: the time and the memory above the model, a bar each."""
    methods = ("lora_lib", "PEFT, Trainer", "PEFT, SFTTrainer")
    middle = lambda key: {m: float(np.median([row[key] for row in select(rows, method=m, step=0)]))
                          for m in methods}
    colors = {None: plots.ORANGE}                           # LoRA's, whoever's library it is
    with plots.panels(2, width=4.6, height=2.2) as (left, right):
        plots.bars(middle("seconds"), xlabel="time of a run (s)", colors=colors, ax=left)
        plots.bars({m: value / 1e9 for m, value in middle("above").items()}, colors=colors,
                   xlabel="memory above the model (GB)", ax=right)
        plt.gcf().savefig(path)
    plt.close("all")


def runs(folder: Path | None) -> str:
    """What whole training runs took, beside Trainer's."""
    if folder is None:
        return NO_RUNS.rstrip()
    rows, about = read(folder / "runs.csv"), json.loads((folder / "about.json").read_text())
    base, ours = "PEFT, Trainer", "lora_lib"
    few = ", 2 rows at a time"
    first = {m: select(rows, method=m, step=0) for m in dict.fromkeys(r["method"] for r in rows)}
    ratio = lambda m, key, other=base: over(rows, m, key, other)
    middle = lambda m, key: float(np.median([row[key] for row in first[m]]))
    losses = {m: [row["loss"] for row in select(rows, method=m, round=0)] for m in first}
    lines = [[m, seconds(middle(m, "seconds")), code(ratio(m, "seconds"), ".2f"),
              f"`{middle(m, 'peak') / 1e9:.2f}` GB", code(ratio(m, "peak"), ".2f"),
              f"`{middle(m, 'above') / 1e9:.2f}` GB", code(ratio(m, "above"), ".2f"),
              code(losses[m][-1], ".3f")] for m in first]
    judge = lambda text, key, most: [text, *(
        f"{code(value, '.2f')}, {'yes' if value <= most else '**no**'}"
        for value in (ratio(ours, key), ratio(ours + few, key)))]
    return RUNS.format(
        steps=len(losses[ours]), rounds=len(first[ours]),
        table=table(["method", "time", "over Trainer's", "peak", "over Trainer's",
                     "above the model", "over Trainer's", "last loss"], lines),
        apart=f"{max(np.abs(np.subtract(losses[m], losses[ours])).max() for m in first):.1e}",
        targets=table(["target", "whole batches", "2 rows at a time"], [
            judge("At most `0.6` of the time", "seconds", 0.6),
            judge("At most `0.4` of the memory above the model", "above", 0.4),
            judge("At most `0.4` of the peak, model included", "peak", 0.4)]),
        parts="With two rows at a time on both sides the time is "
              f"{code(ratio(ours + few, 'seconds', base + few), '.2f')} of Trainer's, and the memory "
              f"above the model {code(ratio(ours + few, 'above', base + few), '.2f')}.",
        prompt=f"{about['shared']:.0%}", learned=f"{about['learned']:.0%}",
        machine=table(["", ""], [[key, code(about[key])] for key in
                                 ("date", "hardware", "capability", "cores", "torch",
                                  "transformers", "peft", "trl") if about.get(key)])).rstrip()


def page(folder: Path, gpu_folder: Path | None = None, runs_folder: Path | None = None) -> str:
    """The text of the page: of a CPU's run, a GPU's and whole training runs if there are."""
    rows, kept = read(folder / "times.csv"), read(folder / "bytes.csv")
    methods = METHODS
    sizes = {}
    for row in kept:
        key = (row["dtype"], row["size"], row["method"])
        sizes[key] = sizes.get(key, 0) + row["bytes"]
    points = list(dict.fromkeys(key[:2] for key in sizes))
    return TEXT.format(
        lead=lead(runs_folder), machine=machine(folder), gpu=(NO_GPU if gpu_folder is None else gpu(gpu_folder)).rstrip(),
        targets=table(["target", "measured", "reached"],
                      [[text, value, "yes" if ok else "**no**"]
                       for text, value, ok in targets(rows, kept)]),
        missed=missed(rows),
        layer=matrix(rows, "step", methods, ["size", "tokens"], rank=8, dtype="float32")
        + "\n\nThe same in `bfloat16`:\n\n" + matrix(rows, "step", methods, ["size", "tokens"], rank=8, dtype="bfloat16")
        + "\n\nThe forward pass alone, and forward, backward and a step of AdamW, in float32:\n\n"
        + matrix(rows, "forward", methods, ["size", "tokens"], rank=8, dtype="float32") + "\n\n"
        + matrix(rows, "optimizer", methods, ["size", "tokens"], rank=8, dtype="float32"),
        shared=matrix(rows, "shared", methods + ["products"], ["dtype", "size", "tokens"]),
        bytes=table(["dtype", "width", *methods],
                    [[dtype, code(size, ".0f"),
                      *(f"`{sizes[dtype, size, m] / 1e6:.2f}` MB" for m in methods)]
                     for dtype, size in points]),
        thin=thin(rows), inference=matrix(rows, "inference", ["merged", "merged and replaced", "lora_lib", "PEFT",
                                             "loralib"], ["size", "tokens"]),
        model=steps(rows), runs=runs(runs_folder),
        files=table(["", "lora_lib", "PEFT"],
                    [[action, *(seconds(one(rows, m, what="files", action=action)["seconds"])
                                for m in ("lora_lib", "PEFT"))]
                     for action in ("inject", "save", "load")]),
        numpy=table(["width", "tokens", "ratio"],
                    [[code(row["size"], ".0f"), code(row["tokens"], ".0f"),
                      code(row["ratio"], ".2f")]
                     for row in select(rows, what="numpy", method="lora_lib.numpy")]),
        imports=table(["", "seconds"], [[code(row["method"]), seconds(row["seconds"])]
                                        for row in select(rows, what="import")]))


if __name__ == "__main__":
    folder = newest()
    picture(read(folder / "times.csv"), BOOK / "_static" / "speed.png")
    if whole := newest_runs():
        gain(read(whole / "runs.csv"), BOOK / "_static" / "gain.png")
    with atomic(BOOK / "speed.md") as file:
        file.write_text(page(folder, newest("cuda"), newest_runs()), "utf8")
