"""Bottleneck adapters beside LoRA at one parameter budget: quality, time, and no merging.

`python -m lora_lib.experiments.bottleneck` takes about six minutes on one core, in float32. The
rate of each method is the best of a grid on seeds 10 and 11; what is compared are the seeds 0 to 4.
"""

import copy
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lib.experiments.claims import DOES_NOT, HOLDS, Verdict
from lora_lib.experiments.sweep import RESULTS, Row, column, interval, main, read, select
from lora_lib.experiments.trial import adapted, base, made, measure, train
from lora_lib.torch import cross_entropy, merge
from lora_lib.torch.lora import generator_of


class Bottleneck(nn.Module):
    """A block with a small network on its output: y = block(x), then y + up(gelu(down(y))).

    `down` (width, size) is drawn from N(0, 1 / size); `up` (size, width) is zero, so the first
    output is the block's own. After Houlsby et al. 2019, without their biases.
    """

    def __init__(self, block: nn.Module, size: int, width: int, *, seed=None):
        super().__init__()
        dtype = next(block.parameters()).dtype
        self.block = block
        self.down, self.up = (nn.Linear(*shape, bias=False) for shape in
                              ((size, width), (width, size)))
        nn.init.normal_(self.down.weight, std=size**-0.5, generator=generator_of(seed))
        nn.init.zeros_(self.up.weight)
        self.to(dtype)

    def update(self, y: Tensor) -> Tensor:
        """What is added to the block's output y (..., size)."""
        return self.up(F.gelu(self.down(y)))

    def forward(self, *args) -> Tensor:
        y = self.block(*args)
        return y + self.update(y)


def insert(model: nn.Module, width: int, *, seed: int | None = None) -> nn.Module:
    """Put one after every attention and every MLP, and freeze all else. Returns the same model."""
    model.requires_grad_(False)
    generator = generator_of(seed)
    for layer in model.model["layers"]:
        for name in ("self_attn", "mlp"):
            block = Bottleneck(getattr(layer, name), model.config.hidden_size, width,
                               seed=generator)
            setattr(layer, name, block)
    return model


def bottlenecks(model: nn.Module) -> list[Bottleneck]:
    return [module for module in model.modules() if isinstance(module, Bottleneck)]


@torch.no_grad()
def _fits(model, tokens):
    """For every bottleneck: the block's outputs y on `tokens`, with a column of ones, what it adds
    to them, u, and the matrix (size + 1, size) of least squares from the one to the other."""
    seen = {}
    hooks = [module.block.register_forward_hook(
        lambda _, args, out, module=module: seen.update({module: out.flatten(0, -2)}))
        for module in bottlenecks(model)]
    model(tokens)
    for hook in hooks:
        hook.remove()
    for module, y in seen.items():
        u, y = module.update(y).double(), y.double()
        inputs = torch.cat([y, torch.ones_like(y[:, :1])], dim=1)
        yield module, inputs, u, torch.linalg.lstsq(inputs, u).solution


@torch.no_grad()
def not_linear(model: nn.Module, tokens: Tensor) -> list[float]:
    """For every bottleneck, the part of its update that no matrix and bias can give.

    |u - M y - b| / |u| over the positions of `tokens` (batch, length), with the M and b of least
    squares; 0 for an update that could be merged into the block's last weight, NaN for none.
    """
    return [((u - y @ fit).norm() / u.norm()).item() for _, y, u, fit in _fits(model, tokens)]


