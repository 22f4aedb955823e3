"""What chapters 1 to 5 claim, measured again for the summary: one number a claim and seed.

`python -m lora_lib.experiments.foundations` takes about three minutes on one core.
"""

import copy
from functools import lru_cache

import numpy as np

from lora_lib import costs
from lora_lib.data import digits
from lora_lib.experiments import sweep
from lora_lib.experiments.claims import DOES_NOT, HOLDS, Verdict
from lora_lib.experiments.sweep import column, main, read, select
from lora_lib.numpy import LoRALayer, LoRALinear, accuracy, inject, merge, mlp, train

SEEDS = range(5)
MEASURES = {}


def measure(function):
    """Enter function(seed) -> number under its name, spelled with spaces."""
    MEASURES[function.__name__.replace("_", " ")] = function
    return function


def trial(what: str, seed: int) -> dict[str, float]:
    """The measure `what` with this seed. Raises KeyError for an unknown one."""
    return {"value": float(MEASURES[what](seed))}


def points() -> list[dict]:
    return [{"what": what, "seed": seed} for what in MEASURES for seed in SEEDS]


# ------------------------------------------------- chapter 1, on digits turned by 90 degrees
data = lru_cache(digits)


@lru_cache
def base(seed):
    return _trained(mlp(64, 128, 128, 10, seed=seed), 0, seed, lr=1e-3)


@lru_cache
def full(seed):
    return _trained(copy.deepcopy(base(seed)), 90, seed, lr=1e-3)


@lru_cache
def lora(seed, rank, turn=90):
    network = inject(copy.deepcopy(base(seed)), rank, 2 * rank, seed=seed)
    return _trained(network, turn, seed, lr=1e-2)


def _trained(network, turn, seed, lr):
    train(network, data(turn).x_train, data(turn).y_train, steps=800, lr=lr, seed=seed)
    return network


def _score(network, turn=90):
    return accuracy(network, data(turn).x_test, data(turn).y_test)


def _change(seed):
    return full(seed).layers[2].weight - base(seed).layers[2].weight


@measure
def full_accuracy(seed):
    return _score(full(seed))


@measure
def lora_rank_1_accuracy(seed):
    return _score(lora(seed, 1))


@measure
def lora_rank_8_accuracy(seed):
    return _score(lora(seed, 8))


@measure
def full_change_cut_to_rank_1_accuracy(seed):
    network = copy.deepcopy(full(seed))
    for layer, old in zip(network.layers, base(seed).layers):
        if hasattr(old, "weight"):
            U, sigma, Vt = np.linalg.svd(layer.weight - old.weight, full_matrices=False)
            layer.weight = old.weight + sigma[0] * np.outer(U[:, 0], Vt[0])
    return _score(network)


@measure
def full_change_directions_for_99_percent(seed):
    squares = np.linalg.svd(_change(seed), compute_uv=False) ** 2
    return np.sum(np.cumsum(squares) / squares.sum() < 0.99) + 1


# ----------------------------------------------------------- chapters 2 and 3: one layer, a start
def _layer(seed):
    """A layer with a trained-size B, its weight, inputs, and gradients of its outputs."""
    rng = np.random.default_rng(seed)
    layer = LoRALayer(48, 32, 8, 16, seed=rng)
    layer.B = rng.normal(0, 0.1, layer.B.shape)
    return layer, rng.normal(size=(32, 48)) / 48**0.5, rng.normal(size=(5, 48)), rng


@measure
def error_of_an_input_gradient_without_the_adapter(seed):
    layer, W, x, rng = _layer(seed)
    g = rng.normal(size=(5, 32))
    right = layer.backward(g, x, W)
    return np.linalg.norm(g @ W - right) / np.linalg.norm(right)


@measure
def output_change_at_the_start(seed):
    fresh = inject(copy.deepcopy(base(seed)), 8, 16, seed=seed)
    return np.abs(fresh(data().x_test) - base(seed)(data().x_test)).max()


@measure
def accuracy_at_the_start_with_both_random(seed):
    network, rng = inject(copy.deepcopy(base(seed)), 8, 16, seed=seed), np.random.default_rng(seed)
    for layer in network.layers:
        if isinstance(layer, LoRALinear):
            layer.B = rng.normal(0, layer.rank**-0.5, layer.B.shape)
    return _score(network, 0)


@measure
def accuracy_trained_from_a_zero(seed):
    """A = 0 with B random, at a lower rate, since its steps are larger (chapter 3)."""
    network, rng = inject(copy.deepcopy(base(seed)), 8, 16, seed=seed), np.random.default_rng(seed)
    for layer in network.layers:
        if isinstance(layer, LoRALinear):
            layer.A[:], layer.B = 0, rng.normal(0, layer.rank**-0.5, layer.B.shape)
    return _score(_trained(network, 90, seed, lr=3e-3))


@measure
def accuracy_trained_from_both_zero(seed):
    network = inject(copy.deepcopy(base(seed)), 8, 16, seed=seed)
    for layer in network.layers:
        if isinstance(layer, LoRALinear):
            layer.A[:] = 0
    return _score(_trained(network, 90, seed, lr=1e-2))


