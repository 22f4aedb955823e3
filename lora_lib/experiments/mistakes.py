"""Each common mistake, planted in the fine-tuning of a small network from digits to turned digits.

`python -m lora_lib.experiments.mistakes` takes about eight minutes on one core, in float64. A seed
draws the test images, the validation images, the first weights, the adapters and the order. Each
rank, and full fine-tuning, has the rate at which the fewest validation images are read wrongly.

The margins were written down before these runs; runs on one split of the images, whose rates were
chosen on the test images, were known. Accuracies within 0.03 are the same, and so are times within
5 %. We expected:
- an adapter that learned beside an unfrozen base is worse alone, rank 1 underfits, a step at rank
  64 takes longer, and so does a call that is not merged: all hold
- rank 64 reads fewer new images than rank 16, on 60 and on 240 images: does not hold
- LoRA's best rate is above that of full fine-tuning: undecided, as both curves are flat on top
"""

import copy
import math
import random
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from lora_lib import costs
from lora_lib.data import digits
from lora_lib.experiments import latency
from lora_lib.experiments.claims import Claim, Verdict
from lora_lib.experiments.intervals import of_shares, rate_ratio, ratio
from lora_lib.experiments.sweep import (Row, by_seed, chosen, column, grow, narrowed, read_if_any,
                                        select, shown, table)
from lora_lib.text import FEELINGS, PEOPLE
from lora_lib.torch import fine_tune, inject, load_pretrained, lora_modules, warmup_cosine

SEEDS, HELD = range(5), 360                # HELD: images to test on, and as many to choose by
RANKS = (1, 4, 8, 16, 64)
FEW, MORE = SIZES = (60, 240)              # training images, where overfitting is to be seen
RATES = tuple(2.5e-4 * 2**i for i in range(8))           # 0.00025 to 0.032
LOWEST = {0: 2.5e-4, 1: 4e-3, 4: 2e-3, 8: 2e-3, 16: 1e-3, 64: 5e-4}    # where a rank's grid begins

FREEZE = Claim("forgetting to freeze the base defeats the purpose", "9",
               "accuracy, an adapter minus one that learned beside an unfrozen base, both on a "
               "fresh base", 0.03)
UNDERFITS = Claim("a rank too low underfits", "9",
                  "accuracy, rank 8 minus rank 1, each at its own rate", 0.03)
OVERFITS = Claim("a rank too high overfits", "9",
                 "accuracy on new images, rank 16 minus rank 64, each at its own rate", 0.03)
SLOWER = Claim("a rank too high is slower and takes more memory", "9",
               "time of a step at width 512, rank 64 over rank 8", 1.05)
TOO_LOW = Claim("a learning rate that is right for full fine-tuning is too low for LoRA", "9",
                "best rate, rank 8 over full fine-tuning, alpha = 2r", 1)
UNMERGED = Claim("an adapter that is not merged slows inference", "9",
                 "time of a call with one token, unmerged over merged", 1.05)


@lru_cache
def _data(turn, examples=0, seed=0):
    """(x, y) to train on, all or `examples`, to choose by, and to test on, as the seed draws
    them; the same images for every turn."""
    x, y, *test = map(torch.tensor, digits(turn, seed))
    drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    rest = drawn[HELD:HELD + examples] if examples else drawn[HELD:]
    return (x[rest], y[rest]), (x[drawn[:HELD]], y[drawn[:HELD]]), tuple(test)


@lru_cache
def _pretrained(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
                              nn.Linear(128, 10)).double()
    fine_tune(model, _data(0, seed=seed)[0], steps=400, batch_size=64, lr=3e-3, seed=seed,
              progress=False)
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
def score(model, seed: int, turn: int = 90) -> float:
    """The accuracy on the seed's test images, turned."""
    return _right(model, _data(turn, 0, seed)[2])


def _right(model, data):
    x, y = data
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
    x, y = _data(90, 0, seed)[0]
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
    """Make one mistake; the accuracy on test and on training images after it ("test", "fit"), and
    the share of validation images that are read wrongly ("valid"), by which rates are chosen."""
    with torch.random.fork_rng(), torch.no_grad():
        with torch.enable_grad():
            model = MISTAKES[mistake](seed, rank=rank, lr=lr, steps=steps, examples=examples)
        fit, valid, test = (_right(model, part) for part in _data(90, examples, seed))
    return {"test": test, "valid": 1 - valid, "fit": fit}


def method(rank: int, examples: int = 0) -> dict:
    """The trial's arguments for adapters of this rank, 0 for full fine-tuning."""
    return {"examples": examples} | ({"mistake": "none", "rank": rank} if rank else
                                     {"mistake": "full fine tuning"})


def _rows(**where):
    """The kept rows with these arguments, the trial's defaults for others but the rate."""
    usual = {"mistake": "none", "rank": 8, "steps": 400, "examples": 0}
    return select(read_if_any("mistakes"), **usual | where)


