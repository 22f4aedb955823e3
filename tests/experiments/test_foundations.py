"""The verdicts of chapters 1 to 5 follow planted numbers, and the measures do what they say."""

import numpy as np
import pytest

from lora_lib.experiments import foundation_measures as measures
from lora_lib.experiments import foundations, sweep
from lora_lib.experiments.claims import DOES_NOT, HOLDS, UNDECIDED

USUAL = {
    "full accuracy": 0.97, "lora rank 8 accuracy": 0.97, "lora rank 1 accuracy": 0.9,
    "full change cut to rank 1 accuracy": 0.2, "full change cut to rank 4 accuracy": 0.6,
    "full change cut to rank 8 accuracy": 0.93, "full change cut to rank 16 accuracy": 0.97,
    "full change cut to rank 32 accuracy": 0.97, "output change at the start": 0,
    "merged against unmerged": 1e-15, "accuracy trained from a zero": 0.97,
    "kept of an update of 2^-4 merged in bfloat16": 1.0,
    "kept of an update of 2^-10 merged in bfloat16": 0.6,
    "step time of lora on q and v at width 512": 0.6,
    "step time of lora on all linear layers at width 96": 1.2}


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """The verdicts by claim when the measures have these means, half a unit for the others."""
    monkeypatch.setattr(sweep, "RESULTS", tmp_path)

    def of(merged_time=1.0, **changed):
        means = USUAL | {name.replace("_", " "): value for name, value in changed.items()}
        rng = np.random.default_rng(0)
        noise = lambda what: 0 if what.startswith(("output", "merged")) else 0.002 * rng.normal()
        sweep.write(tmp_path / "foundations.csv", [
            {"what": what, "seed": seed, "value": means.get(what, 0.5) + noise(what)}
            for what in measures.MEASURES for seed in foundations.SEEDS])
        sweep.write(tmp_path / "bottleneck_speed.csv", [
            {"seed": s, "LoRA merged": merged_time + 0.005 * rng.normal()} for s in range(5)])
        return {v.claim: v for v in foundations.verdicts()}
    return of


def test_what_is_usual(judged):
    found = judged()
    assert found[foundations.ENOUGH.text].verdict == found[foundations.FREE.text].verdict == HOLDS
    assert found[foundations.LOW.text].verdict == f"{HOLDS} if 16 or 32 directions are kept"
    assert found[foundations.START.text].verdict == DOES_NOT
    assert found[foundations.STACK.text].verdict == DOES_NOT
    assert found[foundations.LOSSLESS.text].verdict \
        == f"{HOLDS} if the update has 1/16 of the weight's norm"
    assert found[foundations.FASTER.text].verdict == f"{HOLDS} if at width 512, q and v"
    assert sum(v.counted for v in found.values()) == 9


@pytest.mark.parametrize("accuracy, verdict", [(0.96, HOLDS), (0.94, UNDECIDED), (0.9, DOES_NOT)])
def test_a_low_rank_that_falls_behind(accuracy, verdict, judged):
    assert judged(lora_rank_8_accuracy=accuracy)[foundations.ENOUGH.text].verdict == verdict


def test_sums_and_times_that_come_out_otherwise(judged):
    stacked = {"lost_by_merging_one_that_works_on_what_the_other_gives": 0.02}
    found = judged(merged_time=1.05, accuracy_trained_from_a_zero=0.5, **stacked)
    assert found[foundations.STACK.text].verdict \
        == f"{HOLDS} if one works on what the other gives it"
    assert found[foundations.FREE.text].verdict == UNDECIDED
    assert found[foundations.START.text].verdict == HOLDS


def test_a_sum_of_adapters_has_each_ones_update():
    seed, steps = 1, 3
    one, two = (measures._adapted(seed, measures.data(turn, seed), layers=[place], steps=steps)
                for turn, place in ((90, 0), (180, 4)))
    both, base = measures._sum(seed, one, two), measures.base(seed)
    changed = [np.linalg.matrix_rank(both.layers[i].weight - base.layers[i].weight)
               for i in measures.LAYERS]
    assert changed == [8, 0, 8]
    x = measures.data(90, seed).x_test
    np.testing.assert_allclose(measures._sum(seed, one)(x), one(x))


def test_negatives_have_the_bases_answers():
    seed, (d, other) = 1, (measures.data(turn, 1) for turn in (90, 180))
    found = measures._with_negatives(seed, d, other)
    n = len(d.y_train)
    np.testing.assert_array_equal(found.x_train[n:], other.x_train)
    np.testing.assert_array_equal(found.y_train[:n], d.y_train)
    np.testing.assert_array_equal(found.y_train[n:],
                                  measures.base(seed)(other.x_train).argmax(axis=1))
    assert np.mean(found.y_train[n:] == other.y_train) < 0.6          # they are not the labels


def test_a_cut_keeps_the_first_directions():
    assert measures.cut_accuracy(128, 1) == measures.full_accuracy(1)
    assert measures.cut_accuracy(1, 1) < 0.5