# ---------------------------------------------------------------------------- chapter 4: merging
@measure
def merged_against_unmerged(seed):
    x, network = data(90).x_test, copy.deepcopy(lora(seed, 8))
    before = network(x)
    return np.linalg.norm(merge(network)(x) - before) / np.linalg.norm(before)


@measure
def kept_of_a_small_update_merged_in_bfloat16(seed):
    """The update has 2^-10 of the norm of the weight."""
    import torch

    layer = lora(seed, 8).layers[2]
    W = torch.tensor(layer.weight, dtype=torch.bfloat16)
    delta = torch.tensor(layer.delta_weight())
    delta *= 2.0**-10 * W.double().norm() / delta.norm()
    moved = (W.double() + delta).to(torch.bfloat16).double() - W.double()
    return float((moved * delta).sum() / (delta * delta).sum())


@measure
def worse_task_after_merging_two_adapters(seed):
    network = copy.deepcopy(base(seed))
    for i, layer in enumerate(network.layers):
        if hasattr(layer, "weight"):
            for turn in (90, 180):
                layer.weight = layer.weight + lora(seed, 8, turn).layers[i].delta_weight()
    return min(_score(network, 90), _score(network, 180))


def _named_anew(turn):
    """Digits under new names: 0 is called 1, 1 is called 2, ... and 9 is called 0."""
    d = data(turn)
    return d._replace(y_train=(d.y_train + 1) % 10, y_test=(d.y_test + 1) % 10)


@measure
def both_tasks_after_merging_adapters_in_different_layers(seed):
    """The first layer learns to see turned digits, the last one, apart from it, new names."""
    network = copy.deepcopy(base(seed))
    for place, d in ((0, data(90)), (4, _named_anew(0))):
        part = inject(copy.deepcopy(base(seed)), 8, 16, layers=[place], seed=seed)
        train(part, d.x_train, d.y_train, steps=800, lr=1e-2, seed=seed)
        network.layers[place] = part.layers[place]
    both = _named_anew(90)
    return accuracy(merge(network), both.x_test, both.y_test)


# ------------------------------------------------- chapter 5: a step, full and LoRA, in turn
def _models(seed, width, targets):
    from lora_lib.torch import LanguageModel, LanguageModelConfig, inject

    shape = {96: (256, 96, 256, 4, 4), 512: (256, 512, 1408, 2, 8)}[width]
    models = [LanguageModel(LanguageModelConfig(*shape), seed=seed) for _ in range(2)]
    inject(models[1], targets, 8, 16, seed=seed)
    return models


