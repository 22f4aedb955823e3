"""Which layers: claims on planted rows, fronts against a closed form, facts learned by heart."""

import math

import numpy as np
import pytest

from lora_lib.experiments import small_rates
from lora_lib.experiments import targets as t
from lora_lib.experiments.claims import DOES_NOT, HOLDS, UNDECIDED
from lora_lib.experiments.rates import Grid
from lora_lib.experiments.sweep import table
from lora_lib.experiments.trial import adapted
from lora_lib.torch import lora_parameters


def plant(monkeypatch, loss, tales=lambda row: 2.0):
    """Rows of every run that is asked for: loss(row) at the best rate, 0.008, more elsewhere, and
    tales(row) on the old task; the noise is the run's own."""
    def made(row):
        row = {"name": t.FACTS} | row
        noise = 0.001 * np.random.default_rng(
            [row["seed"], row["rank"], *row["name"].encode(), int(row["lr"] * 1e6)]).normal()
        value = loss(row) + 0.1 * np.log2(row["lr"] / 8e-3) ** 2 + noise
        return {"use_rslora": False} | row | {"valid": value, "loss": value, "tales": tales(row)}
    kept = {t.NAME: [], t.FACTS_NAME: [], small_rates.NAME: []}
    for module in (t, small_rates):
        monkeypatch.setattr(module, "read_if_any", lambda name: kept[name])
    for _ in range(9):                                          # as `grow` does
        kept[small_rates.NAME] = [made(point) for point in small_rates.points()]
        kept[t.NAME] = [made(point) for point in t.points()]
        kept[t.FACTS_NAME] = [made(point) for point in t.facts_points()]
    while lower := t.lower_points():
        kept[t.NAME] += [made(point) for point in lower]
    return kept


def everything():
    return [*t.together(), *t.alone(), t.careful()]


def test_choices_are_compared_at_one_budget():
    for targets, rank in t.EQUAL.items():
        count = sum(p.numel() for p in lora_parameters(adapted(targets, rank, 2 * rank)))
        assert abs(count / t.BUDGET - 1) < 0.06


def test_every_choice_has_five_seeds_with_three_rates_or_more(monkeypatch):
    kept = plant(monkeypatch, lambda row: 1.0)
    for task in t.BEGIN:
        for targets in t.TOGETHER if task == t.FACTS else t.EQUAL:
            rates, losses = table(t.rows(task, targets), "valid")
            assert losses.shape[0] == 5 and 0 < losses.mean(axis=0).argmin() < len(rates) - 1
            assert (t.reached(task, targets) == Grid.of(t.rows(task, targets)).own()).all()
    taken = [row for row in kept[t.NAME] if (row["name"], row["targets"]) == (t.FOLLOW, "all")]
    assert {row["lr"] for row in taken} <= {2e-3, 1e-3}         # `small_rates` has the others


def test_claims_follow_the_rows(monkeypatch):
    """Planted: MLP worst on lookup, all best on facts, q above v on lookup, o as good as any."""
    gaps = {(t.LOOK, "mlp"): 0.3, (t.LOOK, "v"): 0.3, (t.LOOK, "k"): 0.1, (t.FOLLOW, "q"): 0.1,
            (t.FOLLOW, "k"): 0.1, (t.FACTS, "all"): -0.2}
    forgets = lambda row: 2 + 40 * row["lr"] * (1 + (row["targets"] == "q,v"))
    plant(monkeypatch, lambda row: 1 + gaps.get((row["name"], row["targets"]), 0), forgets)
    found = {v.claim: v.verdict for v in everything()}
    assert len(found) == 7
    assert found[t.QV.text].startswith("holds if compared on ")
    assert f"{t.LOOK}, mlp" in found[t.QV.text] and f"{t.FACTS}, all" not in found[t.QV.text]
    assert found[t.ALL.text] == HOLDS
    assert found[t.FEED_FORWARD.text] == f"holds if the task is {t.FACTS}"
    assert found[t.LOOK_FOR.text] == HOLDS
    assert found[t.K_LESS.text] == f"holds if the task is {t.LOOK}"
    assert found[t.O_LESS.text] == DOES_NOT and found[t.CAREFUL.text] == DOES_NOT


def test_noise_decides_nothing(monkeypatch):
    noise = lambda row: 0.1 * np.random.default_rng([row["seed"], row["rank"]]).normal()
    plant(monkeypatch, lambda row: 1 + noise(row))
    found = {v.claim: v.verdict for v in everything()}
    assert found[t.QV.text] == found[t.ALL.text] == found[t.FEED_FORWARD.text] == UNDECIDED


def test_forgetting_is_compared_where_as_much_is_learned(monkeypatch):
    """One front for both, tales = 3 - loss: whoever comes further down it forgets no more there."""
    lower = {"q,v": 0.4, "all": 0.0}
    value = lambda row: 1 + lower.get(row["targets"], 0) + 0.1 * np.log2(row["lr"] / 8e-3) ** 2
    plant(monkeypatch, lambda row: 1 + lower.get(row["targets"], 0), lambda row: 3 - value(row))
    for task in t.TASKS:
        own = np.array([3 - t.reached(task, name) for name in t.FRONT])
        assert (own[1] - own[0]).min() > 0.3                    # each at its own rate: misleading
        assert t.crossings(task, "all") == pytest.approx(t.crossings(task, "q,v"), abs=0.01)


def test_a_front_is_crossed_between_two_rates():
    losses, tales = [1.0, 0.6, 0.4, 0.5], [2.0, 2.4, 3.0, 9.0]
    assert t.crossing(losses, tales, 0.8) == pytest.approx(2.2)
    assert t.crossing(losses, tales, 0.5) == pytest.approx(2.7)   # the first time, not the second
    assert t.crossing(losses, tales, 0.4) == pytest.approx(3.0)
    assert math.isnan(t.crossing(losses, tales, 1.2))
    with pytest.raises(ValueError, match="no rate reaches a loss of 0.300, the least is 0.400"):
        t.crossing(losses, tales, 0.3)


def test_facts_are_learned_by_heart():
    one, more = (t.facts("all", 4, 8, 8e-3, people=7, steps=steps, seed=3) for steps in (5, 60))
    assert more["known"] > max(0.3, one["known"]) and more["loss"] < one["loss"]
    assert more["valid"] == more["loss"]


def test_a_diverged_run_knows_nothing(monkeypatch):
    def broken(*_, **__):
        raise FloatingPointError("the loss is nan")
    monkeypatch.setattr(t, "train", broken)
    assert math.isinf(t.facts("q", 2, 4, 8e-3, people=2)["valid"])
