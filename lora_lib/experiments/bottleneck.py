"""Bottleneck adapters beside LoRA at one parameter budget: quality, time, and no merging.

`python -m lora_lib.experiments.bottleneck` takes about ten minutes on one core, in float32. A seed
draws the examples, the adapters and the order; its own validation examples choose its rate.

The margins were written down before these runs; runs on one draw of the examples, whose rates were
chosen on the test, were known. As everywhere in the course, losses within 0.02 nats are the same,
and times within 5 %. We expected:
- bottlenecks learn as well as LoRA with as many numbers: does not hold
- LoRA can be merged exactly and a bottleneck cannot, since more than 0.01 of its update is beyond
  every matrix; a call through it takes more time than through merged LoRA: both hold
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lib.experiments.claims import Claim, Verdict
from lora_lib.experiments.intervals import by_seeds, ratio
from lora_lib.experiments.latency import medians, stepper
from lora_lib.experiments.sweep import (Row, by_seed, chosen, column, grow, main, narrowed, read,
                                        read_if_any, select, table)
from lora_lib.experiments.trial import adapted, base, made, on_redrawn
from lora_lib.torch import merge
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
SEEDS = range(5)
RATES = (4e-3, 8e-3, 1.6e-2)             # where the grid begins
STEPS = 200

AS_WELL = Claim("bottleneck adapters learn as well as LoRA with as many numbers", "bottleneck",
                "loss in nats, each at its own rate, bottleneck minus LoRA", most=0.02)
NOT_LINEAR = Claim("LoRA can be merged exactly, a bottleneck adapter cannot", "bottleneck",
                   "share of a bottleneck's update that is beyond every matrix, its least", 0.01)
TIME = Claim("a bottleneck adapter costs time at every call, merged LoRA does not", "bottleneck",
             "time of a call with one token, bottleneck over merged LoRA", 1.05)


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
          seed: int = 0, dtype: str = "float32") -> dict[str, float]:
    """Adapt, train on the examples that the seed draws, measure; for a bottleneck also the least
    part that is not linear."""
    model = start(method, seed=seed, dtype=dtype)
    found = on_redrawn(model, name, lr=lr, steps=steps, batch_size=batch_size, seed=seed)
    tokens = torch.from_numpy(model.tokenizer.batch(made(name).test[:100])[0])
    return found | {"not linear": min(not_linear(model, tokens), default=0.0)}


def call_times(seed: int, rounds: int = 200) -> dict[str, float]:
    """One token through the model with each kind of adapter, over the time of the bare model.

    All are frozen, and made in an order that the seed draws, since where a model lies in memory
    moves its times by a few percent.
    """
    make = lambda method: start(method, seed=seed, dtype="float32")
    kinds = {"base": lambda: base("float32"), "LoRA merged": lambda: merge(make(LORA)),
             "LoRA not merged": lambda: make(LORA), "bottleneck": lambda: make(BOTTLENECK)}
    models = {name: kinds[name]().requires_grad_(False)
              for name in np.random.default_rng(seed).permutation(list(kinds))}
    token = torch.tensor([[2]])
    with torch.no_grad():
        times = medians({name: lambda model=model: model.eval()(token)
                          for name, model in models.items()}, rounds)
    return {name: value / times["base"] for name, value in times.items() if name != "base"}


def step_time(seed: int, rounds: int = 15) -> float:
    """A training step with bottlenecks over one with LoRA."""
    def step(method):
        model = start(method, seed=seed, dtype="float32").train()
        inputs, labels = map(torch.from_numpy, model.tokenizer.batch(made(TASKS[0]).train[:8]))
        return stepper(model, inputs, labels)
    times = medians({method: step(method) for method in METHODS}, rounds)
    return times[BOTTLENECK] / times[LORA]


def speed(seed: int) -> dict[str, float]:
    """All ratios of times."""
    return call_times(seed) | {"step": step_time(seed)}


def rows(task: str, method: str, steps: int = STEPS) -> list[Row]:
    """The runs that there are of a method."""
    return select(read_if_any("bottleneck"), name=task, method=method, steps=steps)


def points() -> list[dict]:
    """Both methods on both tasks at every rate of their grids, as far as they are known by now."""
    return by_seed({"name": task, "method": method, "lr": lr, "seed": seed} for task in TASKS
                   for method in METHODS
                   for seed, lr in narrowed(rows(task, method), SEEDS, RATES))


def longer() -> list[dict]:
    """The last task with twice the steps, at the rate that is best for all seeds together."""
    return [{"name": TASKS[-1], "method": method, "lr": best_rate(TASKS[-1], method),
             "seed": seed, "steps": 2 * STEPS} for seed in SEEDS[:3] for method in METHODS]


# ------------------------------------------------------------------------ what the runs say
def best_rate(task: str, method: str) -> float:
    """The rate of the least mean loss on validation examples, among those that all seeds have."""
    rates, valid = table(rows(task, method), "valid")
    return rates[valid.mean(axis=0).argmin()]


def compared(task: str, method: str, steps: int = STEPS) -> list[Row]:
    """Each seed's run at the rate that its own validation examples choose, in their order."""
    return chosen(rows(task, method, steps))


def lead(task: str, name: str = "match") -> np.ndarray:
    """The bottleneck's minus LoRA's, seed by seed."""
    return column(compared(task, BOTTLENECK), name) - column(compared(task, LORA), name)


def verdicts() -> list[Verdict]:
    """What is said of both kinds of adapters."""
    times = read("bottleneck_speed")
    bottleneck, merged = column(times, "bottleneck"), column(times, "LoRA merged")
    least = np.min([column(compared(task, BOTTLENECK), "not linear") for task in TASKS], axis=0)
    answers = "; ".join(f"{task} {by_seeds(lead(task)).text()}" for task in TASKS)
    return [
        AS_WELL.across(lambda c: {task: by_seeds(lead(task, "loss"), c) for task in TASKS},
                       condition="the task is {}", note=f"right answers: {answers}"),
        NOT_LINEAR.judged(by_seeds(least), form=".2f"),
        TIME.judged(ratio(bottleneck / merged), form=".2f", note="over the bare model: bottleneck "
                    f"{ratio(bottleneck).text('.2f')}, merged LoRA {ratio(merged).text('.2f')}"),
    ]


if __name__ == "__main__":
    main(speed, [{"seed": seed} for seed in SEEDS], "bottleneck_speed")
    grow(trial, points, "bottleneck")
    main(trial, longer(), "bottleneck")