@torch.no_grad()
def merge_fits(model: nn.Module, tokens: Tensor) -> nn.Module:
    """A plain copy of the model with the M and b of `not_linear` in the place of every bottleneck.

    They go into the block's last linear layer: W becomes W + M W, and b its bias.
    """
    model = copy.deepcopy(model)
    fits = {module: fit for module, _, _, fit in _fits(model, tokens)}
    for layer in model.model["layers"]:
        for name, last in (("self_attn", "o_proj"), ("mlp", "down_proj")):
            module = getattr(layer, name)
            W, fit = getattr(module.block, last).weight, fits[module].to(module.down.weight.dtype)
            linear = nn.Linear(W.shape[1], W.shape[0]).to(W.dtype)
            linear.weight.copy_(W + fit[:-1].T @ W)
            linear.bias.copy_(fit[-1])
            setattr(module.block, last, linear)
            setattr(layer, name, module.block)
    return model


# ------------------------------------------------------------------------------- the runs
TASKS = ("instructions 6", "lookup 3")
LORA, BOTTLENECK = METHODS = ("LoRA", "bottleneck")
RANK, WIDTH = 4, 19                      # 29,184 numbers each: 28 adapters, or 8
TUNING, SEEDS = (10, 11), range(5)
RATES = (4e-3, 8e-3, 1.6e-2)             # where the grid begins
STEPS = 200


def start(method: str, *, seed: int = 0, dtype: str = "float64") -> nn.Module:
    """The pretrained model with adapters of this kind, ready for training.

    Raises ValueError for an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if method == LORA:
        return adapted("all", RANK, 2 * RANK, seed=seed, dtype=dtype)
    return insert(base(dtype), WIDTH, seed=seed)


def trial(name: str, method: str, lr: float, steps: int = STEPS, batch_size: int = 8,
          seed: int = 0, dtype: str = "float64") -> dict[str, float]:
    """Adapt, train, measure; for a bottleneck also the least part that is not linear."""
    model = start(method, seed=seed, dtype=dtype)
    train(model, made(name), lr=lr, steps=steps, batch_size=batch_size, seed=seed)
    tokens = torch.from_numpy(model.tokenizer.batch(made(name).test[:100])[0])
    shares = not_linear(model, tokens)
    return measure(model, made(name)) | {"not linear": min(shares, default=0.0)}


def _medians(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """The median time of each call, in turns, without the first fifth.

    It is the processor's time: on one thread that is the time on a free core, and what else the
    machine does, which interrupts the same call of every turn, is not in it.
    """
    taken = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.process_time()
            call()
            taken[name].append(time.process_time() - begin)
    return {name: float(np.median(times[rounds // 5:])) for name, times in taken.items()}


def call_times(seed: int, rounds: int = 200) -> dict[str, float]:
    """One token through the model with each kind of adapter, over the time of the bare model."""
    make = lambda method: start(method, seed=seed, dtype="float32")
    models = {"base": base("float32"), "LoRA merged": merge(make(LORA)),
              "LoRA not merged": make(LORA), "bottleneck": make(BOTTLENECK)}
    token = torch.tensor([[2]])
    with torch.no_grad():
        times = _medians({name: lambda model=model: model.eval()(token)
                          for name, model in models.items()}, rounds)
    return {name: value / times["base"] for name, value in times.items() if name != "base"}


def step_time(seed: int, rounds: int = 15) -> float:
    """A training step with bottlenecks over one with LoRA."""
    def step(method):
        model = start(method, seed=seed, dtype="float32").train()
        inputs, labels = map(torch.from_numpy, model.tokenizer.batch(made(TASKS[0]).train[:8]))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

        def call():
            cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        return call
    times = _medians({method: step(method) for method in METHODS}, rounds)
    return times[BOTTLENECK] / times[LORA]


def speed(seed: int) -> dict[str, float]:
    """All ratios of times."""
    return call_times(seed) | {"step": step_time(seed)}


def _point(task, method, lr, seed):
    return {"name": task, "method": method, "lr": lr, "seed": seed, "dtype": "float32"}


def grid(task: str, method: str) -> tuple[list[float], float | None]:
    """The rates to try, and the best of those tried, by the mean test loss of the tuning seeds.

    The grid goes on at a side for as long as the best stands at its end.
    """
    rows = read("bottleneck") if (RESULTS / "bottleneck.csv").exists() else []
    rows = [r for r in select(rows, name=task, method=method, steps=STEPS)
            if r["seed"] in TUNING]
    loss = {lr: column(select(rows, lr=lr), "loss").mean() for lr in {r["lr"] for r in rows}}
    rates, best = sorted({*RATES, *loss}), min(loss, key=loss.get, default=None)
    if set(rates) == set(loss):
        rates += [best / 2] * (best == rates[0]) + [best * 2] * (best == rates[-1])
    return rates, best


def tuning() -> list[dict]:
    """The grid of every task and method, as far as it is known by now."""
    return [_point(task, method, lr, seed) for task in TASKS for method in METHODS
            for lr in grid(task, method)[0] for seed in TUNING]


def comparison() -> list[dict]:
    return [_point(task, method, grid(task, method)[1], seed)
            for task in TASKS for seed in SEEDS for method in METHODS]


def longer() -> list[dict]:
    """The last task with twice the steps, on the first seeds."""
    task = TASKS[-1]
    return [_point(task, method, grid(task, method)[1], seed) | {"steps": 2 * STEPS}
            for seed in SEEDS[:3] for method in METHODS]


# ------------------------------------------------------------------------ what the runs say
def compared(task: str, method: str, steps: int = STEPS) -> list[Row]:
    """The runs of a method at its own rate, in the order of the seeds, without the tuning's."""
    rows = select(read("bottleneck"), name=task, method=method, lr=grid(task, method)[1],
                  steps=steps)
    return sorted((r for r in rows if r["seed"] in SEEDS), key=lambda r: r["seed"])


