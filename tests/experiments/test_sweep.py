"""The sweep against what it promises: nothing run twice, nothing lost, numbers kept."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lora_lib.experiments import claims, sweep

LOG = "log.txt"


def trial(folder: str, a: int, b: float = 0.5, kind: str = "x") -> dict:
    """Notes that it ran; fails where a file says so."""
    with open(Path(folder) / LOG, "a") as file:
        file.write(f"{a} {b}\n")
    if (Path(folder) / f"fail {a}").exists():
        raise RuntimeError(f"trial {a}")
    return {"sum": a + b, "third": 1 / 3, "lost": math.inf}


def ran(folder):
    return (folder / LOG).read_text().splitlines() if (folder / LOG).exists() else []


def points(folder, *numbers):
    return [{"folder": str(folder), "a": a} for a in numbers]


def test_a_sweep_keeps_rows_in_order_and_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "r.csv"
    (tmp_path / "fail 3").touch()
    with pytest.raises(RuntimeError, match="trial 3"):
        sweep.run(trial, points(tmp_path, 1, 2, 3, 4), out)
    kept = [row["a"] for row in sweep.read(out)]
    assert kept == [1, 2]
    (tmp_path / "fail 3").unlink()
    sweep.run(trial, points(tmp_path, 1, 2, 3, 4), out)
    assert [row["a"] for row in sweep.read(out)] == [1, 2, 3, 4]
    assert ran(tmp_path).count("1 0.5") == ran(tmp_path).count("2 0.5") == 1
    before = out.read_bytes()
    sweep.run(trial, points(tmp_path, 1, 2, 3, 4), out)
    assert out.read_bytes() == before and len(ran(tmp_path)) in (5, 6)


def test_rows_hold_defaults_and_numbers_to_six_digits_and_other_points_stay(tmp_path):
    out = tmp_path / "r.csv"
    sweep.run(trial, points(tmp_path, 7), out)
    sweep.run(trial, points(tmp_path, 5), out, workers=2)
    rows = sweep.read(out)
    assert [row["a"] for row in rows] == [5, 7]               # this run's points, then the others
    assert rows[0] == {"folder": str(tmp_path), "a": 5, "b": 0.5, "kind": "x", "sum": 5.5,
                       "third": 0.333333, "lost": math.inf}
    assert sweep.select(rows, a=7, kind="x") == rows[1:]
    assert np.array_equal(sweep.column(rows, "sum"), [5.5, 7.5])
    with pytest.raises(ValueError, match="no row"):
        sweep.column(sweep.select(rows, a=1), "sum")


def test_a_point_that_the_trial_does_not_take_is_refused(tmp_path):
    with pytest.raises(TypeError, match="unexpected keyword"):
        sweep.run(trial, [{"folder": "", "a": 1, "c": 2}], tmp_path / "r.csv")
    assert not list(tmp_path.iterdir())


def test_intervals_are_students_and_cover(tmp_path):
    rng = np.random.default_rng(0)
    draws = rng.normal(3.0, 2.0, (2000, 5))
    covered = sum(abs(mean - 3.0) <= half for mean, half in map(sweep.interval, draws))
    assert 0.93 < covered / len(draws) < 0.97
    mean, half = sweep.interval(draws[0])
    low, high = stats.ttest_1samp(draws[0], 0).confidence_interval()
    assert (mean - half, mean + half) == pytest.approx((low, high))
    with pytest.raises(ValueError, match="at least two values, got 1"):
        sweep.interval([1.0])


def test_an_interval_is_written_with_one_sign():
    assert sweep.shown([1.0, 2.0, 3.0]) == "2.00 ± 2.48"
    assert sweep.shown([1.0, 2.0, 3.0], "+.1f") == "+2.0 ± 2.5"


def test_each_seed_takes_its_best_rate_of_those_that_all_have():
    row = lambda seed, lr, valid: {"seed": seed, "lr": lr, "valid": valid}
    rows = [row(1, 4e-3, 5), row(1, 2e-3, 5), row(1, 1e-3, 0), row(0, 2e-3, 3), row(0, 4e-3, 2)]
    assert sweep.shared(rows) == [rows[0], rows[1], rows[3], rows[4]]
    assert sweep.shared(rows, [0, 1, 2]) == []
    assert sweep.chosen(rows) == [rows[4], rows[1]]               # the lowest of equals


def test_verdicts_are_one_of_three_kinds_and_print_as_a_table():
    rows = [claims.Verdict("a", "6", "holds", "1"), claims.Verdict("b", "7", "holds if c", "2")]
    assert claims.table(rows).splitlines()[2:] == ["| a | 6 | **holds** | 1 |",
                                                   "| b | 7 | **holds if c** | 2 |"]
    with pytest.raises(ValueError, match="got 'perhaps'"):
        claims.Verdict("a", "6", "perhaps", "1")
