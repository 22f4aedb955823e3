"""The analysis of chapter 8 against runs whose outcome is planted, and the kept sweep."""

import numpy as np
import pytest
import torch

from lora_lib.experiments import sweep, when
from lora_lib.experiments.when import BROAD, FAR, FULL, NARROW, STYLE

RATE = {FULL: 2e-3, NARROW: 8e-3, BROAD: 8e-3, when.THIN: 8e-3, when.WIDE: 4e-3}
MATCH = {FULL: 0.8, NARROW: 0.4, BROAD: 0.8, when.THIN: 0.4, when.WIDE: 0.6}
LOSS = {FULL: 1.0, NARROW: 3.0, BROAD: 2.0, when.THIN: 3.0, when.WIDE: 1.5}


def outcome(method, seed, lr):
    far = abs(np.log2(lr / RATE[method]))            # losses least at the rate above
    return {"match": MATCH[method] + 0.01 * seed, "loss": LOSS[method] + far + 0.01 * (seed % 10),
            "tales": 2.0 - far if method == FULL else 1.0, "train": 0.0}


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A sweep whose every outcome is known: `run(points)` adds them to its file."""
    monkeypatch.setattr(sweep, "RESULTS", tmp_path)
    monkeypatch.setattr(when, "RESULTS", tmp_path)
    rows = []

    def run(points):
        known = {str(row) for row, _ in rows}
        rows.extend((p, p | outcome((p["targets"], p["rank"]), p["seed"], p["lr"]))
                    for p in points if str(p) not in known)
        sweep.write(tmp_path / "when.csv", [row for _, row in rows])

    sweep.write(tmp_path / "when_base.csv", [{"name": t, "loss": 5.0} for t in when.SETTING])
    return run


def whole(run):
    run(when.tuning())
    run(when.finals())
    run(when.comparison())
    run(when.forgetting())


def test_a_grid_goes_on_until_the_best_rate_is_inside(planted, monkeypatch):
    monkeypatch.setitem(RATE, NARROW, 3.2e-2)
    rates, best = when.grid(STYLE, NARROW)
    assert (rates, best) == ([4e-3, 8e-3, 1.6e-2], [])
    for last in (3.2e-2, 6.4e-2):
        planted(when.tuning())
        assert when.grid(STYLE, NARROW)[0][-1] == last
    planted(when.tuning())
    rates, order = when.grid(STYLE, NARROW)
    assert rates == [4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2] and order[0] == 3.2e-2
    assert when.best_rate("dialect 0.1", BROAD) == RATE[BROAD]


def test_a_second_seed_decides_between_rates_that_are_close(planted, monkeypatch):
    monkeypatch.setitem(RATE, BROAD, 1.15e-2)         # between two rates of the grid
    planted(when.tuning())
    assert when.close(STYLE, NARROW) == [8e-3]
    first, second = when.close(STYLE, BROAD)
    assert {first, second} == {8e-3, 1.6e-2} and when.best_rate(STYLE, BROAD) == first
    assert {p["lr"] for p in when.finals()} == {first, second}
    monkeypatch.setitem(RATE, BROAD, second)
    monkeypatch.setitem(LOSS, BROAD, 0.0)
    planted(when.finals())
    assert when.best_rate(STYLE, BROAD) == second


def test_what_is_compared_leaves_out_the_tuning_seed_and_other_rates(planted):
    whole(planted)
    rows = when.compared(STYLE, FULL)
    assert [row["seed"] for row in rows] == [0, 1, 2, 3, 4]
    assert {(row["lr"], row["steps"]) for row in rows} == {(2e-3, 200)}


def test_quality_and_gain_are_shares_of_full_fine_tunings(planted):
    whole(planted)
    match = [(0.4 + 0.01 * s) / (0.8 + 0.01 * s) for s in range(5)]
    loss = [(5 - 3 - 0.01 * s) / (5 - 1 - 0.01 * s) for s in range(5)]
    np.testing.assert_allclose(when.quality(STYLE, NARROW), match, rtol=1e-5)
    np.testing.assert_allclose(when.gain(STYLE, NARROW), loss, rtol=1e-5)
    assert (when.quality(STYLE, FULL) == 1).all() and (when.gain(STYLE, FULL) == 1).all()


def test_forgetting_is_compared_at_equal_loss_on_the_task(planted):
    whole(planted)
    # LoRA's loss is 1 above full's; full fine-tuning gets there at half the rate, with tales at 1
    ours, theirs = when.forgotten(BROAD)
    np.testing.assert_allclose(ours, [1, 1, 1])
    np.testing.assert_allclose(theirs, [1, 1, 1], rtol=1e-5)
    verdict = {v.claim: v.verdict for v in when.verdicts()}
    least = verdict["LoRA forgets less than full fine-tuning"]
    assert least.startswith("holds if each has its best rate, after: restyle 1, instructions 6")


def test_the_verdicts_follow_the_numbers(planted, monkeypatch):
    whole(planted)
    verdict = {v.claim: v.verdict for v in when.verdicts()}
    assert verdict["good for style"] == "holds if all linear layers are adapted"
    shift = "might need more for an extreme domain shift"
    assert verdict[shift] == "holds"                  # judged by the loss: 3 of 4 at rank 8
    assert verdict["good for a domain"] == "does not hold"
    monkeypatch.setattr(when, "share", lambda task, method: np.array([0.9, 0.8]))
    verdict = {v.claim: v.verdict for v in when.verdicts()}
    assert (verdict["good for style"], verdict[shift]) == ("does not hold", "holds")
    monkeypatch.setattr(when, "share", lambda task, method: np.array([0.95, 1.05]))
    verdict = {v.claim: v.verdict for v in when.verdicts()}
    assert (verdict["good for style"], verdict[shift]) == ("holds", "does not hold")
    assert verdict["95 to 100 % of the quality of full fine-tuning"] == "holds"
    narrow = {NARROW: 0.5, BROAD: 0.95, when.WIDE: 1.0}
    monkeypatch.setattr(when, "share", lambda task, method: np.full(2, narrow.get(method, 1)))
    verdict = {v.claim: v.verdict for v in when.verdicts()}
    assert verdict["good for style"] == "holds if all linear layers are adapted"
    assert verdict[shift] == "holds if only q and v are adapted"
    monkeypatch.setattr(when, "share", lambda task, method: np.array([0.8, 1.0, 0.9]))
    style, *_ = when.verdicts()                       # 0.90 ± 0.25
    assert style.verdict == "does not hold" and "; open, as the interval" in style.effect


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_head_stays_and_all_else_moves(frozen, monkeypatch):
    found = {}
    monkeypatch.setattr(when, "measure", lambda model, task: found.update(model=model) or {})
    when.head(STYLE, 1e-3, frozen, steps=2, batch_size=2, seed=0)
    start = dict(when.base("float32").named_parameters())
    same = [n for n, p in found["model"].named_parameters() if torch.equal(p, start[n])]
    assert same == (["model.embed_tokens.weight"] if frozen else [])


def test_every_task_is_measured_with_full_and_both_kinds_of_adapters():
    for task in when.SETTING:
        assert {FULL, NARROW, BROAD} <= set(when.methods(task))
    assert when.TUNED_ON["dialect 0.5"] == FAR


def test_the_kept_sweep_is_whole():
    for task in when.SETTING:
        for method in when.methods(task):
            assert len(when.compared(task, method)) == when.SETTING[task][2] >= 3
            if task not in when.TUNED_ON:
                rates, order = when.grid(task, method)
                assert rates[0] < order[0] < rates[-1]
    assert len(when.verdicts()) == 7