def tried(rank: int, examples: int = 0) -> list[Row]:
    """The kept runs of a method at the rates of its grid, each of which is twice another."""
    whole = lambda lr: abs(math.log2(lr / RATES[0]) % 1 - 0.5) > 0.499
    return [row for row in _rows(**method(rank, examples)) if whole(row["lr"])]


def wrong(rank: int, examples: int = 0):
    """The rates (n,) at which every seed has run, and the shares of validation images (seeds, n)
    that are read wrongly."""
    return table(tried(rank, examples), "valid")


def best_rate(rank: int, examples: int = 0) -> float:
    """The rate with the fewest wrong answers on validation images, over the seeds; the lowest of
    equals."""
    rates, shares = wrong(rank, examples)
    return rates[shares.mean(axis=0).argmin()]


def least_rate(rank: int) -> float:
    """The lowest rate that is good enough: within 0.01 of the best, on validation images."""
    rates, shares = wrong(rank)
    return rates[(shares.mean(axis=0) <= shares.mean(axis=0).min() + 0.01).argmax()]


def points() -> list[dict]:
    """Every mistake; 16 bits at several rates; full fine-tuning and rank 8 at all; and every rank
    and number of images on its grid, as far as it is known by now."""
    kinds: list[dict] = [{"mistake": name} for name in MISTAKES]
    kinds += [{"mistake": m, "lr": lr} for m in ("none", "sixteen bit adapter")
              for lr in (1e-4, 1e-3)]
    kinds += [method(rank) | {"lr": lr} for rank in (0, 8) for lr in RATES]
    grids = [method(rank, n) | {"seed": seed, "lr": lr} for rank in (0, *RANKS)
             for n in (0, *SIZES) for seed, lr in narrowed(
                 tried(rank, n), SEEDS, [LOWEST[rank] * 2**i for i in range(6)])]
    return by_seed([kind | {"seed": seed} for kind in kinds for seed in SEEDS] + grids)


# ---------------------------------------------------------------------------------- the verdicts
def values(what: str = "test", **where):
    """The kept outcomes with these arguments, the trial's defaults for others, by seed."""
    rows = _rows(**{"lr": 1e-2} | where)
    return column(sorted(rows, key=lambda row: row["seed"]), what)


def tuned(rank: int, examples: int = 0, what: str = "test"):
    """The kept outcomes of a rank, or 0 for full fine-tuning, by seed, each at the rate that is
    best on its own validation images."""
    return column(chosen(tried(rank, examples)), what)


def cost_of_rank(rank: int, over: int = 8) -> tuple[float, float]:
    """Memory and arithmetic of a step of a 7B Llama with adapters on all linear layers, 512 tokens,
    each over that of rank `over`."""
    memory, flops = ([f(costs.LLAMA_7B, batch=1, sequence=512, rank=r,
                        target_modules="all-linear").total for r in (rank, over)]
                     for f in (costs.memory, costs.flops))
    return memory[0] / memory[1], flops[0] / flops[1]


def verdicts() -> list[Verdict]:
    """The five mistakes that every list has, and what an adapter costs that is not merged."""
    right, alone, least = values(), values(mistake="base not frozen"), least_rate(0)
    every = {rank: tuned(rank) for rank in (0, 1, 8)}
    few = {n: {rank: tuned(rank, n) for rank in (8, 16, 64)} for n in SIZES}
    memory, flops = cost_of_rank(64)
    (full_rates, full), (rates, low) = wrong(0), wrong(8)
    return [
        FREEZE.judged(of_shares(right, alone, HELD), note=f"accuracies {shown(right)} and "
                      f"{shown(alone)}; and all weights are trained"),
        UNDERFITS.judged(of_shares(every[8], every[1], HELD),
                         note=f"accuracies {shown(every[8])} and {shown(every[1])}"),
        OVERFITS.across(lambda c: {f"{n} images": of_shares(few[n][16], few[n][64], HELD, c)
                                   for n in SIZES}, condition="there are {}", form="+.3f"),
        SLOWER.judged(ratio(latency.values("step")), form=".2f", note="counted for 7B: memory "
                      f"{memory - 1:+.0%}, arithmetic {flops - 1:+.0%}"),
        TOO_LOW.judged(rate_ratio(low, rates, full, full_rates), form=".2g",
                       note=f"at {least:g}, good enough for full fine-tuning "
                       f"({shown(values(mistake='full fine tuning', lr=least))}), rank 8 has "
                       f"{shown(values(lr=least))}, at its own rate {shown(every[8])}"),
        UNMERGED.judged(ratio(latency.values("call")), form=".2f"),
    ]


if __name__ == "__main__":
    grow(trial, points, "mistakes")
