"""What chapters 1 to 5 claim, as functions of a seed: each gives one number.

The seed draws the test images, the first weights, the adapters and the order of the batches.
"""

import copy
from functools import lru_cache, partial

import numpy as np

from lora_lib.data import digits
from lora_lib.numpy import LoRALayer, LoRALinear, accuracy, inject, merge, mlp, train

TEST = 360                                                         # images of a seed
CUTS = (1, 4, 8, 16, 32)
LAYERS = FIRST, MIDDLE, LAST = (0, 2, 4)
MEASURES = {}


def measure(function):
    """Enter function(seed) -> number under its name, spelled with spaces."""
    MEASURES[function.__name__.replace("_", " ")] = function
    return function


# ------------------------------------------------- chapter 1, on digits turned by 90 degrees
data = lru_cache(digits)


@lru_cache
def base(seed):
    return _trained(mlp(64, 128, 128, 10, seed=seed), data(0, seed), seed, lr=1e-3)


@lru_cache
def full(seed):
    return _trained(copy.deepcopy(base(seed)), data(90, seed), seed, lr=1e-3)


@lru_cache
def lora(seed, rank):
    return _adapted(seed, data(90, seed), rank)


def _adapted(seed, d, rank=8, layers=None, steps=800):
    network = inject(copy.deepcopy(base(seed)), rank, 2 * rank, layers=layers, seed=seed)
    return _trained(network, d, seed, lr=1e-2, steps=steps)


def _trained(network, d, seed, lr, steps=800):
    train(network, d.x_train, d.y_train, steps=steps, lr=lr, seed=seed)
    return network


def _score(network, d):
    return accuracy(network, d.x_test, d.y_test)


def _change(seed):
    return full(seed).layers[MIDDLE].weight - base(seed).layers[MIDDLE].weight


@measure
def full_accuracy(seed):
    return _score(full(seed), data(90, seed))


@measure
def lora_rank_1_accuracy(seed):
    return _score(lora(seed, 1), data(90, seed))


@measure
def lora_rank_8_accuracy(seed):
    return _score(lora(seed, 8), data(90, seed))


def cut_accuracy(rank, seed):
    """Of full fine-tuning, when only the first directions of every layer's change are kept."""
    network = copy.deepcopy(full(seed))
    for i in LAYERS:
        old = base(seed).layers[i].weight
        U, sigma, Vt = np.linalg.svd(network.layers[i].weight - old, full_matrices=False)
        network.layers[i].weight = old + (U[:, :rank] * sigma[:rank]) @ Vt[:rank]
    return _score(network, data(90, seed))


for cut in CUTS:
    MEASURES[f"full change cut to rank {cut} accuracy"] = partial(cut_accuracy, cut)


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
    x, fresh = data(0, seed).x_test, inject(copy.deepcopy(base(seed)), 8, 16, seed=seed)
    return np.abs(fresh(x) - base(seed)(x)).max()


@measure
def accuracy_at_the_start_with_both_random(seed):
    network, rng = inject(copy.deepcopy(base(seed)), 8, 16, seed=seed), np.random.default_rng(seed)
    for layer in network.layers:
        if isinstance(layer, LoRALinear):
            layer.B = rng.normal(0, layer.rank**-0.5, layer.B.shape)
    return _score(network, data(0, seed))


@measure
def accuracy_trained_from_a_zero(seed):
    """A = 0 with B random, at a lower rate, since its steps are larger (chapter 3)."""
    network, rng = inject(copy.deepcopy(base(seed)), 8, 16, seed=seed), np.random.default_rng(seed)
    for layer in network.layers:
        if isinstance(layer, LoRALinear):
            layer.A[:], layer.B = 0, rng.normal(0, layer.rank**-0.5, layer.B.shape)
    return _score(_trained(network, data(90, seed), seed, lr=3e-3), data(90, seed))


