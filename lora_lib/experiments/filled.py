"""How many made-up facts fit into the numbers that are trained, until no more do: the small model.

`python -m lora_lib.experiments.filled` takes half an hour on one core, in float32.
Chapter 8 has its curves; the verdicts wait until the runs are whole.

Only the feed-forward part of the last layer is trained, so what enters it is computed once and a
step sees all facts. The model chooses among a question's possible answers, since which kind of word
is wanted is not what shall be measured. For each size people are doubled until 5 % more is known at
most: then it is full, for this number of steps, and its capacity is the most that was known on the
way. The rate is the best on the mean of three seeds that are not compared, with four times the
people that the ladder begins with.

This is the second design. In the first the rate was the best on one seed, with twice the people. It
lay at the edge of what trains: with more people some seeds knew half of what others did, and rank 4
knew less with 512 people than with 256. That is no capacity.

Written down before the runs. Known were older ones that were not full (0.15 and 0.17 bits for a
number), and one seed's look at this design with all words as answers: 0.25 bits for each of 2112.
- the bits known grow with the numbers trained: their logarithms have a slope of 0.8 to 1.25 (holds)
- LoRA holds as many bits for each number as whole neurons do, to a factor of 1.5 (undecided)
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from lora_lib.experiments.claims import Claim, Verdict
from lora_lib.experiments.intervals import by_seeds, ratio
from lora_lib.experiments.sweep import Row, column, grow, read_if_any, select, wider
from lora_lib.experiments.trial import base
from lora_lib.tasks import BIOGRAPHY, BITS_PER_PERSON, Pair, biographies
from lora_lib.torch import fine_tune, inject, warmup_cosine

NAME, SEEDS, TUNING = "filled", range(5), (10, 11, 12)
STEPS, LADDER, GROWTH = 800, (8, 16, 32, 64, 128, 256, 512, 1024), 1.05
# What is trained, and where its ladder of people begins: adapters of these ranks, with alpha = 2 r,
# on the three matrices of 96 by 256; or so many of the 256 neurons whole.
ADAPTERS = tuple(("LoRA", rank) for rank in (1, 2, 4))
WHOLE = ("whole", 8)
FIRST = {("LoRA", 1): 16, ("LoRA", 2): 32, ("LoRA", 4): 64, WHOLE: 32}
RATES = {"LoRA": (1e-2, 2e-2, 4e-2), "whole": (1e-3, 2e-3, 4e-3)}        # where the grids begin
NAMES = {**{adapter: f"LoRA, rank {adapter[1]}" for adapter in ADAPTERS},
         WHOLE: f"{WHOLE[1]} neurons, whole"}

GROWS = Claim("new knowledge: capacity grows with the numbers trained", "8",
              "slope of log(bits known at saturation) on log(numbers trained), ranks 1 to 4",
              0.8, 1.25)
ALIKE = Claim("a number of LoRA's holds as much as one of a whole matrix", "8",
              "bits for each number trained at saturation, LoRA of rank 2 over 8 whole neurons",
              1 / 1.5, 1.5)


class Last(nn.Module):
    """The feed-forward part of a language model's last layer, which it shares with it.

    `below` gives what enters it at one position `at` (n,) of each row of tokens (n, length):
    (n, hidden); no training here changes that. `forward` scores the words `offered` (n, choices),
    token numbers, -1 where there is none: (n, choices).
    """

    def __init__(self, model):
        super().__init__()
        last = model.model["layers"][-1]
        self.norm, self.mlp, self.rest = last.post_attention_layernorm, last.mlp, [model]

    def below(self, tokens: Tensor, at: Tensor) -> Tensor:
        seen: list[Tensor] = []
        hook = self.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with torch.no_grad():
            self.rest[0](tokens)
        hook.remove()
        return seen[0][torch.arange(len(at)), at]

    def forward(self, x: Tensor, offered: Tensor) -> Tensor:
        x = self.rest[0].model["norm"](x + self.mlp(self.norm(x)))
        scores = torch.einsum("nh,nch->nc", x, self.rest[0].lm_head.weight.detach()[offered])
        return scores.masked_fill(offered < 0, -math.inf)


def facts(tokenizer, pairs: list[Pair]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Biographies as tokens (n, length), the position (n,) before the answer, the words that could
    be the answer (n, choices), filled up with -1, and which of them is it (n,)."""
    tokens, labels = map(torch.from_numpy, tokenizer.batch(pairs))
    at = (labels != -100).int().argmax(dim=1)
    lists = [answers for _, answers in BIOGRAPHY.values()]
    most = max(map(len, lists))
    word = {answer: tokenizer.encode(f" {answer}")[0] for answers in lists for answer in answers}
    offered = [[word[a] for a in answers] + [-1] * (most - len(answers)) for answers in lists]
    right = [lists[i % len(lists)].index(answer.strip()) for i, (_, answer) in enumerate(pairs)]
    return (tokens[:, :at.max() + 1], at,
            torch.tensor(offered * (len(pairs) // len(lists))), torch.tensor(right))


def prepare(kind: str, size: int, *, seed: int = 0, dtype: str = "float32") -> Last:
    """The last layer ready for training: adapters of rank `size`, or `size` neurons whole."""
    top = Last(base(dtype))
    if kind == "LoRA":
        inject(top, "all-linear", size, 2 * size, seed=seed)
        return top
    train_neurons(top.requires_grad_(False).mlp, size)
    return top


def train_neurons(mlp: nn.Module, count: int) -> None:
    """Train the first `count` neurons of a feed-forward part, and nothing else of it: a neuron is a
    row of each matrix, of `down_proj` a column."""
    for name, weight in mlp.named_parameters():
        weight.requires_grad_(True)
        kept = torch.zeros_like(weight)
        (kept.T if "down" in name else kept)[:count] = 1
        weight.register_hook(lambda gradient, kept=kept: gradient * kept)


@lru_cache
def numbers(kind: str, size: int) -> int:
    """How many numbers are trained."""
    config = base().config
    hidden, inner = config.hidden_size, config.intermediate_size
    return 3 * size * (hidden + inner if kind == "LoRA" else hidden)


def learn(people: int, kind: str, size: int, lr: float, steps: int = STEPS, seed: int = 0,
          dtype: str = "float32", schedule: Callable[[int], float] | None = None) -> np.ndarray:
    """Learn `people` biographies by heart, every step on all of them: the bits known before each
    step, and after the last, (steps + 1,). The rate is constant unless `schedule` says otherwise.

    A run that diverges raises FloatingPointError.
    """
    top, pairs = prepare(kind, size, seed=seed, dtype=dtype), biographies(people, seed)
    tokens, at, offered, right = facts(top.rest[0].tokenizer, pairs)
    data = top.below(tokens, at), offered, right
    losses = fine_tune(top, data, steps=steps, batch_size=len(pairs), lr=lr, seed=seed,
                       schedule=schedule, progress=False)
    with torch.no_grad():
        losses.append(nn.functional.cross_entropy(top(*data[:2]), right).item())
    return people * BITS_PER_PERSON - np.array(losses) * len(pairs) / math.log(2)


def trial(people: int, kind: str, size: int, lr: float, steps: int = STEPS,
          seed: int = 0) -> dict[str, float]:
    """Learn with a short warmup and a cosine; the bits known in the end, and those missing. A run
    whose loss is no longer finite knows nothing."""
    offered = people * BITS_PER_PERSON
    try:
        known = learn(people, kind, size, lr, steps, seed,
                      schedule=warmup_cosine(steps, warmup=steps // 20))[-1]
    except FloatingPointError:
        known = 0.0
    return {"known": float(known), "missing": offered - known}


def rows(adapter: tuple[str, int], **where) -> list[Row]:
    """The rows of an adapter, or of whole neurons."""
    return select(read_if_any(NAME), kind=adapter[0], size=adapter[1], steps=STEPS, **where)


def rates(adapter: tuple[str, int]) -> list[float]:
    """The rates of the tuning seeds, as far as they are known by now."""
    return wider(tuning(adapter), RATES[adapter[0]], "missing")


def tuning(adapter: tuple[str, int]) -> list[Row]:
    """The runs of the tuning seeds."""
    return [row for row in rows(adapter, people=4 * FIRST[adapter]) if row["seed"] in TUNING]


def best_rate(adapter: tuple[str, int]) -> float:
    """The rate at which the tuning seeds know most, on the mean."""
    missing: dict[float, list[float]] = {}
    for row in tuning(adapter):
        missing.setdefault(row["lr"], []).append(row["missing"])
    return min(missing, key=lambda lr: np.mean(missing[lr]))


def compared(adapter: tuple[str, int], **where) -> list[Row]:
    """The runs of the seeds that are compared, at the best rate."""
    return [row for row in rows(adapter, lr=best_rate(adapter), **where) if row["seed"] in SEEDS]


def ladder(adapter: tuple[str, int]) -> tuple[int, ...]:
    """The numbers of people that have been run with every seed, in order."""
    return tuple(people for people in LADDER
                 if set(SEEDS) <= {row["seed"] for row in compared(adapter, people=people)})


def known(adapter: tuple[str, int], people: int) -> np.ndarray:
    """The bits known, seed by seed (seeds,)."""
    return column(sorted(compared(adapter, people=people), key=lambda row: row["seed"]), "known")


def full(adapter: tuple[str, int]) -> bool:
    """Whether twice as many people have brought 5 % more at most."""
    *_, less, more = (0, 0, *ladder(adapter))
    return less > 0 and known(adapter, more).mean() <= GROWTH * known(adapter, less).mean()


def points() -> list[dict]:
    """The grid of every adapter; then, at its best rate, all seeds with twice as many people until
    it is full or the ladder ends."""
    found = []
    for adapter in (*ADAPTERS, WHOLE):
        kind, size = adapter
        point = lambda people, lr, seed, kind=kind, size=size: {
            "people": people, "kind": kind, "size": size, "lr": lr, "seed": seed}
        tried = [(lr, seed) for lr in rates(adapter) for seed in TUNING]
        found += [point(4 * FIRST[adapter], lr, seed) for lr, seed in tried]
        if {(row["lr"], row["seed"]) for row in tuning(adapter)} < set(tried):
            continue
        first = LADDER.index(FIRST[adapter])
        count = max(2, len(ladder(adapter)) + (not full(adapter)))
        found += [point(people, best_rate(adapter), seed) for seed in SEEDS
                  for people in LADDER[first:first + count]]
    return found


# ------------------------------------------------------------------------- what the runs say
def capacity(adapter: tuple[str, int]) -> np.ndarray:
    """The bits known by each seed (seeds,) with the people of which most is known. Raises
    ValueError while more people still bring more."""
    if not full(adapter):
        raise ValueError(f"{NAMES[adapter]} is not full with {ladder(adapter)} people")
    return max((known(adapter, people) for people in ladder(adapter)), key=np.mean)


def per_number(adapter: tuple[str, int]) -> np.ndarray:
    """The bits known at saturation for each number trained (seeds,)."""
    return capacity(adapter) / numbers(*adapter)


def slopes() -> np.ndarray:
    """The slope of log(bits at saturation) on log(numbers), by least squares, of each seed."""
    sizes = np.log([numbers(*adapter) for adapter in ADAPTERS])
    return np.polyfit(sizes, np.log([capacity(adapter) for adapter in ADAPTERS]), 1)[0]


def judged() -> list[Verdict]:
    """The two claims."""
    bits = ", ".join(f"{NAMES[a]} {per_number(a).mean():.2f}" for a in (*ADAPTERS, WHOLE))
    return [GROWS.judged(by_seeds(slopes()), form=".2f", note=f"bits for a number: {bits}"),
            ALIKE.judged(ratio(per_number(("LoRA", 2)) / per_number(WHOLE)), form=".2f")]


if __name__ == "__main__":
    grow(trial, points, NAME)
