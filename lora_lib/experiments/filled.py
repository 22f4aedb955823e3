"""How many made-up facts fit into the numbers that are trained, until no more do: the small model.

`python -m lora_lib.experiments.filled` takes half an hour on one core, in float32. Chapter 8 has
its curves and its verdicts.

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
from lora_lib.experiments.filling import Filling
from lora_lib.experiments.intervals import by_seeds, ratio
from lora_lib.experiments.sweep import grow
from lora_lib.experiments.trial import base
from lora_lib.tasks import BIOGRAPHY, BITS_PER_PERSON, Pair, biographies
from lora_lib.torch import fine_tune, inject, warmup_cosine

STEPS = 800
# What is trained: adapters of these ranks, with alpha = 2 r, on the three matrices of 96 by 256; or
# so many of the 256 neurons whole.
ADAPTERS = tuple(("LoRA", rank) for rank in (1, 2, 4))
WHOLE = ("whole", 8)
NAMES = {**{adapter: f"LoRA, rank {adapter[1]}" for adapter in ADAPTERS},
         WHOLE: f"{WHOLE[1]} neurons, whole"}
RUNS = Filling("filled", STEPS, seeds=(0, 1, 2, 3, 4), tuning=(10, 11, 12),
               people=(8, 16, 32, 64, 128, 256, 512, 1024),
               begin={adapter: (1e-2, 2e-2, 4e-2) for adapter in ADAPTERS}
               | {WHOLE: (1e-3, 2e-3, 4e-3)},
               first=dict(zip((*ADAPTERS, WHOLE), (16, 32, 64, 32))))

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


# ------------------------------------------------------------------------- what the runs say
def per_number(adapter: tuple[str, int]) -> np.ndarray:
    """The bits known at saturation for each number trained (seeds,)."""
    return RUNS.capacity(adapter) / numbers(*adapter)


def verdicts() -> list[Verdict]:
    """The two claims."""
    bits = ", ".join(f"{NAMES[a]} {per_number(a).mean():.2f}" for a in (*ADAPTERS, WHOLE))
    slopes = RUNS.slopes({adapter: numbers(*adapter) for adapter in ADAPTERS})
    return [GROWS.judged(by_seeds(slopes), form=".2f", note=f"bits for a number: {bits}"),
            ALIKE.judged(ratio(per_number(("LoRA", 2)) / per_number(WHOLE)), form=".2f")]


if __name__ == "__main__":
    grow(trial, RUNS.points, RUNS.name)
