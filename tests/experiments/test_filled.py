"""Capacity: the shortcut against the whole model, the ladder and the verdicts on planted runs."""

import math

import numpy as np
import pytest
import torch

from lora_lib.experiments import filled as c
from lora_lib.experiments import filling
from lora_lib.experiments.filled import ADAPTERS, RUNS, WHOLE, Last
from lora_lib.experiments.trial import base, bits_known
from lora_lib.tasks import BIOGRAPHY, BITS_PER_PERSON, biographies
from lora_lib.torch import fine_tune, inject


def test_the_last_layer_scores_as_the_whole_model_does_adapted_or_not():
    model, pairs = base(), biographies(3)
    top = Last(model)
    tokens, at, offered, right = c.facts(model.tokenizer, pairs)
    x = top.below(tokens, at)
    def whole():
        logits = model(tokens)[torch.arange(len(tokens)), at].detach()
        return logits.gather(1, offered.clamp(min=0)).masked_fill(offered < 0, -math.inf)
    torch.testing.assert_close(top(x, offered).detach(), whole())
    inject(top, "all-linear", 1, 2, seed=0)
    before = whole()
    fine_tune(top, (x, offered, right), steps=2, batch_size=15, lr=1e-2, progress=False)
    assert not torch.allclose(before, whole())
    torch.testing.assert_close(top(x, offered).detach(), whole())


def test_facts_are_rows_without_the_answer_and_the_words_it_may_be():
    tokenizer, pairs = base().tokenizer, biographies(4, seed=3)
    for i, (row, t, words, which) in enumerate(zip(*c.facts(tokenizer, pairs))):
        prompt, answer = pairs[i]
        assert tokenizer.decode(row[:t + 1]) == prompt
        offered = [tokenizer.decode([word]).strip() for word in words if word >= 0]
        assert offered == list(list(BIOGRAPHY.values())[i % 5][1])
        assert offered[which] == answer.strip()


@pytest.mark.parametrize("kind, size, trained", [("LoRA", 2, 2 * 3 * (96 + 256)),
                                                 ("whole", 8, 8 * 3 * 96)])
def test_only_the_numbers_that_are_counted_move(kind, size, trained):
    top = c.prepare(kind, size)
    tokens, at, offered, right = c.facts(top.rest[0].tokenizer, biographies(2))
    before = {name: p.clone() for name, p in top.named_parameters()}
    fine_tune(top, (top.below(tokens, at), offered, right), steps=4, batch_size=10, lr=1e-2,
              progress=False)
    moved = {name: int((p != before[name]).sum()) for name, p in top.named_parameters()}
    assert sum(moved.values()) == c.numbers(kind, size) == trained
    if kind == "whole":
        down = dict(top.named_parameters())["mlp.down_proj.weight"]
        assert (down[:, size:] == before["mlp.down_proj.weight"][:, size:]).all()
        assert moved["mlp.gate_proj.weight"] == moved["mlp.down_proj.weight"] == 96 * size


def test_the_bits_known_are_those_of_the_chances_among_the_answers():
    """Against `bits_known`, which counts all words: of these the rest's share is taken away."""
    model, pairs = base("float64"), biographies(2, seed=1)
    tokens, at, offered, _ = c.facts(model.tokenizer, pairs)
    with torch.no_grad():
        chances = model(tokens)[torch.arange(len(tokens)), at].softmax(-1)
    allowed = sum(-math.log2(p[words[words >= 0]].sum()) for p, words in zip(chances, offered))
    known = c.learn(2, "LoRA", 1, 1e-2, steps=1, seed=1, dtype="float64")
    assert known[0] == pytest.approx(bits_known(model, pairs) + allowed, abs=1e-6)
    assert known[1] > known[0] and len(known) == 2


def test_a_trial_learns_and_a_run_that_diverges_knows_nothing(monkeypatch):
    found = c.trial(2, "LoRA", 2, 2e-2, steps=60)
    assert 0.9 < found["known"] / (2 * BITS_PER_PERSON) <= 1
    assert found["known"] + found["missing"] == pytest.approx(2 * BITS_PER_PERSON)
    def broken(*_, **__):
        raise FloatingPointError
    monkeypatch.setattr(c, "fine_tune", broken)
    assert c.trial(1, "LoRA", 1, 1e-2) == {"known": 0, "missing": BITS_PER_PERSON}


@pytest.fixture
def planted(monkeypatch):
    """A sweep, as `grow` makes it, in which `holds(adapter, people)` bits are known."""
    def plant(holds):
        kept = {}
        monkeypatch.setattr(filling, "read_if_any", lambda name: list(kept.values()))
        def outcome(p):
            away = abs(math.log2(p["lr"] / (8e-2 if p["kind"] == "LoRA" else 1e-3)))
            offered = p["people"] * BITS_PER_PERSON
            known = holds((p["kind"], p["size"]), p["people"]) * (1 - 0.1 * away)
            return {"known": known + 0.01 * p["seed"], "missing": offered - known}
        while new := [p for p in RUNS.points() if tuple(p.values()) not in kept]:
            kept |= {tuple(p.values()): p | {"steps": c.STEPS} | outcome(p) for p in new}
        return list(kept.values())
    return plant


def up_to(bits_per_number):
    """Everything that is offered is known, up to so many bits for each number."""
    return lambda adapter, people: min(people * BITS_PER_PERSON,
                                       bits_per_number(adapter) * c.numbers(*adapter))


def test_grids_end_beyond_the_best_and_ladders_when_full(planted):
    rows = planted(up_to(lambda adapter: 0.25))
    for adapter, rate in ((ADAPTERS[0], 8e-2), (WHOLE, 1e-3)):
        people = RUNS.grid(adapter)
        tried = RUNS.rates(adapter, people)
        assert tried[0] < RUNS.best_rate(adapter, people) == rate < tried[-1]
    assert {row["lr"] for row in rows
            if row["seed"] not in RUNS.tuning and row["kind"] == "LoRA"} == {8e-2}
    for adapter, people in zip(ADAPTERS, (16, 31, 63)):        # what 0.25 bits make
        tops = RUNS.ladder(adapter)
        assert RUNS.full(adapter) and tops[-2] >= people / 1.05 and tops[-1] == 2 * tops[-2]
        assert len(RUNS.known(adapter, tops[-1])) == len(RUNS.seeds)
        np.testing.assert_allclose(c.per_number(adapter), 0.25, rtol=0.01)
    np.testing.assert_allclose(RUNS.slopes({a: c.numbers(*a) for a in ADAPTERS}), 1, atol=0.01)
    with pytest.raises(ValueError, match="has no seed"):
        RUNS.known(ADAPTERS[0], tops[-1])


def test_an_adapter_that_is_not_full_has_no_capacity(planted):
    planted(lambda adapter, people: people * BITS_PER_PERSON)
    assert RUNS.ladder(WHOLE)[-1] == RUNS.people[-1] and not RUNS.full(WHOLE)
    with pytest.raises(ValueError, match="is not full with"):
        RUNS.capacity(WHOLE)


@pytest.mark.parametrize("bits, verdicts", [
    (lambda a: 0.25, ["holds", "holds"]),
    (lambda a: 0.25 if a == WHOLE else 0.25 / a[1], ["does not hold", "does not hold"]),
    (lambda a: 0.05 if a == WHOLE else 0.25, ["holds", "does not hold"])])
def test_the_verdicts_follow_the_numbers(planted, bits, verdicts):
    planted(up_to(bits))
    assert [v.verdict for v in c.verdicts()] == verdicts
