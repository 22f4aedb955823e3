"""Every rung is the same layer, counted the same as PyTorch counts it; the kept times are whole."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lora_lib.experiments import ladder
from lora_lib.experiments.ladder import (SETTINGS, Count, Rates, Setting, Work, counted, kind, made,
                                         measure, parts, rates, saved, step)
from lora_lib.experiments.rungs import BESIDE_16_BITS, RUNGS, TOGETHER
from lora_lib.experiments.sweep import read, select, write

SMALL = {1: Setting(48, 20, 4), 3: Setting(48, 20, 4, layers=3)}
HALF = Setting(48, 20, 4, "bfloat16", 3)


def by_hand(x, layers, gs):
    """y = x (W + scaling B A)^T + b in float64, and its gradients by autograd."""
    x, *trained = (t.detach().double().requires_grad_()
                   for t in (x, *(layer.A for layer in layers), *(layer.B for layer in layers)))
    As, Bs = trained[:len(layers)], trained[len(layers):]
    ys = [x @ (layer.W.double() + layer.scaling * B @ A).t() + layer.bias.double()
          for layer, A, B in zip(layers, As, Bs)]
    return ys, torch.autograd.grad(ys, [x, *trained], [g.double() for g in gs])


def far(ours, truth):
    return ((ours.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("layers, name", [
    *((1, name) for name in RUNGS if name != "frozen"),
    *((3, name) for name in TOGETHER if name != "frozen")])
@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_every_rung_is_the_formula(layers, name, dtype, error):
    data = made(SMALL[layers], seed=1, dtype=dtype)
    ys, gradients = step(SMALL[layers].rungs()[name], *data)()
    true_ys, truth = by_hand(*data)
    assert all(far(*pair) < error for pair in zip((*ys, *gradients), (*true_ys, *truth)))
    assert all(y.shape == (20, 48) and y.dtype == dtype for y in ys)


@pytest.mark.parametrize("name", [name for name in BESIDE_16_BITS if name != "frozen"])
def test_in_bfloat16_the_error_is_that_of_rounding(name):
    data = made(HALF, seed=1)
    ys, gradients = step(HALF.rungs()[name], *data)()
    true_ys, truth = by_hand(*data)
    assert all(far(*pair) < 0.01 for pair in zip((*ys, *gradients), (*true_ys, *truth)))
    assert [g.dtype for g in gradients] == [torch.bfloat16] + [torch.float32] * 6


def test_the_last_rung_is_the_library_to_the_bit():
    data = made(Setting(80, 64, 8))              # where the library transposes
    ours, theirs = (step(RUNGS[name], *data)() for name in ("transposed", "library"))
    assert torch.equal(ours[0][0], theirs[0][0])
    assert all(torch.equal(*pair) for pair in zip(ours[1], theirs[1]))


def test_a_stack_must_be_one():
    x, ((W, bias, A, B, scaling),), _ = made(SMALL[1])
    with pytest.raises(ValueError, match="one buffer"):
        RUNGS["W, A stacked"](x, W, bias, A.detach().clone(), B, scaling)


@pytest.mark.parametrize("setting", [*SMALL.values(), HALF])
def test_flops_are_those_that_pytorch_counts(setting):
    data = made(setting)
    for rung in setting.rungs().values():
        with FlopCounterMode(display=False) as counter:
            step(rung, *data)()
        assert counted(step(rung, *data)).flops.total() == counter.get_total_flops()


def test_flops_are_those_of_the_formula():
    data, (n, k, r) = made(SMALL[1]), (20, 48, 4)
    of = lambda name: counted(step(RUNGS[name], *data)).flops.total()
    assert of("frozen") == 4 * n * k * k
    assert of("formula") - of("frozen") == 6 * n * r * 2 * k


def test_kinds_of_products():
    n, k, r = 64, 128, 8
    x, A, B = torch.ones(n, k), torch.ones(r, k), torch.ones(k, r)
    for a, b, expected in ((x, torch.ones(k, k).t(), "large"), (x, A.t(), "narrow"),
                           (x, B, "tall"), (x.t(), torch.ones(n, r), "tall"),
                           (B.t(), x.t(), "flat"), (torch.ones(n, r), A, "wide")):
        assert kind(a, b) == expected
    for name, function in parts(*made(Setting(128, 64))).items():
        done = set(counted(function).flops)
        assert done == (set() if name == "add" else {"wide float32"} if "apart" in name else {name})


def test_bytes_and_calls():
    x = torch.ones(10, 10)
    with Count() as count:
        (x.t() + x) * 2
    assert (count.work.calls, count.work.bytes) == (3, 5 * x.nbytes)


def test_what_is_saved_for_backward():
    (x, layers, gs), half = made(SMALL[1]), made(HALF)
    for name in ("formula", "narrow scale", "one step", "in place", "transposed", "library"):
        assert saved(RUNGS[name], x, layers, gs) == (x.numel() + 20 * 4) * 4
    assert saved(RUNGS["frozen"], x, layers, gs) == 0
    of = {name: saved(rung, *half) for name, rung in BESIDE_16_BITS.items()}
    numbers, low = 20 * 48, 20 * 4
    assert of["library"] == of["shared"] == 2 * numbers + 3 * 2 * low
    assert of["cast x"] == 3 * 4 * numbers + 3 * 4 * low
    assert of["cast A and B"] == of["library"] + 3 * 2 * (2 * 48 * 4)       # the casts are kept


def test_a_prediction_adds_up():
    work = Work(calls=3, bytes=100)
    work.flops["large float32"] = 50
    assert Rates({"large float32": 10.0}, 25.0, 2.0).predict(work) == 5 + 4 + 6


def test_rows_are_written_and_read_again(tmp_path):
    settings = [ladder.TINY, SMALL[1]]
    write(tmp_path / "ladder.csv", [row | ladder.machine() for setting in settings
                                    for row in measure(setting, rounds=1)])
    rows = read(tmp_path / "ladder.csv")
    assert {"cpu", "threads", "torch", "low", "high"} <= set(rows[0])
    assert [row["name"] for row in select(rows, **vars(SMALL[1]), kind="rung")] == list(RUNGS)
    found = rates(rows, SMALL[1])
    assert min(*found.flops.values(), found.bytes, found.call) > 0


def test_the_kept_rows_are_those_of_the_settings():
    rows = read("ladder")
    for setting in SETTINGS:
        kept = [row["name"] for row in select(rows, **vars(setting), kind="rung")]
        assert kept == list(setting.rungs())
    assert all(row["low"] <= row["seconds"] <= row["high"] for row in rows)


def test_a_measurement_covers_rungs_and_parts():
    names = {row["name"]: row for row in measure(SMALL[3], rounds=1)}
    assert set(TOGETHER) < set(names) and names["frozen"]["ratio"] == 1
