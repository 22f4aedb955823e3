"""When LoRA is enough, what needs more of it, and what it forgets: the small model.

`python -m lora_lib.experiments.enough` takes 40 minutes on one core, in float32. A seed draws the
examples, the adapters and the order, and takes the rate that its own validation examples choose.
LoRA is on all linear layers, with alpha = 2 r; of the width, 96, rank 4 is 4 % and rank 16 a sixth.

The style task, to retell a sentence in the present tense, is tested without the random openings
("One rainy day"): what they ask for is to copy. Its right answers have no verb in the past and the
content of the right one; "present" is the share without a verb in the past.

On the style and the instructions, runs are also measured after each quarter of their steps. What
is forgotten is compared where both methods have learned as much (`smol_updates.gap`), and where
both have moved as far: the size of an update is its Frobenius norm over that of the weights.

Written down before the runs. Known were older ones, whose seeds shared their examples, whose rates
were chosen on the test and whose style task counted openings; and `small_rates`, seeds 0 to 2. A
loss is in nats a token; within 0.02 it is the same.
- LoRA is as good as full fine-tuning: for style undecided, at rank 16; for instructions and for a
  near domain it does not hold (older runs: behind by 0.05 to 0.1)
- a new format gains more by a higher rank than the style does, by more than 0.02: undecided; a far
  domain more than a near one: holds
- at least 95 % of full fine-tuning's right answers: undecided for all
- the frozen output head holds LoRA back, by more than 0.02: does not hold
- LoRA forgets less, by more than 0.02: does not hold (older runs: it forgets more)
- what is forgotten follows the size of the change, to 0.1, whatever the method: does not hold, as
  an update of low rank that is as large has larger directions
"""

import math
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
import torch

from lora_lib.experiments import small_rates
from lora_lib.experiments.claims import Claim, Verdict
from lora_lib.experiments.intervals import by_seeds, of_shares
from lora_lib.experiments.rates import DOUBLE
from lora_lib.experiments.smol_studies import AS_GOOD
from lora_lib.experiments.smol_updates import FORGETS, front, gap
from lora_lib.experiments.sweep import (Row, by_seed, chosen, column, grow, main, narrowed,
                                        read_if_any, select)
from lora_lib.experiments.trial import VALIDATION, adapted, base, held_out_tales, made, measure
from lora_lib.tasks import INSTRUCTIONS, Task, without_openings
from lora_lib.text import in_present
from lora_lib.torch import exact_match, fine_tune, lora_modules, mean_loss, warmup_cosine

NAME, SEEDS, QUARTERS = "enough", range(5), (1, 2, 3, 4)
STYLE, FOLLOW, FORMAT, DOMAIN, FAR = (
    "restyle 1", "instructions 6", "records 1", "dialect 0.25", "dialect 1.0")
# A method is what is trained and the rank; "body" is all but the embedding, the output head too.
FULL, BODY, LOW, HIGH = ("full", 0), ("body", 0), ("all", 4), ("all", 16)
NAMES = {FULL: "full fine-tuning", BODY: "embedding frozen", LOW: "LoRA, rank 4",
         HIGH: "LoRA, rank 16"}
SETTING = {STYLE: (200, 8), FOLLOW: (200, 8), FORMAT: (160, 8), DOMAIN: (100, 4), FAR: (100, 4)}
METHODS = {STYLE: (FULL, LOW, HIGH), FOLLOW: (FULL, LOW, HIGH), FORMAT: (FULL, LOW, HIGH),
           DOMAIN: (FULL, LOW, HIGH), FAR: (LOW, HIGH)}
FRONTS = (STYLE, FOLLOW)                                 # measured after every quarter
BEGIN = {FULL: (1e-3, 2e-3, 4e-3), LOW: (4e-3, 8e-3, 1.6e-2), HIGH: (2e-3, 4e-3, 8e-3)}
TEXTS, PAIRS, SPOKEN = 100, 300, 100                     # test examples; answers read for the tense

