"""From the formula to `lora_lib.torch.fused`, one change at a time: the same numbers, timed.

`python -m lora_lib.experiments.ladder` measures every rung, and the products that rungs are made
of, and writes results/ladder.csv: a few minutes on two cores. It is a measurement of one machine.
"""

import argparse
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lib.experiments.rungs import BESIDE_16_BITS, RUNGS, TOGETHER, Layer
from lora_lib.experiments.sweep import RESULTS, Row, select, write
from lora_lib.experiments.timing import hardware, in_turn


@dataclass(frozen=True)
class Setting:
    """Where rungs are measured: `tokens` rows x (n, k), square weights, k = d = `width`.

    With `dtype` "bfloat16" x and W have it; A and B are float32. `layers` of them read one x.
    """
    width: int
    tokens: int
    rank: int = 8
    dtype: str = "float32"
    layers: int = 1

    def rungs(self) -> dict[str, Callable]:
        if self.layers == 1:
            return RUNGS
        return TOGETHER if self.dtype == "float32" else BESIDE_16_BITS


TINY = Setting(16, 16, 2)                        # all calls, no work
SETTINGS = (TINY, Setting(256, 128), Setting(1024, 256), Setting(2048, 256), Setting(512, 2048),
            Setting(1024, 256, layers=3), Setting(2048, 256, layers=3),
            Setting(2048, 256, dtype="bfloat16", layers=3))


