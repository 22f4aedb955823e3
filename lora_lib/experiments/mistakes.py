"""Each common mistake, planted in the fine-tuning of a small network from digits to turned digits.

`python -m lora_lib.experiments.mistakes` takes about seven minutes on one core, in float64. Each
rank, and full fine-tuning, has the rate that is best on two seeds; other seeds are compared.
"""

import copy
import random
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from lora_lib import costs
from lora_lib.data import digits
from lora_lib.experiments import latency
from lora_lib.experiments.claims import DOES_NOT, HOLDS, Verdict
from lora_lib.experiments.sweep import RESULTS, column, interval, main, read, run, select, shown
from lora_lib.text import FEELINGS, PEOPLE
from lora_lib.torch import fine_tune, inject, load_pretrained, lora_modules, warmup_cosine

SEEDS, TUNING = range(5), (10, 11)
RANKS = (1, 4, 8, 16, 64)
FEW = 60                                   # training examples, where overfitting is to be seen
RATES = tuple(2.5e-4 * 2**i for i in range(8))           # 0.00025 to 0.032
LOWEST = {0: 2.5e-4, 1: 4e-3, 4: 2e-3, 8: 2e-3, 16: 1e-3, 64: 5e-4}    # where a rank's grid begins


@lru_cache
def _data(turn, examples=0, seed=0):
    """(x, y) to train on, all or `examples` drawn by `seed`, and (x, y) to test on."""
    x, y, *test = map(torch.tensor, digits(turn))
    if examples:
        drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:examples]
        x, y = x[drawn], y[drawn]
    return (x, y), tuple(test)


@lru_cache
def _pretrained(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
                              nn.Linear(128, 10)).double()
    fine_tune(model, _data(0)[0], steps=400, batch_size=64, lr=3e-3, seed=seed, progress=False)
    return model.eval()


def pretrained(seed: int) -> nn.Sequential:
    """A network that reads upright digits, 64 to 128 to 128 to 10, in float64; a fresh copy."""
    return copy.deepcopy(_pretrained(seed))


def adapted(seed: int, rank: int = 8, **options) -> nn.Sequential:
    """The same with fresh adapters on the first two layers, where ranks up to 64 fit."""
    return inject(pretrained(seed), ["0", "2"], rank, 2 * rank, seed=seed, **options)


def train(model, seed: int, *, lr: float = 1e-2, steps: int = 400,
          examples: int = 0) -> list[float]:
    """Teach it the digits turned by 90 degrees, all of them or `examples` drawn by the seed."""
    return fine_tune(model, _data(90, examples, seed)[0], steps=steps,
                     batch_size=min(64, examples or 64), lr=lr, seed=seed, progress=False)


@torch.no_grad()
def score(model, data=None) -> float:
    """The accuracy on (x, y), by default the test images turned by 90 degrees."""
    x, y = data or _data(90)[1]
    return (model(x).argmax(1) == y).double().mean().item()


# ------------------------------------------------------- the mistakes, one function each
@lru_cache(maxsize=16)
def _trained(seed, rank, dropout, lr, steps, examples):
    model = adapted(seed, rank, dropout=dropout)
    train(model, seed, lr=lr, steps=steps, examples=examples)
    return model


def none(seed, *, rank=8, dropout=0.0, lr=1e-2, steps=400, examples=0):
    return copy.deepcopy(_trained(seed, rank, dropout, lr, steps, examples))


def full_fine_tuning(seed, *, rank, **how):
    model = pretrained(seed)
    train(model, seed, **how)
    return model


def base_not_frozen(seed, *, rank, **how):
    """What is left when the adapter alone is put on a fresh base: its file holds no more."""
    model = adapted(seed, rank).requires_grad_(True)
    train(model, seed, **how)
    fresh = adapted(seed, rank)
    for layer, source in zip(lora_modules(fresh).values(), lora_modules(model).values()):
        layer.A, layer.B = source.A, source.B
    return fresh


