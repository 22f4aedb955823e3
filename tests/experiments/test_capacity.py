"""The capacity experiment: the shortcut against the whole model, verdicts against planted runs."""

import math

import numpy as np
import pytest
import torch

from lora_lib.experiments import capacity, sweep
from lora_lib.experiments.capacity import ADAPTERS, FULL, LARGE, PEOPLE, SMALL, Top
from lora_lib.experiments.trial import base
from lora_lib.tasks import BITS_PER_PERSON, biographies
from lora_lib.torch import fine_tune, inject, lora_parameters


@pytest.mark.parametrize("first", range(4))
def test_the_top_gives_what_the_whole_model_gives_adapted_or_not(first):
    model = base()
    top = Top(model, first)
    tokens, at, words = capacity.facts(model.tokenizer, biographies(3))
    whole = lambda: model(tokens)[torch.arange(len(tokens)), at]
    x = top.below(tokens).detach()
    torch.testing.assert_close(top(x, at), whole())
    inject(top, "all-linear", 1, 2, seed=0)
    before = whole().detach()
    fine_tune(top, (x, at, words), steps=2, batch_size=15, lr=1e-2, progress=False)
    assert not torch.allclose(before, whole())
    torch.testing.assert_close(top(x, at), whole())
    assert len(lora_parameters(model)) == 2 * 7 * (4 - first)    # none is below `first`


def test_facts_are_the_answers_words_and_the_rows_show_none():
    tokenizer = base().tokenizer
    pairs = biographies(4, seed=3)
    tokens, at, words = capacity.facts(tokenizer, pairs)
    for (prompt, answer), row, t, word in zip(pairs, tokens, at, words):
        assert tokenizer.decode([word]) == answer.rstrip("\n")
        assert tokenizer.decode(row[:t + 1]) == prompt


@pytest.mark.parametrize("targets, rank, parameters", [
    ("q,v", 1, 2 * (96 + 96)), ("all", 2, 2 * (4 * (96 + 96) + 3 * (96 + 256))),
    ("full", 0, 4 * 96 * 96 + 3 * 96 * 256 + 2 * 96)])
def test_a_trial_counts_what_it_trains_and_learns(targets, rank, parameters):
    result = capacity.trial(2, targets, rank, 1e-2 if rank else 2e-3, steps=150, dtype="float32")
    assert result["parameters"] == parameters and result["offered"] == 2 * BITS_PER_PERSON
    assert 0 < result["known"] <= result["offered"]


def test_a_run_that_diverges_knows_nothing(monkeypatch):
    def diverge(*_, **__):
        raise FloatingPointError
    monkeypatch.setattr(capacity, "fine_tune", diverge)
    assert capacity.trial(1, "q,v", 1, 1e-2)["known"] == -math.inf


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A sweep in which adapter i holds `holds(i, people)` of the bits offered."""
    monkeypatch.setattr(sweep, "RESULTS", tmp_path)
    monkeypatch.setattr(capacity, "RESULTS", tmp_path)

    def plant(holds):
        rows = []
        for i, adapter in enumerate((*ADAPTERS, FULL)):
            for lr, known in ((5e-3, 0.1), (1e-2, 0.2), (2e-2, 0.1)):
                rows.append(capacity._point(adapter, 32, lr, capacity.TUNING) | {
                    "known": known, "offered": 1, "parameters": 100})
            for people in PEOPLE:
                offered = people * BITS_PER_PERSON
                rows += [capacity._point(adapter, people, 1e-2, seed) | {
                    "known": holds(i, people) * offered + seed - 1, "offered": offered,
                    "parameters": 100} for seed in capacity.SEEDS]
        sweep.write(tmp_path / "capacity.csv", rows)
    return plant


def test_bits_for_a_number_are_taken_where_most_is_known(planted):
    planted(lambda i, people: min(1, 8 / people))             # eight people, then no more
    held = 8 * BITS_PER_PERSON
    np.testing.assert_allclose(capacity.curve(SMALL).mean(axis=0),
                               np.minimum(held, np.array(PEOPLE) * BITS_PER_PERSON), rtol=1e-5)
    assert capacity.per_number(SMALL).mean() == pytest.approx(held / 100, rel=1e-5)


@pytest.mark.parametrize("holds, verdict", [
    (lambda i, people: 1, "does not hold"),
    (lambda i, people: 0.5, "does not hold"),                 # nor does the whole layer
    (lambda i, people: 1 if i == 4 else min(1, 8 / people),
     "holds if the facts outgrow the adapter"),
    (lambda i, people: 1 if i == 4 else 0.5, "holds")])
def test_the_verdict_follows_the_numbers(planted, holds, verdict):
    planted(holds)
    assert capacity.verdicts()[0].verdict == verdict


def test_a_grid_goes_on_until_the_best_rate_is_inside(planted):
    planted(lambda i, people: 1)
    assert capacity.grid(LARGE) == ([5e-3, 1e-2, 2e-2], 1e-2)
    assert capacity.grid(SMALL)[0] == [5e-3, 1e-2, 2e-2, 4e-2]   # a rate is still to be tried
    assert capacity.grid(("all", 2, 2)) == ([1e-2, 2e-2, 4e-2], None)


def test_the_kept_sweep_is_whole():
    for adapter in (*ADAPTERS, FULL):
        rates, best = capacity.grid(adapter)
        assert rates[0] < best < rates[-1]
        assert capacity.curve(adapter).shape[0] >= 3
    assert len(capacity.known(SMALL, 32, capacity.LONGER)) >= 2
