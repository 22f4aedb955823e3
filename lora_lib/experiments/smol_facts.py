"""How many made-up facts fit into the numbers that are trained, until no more do: SmolLM2.

`python -m lora_lib.experiments.smol_facts` takes about an hour on one core.

As on the small model (`lora_lib.experiments.filled`): only the feed-forward part of the last
layer is trained, so what enters it is computed once, which is also kept in the cache's folder; and
the model chooses among a question's possible answers. A step sees 64 facts. People are doubled
until 5 % more is known at most, up to 800: then a method is full, for this number of steps. The
names are the same for every seed, which draws what is true of them, the adapter and the order;
rates are the best on three seeds that are not compared, the ladder's with four times the people
that it begins with, the comparison's with the more people of the two. (This was mended before the
first run: one seed at one number of people chose the rate, which had failed on the small model.)

Written down before the runs. Known were some of one seed at single rates, with the words of all
questions to choose from: rank 1 of this part knew 0.12 and 0.13 bits for a number after 400 looks
at each of 50 and 100 at each of 200 people, and all of it 0.92 of the bits of 200 after 51.
- the bits known grow with the numbers trained: their logarithms have a slope of 0.8 to 1.25 (holds)
- LoRA holds as many bits for each number as whole neurons do, to a factor of 1.5 (undecided)
- new knowledge needs more than LoRA: the whole part knows more by over 0.05 of the bits (holds for
  200 people at ranks 1 and 2, and not for 50 at rank 4; undecided in between)
"""

import copy
import math
import random
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_lib.experiments.claims import Claim, Verdict, untested
from lora_lib.experiments.filled import ALIKE, GROWS, train_neurons
from lora_lib.experiments.filling import Filling, Method
from lora_lib.experiments.intervals import by_seeds, ratio
from lora_lib.experiments.sweep import grow
from lora_lib.files import atomic, cache
from lora_lib.tasks import BIOGRAPHY, BITS_PER_PERSON, biographies
from lora_lib.torch import fine_tune, inject, warmup_cosine

STEPS, BATCH = 1200, 64
HIDDEN, INNER = 576, 1536
# What is trained: adapters of these ranks, with alpha = 2 r, on the three matrices of 576 by 1536;
# or so many of the 1536 neurons whole, up to all.
ADAPTERS = (("LoRA", 1), ("LoRA", 2), ("LoRA", 4))
SOME, ALL = ("whole", 16), ("whole", INNER)
NAMES = {**{adapter: f"rank {adapter[1]}" for adapter in ADAPTERS},
         SOME: f"{SOME[1]} whole neurons", ALL: "all neurons"}
FEW, MANY, KNOWN = 50, 200, 0.9                   # people, and the share of their bits that ALL
                                                  # must know where the others are held against it
RUNS = Filling("smol_facts", STEPS, seeds=(0, 1, 2), tuning=(10, 11, 12),
               people=(50, 100, 200, 400, 800),
               begin={adapter: (5e-3, 1e-2, 2e-2) for adapter in ADAPTERS}
               | {SOME: (1e-3, 2e-3, 4e-3), ALL: (2.5e-4, 5e-4, 1e-3)},
               first=dict(zip((*ADAPTERS, SOME), (50, 100, 200, 200))),
               against=(*ADAPTERS, ALL), compared=(FEW, MANY))
HERE_ALIKE = replace(ALIKE, effect=f"bits for each number trained at saturation, LoRA of "
                                   f"{NAMES[ADAPTERS[-1]]} over {NAMES[SOME]}")
MORE = Claim("might need more for entirely new knowledge", "8",
             "share of the bits known, all of the last feed-forward part trained minus LoRA on it",
             0.05)

LISTS = [answers for _, answers in BIOGRAPHY.values()]
WORDS = list(dict.fromkeys(word for answers in LISTS for word in answers))


@lru_cache
def base() -> nn.Module:
    """The pretrained model, of which only copies are trained."""
    from lora_lib.models import load_pretrained
    return load_pretrained("smollm2")