def both_random(seed, *, rank, **how):
    model = adapted(seed, rank)
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_modules(model).values():
        layer.B.data.normal_(generator=generator)
    train(model, seed, **how)
    return model


def both_zero(seed, *, rank, **how):
    model = adapted(seed, rank)
    for layer in lora_modules(model).values():
        layer.A.data.zero_()
    train(model, seed, **how)
    return model


def sixteen_bit_adapter(seed, *, rank, **how):
    model = adapted(seed, rank, dtype=torch.bfloat16)
    train(model, seed, **how)
    return model


def optimizer_before_injection(seed, *, rank, lr, steps, **how):
    model = pretrained(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    inject(model, ["0", "2"], rank, 2 * rank, seed=seed)
    x, y = _data(90)[0]
    for rows in torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).split(64):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model


def scaling_forgotten(seed, **how):
    model = none(seed, **how)
    for layer in lora_modules(model).values():
        layer.linear.weight.data += layer.B.data @ layer.A.data
        layer.merged = True
    return model


def merged_twice(seed, **how):
    model = none(seed, **how)
    for layer in lora_modules(model).values():
        layer.linear.weight.data += 2 * layer.delta_weight().data
        layer.merged = True
    return model


def swapped_in_a_square_layer(seed, **how):
    """A loader that takes A for B: transposed, each has the other's shape in a square layer."""
    model = none(seed, **how)
    layer = lora_modules(model)["2"]
    layer.A, layer.B = nn.Parameter(layer.B.data.T.clone()), nn.Parameter(layer.A.data.T.clone())
    return model


def head_not_saved(seed, *, rank, **how):
    """The last layer was trained beside the adapters, and only they were kept."""
    model = adapted(seed, rank)
    model[4].requires_grad_(True)
    train(model, seed, **how)
    model[4] = pretrained(seed)[4]
    return model


def dropout_left_on(seed, **how):
    model = none(seed, dropout=0.5, **how)
    torch.manual_seed(seed)
    return model.train()


def dropout_off_again(seed, **how):
    return dropout_left_on(seed, **how).eval()


# --------------------------------------------- two words that the small language model never met
GLAD = ("brave", "calm", "glad", "proud")


def grown(seed: int):
    """The language model with two new tokens, whose rows in the tied embedding are small noise."""
    model = load_pretrained(dtype=torch.float64)
    old = model.model.embed_tokens.weight.data
    new = torch.randn(2, old.shape[1], generator=torch.Generator().manual_seed(seed)) * 0.02
    model.model.embed_tokens = nn.Embedding.from_pretrained(torch.cat([old, new.to(old.dtype)]))
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def moods(tokenizer, n: int, seed) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels (n, length): "Mira felt calm." is followed by one new token for the glad
    feelings and by the other for the rest."""
    rng, rows, answers = random.Random(f"moods {seed}"), [], []
    for _ in range(n):
        feeling = rng.choice(FEELINGS)
        text = f"{rng.choice(PEOPLE)} felt {feeling}."
        rows.append([tokenizer.end, *tokenizer.encode(text)])
        answers.append(len(tokenizer) + (feeling in GLAD))
    inputs = torch.tensor(rows)
    labels = torch.full(inputs.shape, -100)
    labels[:, -1] = torch.tensor(answers)
    return inputs, labels


def new_words(seed: int, train_embedding: bool) -> float:
    """Teach the moods with adapters on all linear layers; the share of right answers."""
    model = inject(grown(seed), "all-linear", 8, 16, seed=seed)
    model.model.embed_tokens.weight.requires_grad_(train_embedding)
    fine_tune(model, moods(model.tokenizer, 500, "train"), steps=100, batch_size=16, lr=5e-3,
              seed=seed, schedule=warmup_cosine(100, 5), progress=False)
    inputs, labels = moods(model.tokenizer, 200, "test")
    with torch.no_grad():
        return (model(inputs)[:, -1].argmax(-1) == labels[:, -1]).double().mean().item()


MISTAKES = {f.__name__.replace("_", " "): f for f in (
    none, full_fine_tuning, base_not_frozen, both_random, both_zero, sixteen_bit_adapter,
    optimizer_before_injection, scaling_forgotten, merged_twice, swapped_in_a_square_layer,
    head_not_saved, dropout_left_on, dropout_off_again)}


def trial(mistake: str, rank: int = 8, lr: float = 1e-2, steps: int = 400, examples: int = 0,
          seed: int = 0) -> dict[str, float]:
    """Make one mistake; the accuracy on test and on training images after it."""
    with torch.random.fork_rng():
        model = MISTAKES[mistake](seed, rank=rank, lr=lr, steps=steps, examples=examples)
        return {"test": score(model), "fit": score(model, _data(90, examples, seed)[0])}


# A method is the rank of its adapters; 0 is full fine-tuning.
def _method(rank):
    return {"mistake": "none", "rank": rank} if rank else {"mistake": "full fine tuning"}


def _rows(**where):
    """The kept rows with these arguments, the trial's defaults for others but the rate."""
    usual = {"mistake": "none", "rank": 8, "steps": 400, "examples": 0}
    rows = read("mistakes") if (RESULTS / "mistakes.csv").exists() else []
    return select(rows, **usual | where)


