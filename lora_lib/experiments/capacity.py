"""How many made-up facts an adapter holds: bits known against bits offered, by its size.

`python -m lora_lib.experiments.capacity` takes about a quarter of an hour on one core, in float32.
Only the last layer is adapted, so what enters it is computed once. The rate of each adapter is the
best of a grid on seed 10; what is compared are the seeds 0 to 2.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lib.experiments.claims import DOES_NOT, HOLDS, Verdict
from lora_lib.experiments.sweep import RESULTS, Row, column, grow, main, read, select, shown
from lora_lib.experiments.trial import TARGETS, base, bits_known
from lora_lib.tasks import BITS_PER_PERSON, biographies
from lora_lib.torch import fine_tune, inject, warmup_cosine
from lora_lib.models.tales import rotary, rotate

# What is trained: (targets, rank, the first layer that is adapted); alpha is 2 * rank.
FULL = ("full", 0, 3)
ADAPTERS = TINY, SMALL, MIDDLE, LARGE = (("q,v", 1, 3), ("all", 1, 3), ("all", 4, 3),
                                         ("all", 16, 3))
NAMES = {TINY: "q,v, rank 1", SMALL: "all linear, rank 1", MIDDLE: "all linear, rank 4",
         LARGE: "all linear, rank 16", FULL: "the whole layer"}
PEOPLE, SEEDS, TUNING = (8, 16, 32, 64), range(3), 10
RATES = {FULL: (1e-3, 2e-3, 4e-3), LARGE: (5e-3, 1e-2, 2e-2)}            # where the grid begins
OTHER_RATES = (1e-2, 2e-2, 4e-2)


class Top(nn.Module):
    """The last layers of a language model, from `first` on, which they share with it.

    `below` gives what enters them, (batch, length, hidden), and no adapter here changes that;
    `forward` makes of it the logits (batch, vocab) at one position `at` (batch,) of each row, the
    only one for which the last layer is computed.
    """

    def __init__(self, model, first: int):
        super().__init__()
        self.first, self.config, self.layers = first, model.config, model.model["layers"][first:]
        self.rest = [model]                                  # in a list: no part of this module

    def below(self, tokens: Tensor) -> Tensor:
        inner = self.rest[0].model
        x = inner["embed_tokens"](tokens)
        for layer in inner["layers"][:self.first]:
            x = layer(x, *self._angles(x))
        return x

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        cosines, sines = self._angles(x)
        *before, last = self.layers
        for layer in before:
            x = layer(x, cosines, sines)
        attention, normed, rows = last.self_attn, last.input_layernorm(x), torch.arange(len(x))
        heads = lambda y: y.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        q = heads(attention.q_proj(normed[rows, at])[:, None])
        q = rotate(q, cosines[at][:, None, None], sines[at][:, None, None])
        k, v = heads(attention.k_proj(normed)), heads(attention.v_proj(normed))
        seen = torch.arange(x.shape[1]) <= at[:, None]
        mixed = F.scaled_dot_product_attention(q, rotate(k, cosines, sines), v,
                                               attn_mask=seen[:, None, None])
        x = x[rows, at] + attention.o_proj(mixed.transpose(1, 2).flatten(-2))[:, 0]
        x = x + last.mlp(last.post_attention_layernorm(x))
        return self.rest[0].lm_head(self.rest[0].model["norm"](x))

    def _angles(self, x):
        return rotary(x.shape[1], self.config.hidden_size // self.config.num_heads,
                      self.config.rope_theta, like=x)


def facts(tokenizer, pairs) -> tuple[Tensor, Tensor, Tensor]:
    """Biographies as tokens (n, length), the position before the answer's word, and that word."""
    tokens, labels = map(torch.from_numpy, tokenizer.batch(pairs))
    at = (labels != -100).int().argmax(dim=1)
    return tokens[:, :at.max() + 1], at, labels[torch.arange(len(at)), at]