class Last(nn.Module):
    """A copy of the feed-forward part of a model's last layer, and what the model does after it.

    `below` gives what enters it at the last token of each row, (n, hidden). `forward` scores the
    words `offered` (n, choices), numbers in `WORDS`, -1 where there is none: (n, choices).
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        last = model.model.layers[-1]
        self.norm, self.mlp, self.rest = last.post_attention_layernorm, copy.deepcopy(last.mlp), [
            model]
        first = [model.tokenizer.encode(f" {word}")[0] for word in WORDS]
        self.head = model.lm_head.weight.detach()[first]
        self.requires_grad_(False)

    @torch.no_grad()
    def below(self, rows: list[list[int]]) -> Tensor:
        model, found = self.rest[0], torch.empty(len(rows), self.head.shape[1])
        seen: list[Tensor] = []
        hook = model.model.layers[-1].post_attention_layernorm.register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0][:, -1]))
        by_length: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            by_length.setdefault(len(row), []).append(i)
        for same in by_length.values():
            for some in torch.tensor(same).split(128):
                model.model(input_ids=torch.tensor([rows[i] for i in some]), use_cache=False)
                found[some] = seen.pop()
        hook.remove()
        return found

    def forward(self, x: Tensor, offered: Tensor) -> Tensor:
        x = self.rest[0].model.norm(x + self.mlp(self.norm(x)))
        scores = F.linear(x, self.head).gather(1, offered.clamp(min=0))
        return scores.masked_fill(offered < 0, -math.inf)


@lru_cache
def states() -> Tensor:
    """What enters the part for every question about everyone (5 * people, hidden), kept in a
    file of the cache once it is made."""
    from lora_lib.models import smollm2
    path = cache() / f"{smollm2.folder().name}-facts-{RUNS.people[-1]}.safetensors"
    if not path.exists():
        prompts = [prompt for prompt, _ in biographies(RUNS.people[-1])]
        made = Last(base()).below([base().tokenizer.encode(prompt) for prompt in prompts])
        with atomic(path) as temporary:
            save_file({"x": made}, temporary)
    return load_file(path)["x"]


def truths(people: int, seed: int) -> tuple[Tensor, Tensor]:
    """The words that could answer each question (n, choices), numbers in `WORDS` filled up with -1,
    and which of them does (n,), drawn by the seed."""
    rng, most = random.Random(f"truths {seed}"), max(map(len, LISTS))
    offered = [[WORDS.index(word) for word in answers] + [-1] * (most - len(answers))
               for answers in LISTS]
    right = [rng.randrange(len(answers)) for _ in range(people) for answers in LISTS]
    return torch.tensor(offered).repeat(people, 1), torch.tensor(right)


def prepare(kind: str, size: int, seed: int = 0) -> Last:
    """The part ready for training: adapters of rank `size`, or `size` neurons whole."""
    part = Last(base())
    if kind == "LoRA":
        inject(part, "all-linear", size, 2 * size, seed=seed)
        return part
    train_neurons(part.mlp, size)
    return part


def numbers(kind: str, size: int) -> int:
    """How many numbers are trained."""
    return 3 * size * (HIDDEN + INNER if kind == "LoRA" else HIDDEN)


def trial(people: int, kind: str, size: int, lr: float, steps: int = STEPS,
          seed: int = 0) -> dict[str, float]:
    """Learn `people` biographies by heart; the bits known in the end, those missing, and the
    numbers trained. A run whose loss is no longer finite knows nothing."""
    part, (offered, right) = prepare(kind, size, seed), truths(people, seed)
    x, bits = states()[:len(right)], people * BITS_PER_PERSON
    try:
        fine_tune(part, (x, offered, right), steps=steps, batch_size=BATCH, lr=lr, seed=seed,
                  schedule=warmup_cosine(steps, warmup=steps // 20), progress=False)
        with torch.no_grad():
            loss = F.cross_entropy(part(x, offered), right, reduction="sum").item()
        known = bits - loss / math.log(2)
    except FloatingPointError:
        known = 0.0
    return {"known": known, "missing": bits - known, "numbers": numbers(kind, size)}


# ------------------------------------------------------------------------- what the runs say
def per_number(method: Method) -> np.ndarray:
    """The most bits known for each number trained (seeds,)."""
    return RUNS.most(method) / numbers(*method)


def share(method: Method, people: int) -> np.ndarray:
    """The share of the bits that is known (seeds,)."""
    return RUNS.comparison(method, people) / (people * BITS_PER_PERSON)


def verdicts() -> list[Verdict]:
    """The claims on SmolLM2. What is not full with the most people has no capacity to judge, and
    facts that all numbers together do not learn are no test of a few."""
    bits = "bits for a number: " + ", ".join(
        f"{NAMES[m]} {per_number(m).mean():.2f}" for m in (*ADAPTERS, SOME))
    if open_ended := [NAMES[m] for m in (*ADAPTERS, SOME) if not RUNS.full(m)]:
        why = f"not full with {RUNS.people[-1]} people: {', '.join(open_ended)}; {bits}"
        found = [untested(claim.text, claim.chapter, why) for claim in (GROWS, HERE_ALIKE)]
    else:
        slopes = RUNS.slopes({adapter: numbers(*adapter) for adapter in ADAPTERS})
        found = [GROWS.judged(by_seeds(slopes), form=".2f", note=bits), HERE_ALIKE.judged(
            ratio(per_number(ADAPTERS[-1]) / per_number(SOME)), form=".2f")]
    lacking = [n for n in (FEW, MANY) if share(ALL, n).mean() < KNOWN]
    found.append(untested(
        MORE.text, MORE.chapter, f"even all neurons know {share(ALL, lacking[0]).mean():.2f} of "
        f"the bits of {lacking[0]} people") if lacking else MORE.across(
        lambda c: {f"{NAMES[a]} for {n} people": by_seeds(share(ALL, n) - share(a, n), c)
                   for n in (FEW, MANY) for a in ADAPTERS},
        form="+.2f", condition="it has {}"))
    return [verdict.on("SmolLM2") for verdict in found]


if __name__ == "__main__":
    grow(trial, RUNS.points, RUNS.name)