def tried(rank: int, examples: int = 0) -> dict[float, float]:
    """The mean accuracy on the tuning seeds of each rate that was tried, in their order."""
    scores = {}
    for row in _rows(**_method(rank), examples=examples):
        if row["seed"] in TUNING:
            scores.setdefault(row["lr"], []).append(row["test"])
    return {lr: round(sum(scores[lr]) / len(scores[lr]), 6) for lr in sorted(scores)}


def best_rate(rank: int, examples: int = 0) -> float:
    """The rate with the highest accuracy on the tuning seeds; the lowest of equals."""
    scores = tried(rank, examples)
    return max(scores, key=scores.get)


def least_rate(rank: int) -> float:
    """The lowest rate that is good enough: on the tuning seeds, within 0.01 of the best."""
    scores = tried(rank)
    return min(lr for lr, score in scores.items() if score >= max(scores.values()) - 0.01)


def grid(rank: int, examples: int = 0) -> list[float]:
    """Six rates, each twice the one before, and more at a side for as long as the best stands at
    its end. With alpha = 2 r, a high rank needs low ones (chapter 3)."""
    known = tried(rank, examples)
    rates = sorted({*(LOWEST[rank] * 2**i for i in range(6)), *known})
    if set(rates) == set(known):
        best = best_rate(rank, examples)
        rates += [best / 2] * (best == rates[0]) + [best * 2] * (best == rates[-1])
    return rates


def tuning() -> list[dict]:
    """Full fine-tuning and every rank at every rate, on all images and on few."""
    return [_method(rank) | {"lr": lr, "examples": examples, "seed": seed} for rank in (0, *RANKS)
            for examples in (0, FEW) for lr in grid(rank, examples) for seed in TUNING]


def comparison() -> list[dict]:
    """Every mistake, 16 bits and full fine-tuning at several rates, and every rank at its best."""
    kinds = [{"mistake": name} for name in MISTAKES]
    kinds += [{"mistake": m, "lr": lr} for m in ("none", "sixteen bit adapter")
              for lr in (1e-4, 1e-3)]
    kinds += [_method(rank) | {"lr": lr} for rank in (0, 8) for lr in RATES]
    kinds += [_method(rank) | {"lr": best_rate(rank, examples), "examples": examples}
              for rank in (0, *RANKS) for examples in (0, FEW)]
    return [kind | {"seed": seed} for kind in kinds for seed in SEEDS]