@measure
def accuracy_trained_from_both_zero(seed):
    network = inject(copy.deepcopy(base(seed)), 8, 16, seed=seed)
    for layer in network.layers:
        if isinstance(layer, LoRALinear):
            layer.A[:] = 0
    return _score(_trained(network, data(90, seed), seed, lr=1e-2), data(90, seed))


# ---------------------------------------------------------------------------- chapter 4: merging
@measure
def merged_against_unmerged(seed):
    x, network = data(90, seed).x_test, copy.deepcopy(lora(seed, 8))
    before = network(x)
    return np.linalg.norm(merge(network)(x) - before) / np.linalg.norm(before)


def kept_in_bfloat16(exponent, seed):
    """The share that is kept of an update with 2^exponent of the norm of the weight."""
    import torch

    layer = lora(seed, 8).layers[MIDDLE]
    W = torch.tensor(layer.weight, dtype=torch.bfloat16)
    delta = torch.tensor(layer.delta_weight())
    delta *= 2.0**exponent * W.double().norm() / delta.norm()
    moved = (W.double() + delta).to(torch.bfloat16).double() - W.double()
    return float((moved * delta).sum() / (delta * delta).sum())


for exponent in (-4, -10):
    MEASURES[f"kept of an update of 2^{exponent} merged in bfloat16"] = partial(
        kept_in_bfloat16, exponent)


def _named_anew(d):
    """Digits under new names: 0 is called 1, 1 is called 2, ... and 9 is called 0."""
    return d._replace(y_train=(d.y_train + 1) % 10, y_test=(d.y_test + 1) % 10)


def _with_negatives(seed, d, other):
    """Beside a task's images the other task's, with the answers that the base gives to them."""
    answers = base(seed)(other.x_train).argmax(axis=1)
    return d._replace(x_train=np.concatenate([d.x_train, other.x_train]),
                      y_train=np.concatenate([d.y_train, answers]))


def _sum(seed, *adapted):
    network = copy.deepcopy(base(seed))
    for other in adapted:
        for layer, its in zip(network.layers, other.layers):
            if isinstance(its, LoRALinear):
                layer.weight = layer.weight + its.delta_weight()
    return network


def _lost(seed, turned, turned_back):
    """How much the worse task loses by merging an adapter for 90 degrees and one for 180."""
    both, tasks = _sum(seed, turned, turned_back), (data(90, seed), data(180, seed))
    return max(_score(alone, d) - _score(both, d) for alone, d in zip((turned, turned_back), tasks))


def _pair(seed, *layers, negatives=False, **options):
    tasks = data(90, seed), data(180, seed)
    learned = tasks if not negatives else (_with_negatives(seed, *tasks),
                                           _with_negatives(seed, *reversed(tasks)))
    return _lost(seed, *(_adapted(seed, d, layers=where, **options)
                         for d, where in zip(learned, layers)))


@measure
def lost_by_merging_two_in_all_layers(seed):
    return _pair(seed, None, None)


@measure
def lost_by_merging_90_in_the_first_layer_and_180_in_the_last(seed):
    return _pair(seed, [FIRST], [LAST])


@measure
def lost_by_merging_180_in_the_first_layer_and_90_in_the_last(seed):
    return _pair(seed, [LAST], [FIRST])


@measure
def lost_by_merging_two_trained_with_negatives(seed):
    """Each saw the other's images too, in twice the steps, and learned to leave them alone."""
    return _pair(seed, None, None, negatives=True, steps=1600)


@measure
def lost_by_merging_one_that_works_on_what_the_other_gives(seed):
    """The first layer learns to see turned digits, the last one, apart from it, new names."""
    see = _adapted(seed, data(90, seed), layers=[FIRST])
    name = _adapted(seed, _named_anew(data(0, seed)), layers=[LAST])
    alone = min(_score(see, data(90, seed)), _score(name, _named_anew(data(0, seed))))
    return alone - _score(_sum(seed, see, name), _named_anew(data(90, seed)))


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
    from lora_lib.experiments.latency import ratio, stepper

    full_, low = (stepper(model, *_tokens(seed)) for model in _models(seed, width, targets))
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