def made(setting: Setting, seed: int = 0, dtype: torch.dtype | None = None
         ) -> tuple[Tensor, list[Layer], list[Tensor]]:
    """x, layers, and a gradient g for each output. Every A lies behind its W, for `Stacked`.

    `dtype` is that of x, W and the bias, and of A and B if it is wider; default the setting's.
    """
    dtype = dtype or getattr(torch, setting.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    generator, k, r = torch.Generator().manual_seed(seed), setting.width, setting.rank
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    x = normal(setting.tokens, k).to(dtype).requires_grad_()
    layers = []
    for _ in range(setting.layers):
        both = (normal(k + r, k) / k**0.5).to(dtype)
        A = both[k:] if wide is dtype else both[k:].to(wide)
        layers.append(Layer(both[:k], normal(k).to(dtype), A.requires_grad_(),
                            normal(k, r).to(wide).requires_grad_(), 2.0))
    return x, layers, [normal(setting.tokens, k).to(dtype) for _ in layers]


def doubled(x: Tensor, layers: list[Layer], gs: list[Tensor]) -> tuple:
    """The same data in float64, for the truth about it."""
    cast = lambda t: t.detach().double().requires_grad_(t.requires_grad)
    return cast(x), [Layer(*map(cast, layer[:4]), layer.scaling) for layer in layers], [
        cast(g) for g in gs]


def step(rung: Callable, x: Tensor, layers: list[Layer], gs: list[Tensor]) -> Callable:
    """A function that goes forward and backward: (outputs, [dx, dA, ..., dB, ...]).

    Gradients that the rung has none of (`frozen`) are None.
    """
    trained = [x, *(layer.A for layer in layers), *(layer.B for layer in layers)]
    several = rung in (*TOGETHER.values(), *BESIDE_16_BITS.values())

    def run():
        ys = rung(x, layers) if several else (rung(x, *layers[0]),)
        return ys, torch.autograd.grad(ys, trained, gs, allow_unused=True)
    return run


# What a function does, counted; and what that should cost.


@dataclass
class Work:
    """FLOPs by kind of product, bytes that elementwise operations move, and calls of operators."""
    flops: Counter = field(default_factory=Counter)
    bytes: int = 0
    calls: int = 0


class Count(TorchDispatchMode):
    """`with Count() as count:` what runs in the block is in `count.work`."""

    def __init__(self):
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.work.calls += 1
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = args[-2:]
            self.work.flops[f"{kind(a, b)} {name_of(a)}"] += 2 * a.shape[0] * b.numel()
        elif not (func.is_view or func.overloadpacket is torch.ops.aten.new_empty):
            lists = [t for arg in args if isinstance(arg, list) for t in arg]        # cat's
            tensors = [t for t in (*args, out, *lists) if isinstance(t, Tensor)]
            self.work.bytes += sum(t.nbytes for t in tensors)
        return out


def name_of(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def kind(a: Tensor, b: Tensor) -> str:
    """Which product a b (m, l) (l, n) is, by its least side: "large" unless that is a small rank.

    narrow  x A^T: n is least and b lies transposed, so both are read along their rows
    tall    g B, g^T u: n is least       flat   B^T g^T, u^T g: m is least, their transposes
    wide    u B^T, v A: the rank is summed over
    """
    (m, l), n = a.shape, b.shape[1]
    least = min(m, l, n)
    if least > 32 or least == max(m, l, n):
        return "large"
    if least == n:
        return "narrow" if b.stride(0) == 1 and a.stride(1) == 1 else "tall"
    return "flat" if least == m else "wide"


def parts(x: Tensor, layers: list[Layer], gs: list[Tensor]) -> dict[str, Callable]:
    """What rungs are made of: each kind of product, as it occurs, and x + g; and u B^T alone, into
    rows that are d or d + 8 numbers apart.

    The additions take turns at copies of x and g, so that these are as far from the processor as
    they are after a product has gone over W.
    """
    W, _, A, B, _ = (t.detach() if isinstance(t, Tensor) else t for t in layers[0])
    x, g = x.detach(), gs[0]
    found = {}
    for dtype in {x.dtype: 0, A.dtype: 0}:
        x_, g_, a, b = (t.to(dtype) for t in (x, g, A, B))
        u, v = x_ @ a.t(), g_ @ b
        w = W.to(dtype)
        one = {"large": lambda x=x_, g=g_, W=w: (x @ W.t(), g @ W),
               "narrow": lambda x=x_, A=a: x @ A.t(),
               "tall": lambda g=g_, B=b, u=u: (g @ B, g.t() @ u),
               "flat": lambda g=g_, B=b, u=u, v=v.t().contiguous(), x=x_:
               (B.t() @ g.t(), u.t() @ g, v @ x),
               "wide": lambda u=u, v=v, A=a, B=b: (u @ B.t(), v @ A)}
        found |= {f"{name} {name_of(x_)}": function for name, function in one.items()}
    pairs = itertools.cycle([(x.clone(), g.clone()) for _ in range(1 + W.nbytes // x.nbytes)])
    y, u, B = x.new_empty(len(x), len(W) + 8), x[:, :len(A)].contiguous(), B.to(x.dtype)
    rows = {"rows d apart": y.view(-1)[:len(x) * len(W)].view(len(x), len(W)),
            "rows d + 8 apart": y[:, :len(W)]}
    return found | {"add": lambda: torch.add(*next(pairs))} | {
        name: lambda out=out: torch.mm(u, B.t(), out=out) for name, out in rows.items()}


def counted(function: Callable) -> Work:
    """The work of one call."""
    with Count() as count:
        function()
    return count.work


def saved(rung: Callable, x: Tensor, layers: list[Layer], gs: list[Tensor]) -> int:
    """Bytes that a call keeps for backward, storages once, without the layers' own tensors."""
    given = {t.untyped_storage().data_ptr() for layer in layers for t in layer[:4]}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step(rung, x, layers, gs)()
    return sum(size for address, size in kept.items() if address not in given)


@dataclass(frozen=True)
class Rates:
    """What was reached in a setting: FLOPs a second by kind, bytes a second, seconds a call."""
    flops: dict[str, float]
    bytes: float
    call: float

    def predict(self, work: Work) -> float:
        """Seconds: FLOPs over their rate, bytes over theirs, and the calls."""
        return (sum(n / self.flops[kind] for kind, n in work.flops.items())
                + work.bytes / self.bytes + work.calls * self.call)


def rates(rows: list[Row], setting: Setting) -> Rates:
    """The rates that rows of `measure` show, without what a call costs by itself: the time where
    all is tiny, for the formula with what autograd adds."""
    tiny = {row["name"]: row for row in select(rows, **at(TINY))}
    flops = {row["name"]: row["work"] / max(
        row["seconds"] - tiny[row["name"].replace("bfloat16", "float32")]["seconds"], 1e-12)
        for row in select(rows, **at(setting), kind="part")}
    return Rates(flops, flops.pop("add"), tiny["formula"]["seconds"] / tiny["formula"]["calls"])


def at(setting: Setting) -> dict:
    """The columns that name a setting, to `select` its rows by."""
    return vars(setting)


def measure(setting: Setting, rounds: int = 15, seed: int = 0) -> list[Row]:
    """A row for each rung and part, all timed in turn: the median, the quartiles, and the ratio to
    the frozen layers, its median over the rounds."""
    data = made(setting, seed)
    rungs = {name: step(rung, *data) for name, rung in setting.rungs().items()}
    functions = rungs | parts(*data)
    times = in_turn(functions, rounds)
    rows = []
    for name, function in functions.items():
        low, median, high = np.percentile(times[name], (25, 50, 75))
        work = counted(function)
        rows.append(at(setting) | {
            "kind": "rung" if name in rungs else "part", "name": name, "seconds": median,
            "low": low, "high": high, "ratio": np.median(times[name] / times["frozen"]),
            "calls": work.calls, "work": work.bytes if name == "add" else work.flops.total()})
    return rows


def machine() -> dict[str, str | int]:
    """What the times depend on: the processor, threads, and PyTorch."""
    return {"cpu": hardware(), "threads": torch.get_num_threads(),
            "torch": f"torch {torch.__version__}"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS / "ladder.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    write(args.out, [row | machine() for setting in SETTINGS
                     for row in measure(setting, args.rounds)])
