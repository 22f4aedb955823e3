"""The kept results are those of the experiments as they stand, and verdicts follow from them."""

import importlib
import inspect
import math

import numpy as np
import pytest

from lora_lib.experiments import claims, foundations, sweep, targets, trial

MODULES = sorted(path.stem for path in (sweep.RESULTS.parent).glob("*.py")
                 if "def verdicts" in path.read_text("utf8"))


def keys(function, points):
    signature = inspect.signature(function)
    return {sweep._key(signature, sweep._complete(signature, point)) for point in points}


@pytest.mark.parametrize("function, points, name", [
    (foundations.trial, foundations.points, "foundations"),
    (trial.trial, targets.tuning, "targets"),
    (trial.trial, lambda: targets.widened(sweep.read("targets")), "targets"),
    (trial.trial, lambda: targets.points(sweep.read("targets")), "targets"),
    (targets.facts, lambda: targets.facts_points([10], lambda _: targets.FACTS_RATES),
     "targets_facts"),
    (targets.facts, lambda: targets.facts_points(
        targets.SEEDS, lambda t: [targets.best_facts_rate(sweep.read("targets_facts"), t)]),
     "targets_facts"),
])
def test_every_point_has_been_run(function, points, name):
    signature = inspect.signature(function)
    kept = {sweep._key(signature, row) for row in sweep.read(name)}
    assert keys(function, points()) <= kept


@pytest.mark.parametrize("path", sorted(sweep.RESULTS.glob("*.csv")), ids=lambda path: path.stem)
def test_results_are_small_and_whole(path):
    rows = sweep.read(path)
    assert path.stat().st_size < 100_000 and rows
    assert not any(math.isnan(v) for row in rows for v in row.values() if isinstance(v, float))


def test_experiments_give_verdicts_and_no_claim_is_judged_twice():
    found = [v for module in MODULES
             for v in importlib.import_module(f"lora_lib.experiments.{module}").verdicts()]
    assert len(found) > 30 and all(isinstance(v, claims.Verdict) for v in found)
    assert len({(v.claim, v.model) for v in found}) == len(found)


def test_a_measure_of_the_foundations_comes_out_again():
    for what in ("lora rank 8 accuracy", "worse task after merging two adapters",
                 "error of an input gradient without the adapter"):
        again = foundations.trial(what, seed=0)["value"]
        assert again == pytest.approx(foundations.values(what)[0], abs=0.05)


def test_targets_choose_the_best_rate_and_go_on_at_an_end():
    def row(lr, seed, loss):
        return {"name": "lookup 3", "targets": "q", "rank": 38.0, "lr": lr, "seed": seed,
                "loss": loss}
    rows = [row(lr, seed, loss) for lr, loss in ((4e-3, 1.0), (8e-3, 0.5), (1.6e-2, 0.9))
            for seed in (10.0, 11.0)] + [row(1.6e-2, 0.0, 0.1)]      # seed 0 does not choose
    assert targets.best_rate(rows, "lookup 3", "q", 38) == 8e-3
    rows[2]["loss"] = rows[3]["loss"] = 2.0
    one = targets.configurations
    try:
        targets.configurations = lambda: [("lookup 3", "q", 38)]
        assert [(p["lr"], p["seed"]) for p in targets.widened(rows)] == [(3.2e-2, 10), (3.2e-2, 11)]
    finally:
        targets.configurations = one


def test_a_paired_difference_must_leave_out_zero():
    one = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert targets._greater(one + 0.1, one)
    assert not targets._greater(one + np.array([0.5, -0.5, 0.5, -0.5, 0.1]), one)
