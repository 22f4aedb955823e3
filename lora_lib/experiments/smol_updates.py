"""SmolLM2: what an update forgets, what it looks like, how little of it would do.

`python -m lora_lib.experiments.smol_updates` takes 90 core-minutes; the rows that are kept come
from an H200, those of the dissected updates from a processor. A run of a method at one of four
rates, or more if the best is not inside, is measured after each quarter of its steps: on the task
and on prose, which may be forgotten. The rate that a seed's validation examples choose is then run
once more, and its update is dissected, matrix by matrix. (On the GPU, transformers 5.17 took
another mark for the end of a passage. So prose is 0.089 to 0.097 higher there in the six runs made
on both, which in a difference of the methods leaves less than 0.01; their task losses are equal to
0.0002.)

Which of two methods forgets less is seen where both have learned the task equally well. Each seed's
points (task loss, prose loss) have a front, those that no other beats at both; between two of them
prose is read off a straight line over the logarithm of the task loss. The difference is the mean
over task losses from the least that both methods reach to three times that.

An intruder dimension (arXiv 2410.21228) is a left singular vector of the trained W', among its
first ten, whose |cosine| with every left singular vector of W is below 0.5. It is shrunk by scaling
its singular value in W'.

Written down before the runs. Known were runs of `smol_rates` on seeds 0 and 1, measured at their
end only; no run on the seeds 3 to 5, used here. The rates begin lower than where those are best:
above the best, both losses were higher, and the front is made below it. Losses are in nats a token;
at its best rate full fine-tuning forgot 0.1 to 0.4, LoRA 0.5 to 0.8.
- LoRA forgets less, by more than 0.02 (does not hold: in the known runs it forgets more)
- LoRA's update has intruder dimensions, in more than 1 % of the first ten directions, which full
  fine-tuning's has not (holds); full fine-tuning's has none, to 1 % (holds)
- shrunk by half, LoRA's intruder dimensions give back more than a quarter of what was forgotten
  (holds), cost at most 0.02 on the task (undecided), and leave prose more than 0.02 better than the
  whole update does, shrunk until the task suffers as much (undecided). Where the update of a seed
  has no intruder, there is nothing to shrink, and these three cannot be tested
- cut to 16 directions in each matrix, full fine-tuning's update is as good, to 0.02 (undecided)
- LoRA's update merged into bfloat16 weights is as good as beside them, to 0.02 (holds)
"""

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lora_lib.experiments.claims import Claim, Verdict, untested
from lora_lib.experiments.intervals import by_seeds, of_shares
from lora_lib.experiments.smol import encoded, fresh, parts, prose, train
from lora_lib.experiments.smol_studies import FULL, lora
from lora_lib.experiments.sweep import Row, by_seed, column, grow, main, read_if_any, select, wider
from lora_lib.tuning.data import encode
from lora_lib.tuning.evaluation import mean_loss
from lora_lib.tuning.loop import warmup_cosine

NAME, DISSECTED = "smol_updates", "smol_updates_dissected"
TASK, EXAMPLES, TESTED, SEEDS = "instructions 6", 512, 96, (3, 4, 5)
LORA = lora("all", 16)
RATES = {"full": (2.5e-5, 5e-5, 1e-4, 2e-4), "all": (2.5e-4, 5e-4, 1e-3, 2e-3)}
QUARTERS, MATRICES = (1, 2, 3, 4), 210
RANGE = np.geomspace(1, 3, 9)            # task losses to compare at, over the least of both
TOP, BELOW, MANY = 10, 0.5, 100          # what makes an intruder dimension; where else to look
SHRUNK, HALF, NONE = (0.5, 0.0), "intruders x 0.5", "intruders x 0"
SCALED, RANKS = (0.75, 0.5, 0.25), (1, 4, 16, 64)

FORGETS = Claim("LoRA forgets less than full fine-tuning", "8",
                "loss on prose in nats where both reach one task loss, full minus LoRA", 0.02)
INTRUDES = Claim("LoRA's update has intruder dimensions that full fine-tuning's has not", "8",
                 "share of intruders among the first ten directions of a matrix, LoRA minus full",
                 0.01)
FREE = Claim("full fine-tuning makes no intruder dimensions", "8",
             "share of intruders among the first ten directions of a matrix", most=0.01)
