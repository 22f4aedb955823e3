"""Batch sizes and dials: verdicts on planted rows, and a sweep that sees as many examples."""

import numpy as np
import pytest

from lora_lib.experiments import batches as b
from lora_lib.experiments import small_rates
from lora_lib.experiments.claims import DOES_NOT, HOLDS, UNDECIDED


def plant(monkeypatch, loss):
    """Rows of every run that is asked for: loss(row) at the best rate, 0.002, and more elsewhere."""
    def made(row):
        noise = 0.001 * np.random.default_rng(
            [row["seed"], row["rank"], ord(row["name"][-1]), int(row["lr"] * 1e5)]).normal()
        value = loss(row) + 0.1 * np.log2(row["lr"] / 2e-3) ** 2 + noise
        return {"use_rslora": False} | row | {"valid": value, "loss": value}
    kept = {b.NAME: [], small_rates.NAME: []}
    for module in (b, small_rates):
        monkeypatch.setattr(module, "read_if_any", lambda name: kept[name])
        for _ in range(9):                                      # as `grow` does
            kept[module.NAME] = [made(point) for point in module.points()]


def test_every_batch_sees_as_many_examples():
    points = b.points()
    assert all(p["steps"] * p["batch_size"] == b.EXAMPLES for p in points)
    assert {p["batch_size"] for p in points} == set(b.SIZES) | {8}


@pytest.mark.parametrize("easy, hard, verdict", [
    (0.1, 0.5, HOLDS), (0.5, 0.5, DOES_NOT), (0.5, 0.1, DOES_NOT), (0.1, 0.12, UNDECIDED)])
def test_a_harder_task_wants_more_rank_if_rank_saves_more_there(monkeypatch, easy, hard, verdict):
    saved = {b.EASY: easy, b.HARD: hard}
    plant(monkeypatch, lambda row: 1 - saved[row["name"]] * (row["rank"] == b.HIGH))
    found = {v.claim: v.verdict for v in b.verdicts()}
    assert found[b.COMPLEX.text] == verdict and found[b.BATCH.text] == DOES_NOT


def test_a_large_batch_costs_lora_more_where_it_falls_behind(monkeypatch):
    plant(monkeypatch, lambda row: 1 + 0.1 * (row["rank"] == 16 and row["batch_size"] == 32))
    assert {v.claim: v.verdict for v in b.verdicts()}[b.BATCH.text] == HOLDS
