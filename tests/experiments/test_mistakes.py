"""The planted mistakes do what they say, and the verdicts follow planted outcomes."""

import inspect
import zlib

import numpy as np
import pytest
import torch

from lora_lib.experiments import latency, mistakes, sweep
from lora_lib.experiments.claims import DOES_NOT, HOLDS, UNDECIDED
from lora_lib.torch import lora_modules

HOW = {"rank": 4, "lr": 1e-2, "steps": 5, "examples": 0}
X = torch.rand(6, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    """A base that is trained for a moment only."""
    fine_tune = mistakes.fine_tune
    monkeypatch.setattr(mistakes, "fine_tune", lambda *a, steps, **k: fine_tune(
        *a, steps=min(steps, 5), **k))
    caches = mistakes._pretrained, mistakes._trained
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("wrong", ["both zero", "optimizer before injection"])
def test_what_cannot_learn_stays_the_pretrained_network(wrong):
    model = mistakes.MISTAKES[wrong](0, **HOW)
    assert torch.equal(model(X), mistakes.pretrained(0)(X))


@pytest.mark.parametrize("wrong, times", [("scaling forgotten", 0.5), ("merged twice", 2)])
def test_a_wrong_merge_adds_the_update_that_often(wrong, times):
    right, merged = (mistakes.MISTAKES[name](0, **HOW) for name in ("none", wrong))
    for layer in lora_modules(right).values():
        layer.B.data *= times                            # the update is linear in B
    torch.testing.assert_close(merged(X), right(X))


def test_the_swapped_update_is_the_transpose_of_the_right_one():
    right, wrong = (lora_modules(mistakes.MISTAKES[name](0, **HOW))["2"]
                    for name in ("none", "swapped in a square layer"))
    torch.testing.assert_close(wrong.delta_weight(), right.delta_weight().T)


def test_dropout_is_on_where_it_was_left_on():
    on, off = (mistakes.MISTAKES[name](0, **HOW) for name in ("dropout left on",
                                                              "dropout off again"))
    assert not torch.equal(on(X), on(X)) and torch.equal(off(X), off(X))


def test_a_seed_draws_images_to_train_on_to_choose_by_and_to_test_on():
    parts, upright = mistakes._data(90, 60, 1), mistakes._data(0, 60, 1)
    assert [len(x) for x, _ in parts] == [60, 360, 360]
    for (x, y), (before, same) in zip(parts, upright):         # the same images, turned
        assert torch.equal(y, same)
        assert torch.equal(x.view(-1, 8, 8), before.view(-1, 8, 8).rot90(1, (1, 2)))
    everything = [{bytes(row.numpy()) for row in x} for x, _ in mistakes._data(90, 0, 1)]
    assert not everything[0] & everything[1] and not everything[2] & (everything[0] | everything[1])
    assert {bytes(row.numpy()) for row in parts[0][0]} < everything[0]
    others = mistakes._data(90, 60, 0)
    assert not any(torch.equal(x, other) for (x, _), (other, _) in zip(parts, others))


def planted(point, gap, best, rng):
    """Accuracy 0.9 at a method's best rate, less beside it; rank 1 reads 0.2 fewer images, and
    rank 64 reads `gap` fewer than the others."""
    full = point["mistake"] == "full fine tuning"
    off = abs(np.log2(point["lr"] / (1e-3 if full else best))) / 20
    lost = 0.2 * (point["rank"] == 1) + 0.5 * (point["mistake"] not in ("none", "full fine tuning"))
    right = 0.9 - off - lost - gap * (point["rank"] == 64)
    test, valid = right + 0.002 * rng.normal(size=2)
    if point["lr"] == 3.2e-2:                    # what is right on the test must not choose the rate
        test, valid = 1.0, 0.5
    return {"test": test, "valid": 1 - valid, "fit": 1.0}


@pytest.fixture
def sweep_of(tmp_path, monkeypatch):
    """Runs the whole sweep on planted outcomes."""
    monkeypatch.setattr(sweep, "RESULTS", tmp_path)
    sweep.write(tmp_path / "latency.csv", [{"seed": seed, "step": 1.2 + seed / 1000, "call": 1.2}
                                           for seed in latency.SEEDS])

    def run(gap=0.0, best=8e-3):
        usual = {"mistake": "none", "rank": 8, "lr": 1e-2, "steps": 400, "examples": 0}
        rows, done = {}, -1
        while done != len(rows):
            done = len(rows)
            for point in (usual | p for p in mistakes.points()):
                rng = np.random.default_rng(zlib.crc32(str(point).encode()))
                rows.setdefault(str(point), point | planted(point, gap, best, rng))
            sweep.write(tmp_path / "mistakes.csv", rows.values())
        return {v.claim: v.verdict for v in mistakes.verdicts()}
    return run


def test_the_verdicts_follow_what_was_measured(sweep_of):
    verdicts = sweep_of()
    assert (mistakes.best_rate(0), mistakes.best_rate(8), mistakes.best_rate(1, mistakes.FEW)) \
        == (1e-3, 8e-3, 8e-3)
    assert list(mistakes.tuned(8)) == pytest.approx([0.9] * 5, abs=0.01)
    assert mistakes.least_rate(0) == 1e-3
    assert verdicts[mistakes.OVERFITS.text] == DOES_NOT
    assert all(verdicts[c.text] == HOLDS for c in (mistakes.FREEZE, mistakes.UNDERFITS,
                                                   mistakes.TOO_LOW))


def test_a_gap_at_the_margin_and_equal_rates_are_undecided(sweep_of):
    verdicts = sweep_of(gap=0.03, best=1e-3)
    assert verdicts[mistakes.OVERFITS.text] == verdicts[mistakes.TOO_LOW.text] == UNDECIDED


def test_a_rank_that_overfits_is_found(sweep_of):
    assert sweep_of(gap=0.1)[mistakes.OVERFITS.text] == HOLDS


def test_the_kept_sweep_is_whole():
    kept = {sweep._key(inspect.signature(mistakes.trial), row) for row in sweep.read("mistakes")}
    points = [sweep._complete(inspect.signature(mistakes.trial), p) for p in mistakes.points()]
    assert {sweep._key(inspect.signature(mistakes.trial), p) for p in points} == kept
    for rank in (0, *mistakes.RANKS):
        for examples in (0, *mistakes.SIZES):
            assert mistakes.best_rate(rank, examples) not in (
                min(mistakes.wrong(rank, examples)[0]), max(mistakes.wrong(rank, examples)[0]))
            assert len(mistakes.tuned(rank, examples)) == len(mistakes.SEEDS)
    assert len(mistakes.verdicts()) == 6
