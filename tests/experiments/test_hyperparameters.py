"""The analysis of chapter 7 against runs whose outcome is planted, and the kept sweep."""

import numpy as np
import pytest

from lora_lib.experiments import hyperparameters as h
from lora_lib.experiments import sweep

FULL_BEST = 2e-3


def best(point):
    """The planted best rate: 2e-3 for full; for LoRA it depends on s and falls like rank^-0.5."""
    if point["targets"] == "full":
        return FULL_BEST
    rank = point["rank"]
    s = point["alpha"] / (rank**0.5 if point.get("use_rslora") else rank)
    return 1.6e-2 / s / rank**0.25


def plant(path, lowest=lambda point: 0.5):
    """A sweep whose losses are parabolas over log2(rate), the least at `best`."""
    rows = []
    for point in h.points():
        far = np.log2(point["lr"] / best(point))
        loss = lowest(point) + 0.01 * point["seed"] + 0.1 * far**2
        rows.append({"use_rslora": False} | point | {"loss": loss, "match": 1 - loss})
    sweep.write(path / "hyperparameters.csv", rows)


@pytest.fixture
def planted(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "RESULTS", tmp_path)
    plant(tmp_path)
    return tmp_path


def test_the_best_rate_is_found_between_the_rates_of_the_grid(planted):
    np.testing.assert_allclose(h.best_rates("full"), [FULL_BEST] * 3, rtol=1e-3)
    np.testing.assert_allclose(h.best_rates("alpha = 2r", 16), [4e-3] * 3, rtol=1e-3)
    np.testing.assert_allclose(h.best_rates("alpha = 2r", 4), [8e-3 / 2**0.5] * 3, rtol=1e-3)
    np.testing.assert_allclose(h.higher("alpha = 2r", 16), [2] * 3, rtol=1e-3)
    np.testing.assert_allclose(h.drift("alpha = 2r"), [64**-0.25] * 3, rtol=1e-3)


def test_a_best_rate_at_an_end_of_the_grid_is_that_end(planted, monkeypatch):
    assert not h.at_end("alpha = 2r", 16)
    falling = np.array([[6.0, 5, 4, 3, 2, 1]])
    monkeypatch.setattr(h, "grid", lambda scheme, rank=0, what="loss": falling)
    assert h.best_rates("alpha = r", 1) == pytest.approx([h.RATES[-1]])
    assert h.at_end("alpha = r", 1)


def test_a_seed_has_no_say_in_its_own_rate(monkeypatch):
    losses = np.array([[0., 5, 5], [3, 1, 2], [3, 1, 2]])        # seed 0 alone likes the first rate
    monkeypatch.setattr(h, "grid", lambda scheme, rank=0, what="loss": losses)
    np.testing.assert_array_equal(h.tuned("any", 1), [5, 3, 3])


def test_ratios_have_a_geometric_mean_and_its_interval():
    mean, low, high = h.times([0.5, 1, 2])
    assert mean == pytest.approx(1) and low == pytest.approx(1 / high)
    assert high == pytest.approx(np.exp(sweep.interval(np.log([0.5, 1, 2]))[1]))


def test_the_verdicts_follow_the_numbers(planted, monkeypatch):
    monkeypatch.setattr(h, "rank_8", lambda: np.array([0.9, 0.91, 0.92]))
    of = lambda: [v.verdict for v in h.verdicts()]
    # planted: alpha = 16 rises by 64^0.75, rsLoRA by 64^0.25, alpha = 2r falls by 64^-0.25
    divided, root, higher, serves, between, more = of()
    assert (divided, root) == ("does not hold", "does not hold")
    assert between == "does not hold"
    assert (higher, more) == ("holds", "holds")                            # 8, 5.7, 4, 2.8 e-3
    assert serves == "holds if the rank is at least 64"                    # the nearest rate there
    monkeypatch.setattr(h, "higher", lambda scheme, rank: np.array([0.9, 1, 1.1]) * 8 / rank**0.5)
    assert of()[2] == "holds if the rank is at most 16 (alpha = 2r)"
    monkeypatch.setattr(h, "rank_8", lambda: h.tuned("alpha = 2r", 64))
    monkeypatch.setattr(h, "drift", lambda scheme: np.array([0.9, 1.0, 1.1]))
    assert of()[:2] == ["holds", "holds"] and of()[-1] == "does not hold"


def test_the_kept_sweep_is_whole():
    for scheme in ("full", *h.SCHEMES):
        for rank in h.RANKS:
            assert h.grid(scheme, rank).shape == (3, 6)
            if (scheme, rank) != ("alpha = r", 1):               # there one seed's best is an end
                assert not h.at_end(scheme, rank)
    assert not {0, len(h.FULL_RATES) - 1} & set(h.grid("full").argmin(axis=1))
    assert len(h.searched("lookup 3", "all", 8)[1]) == 5
    assert len(h.verdicts()) == 6
