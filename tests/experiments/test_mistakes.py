"""The planted mistakes do what they say, and the verdicts follow planted outcomes."""

import numpy as np
import pytest
import torch

from lora_lib.experiments import mistakes, sweep
from lora_lib.experiments.claims import DOES_NOT, HOLDS
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


def test_few_examples_are_drawn_by_the_seed():
    (x, y), _ = mistakes._data(90, 60, 0)
    (other, _), _ = mistakes._data(90, 60, 1)
    assert len(x) == len(y) == 60 and not torch.equal(x, other)


def planted(point):
    """Test accuracy 0.9 at the best rate, less beside it; rank 1 has 0.2 less."""
    full = point["mistake"] == "full fine tuning"
    off = abs(np.log2(point["lr"] / (1e-3 if full else 8e-3))) / 20
    lost = 0.2 * (point["rank"] == 1) + 0.5 * (point["mistake"] not in ("none", "full fine tuning"))
    return {"test": 0.9 - off - lost + 0.001 * (point["seed"] % 10), "fit": 1.0}


def test_the_verdicts_follow_what_was_measured(tmp_path, monkeypatch):
    times = sweep.read("latency")
    monkeypatch.setattr(sweep, "RESULTS", tmp_path)
    monkeypatch.setattr(mistakes, "RESULTS", tmp_path)
    sweep.write(tmp_path / "latency.csv", times)
    usual = {"rank": 8, "lr": 1e-2, "steps": 400, "examples": 0}

    def run(points):
        rows = {str(row): row for row in (usual | point for point in points)}.values()
        sweep.write(tmp_path / "mistakes.csv", [row | planted(row) for row in rows])

    for _ in range(3):
        run(mistakes.tuning())
    assert (mistakes.best_rate(0), mistakes.best_rate(8), mistakes.best_rate(1, mistakes.FEW)) \
        == (1e-3, 8e-3, 8e-3)
    run(mistakes.tuning() + mistakes.comparison())
    assert list(mistakes.tuned(8)) == pytest.approx([0.9 + 0.001 * seed for seed in range(5)])
    verdicts = {v.claim: v.verdict for v in mistakes.verdicts()}
    assert verdicts["a rank too high overfits"] == DOES_NOT
    assert verdicts["a rank too low underfits"] == HOLDS
    assert list(verdicts.values()).count(DOES_NOT) == 1


def test_the_kept_sweep_is_whole_and_no_best_rate_stands_at_the_end_of_its_grid():
    for rank in (0, *mistakes.RANKS):
        for examples in (0, mistakes.FEW):
            rates = list(mistakes.tried(rank, examples))
            assert mistakes.grid(rank, examples) == rates
            assert mistakes.best_rate(rank, examples) not in (rates[0], rates[-1])
            assert len(mistakes.tuned(rank, examples)) == len(mistakes.SEEDS)
    for name in mistakes.MISTAKES:
        assert len(mistakes.values(mistake=name)) == len(mistakes.SEEDS)
    assert len(mistakes.verdicts()) == 6