def lead(task: str, name: str = "match") -> np.ndarray:
    """The bottleneck's minus LoRA's, seed by seed."""
    return column(compared(task, BOTTLENECK), name) - column(compared(task, LORA), name)


def verdicts() -> list[Verdict]:
    """With 95 % confidence: right answers that are as good fall behind by less than 0.05, and a
    call that costs time takes 0.05 calls of the bare model more than with merged LoRA. An update
    cannot be merged exactly when more than 0.01 of it is beyond every matrix."""
    shown = lambda values, digits=2: "{:+.{d}f} ± {:.{d}f}".format(*interval(values), d=digits)
    level = [task for task in TASKS if interval(lead(task))[0] - interval(lead(task))[1] > -0.05]
    as_good = HOLDS if len(level) == len(TASKS) else (
        f"{HOLDS} if the task is {level[0]!r}" if level else DOES_NOT)
    rows = read("bottleneck_speed")
    bottleneck, merged = column(rows, "bottleneck"), column(rows, "LoRA merged")
    least = min(column(compared(task, BOTTLENECK), "not linear").min() for task in TASKS)
    mean, half = interval(bottleneck - merged)
    only = mean - half > 0.05 and least > 0.01
    times = lambda values: "{:.2f} ± {:.2f}".format(*interval(values))
    return [
        Verdict("bottleneck adapters learn as well as LoRA with as many numbers", "summary",
                as_good, "bottleneck minus LoRA: " + "; ".join(
                    f"{task}, right answers {shown(lead(task))}, loss {shown(lead(task, 'loss'))}"
                    for task in TASKS)),
        Verdict("LoRA can be merged exactly, a bottleneck adapter cannot and costs time", "summary",
                HOLDS if only else DOES_NOT,
                f"one call, over the bare model's time: merged LoRA {times(merged)}, bottleneck "
                f"{times(bottleneck)}; at least {least:.0%} of every update is beyond any matrix"),
    ]


if __name__ == "__main__":
    main(speed, [{"seed": seed} for seed in SEEDS], "bottleneck_speed")
    done = None
    while (wanted := tuning()) != done:                        # a grid may have to go on
        main(trial, wanted, "bottleneck")
        done = wanted
    main(trial, comparison(), "bottleneck")
    main(trial, longer(), "bottleneck")