# ---------------------------------------------------------------------------------- the verdicts
def values(what: str = "test", **where):
    """The kept outcomes with these arguments, the trial's defaults for others, by seed."""
    rows = [row for row in _rows(**{"lr": 1e-2} | where) if row["seed"] in SEEDS]
    return column(sorted(rows, key=lambda row: row["seed"]), what)


def tuned(rank: int, examples: int = 0, what: str = "test"):
    """The kept outcomes of a rank, or 0 for full fine-tuning, at the rate that is best for it."""
    return values(what, **_method(rank), lr=best_rate(rank, examples), examples=examples)


def cost_of_rank(rank: int, over: int = 8) -> tuple[float, float]:
    """Memory and arithmetic of a step of a 7B Llama with adapters on all linear layers, 512 tokens,
    each over that of rank `over`."""
    memory, flops = ([f(costs.LLAMA_7B, batch=1, sequence=512, rank=r,
                        target_modules="all-linear").total for r in (rank, over)]
                     for f in (costs.memory, costs.flops))
    return memory[0] / memory[1], flops[0] / flops[1]


def verdicts() -> list[Verdict]:
    """The five mistakes that every list has. A difference of accuracies, taken seed by seed, counts
    when its 95 % interval leaves out 0; a cost counts from 2 percent."""
    def above(one, other):
        mean, half = interval(one - other)
        return mean - half > 0

    def judged(condition):
        return HOLDS if condition else DOES_NOT

    right, alone = values(), values(mistake="base not frozen")
    every, few = ({rank: tuned(rank, n) for rank in (0, *RANKS)} for n in (0, FEW))
    best, own, least = best_rate(0), best_rate(8), least_rate(0)
    at_best, at_least = values(lr=best), values(lr=least)
    full_at_least = values(mistake="full fine tuning", lr=least)
    too_low = HOLDS if above(every[8], at_best) and own > best else (
        "holds if it is the lowest rate that is good enough for full fine-tuning"
        if above(every[8], at_least) and above(full_at_least, at_least) else DOES_NOT)
    memory, flops = cost_of_rank(64)
    step, call = (latency.values(what) for what in ("step", "call"))
    return [
        Verdict("forgetting to freeze the base defeats the purpose", "9",
                judged(above(right, alone)),
                f"the adapter alone, on a fresh base: accuracy {shown(alone)} in place of "
                f"{shown(right)}; and all weights are trained"),
        Verdict("a rank too low underfits", "9", judged(above(every[8], every[1])),
                f"each at its best rate: rank 1 {shown(every[1])}, rank 8 {shown(every[8])}"),
        Verdict("a rank too high overfits", "9",
                judged(any(above(few[rank], few[64]) for rank in RANKS[:-1])),
                f"{FEW} images, each at its best rate: rank 8 {shown(few[8])}, 16 "
                f"{shown(few[16])}, 64 {shown(few[64])}, full {shown(few[0])}; rank 64 - rank 16: "
                f"{shown(few[64] - few[16], '+.2f')}"),
        Verdict("a rank too high is slower and takes more memory", "9",
                judged(min(memory, flops) > 1.02 and above(step, 1.02)),
                f"rank 64 over rank 8: a step at width 512 takes {shown(step)} times as long; "
                f"counted for 7B: memory {memory - 1:+.0%}, arithmetic {flops - 1:+.0%}"),
        Verdict("a learning rate that is right for full fine-tuning is too low for LoRA", "9",
                too_low,
                f"best rates: full {best:g}, rank 8 {own:g} ({shown(every[8])}); at {least:g}, "
                f"good enough for full ({shown(full_at_least)}), rank 8 has {shown(at_least)}"),
        Verdict("an adapter that is not merged slows inference", "9", judged(above(call, 1.02)),
                f"time of a call with one token, unmerged over merged: {shown(call)}"),
    ]


if __name__ == "__main__":
    for _ in range(4):                     # each pass may lengthen a grid
        run(trial, tuning(), RESULTS / "mistakes.csv")
    main(trial, tuning() + comparison(), "mistakes")