def _tokens(seed):
    import torch

    tokens = torch.randint(256, (4, 65), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def _step_time(seed, width, targets, rounds=12):
    """The median time of a LoRA step over that of a full one, in turn."""
    import torch

    from lora_lib.experiments.latency import ratio
    from lora_lib.torch import cross_entropy

    inputs, labels = _tokens(seed)

    def step_of(model):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

        def step():
            cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        return step

    full_, low = map(step_of, _models(seed, width, targets))
    return ratio(low, full_, rounds)


@measure
def step_time_of_lora_on_q_and_v_at_width_512(seed):
    return _step_time(seed, 512, ["q_proj", "v_proj"])


@measure
def step_time_of_lora_on_all_linear_layers_at_width_96(seed):
    return _step_time(seed, 96, "all-linear")


@measure
def memory_of_lora_on_q_and_v_at_width_512(seed):
    from lora_lib.torch import measure_memory

    full_, low = (measure_memory(model, *_tokens(seed)).total
                  for model in _models(seed, 512, ["q_proj", "v_proj"]))
    return low / full_


# ---------------------------------------------------------------------------------- the verdicts
def values(what: str) -> np.ndarray:
    """The kept values of a measure, by seed."""
    return column(select(read("foundations"), what=what), "value")


def shown(what: str, form: str = ".2f") -> str:
    """The mean and its 95 % interval, written out."""
    return sweep.shown(values(what), form)


def verdicts() -> list[Verdict]:
    """The claims of chapters 1 to 5, each judged by the comparison written beside it."""
    of = {name: values(name) for name in MEASURES}
    good = min(of["full accuracy"]) - 0.03                  # "as good as full": within 3 points
    directions = of["full change directions for 99 percent"]
    start, merged = (max(of[name]) for name in
                     ("output change at the start", "merged against unmerged"))
    kept = of["kept of a small update merged in bfloat16"]
    parted = of["both tasks after merging adapters in different layers"]
    wide = of["step time of lora on q and v at width 512"]
    narrow = of["step time of lora on all linear layers at width 96"]
    shape, targets = costs.LLAMA_7B, ("q_proj", "v_proj")
    share = shape.lora_parameters(8, targets) / shape.parameters()
    size, size_all = (costs.adapter_bytes(shape, 8, t, 2) / 1e6 for t in (targets, "all-linear"))
    whole, low = (costs.memory(shape, batch=1, sequence=512, rank=r, target_modules=targets).total
                  for r in (None, 8))

    def judged(condition, otherwise=DOES_NOT):
        return HOLDS if condition else otherwise

    return [
        Verdict("a low-rank update is enough for a new task", "1",
                judged(min(of["lora rank 8 accuracy"]) > good),
                f"accuracy on turned digits: full {shown('full accuracy')}, rank 8 "
                f"{shown('lora rank 8 accuracy')}, rank 1 {shown('lora rank 1 accuracy')}"),
        Verdict("the update that full fine-tuning makes is of low rank", "1",
                judged(min(of["full change cut to rank 1 accuracy"]) > good),
                f"99 % of its energy takes {min(directions):.0f} to {max(directions):.0f} of 128 "
                "directions; cut to rank 1 it reads "
                f"{shown('full change cut to rank 1 accuracy')} of the digits"),
        Verdict("at rank 8 a 4096 x 4096 update has 65K numbers in place of 16.7M", "1",
                judged(costs.lora_parameters(4096, 4096, 8) // 1000 == 65),
                f"{costs.lora_parameters(4096, 4096, 8):,} in place of "
                f"{costs.full_parameters(4096, 4096):,}"),
        Verdict("ranks 4, 8, 16, 64 train 32K, 65K, 131K, 524K numbers in a 4096 x 4096 layer", "7",
                judged([costs.lora_parameters(4096, 4096, r) // 1000 for r in (4, 8, 16, 64)]
                       == [32, 65, 131, 524]),
                ", ".join(f"{costs.lora_parameters(4096, 4096, r):,}" for r in (4, 8, 16, 64))),
        Verdict("B projects down and A projects up", "2",
                judged(LoRALayer(5, 7, 2).B.shape[0] < LoRALayer(5, 7, 2).B.shape[1]),
                "A (r, k) projects down to r numbers, B (d, r) projects up"),
        Verdict("the backward pass hands g W to the layer below", "2",
                judged(max(of["error of an input gradient without the adapter"]) < 1e-6),
                "the adapter's own path is left out: in a layer with ordinary A and B, "
                f"{shown('error of an input gradient without the adapter')} of the gradient's "
                "norm"),
        Verdict("with B = 0 the model starts exactly as pretrained", "3", judged(start == 0),
                f"largest change of an output: {start:g}"),
        Verdict("B, not A, must start at zero", "3",
                judged(max(of["accuracy trained from a zero"]) < good,
                       DOES_NOT if max(of["accuracy trained from both zero"]) > good else
                       "holds if A is not zero in its place"),
                f"accuracy reached from B = 0 {shown('lora rank 8 accuracy')}, from A = 0 "
                f"{shown('accuracy trained from a zero')}, from both zero "
                f"{shown('accuracy trained from both zero')}; both random: "
                f"{shown('accuracy at the start with both random')} on the old task at the start"),
        Verdict("merged, the model computes the same", "4", judged(merged < 1e-12),
                f"relative difference {10 ** np.ceil(np.log10(merged)):.0e} at most, in float64"),
        Verdict("merged, inference costs nothing extra", "4",
                judged(column(read("bottleneck_speed"), "LoRA merged").mean() < 1.05),
                "one call over the bare model's: "
                + sweep.shown(column(read("bottleneck_speed"), "LoRA merged"))),
        Verdict("merging loses nothing", "4",
                judged(min(kept) > 0.95, "holds if the update is not small beside 16-bit weights"),
                "merged in bfloat16, an update of 1/1024 of the weight's norm keeps "
                f"{shown('kept of a small update merged in bfloat16')} of itself"),
        Verdict("adapters stack: train several, merge what you need", "4",
                judged(min(of["worse task after merging two adapters"]) > good,
                       "holds if they sit in different layers"
                       if min(parted) > 0.6 else DOES_NOT),
                "two merged: accuracy "
                f"{shown('worse task after merging two adapters')} on the worse of their tasks "
                f"(one alone: {shown('lora rank 8 accuracy')}); in different layers, for two parts "
                f"of one task: {shown('both tasks after merging adapters in different layers')}"),
        Verdict("about 0.1 % of the parameters are trained", "5", judged(3e-4 < share < 3e-3),
                f"{share:.2%} of a 7B Llama at rank 8 on q and v"),
        Verdict("memory is low", "5", judged(low < whole / 2),
                f"7B, one row of 512 tokens: {low / 1e9:.0f} GB in place of {whole / 1e9:.0f} GB "
                "by count; measured at width 512: "
                f"{shown('memory of lora on q and v at width 512')} of full"),
        Verdict("a training step is faster", "5",
                judged(max(narrow) < 0.95 and max(wide) < 0.95,
                       "holds if the layers are wide" if max(wide) < 0.95 else DOES_NOT),
                "a step's time over full fine-tuning's: width 512, q and v, "
                f"{shown('step time of lora on q and v at width 512')}; width 96, all linear, "
                f"{shown('step time of lora on all linear layers at width 96')}"),
        Verdict("an adapter takes about 10 MB", "5",
                judged(size_all < 20, "holds if few layers are adapted" if size < 20 else DOES_NOT),
                f"7B, rank 8, 16 bits: {size:.1f} MB on q and v, {size_all:.0f} MB on all linear "
                "layers"),
    ]


if __name__ == "__main__":
    main(trial, points(), "foundations")