GOOD = {task: Claim(f"good for {what}", "8", f"loss in nats, LoRA minus full, {what}", -0.02, 0.02)
        for task, what in ((STYLE, "style"), (FOLLOW, "instruction following"),
                           (DOMAIN, "a domain"))}
FORMAT_MORE = Claim("might need more for a very different output format", "8",
                    "loss in nats that rank 16 saves over rank 4, on JSON minus on style", 0.02)
FAR_MORE = Claim("might need more for an extreme domain shift", "8",
                 "loss in nats that rank 16 saves over rank 4, all words foreign minus a quarter",
                 0.02)
EQUAL = replace(AS_GOOD, effect="loss in nats, LoRA at rank 16 minus full")
QUALITY = Claim("95 to 100 % of the quality of full fine-tuning", "8",
                "share of right answers, LoRA at rank 16 minus 0.95 times full", 0.0)
HEAD = Claim("the frozen output head holds LoRA back", "8",
             "loss in nats on JSON, full fine-tuning with the embedding frozen minus without", 0.02)
LESS = replace(FORGETS, effect="loss on tales in nats where both reach one task loss, full minus "
                                "LoRA at rank 16")
SIZE = Claim("what is forgotten follows the size of the change, whatever the method", "8",
             "loss on tales in nats where both updates are of one size, full minus LoRA", -0.1, 0.1)


# ------------------------------------------------------------------------------------- the runs
@lru_cache
def parts(name: str, seed: int) -> tuple[Task, list]:
    """A task as this seed draws it, with what it is tested on, and its validation examples."""
    count = TEXTS if name.startswith("dialect") else PAIRS
    if name == STYLE:                                    # a third is left out
        on = without_openings(made(name, test=2 * (count + VALIDATION), seed=seed))
    else:
        on = made(name, test=count + VALIDATION, seed=seed)
    return (Task(name, on.train, on.test[:count], on.probes[:count]),
            on.test[count:count + VALIDATION])


def moved(model) -> float:
    """The size of a trained model's update: its Frobenius norm over that of the base's weights, in
    all linear layers but the head."""
    weights = dict(base("float32").named_parameters())
    adapters = lora_modules(model)
    trained = dict(model.named_parameters())
    update = [adapter.delta_weight() for adapter in adapters.values()] or [
        trained[name] - weight for name, weight in weights.items() if "_proj" in name]
    norm = lambda matrices: math.sqrt(sum(matrix.square().sum().item() for matrix in matrices))
    return norm(update) / norm(W for name, W in weights.items() if "_proj" in name)


def answers(model, prompts: list[str], max_new_tokens: int = 24) -> list[str]:
    """How the model goes on after each prompt, up to a newline: `complete` of many at once."""
    encode, newline = model.tokenizer.encode, model.tokenizer.encode("\n")[0]
    rows = [[model.tokenizer.end, *encode(prompt)] for prompt in prompts]
    said = {}
    for length in set(map(len, rows)):
        where = [i for i, row in enumerate(rows) if len(row) == length]
        tokens = model.generate(torch.tensor([rows[i] for i in where]), max_new_tokens,
                                stop=(newline, model.tokenizer.end))
        for i, row in zip(where, tokens.tolist()):
            text = model.tokenizer.decode(row[length:])
            said[i] = text[:text.find("\n") + 1] or text           # the rest fills the row up
    return [said[i] for i in range(len(rows))]


def by_kind(model, on: Task) -> dict[str, float]:
    """What a task has to tell of its answers beyond their number: "present" of a style, the share
    without a verb in the past; of instructions the share of right answers to each."""
    if on.name == STYLE:
        said = answers(model, [prompt for prompt, _ in on.test[:SPOKEN]])
        return {"present": sum(map(in_present, said)) / len(said)}
    if on.name != FOLLOW:
        return {}
    asked = lambda word: [pair for pair in on.test if f"\nDo: {word}\n" in pair[0]]
    return {word: exact_match(model, model.tokenizer, asked(word)) for word in INSTRUCTIONS}


