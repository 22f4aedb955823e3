"""Batch sizes and dials, on planted rows; and the kept sweep is whole."""

import numpy as np
import pytest

from lora_lib.experiments import batches as b
from lora_lib.experiments import sweep
from lora_lib.experiments.hyperparameters import SETTING, TASK


def test_every_batch_sees_as_many_examples():
    for point in b.points():
        assert point["steps"] * point["batch_size"] == b.EXAMPLES
    assert {p["batch_size"] for p in b.points()} == set(b.BATCHES)


@pytest.mark.parametrize("easy, hard, verdict", [
    (0.1, 0.5, "holds"), (0.5, 0.5, "does not hold"), (0.5, 0.1, "does not hold")])
def test_the_verdict_compares_what_rank_gains_and_a_seed_has_no_say_in_its_rate(
        monkeypatch, easy, hard, verdict):
    rows = []
    for task, gain in ((b.EASY, easy), (b.HARD, hard)):
        for rank in b.RANKS:
            for lr, extra in ((1e-3, 0.3), (2e-3, 0.0)):
                for seed in b.SEEDS:
                    loss = 1 - gain * (rank == 16) + extra + 0.01 * seed
                    rows.append(SETTING | {"name": task, "targets": "all", "rank": rank,
                                           "alpha": 2 * rank, "use_rslora": 0, "lr": lr,
                                           "seed": seed, "loss": loss})
    rows[0]["loss"] = 0.9             # seed 0 at the other rate: better, but its own
    monkeypatch.setattr(b, "read", lambda name: rows if name == "batches" else [])
    np.testing.assert_allclose(b.tuned(b.EASY, "all", 1), [1.0, 1.01, 1.02])
    assert b.verdicts()[0].verdict == verdict


def test_the_kept_sweep_is_whole():
    for (targets, rank) in (("full", 0), ("all", 16)):
        for size in b.BATCHES:
            found = b.losses(TASK, targets, rank, size)
            assert len(found) >= 3 and all(len(v) == 3 for v in found.values())
    for rank in b.RANKS:
        assert all(len(v) == 3 for v in b.losses(b.EASY, "all", rank).values())
    assert len(sweep.read("batches")) == len(b.points())