def trial(people: int, targets: str, rank: int, lr: float, first: int = 3, steps: int = 500,
          seed: int = 0, dtype: str = "float64") -> dict[str, float]:
    """Learn `people` biographies by heart, every step on all of them; the bits known
    and offered, and the numbers trained. "full" trains the layers from `first` on whole. A run
    whose loss is no longer finite knows nothing, and is sure of it."""
    model, pairs = base(dtype), biographies(people, seed)
    top = Top(model, first)
    tokens, at, words = facts(model.tokenizer, pairs)
    with torch.no_grad():
        x = top.below(tokens)
    if targets != "full":
        inject(top, TARGETS[targets], rank, 2 * rank, seed=seed)
    result = {"offered": people * BITS_PER_PERSON,
              "parameters": sum(p.numel() for p in top.parameters() if p.requires_grad)}
    try:
        fine_tune(top, (x, at, words), steps=steps, batch_size=len(x), lr=lr, seed=seed,
                  schedule=warmup_cosine(steps, warmup=steps // 20), progress=False)
    except FloatingPointError:
        return result | {"known": -math.inf}
    return result | {"known": bits_known(model, pairs)}


def _point(adapter, people, lr, seed, steps=500):
    targets, rank, first = adapter
    return {"people": people, "targets": targets, "rank": rank, "lr": lr, "first": first,
            "steps": steps, "seed": seed, "dtype": "float32"}


def kept(adapter: tuple[str, int, int], **where) -> list[Row]:
    """The rows of an adapter."""
    rows = read("capacity") if (RESULTS / "capacity.csv").exists() else []
    return select(rows, **dict(zip(("targets", "rank", "first"), adapter)) | where)


TUNED_AT = 32


def grid(adapter: tuple[str, int, int]) -> tuple[list[float], float | None]:
    """The rates to try on the tuning seed, and the one with the most bits of those tried.

    The grid goes on at a side for as long as the best stands at its end.
    """
    known = {row["lr"]: row["known"] for row in kept(adapter, seed=TUNING)}
    rates = sorted({*RATES.get(adapter, OTHER_RATES), *known})
    best = max(known, key=known.get, default=None)
    if set(rates) == set(known):
        rates += [best / 2] * (best == rates[0]) + [best * 2] * (best == rates[-1])
    return rates, best


def best_rate(adapter: tuple[str, int, int]) -> float:
    return grid(adapter)[1]


def tuning(adapters) -> list[dict]:
    return [_point(adapter, TUNED_AT, lr, TUNING) for adapter in adapters
            for lr in grid(adapter)[0]]


def comparison(seeds) -> list[dict]:
    """Every adapter, and the whole layer, with every number of people."""
    return [_point(adapter, people, best_rate(adapter), seed)
            for seed in seeds for adapter in (*ADAPTERS, FULL) for people in PEOPLE]


LONGER = 2000


def longer(seeds=range(2)) -> list[dict]:
    """A full adapter trained four times as long: is the plateau a lack of steps?"""
    return [_point(SMALL, 32, best_rate(SMALL), seed, LONGER) for seed in seeds]


# ------------------------------------------------------------------------- what the runs say
KNOWN = 0.9


def known(adapter: tuple[str, int, int], people: int, steps: int = 500) -> np.ndarray:
    """The bits known, seed by seed, without the tuning's."""
    rows = [row for row in kept(adapter, people=people, steps=steps) if row["seed"] in SEEDS]
    return column(sorted(rows, key=lambda row: row["seed"]), "known")


def parameters(adapter: tuple[str, int, int]) -> int:
    """The numbers that are trained."""
    return int(column(kept(adapter), "parameters")[0])


def curve(adapter: tuple[str, int, int]) -> np.ndarray:
    """The bits known, (seeds, numbers of people)."""
    return np.stack([known(adapter, people) for people in PEOPLE], axis=1)


def per_number(adapter: tuple[str, int, int]) -> np.ndarray:
    """The bits known for each number trained where the mean is greatest, seed by seed."""
    bits = curve(adapter)
    return bits[:, bits.mean(axis=0).argmax()] / parameters(adapter)


def share(adapter: tuple[str, int, int], people: int) -> np.ndarray:
    """The bits known over those offered, seed by seed."""
    return known(adapter, people) / (people * BITS_PER_PERSON)


def verdicts() -> list[Verdict]:
    """Facts are known where the mean share of the bits is 0.9 or more."""
    knows = lambda adapter, people: share(adapter, people).mean() >= KNOWN
    few, many = PEOPLE[0], PEOPLE[-1]
    short = [adapter for adapter in ADAPTERS if not knows(adapter, many)]
    if not short or not knows(FULL, many):
        verdict = DOES_NOT
    elif any(knows(adapter, few) for adapter in short):
        verdict = f"{HOLDS} if the facts outgrow the adapter"
    else:
        verdict = HOLDS
    effect = "; ".join(f"{NAMES[a]} {shown(share(a, few))} and {shown(share(a, many))}"
                       for a in (SMALL, MIDDLE, LARGE, FULL))
    return [Verdict("might need more for entirely new knowledge", "8", verdict,
                    f"share of the bits known of {few} and of {many} people: {effect}")]


if __name__ == "__main__":
    grow(trial, lambda: tuning((*ADAPTERS, FULL)), "capacity")
    main(trial, comparison(SEEDS), "capacity")
    main(trial, longer(), "capacity")