def trial(name: str, targets: str, rank: int, alpha: float, lr: float, steps: int,
          batch_size: int, seed: int = 0, dtype: str = "float32") -> dict[str, float]:
    """Train on a task as this seed draws it, and measure: the loss and the right answers on the
    test, the losses on validation examples and on tales, the size of the update, and `by_kind`; of
    `FRONTS` also "loss 1" to "size 3", after each quarter of the steps but the last. Of a run that
    diverges everything is infinite, and no answer right.
    """
    model = adapted("full" if targets == "body" else targets, rank, alpha, seed=seed, dtype=dtype)
    if targets == "body":
        model.model.embed_tokens.weight.requires_grad_(False)
    on, validation = parts(name, seed)
    loss_of = partial(mean_loss, model, model.tokenizer)
    data = tuple(map(torch.from_numpy, model.tokenizer.batch(on.train)))
    curve, found = warmup_cosine(steps, warmup=steps // 20), {}

    def schedule(step):                                  # asked once before every step
        if name in FRONTS and step and 4 * step % steps == 0:
            found.update({f"{what} {4 * step // steps}": value for what, value in (
                ("loss", loss_of(on.test)), ("tales", loss_of(held_out_tales())),
                ("size", moved(model)))})
        return curve(step)
    try:
        fine_tune(model, data, steps=steps, batch_size=batch_size, lr=lr, seed=seed,
                  schedule=schedule, progress=False)
    except FloatingPointError:
        early = [f"{what} {q}" for what in ("loss", "tales", "size") for q in QUARTERS[:-1]]
        return {"match": 0.0} | dict.fromkeys(
            ("loss", "tales", "valid", "size", *(early if name in FRONTS else ())), math.inf)
    return measure(model, on) | {"valid": loss_of(validation), "size": moved(model),
                                 **by_kind(model, on), **found}


def setting(task: str, method: tuple[str, int]) -> dict:
    """The trial's arguments for a method on a task, but its rate and seed."""
    targets, rank = method
    steps, batch_size = SETTING[task]
    return {"name": task, "targets": targets, "rank": rank, "alpha": 2 * rank, "steps": steps,
            "batch_size": batch_size, "dtype": "float32"}


def rows(task: str, method: tuple[str, int]) -> list[Row]:
    """The runs that there are; those of rank 4 on instructions are `small_rates`' own."""
    if (task, method) == (FOLLOW, LOW):
        return small_rates.rows(DOUBLE, LOW[1])
    return select(read_if_any(NAME), **setting(task, method))


def points(task: str) -> list[dict]:
    """A task with every method at every rate of its grid, as far as it is known by now."""
    return by_seed(setting(task, method) | {"lr": lr, "seed": seed} for method in METHODS[task]
                   if (task, method) != (FOLLOW, LOW)
                   for seed, lr in narrowed(rows(task, method), SEEDS, BEGIN[method]))


def more() -> list[dict]:
    """Full fine-tuning without the embedding, each seed at the rate of full fine-tuning; and full
    fine-tuning on the style at twice its highest rate, as no update of another seed than the first
    was as large as LoRA's: without it nothing could be compared at one size."""
    rates = [row["lr"] for row in chosen(rows(FORMAT, FULL))]
    return ([setting(FORMAT, BODY) | {"lr": lr, "seed": seed} for seed, lr in zip(SEEDS, rates)]
            + [setting(STYLE, FULL) | {"lr": 4e-3, "seed": seed} for seed in SEEDS])


# ---------------------------------------------------------------------------- what the runs say
def reached(task: str, method: tuple[str, int], what: str = "loss") -> np.ndarray:
    """The test loss of every seed (seeds,), or another column, at the rate that its validation
    examples choose."""
    runs = rows(task, method)
    if method == BODY:                                   # each seed has the rate of full alone
        return column(sorted(runs, key=lambda row: row["seed"]), what)
    return column(chosen(runs), what)


def behind(task: str, method: tuple[str, int], what: str = "loss") -> np.ndarray:
    """LoRA minus full fine-tuning, seed by seed."""
    return reached(task, method, what) - reached(task, FULL, what)


def saves(task: str) -> np.ndarray:
    """How far the loss falls from rank 4 to rank 16, in nats a token, seed by seed."""
    return reached(task, LOW) - reached(task, HIGH)


def course(runs: list[Row], what: str) -> np.ndarray:
    """A column of these runs after all quarters of their steps, in any order."""
    return np.concatenate([column(runs, name) for name in
                           (what, *(f"{what} {q}" for q in QUARTERS[:-1]))])


def front_of(task: str, method: tuple[str, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The losses (n,) on the task and on tales of what no other run or quarter beats at both."""
    runs = select(rows(task, method), seed=seed)
    return front(course(runs, "loss"), course(runs, "tales"))


def at_one_size(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> float:
    """By how much `one`, (sizes, losses on tales), lies above `other`, in nats: the mean over the
    sizes that both have, between points by a straight line over the logarithm of the size. Raises
    ValueError if they have none in common."""
    least, most = max(one[0].min(), other[0].min()), min(one[0].max(), other[0].max())
    if least >= most:
        raise ValueError(f"no size is common to both: {one[0]} and {other[0]}")
    sizes = np.geomspace(least, most, 9)
    at = lambda of: np.interp(np.log(sizes), np.log(np.sort(of[0])), of[1][np.argsort(of[0])])
    return float(np.mean(at(one) - at(other)))


def forgotten(task: str, same: str = "loss") -> np.ndarray:
    """Full fine-tuning's loss on tales minus that of LoRA at rank 16, in nats (seeds,), where both
    have the same loss on the task, or the same "size"."""
    if same == "loss":
        return np.array([gap(*(front_of(task, m, seed) for m in (FULL, HIGH))) for seed in SEEDS])
    found = []
    for seed in SEEDS:
        runs = [select(rows(task, m), seed=seed) for m in (FULL, HIGH)]
        runs = [[row for row in some if math.isfinite(row["loss"])] for some in runs]
        found.append(at_one_size(*((course(r, "size"), course(r, "tales")) for r in runs)))
    return np.array(found)


def verdicts() -> list[Verdict]:
    """The claims on the small model."""
    right = lambda task, method, of=1.0, c=0.95: of_shares(
        reached(task, method, "match"), of * reached(task, FULL, "match"), PAIRS, c)
    good = [claim.across(lambda c, task=task: {f"rank {m[1]}": by_seeds(behind(task, m), c)
                                               for m in (LOW, HIGH)}, form="+.3f",
                         condition="it has {}",
                         note="" if task == DOMAIN else
                         f"right answers at rank 16, {right(task, HIGH).text()}")
            for task, claim in GOOD.items()]
    return good + [
        EQUAL.across(lambda c: {what: by_seeds(behind(task, HIGH), c) for task, what in (
            (STYLE, "style"), (FOLLOW, "instructions"), (DOMAIN, "a near domain"),
            (FORMAT, "a new format"))}, form="+.3f", condition="the task is {}"),
        FORMAT_MORE.judged(by_seeds(saves(FORMAT) - saves(STYLE)), form="+.3f"),
        FAR_MORE.judged(by_seeds(saves(FAR) - saves(DOMAIN)), form="+.3f"),
        QUALITY.across(lambda c: {what: right(task, HIGH, 0.95, c) for task, what in (
            (STYLE, "style"), (FOLLOW, "instructions"), (FORMAT, "a new format"))},
            condition="the task is {}"),
        HEAD.judged(by_seeds(reached(FORMAT, BODY) - reached(FORMAT, FULL)), form="+.3f"),
        LESS.across(lambda c: {what: by_seeds(forgotten(task), c) for task, what in (
            (STYLE, "style"), (FOLLOW, "instructions"))}, condition="the task is {}"),
        SIZE.across(lambda c: {what: by_seeds(forgotten(task, "size"), c) for task, what in (
            (STYLE, "style"), (FOLLOW, "instructions"))}, condition="the task is {}"),
    ]


if __name__ == "__main__":
    for task in SETTING:
        grow(trial, partial(points, task), NAME)
    main(trial, more(), NAME)
