"""Each common mistake, planted in the fine-tuning of a small network from digits to turned digits.

`python -m lora_lib.experiments.mistakes` takes about five minutes on one core, in float64.
"""

import copy
import random
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from lora_lib.data import digits
from lora_lib.experiments.claims import DOES_NOT, HOLDS, Verdict
from lora_lib.experiments.sweep import column, interval, main, read, select
from lora_lib.text import FEELINGS, PEOPLE
from lora_lib.torch import fine_tune, inject, load_pretrained, lora_modules, warmup_cosine

SEEDS = range(5)
RANKS = (1, 2, 4, 8, 16, 32, 64)
FEW = 60                                   # training examples, where overfitting is to be seen


@lru_cache
def _data(turn, examples=0):
    """(x, y) to train on, all or the first `examples`, and (x, y) to test on."""
    x, y, *test = map(torch.tensor, digits(turn))
    return (x[:examples or None], y[:examples or None]), tuple(test)


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
    """Teach it the digits turned by 90 degrees, all of them or the first `examples`."""
    return fine_tune(model, _data(90, examples)[0], steps=steps, batch_size=min(64, examples or 64),
                     lr=lr, seed=seed, progress=False)


@torch.no_grad()
def score(model, turn: int = 90, *, fitted: int | None = None) -> float:
    """The accuracy on the test images, or on the first `fitted` training images (0 for all)."""
    x, y = _data(turn)[1] if fitted is None else _data(turn, fitted)[0]
    return (model(x).argmax(1) == y).double().mean().item()


# ------------------------------------------------------------------- the mistakes, one function each
def none(seed, **how):
    model = adapted(seed, how.pop("rank"))
    train(model, seed, **how)
    return model


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


def dropout_left_on(seed, *, rank, **how):
    model = adapted(seed, rank, dropout=0.5)
    train(model, seed, **how)
    torch.manual_seed(seed)
    return model.train()


def dropout_off_again(seed, **how):
    return dropout_left_on(seed, **how).eval()


# --------------------------------------------- two words that the small language model never met
GLAD = ("brave", "calm", "glad", "proud")


def grown(seed: int):
    """The language model with two new tokens, whose rows in the (tied) embedding are small noise."""
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
    optimizer_before_injection, scaling_forgotten, merged_twice, dropout_left_on,
    dropout_off_again)}


def trial(mistake: str, rank: int = 8, lr: float = 1e-2, steps: int = 400, examples: int = 0,
          seed: int = 0) -> dict[str, float]:
    """Make one mistake; the accuracy on test and on training images after it."""
    with torch.random.fork_rng():
        model = MISTAKES[mistake](seed, rank=rank, lr=lr, steps=steps, examples=examples)
        return {"test": score(model), "fit": score(model, fitted=examples)}


def points() -> list[dict]:
    kinds = [{"mistake": name} for name in MISTAKES]
    kinds += [{"mistake": m, "lr": lr, "rank": r} for r in (1, 8) for lr in (1e-4, 1e-3, 1e-2)
              for m in ("none", "full fine tuning", "sixteen bit adapter")]
    kinds += [{"mistake": "none", "rank": r, "examples": FEW} for r in RANKS]
    kinds += [{"mistake": "full fine tuning", "lr": 1e-3, "examples": FEW}]
    kinds += [{"mistake": "none", "rank": r} for r in RANKS]
    unique = {tuple(kind.items()): kind for kind in kinds}.values()
    return [kind | {"seed": seed} for kind in unique for seed in SEEDS]


# ---------------------------------------------------------------------------------- the verdicts
def tests(**where):
    """The test accuracies of the kept runs with these arguments, the trial's defaults for others."""
    usual = {"mistake": "none", "rank": 8, "lr": 1e-2, "examples": 0}
    return column(select(read("mistakes"), **usual | where), "test")


def shown(values) -> str:
    mean, half = interval(values)
    return f"{mean:.2f} ± {half:.2f}"


def verdicts() -> list[Verdict]:
    """The five mistakes that every list has. A difference counts when it is 0 beyond its interval."""
    def above(one, other):                               # paired: the same seeds
        mean, half = interval(one - other)
        return mean - half > 0

    right, adapter_alone = tests(), tests(mistake="base not frozen")
    low = tests(rank=1)
    few = {rank: tests(rank=rank, examples=FEW) for rank in RANKS}
    slow, full = tests(lr=1e-3), tests(mistake="full fine tuning", lr=1e-3)
    return [
        Verdict("forgetting to freeze the base defeats the purpose", "9",
                HOLDS if above(right, adapter_alone) else DOES_NOT,
                f"the adapter alone, on a fresh base: accuracy {shown(adapter_alone)} in place of "
                f"{shown(right)}; and all weights are trained"),
        Verdict("a rank too low underfits", "9", HOLDS if above(right, low) else DOES_NOT,
                f"rank 1: {shown(low)}, rank 8: {shown(right)}"),
        Verdict("a rank too high overfits", "9", HOLDS if above(few[8], few[64]) else DOES_NOT,
                f"trained on {FEW} images: rank 1 {shown(few[1])}, rank 8 {shown(few[8])}, rank 64 "
                f"{shown(few[64])}"),
        Verdict("a learning rate that is right for full fine-tuning is too low for LoRA", "9",
                HOLDS if above(right, slow) and above(full, slow) else DOES_NOT,
                f"rate 0.001: full {shown(full)}, LoRA {shown(slow)}; LoRA at 0.01 {shown(right)}"),
    ]


if __name__ == "__main__":
    main(trial, points(), "mistakes")