RETURNS = Claim("shrinking intruder dimensions gives back what was forgotten", "8",
                "share of the forgotten nats that comes back, LoRA's intruders by half", 0.25)
CHEAP = Claim("shrinking intruder dimensions costs the task little", "8",
              "loss in nats, LoRA's intruders by half minus as trained", most=0.02)
BETTER = Claim("it is the intruder dimensions that forget", "8",
               "loss on prose in nats at one task loss, the whole update shrunk minus its "
               "intruders by half", 0.02)
LOW = Claim("the update that full fine-tuning makes is of low rank", "1",
            "loss in nats, cut to 16 directions a matrix minus whole", most=0.02)
LOSSLESS = Claim("merging loses nothing", "4",
                 "loss in nats, merged into bfloat16 weights minus beside them", most=0.02)


# ------------------------------------------------------------------------------------- the runs
def score(model: nn.Module, pairs: dict) -> dict[str, float]:
    """The loss on the test examples and that on prose, in nats a token."""
    tokenizer = model.tokenizer
    return {"loss": mean_loss(model, tokenizer, encoded(tokenizer, pairs["test"][:TESTED]), 32),
            "prose": mean_loss(model, tokenizer, encode(tokenizer, prose()), 4)}


def trial(targets: str, rank: int, alpha: float, lr: float, steps: int = 64,
          seed: int = 0) -> dict[str, float]:
    """Train, and measure after each quarter of the steps: "loss 1" to "prose 4"; the loss on the
    validation examples after the last. What a run that diverges does not reach is infinite."""
    model, pairs = fresh(targets, rank, alpha, seed=seed), parts(TASK, EXAMPLES, seed)
    curve = warmup_cosine(steps, warmup=steps // 16)
    names = [f"{what} {quarter}" for quarter in QUARTERS for what in ("loss", "prose")]
    found = dict.fromkeys(["valid", *names], float("inf"))

    def look(quarter):
        found.update({f"{what} {quarter}": value for what, value in score(model, pairs).items()})

    def schedule(step):                              # asked once before every step
        if step and 4 * step % steps == 0:
            look(4 * step // steps)
        return curve(step)
    try:
        train(model, pairs["train"], lr=lr, steps=steps, seed=seed, schedule=schedule)
    except FloatingPointError:
        return found
    look(QUARTERS[-1])
    rows = encoded(model.tokenizer, pairs["validation"])
    return found | {"valid": mean_loss(model, model.tokenizer, rows, 32)}


def dissected(targets: str, rank: int, alpha: float, lr: float, steps: int = 64,
              seed: int = 0) -> dict[str, float]:
    """Train, and look at the update of every matrix; then the losses with parts of it.

    "size" is the update's norm over the weights', "intruders" the share of a matrix's first ten
    directions that are, "intruders of 100" that of the first hundred, "90 %" and "99 %" the number
    of directions with that share of an update's energy, "stable rank" its energy over that of the
    first; all are means over the matrices. LoRA's update is also merged into bfloat16 weights:
    "kept" is the share of it that arrives there, "not back" that of the weights which unmerging
    does not restore.
    """
    from lora_lib.torch import merge
    base, pairs = fresh(**FULL), parts(TASK, EXAMPLES, seed)
    model = fresh(targets, rank, alpha, seed=seed)
    train(model, pairs["train"], lr=lr, steps=steps, seed=seed)
    if targets != "full":
        merge(model)
    before, live = matrices(base), matrices(model)
    after = {name: W.clone() for name, W in live.items()}
    delta = {name: after[name] - W for name, W in before.items()}
    beside = {name: intruders(W, after[name]) for name, W in before.items()}
    intruding = {name: part for name, (part, _) in beside.items()}
    spectra = {name: torch.linalg.svd(D, full_matrices=False) for name, D in delta.items()}
    mean = lambda values: float(np.mean([float(value) for value in values]))
    found = {
        "size": mean(D.norm() / before[name].norm() for name, D in delta.items()),
        "intruders": mean(len(s) / TOP for _, s, _ in intruding.values()),
        f"intruders of {MANY}": mean((closest[:MANY] < BELOW).float().mean()
                                     for _, closest in beside.values()),
        "90 %": mean(directions(s, 0.9) for _, s, _ in spectra.values()),
        "99 %": mean(directions(s, 0.99) for _, s, _ in spectra.values()),
        "stable rank": mean((s / s[0]).square().sum() for _, s, _ in spectra.values()),
    } | {f"{what} base": value for what, value in score(base, pairs).items()}
    ways: dict[str, Callable[[str], Tensor]] = {"whole": after.__getitem__} | {
        f"intruders x {f:g}": lambda name, f=f: after[name] + (f - 1) * product(*intruding[name])
        for f in SHRUNK}
    if targets == "full":
        ways |= {f"rank {r}": lambda name, r=r: before[name] + product(*spectra[name], r)
                 for r in RANKS}
    else:
        half = {name: W.bfloat16() for name, W in before.items()}
        merged = {name: (W + delta[name]).bfloat16() for name, W in half.items()}
        ways |= {f"update x {f:g}": lambda name, f=f: before[name] + f * delta[name]
                 for f in SCALED}
        ways |= {"beside bfloat16": lambda name: half[name] + delta[name],
                 "merged in bfloat16": merged.__getitem__}
        found |= {"kept": kept(half, merged, delta),
                  "not back": mean(((merged[name] - D).bfloat16() != half[name]).float().mean()
                                   for name, D in delta.items())}
    for way, weight in ways.items():
        for name, W in live.items():
            W.copy_(weight(name))
        found |= {f"{what} {way}": value for what, value in score(model, pairs).items()}
    return found


# ----------------------------------------------------------------------------- what is in a matrix
def matrices(model: nn.Module) -> dict[str, Tensor]:
    """The weights of all linear layers but the output head, by the layer's path; not copied."""
    head = model.get_output_embeddings()
    return {name: module.weight.detach() for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head}


def intruders(W: Tensor, trained: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """The part U diag(s) Vh of `trained` (d, k) that its intruder dimensions make beside W (d, k),
    and for every direction of `trained`, in order, its greatest |cosine| with one of W's.

    U is (d, n), s (n,), Vh (n, k), with n between 0 and `TOP`.
    """
    known = torch.linalg.svd(W, full_matrices=False).U
    U, s, Vh = torch.linalg.svd(trained, full_matrices=False)
    closest = (U.T @ known).abs().amax(dim=1)
    where = (closest[:TOP] < BELOW).nonzero()[:, 0]
    return (U[:, where], s[where], Vh[where]), closest


def product(U: Tensor, s: Tensor, Vh: Tensor, rank: int | None = None) -> Tensor:
    """U diag(s) Vh (d, k), of the first `rank` directions or all."""
    return (U[:, :rank] * s[:rank]) @ Vh[:rank]


def directions(s: Tensor, share: float) -> int:
    """How many of the singular values s (n,), the greatest first, have this share of the energy,
    the sum of their squares."""
    energy = s.double().square().cumsum(0)
    return int((energy < share * energy[-1]).sum()) + 1


def kept(before: dict[str, Tensor], merged: dict[str, Tensor], delta: dict[str, Tensor]) -> float:
    """The share of an update that a merge has brought into the weights: the projection on it."""
    moved = sum((torch.sum((merged[name].double() - W.double()) * delta[name])
                 for name, W in before.items()), torch.zeros(()))
    return float(moved / sum(D.double().square().sum() for D in delta.values()))


# ------------------------------------------------------------------------- learned and forgotten
def front(losses, forgotten) -> tuple[np.ndarray, np.ndarray]:
    """Of the points (n,), those that no other beats at both, by rising task loss.

    Points of a run that diverged, which are not finite, are left out.
    """
    order = np.lexsort((forgotten, losses))
    losses, forgotten = np.asarray(losses)[order], np.asarray(forgotten)[order]
    before = np.minimum.accumulate(np.concatenate([[np.inf], forgotten]))[:-1]
    return losses[forgotten < before], forgotten[forgotten < before]


def forgotten_at(level, losses, forgotten):
    """The loss on prose of a front at a task loss, or at several; beyond its ends that of its
    ends."""
    return np.interp(np.log(level), np.log(losses), forgotten)


def gap(one, other) -> float:
    """By how much the front `one`, (losses, forgotten), lies above `other`, in nats: the mean over
    `RANGE` times the least task loss that both reach."""
    levels = RANGE * max(one[0][0], other[0][0])
    return float(np.mean(forgotten_at(levels, *one) - forgotten_at(levels, *other)))


# ---------------------------------------------------------------------------------- the verdicts
def points(seeds: Iterable[int] = SEEDS) -> list[dict]:
    """Both methods at every rate of each seed's grid, as far as it is known by now."""
    return by_seed(method | {"lr": lr, "seed": seed} for seed in seeds for method in (FULL, LORA)
                   for lr in wider(select(read_if_any(NAME), **method, seed=seed),
                                   RATES[method["targets"]]))


def own_points(seeds: Iterable[int] = SEEDS) -> list[dict]:
    """Both methods at the rate that each seed's validation examples choose."""
    best = lambda **which: min(select(read_if_any(NAME), **which), key=lambda row: row["valid"])
    return by_seed(method | {"lr": best(**method, seed=seed)["lr"], "seed": seed}
                   for seed in seeds for method in (FULL, LORA))


def front_of(rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """The front of these runs, after every quarter of their steps."""
    return front(*(np.concatenate([column(rows, f"{what} {quarter}") for quarter in QUARTERS])
                   for what in ("loss", "prose")))


def shrunk_front(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """The front that a dissected update has when the whole of it is shrunk, down to the base."""
    ways = ["whole", *(f"update x {f:g}" for f in SCALED), "base"]
    return front(*([row[f"{what} {way}"] for way in ways] for what in ("loss", "prose")))


def values(method: dict, name: str) -> np.ndarray:
    """A measure of the dissected updates of a method (seeds,)."""
    return column(sorted(select(read_if_any(DISSECTED), **method), key=lambda row: row["seed"]),
                  name)


def more(method: dict, way: str, than: str = "whole") -> np.ndarray:
    """By how much the task loss with an update's part is above that with another (seeds,)."""
    return values(method, f"loss {way}") - values(method, f"loss {than}")


def forgotten() -> np.ndarray:
    """The loss on prose where both methods reach one task loss, full minus LoRA (seeds,)."""
    runs = read_if_any(NAME)
    return np.array([gap(*(front_of(select(runs, **method, seed=seed)) for method in (FULL, LORA)))
                     for seed in SEEDS])


def verdicts() -> list[Verdict]:
    """The claims on SmolLM2."""
    share = lambda way: ((values(LORA, "prose whole") - values(LORA, f"prose {way}"))
                         / (values(LORA, "prose whole") - values(LORA, "prose base")))
    over = [forgotten_at(row[f"loss {HALF}"], *shrunk_front(row)) - row[f"prose {HALF}"]
            for row in select(read_if_any(DISSECTED), **LORA)]
    tried = TOP * MATRICES
    shrunk = lambda claim, judge: judge(claim) if values(LORA, "intruders").min() > 0 else untested(
        claim.text, claim.chapter, "a seed's update has no intruder dimensions to shrink")
    cuts = ", ".join(f"rank {r} {by_seeds(more(FULL, f'rank {r}')).middle:+.3f}" for r in RANKS)
    found = [
        FORGETS.judged(by_seeds(forgotten()), form="+.3f"),
        INTRUDES.judged(of_shares(values(LORA, "intruders"), values(FULL, "intruders"), tried),
                        form="+.3f"),
        FREE.judged(by_seeds(values(FULL, "intruders")), form=".3f"),
        shrunk(RETURNS, lambda claim: claim.judged(
            by_seeds(share(HALF)), note=f"removed, {by_seeds(share(NONE)).text()}")),
        shrunk(CHEAP, lambda claim: claim.judged(
            by_seeds(more(LORA, HALF)), form="+.3f",
            note=f"removed, {by_seeds(more(LORA, NONE)).text('+.3f')}")),
        shrunk(BETTER, lambda claim: claim.judged(by_seeds(over), form="+.3f")),
        LOW.judged(by_seeds(more(FULL, "rank 16")), form="+.3f", note=(
            f"{cuts}; 90 % of an update's energy takes {values(FULL, '90 %').mean():.0f} "
            f"directions, 99 % {values(FULL, '99 %').mean():.0f}")),
        LOSSLESS.judged(by_seeds(more(LORA, "merged in bfloat16", "beside bfloat16")),
                        form="+.4f",
                        note=f"{by_seeds(values(LORA, 'kept')).middle:.1%} of the update arrives"),
    ]
    return [verdict.on("SmolLM2") for verdict in found]


if __name__ == "__main__":
    for count in range(1, len(SEEDS) + 1):
        grow(trial, partial(points, SEEDS[:count]), NAME)
        main(dissected, own_points(SEEDS[:count]), DISSECTED)
