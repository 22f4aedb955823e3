"""Facts in SmolLM2's last feed-forward part: it beside the whole model; verdicts as planted."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lora_lib.experiments import filling, smol_facts
from lora_lib.experiments.claims import DOES_NOT, HOLDS, UNTESTED
from lora_lib.experiments.smol_facts import (ADAPTERS, ALIKE, ALL, FEW, LISTS, MANY, MORE,
                                             RUNS, SOME, WORDS)
from lora_lib.models import smollm2
from lora_lib.tasks import BIOGRAPHY, BITS_PER_PERSON, biographies
from lora_lib.torch import fine_tune


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(smollm2.folder())


@pytest.fixture
def model(tokenizer, monkeypatch):
    """A tiny model in the place of SmolLM2, with its tokens."""
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)).eval()
    with torch.no_grad():
        made.lm_head.weight *= 50                           # else its states are hardly there
    made.tokenizer = tokenizer
    monkeypatch.setattr(smol_facts, "base", lambda: made)
    monkeypatch.setattr(smol_facts, "HIDDEN", 32)
    monkeypatch.setattr(smol_facts, "INNER", 64)
    return made


def asked(model, people):
    return [model.tokenizer.encode(prompt) for prompt, _ in biographies(people)]


@pytest.mark.parametrize("method", [ADAPTERS[0], ("whole", 3)])
def test_the_part_gives_what_the_whole_model_gives_trained_or_not(model, method):
    part, rows = smol_facts.prepare(*method), asked(model, 4)
    offered, right = smol_facts.truths(4, seed=0)

    def whole():
        found = torch.full(offered.shape, -math.inf)
        for i, row in enumerate(rows):
            logits = model(torch.tensor([row])).logits[0, -1]
            for j, word in enumerate(LISTS[i % len(LISTS)]):
                found[i, j] = logits[model.tokenizer.encode(f" {word}")[0]]
        return found

    x = part.below(rows)
    with torch.no_grad():
        before = whole()
        torch.testing.assert_close(part(x, offered), before, atol=1e-4, rtol=1e-4)
    fine_tune(part, (x, offered, right), steps=2, batch_size=20, lr=1e-2, progress=False)
    model.model.layers[-1].mlp = part.mlp
    with torch.no_grad():
        assert not torch.allclose(part(x, offered), before, atol=1e-2)
        torch.testing.assert_close(part(x, offered), whole(), atol=1e-4, rtol=1e-4)


def test_only_so_many_neurons_move(model):
    part, (offered, right) = smol_facts.prepare("whole", 3), smol_facts.truths(2, seed=0)
    x = part.below(asked(model, 2))
    fine_tune(part, (x, offered, right), steps=2, batch_size=10, lr=1e-2, progress=False)
    moved = sum(int((p != old).sum()) for p, old in zip(
        part.mlp.parameters(), model.model.layers[-1].mlp.parameters()))
    assert moved == smol_facts.numbers("whole", 3) == 3 * 3 * 32
    for name, p in part.mlp.named_parameters():
        same = torch.eq(p, dict(model.model.layers[-1].mlp.named_parameters())[name])
        assert (same.T if "down" in name else same)[3:].all()


def test_a_seed_draws_what_is_true(model):
    offered, right = smol_facts.truths(400, seed=0)
    assert offered.shape == (2000, 16) and offered.max() == len(WORDS) - 1
    assert [WORDS[i] for i in offered[7, :8]] == list(BIOGRAPHY["trade"][1])
    assert (offered[7, 8:] == -1).all() and (offered.gather(1, right[:, None]) >= 0).all()
    assert right[0::5].bincount().max() < 2 * 400 / 16          # every place about as often
    assert (right != smol_facts.truths(400, seed=1)[1]).float().mean() > 0.8
    assert torch.equal(right[:50], smol_facts.truths(10, seed=0)[1])


def test_states_are_made_once(model, monkeypatch, tmp_path):
    monkeypatch.setattr(smol_facts, "cache", lambda: tmp_path)
    monkeypatch.setattr(smol_facts, "RUNS", replace(RUNS, people=(2, 3)))
    x = smol_facts.states.__wrapped__()
    torch.testing.assert_close(x, smol_facts.Last(model).below(asked(model, 3)))
    monkeypatch.setattr(smol_facts.Last, "below", None)
    assert torch.equal(smol_facts.states.__wrapped__(), x) and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("kind, size, rate, count", [
    ("LoRA", 2, 1e-2, 3 * 2 * (32 + 64)), ("whole", 64, 1e-2, 3 * 32 * 64)])
def test_a_trial_counts_what_it_trains_and_learns(model, monkeypatch, kind, size, rate, count):
    x = torch.randn(100, 32, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(smol_facts, "states", lambda: x)
    start, end = (smol_facts.trial(16, kind, size, rate, steps=steps) for steps in (1, 200))
    offered = 16 * BITS_PER_PERSON
    assert start["numbers"] == end["numbers"] == count
    assert start["known"] < 0.1 * offered < 0.2 * offered < end["known"] < offered
    assert end["known"] + end["missing"] == pytest.approx(offered)


def test_a_run_that_diverges_knows_nothing(model, monkeypatch):
    def diverge(*_, **__):
        raise FloatingPointError
    monkeypatch.setattr(smol_facts, "states", lambda: torch.zeros(80, 32))
    monkeypatch.setattr(smol_facts, "fine_tune", diverge)
    assert smol_facts.trial(16, "LoRA", 1, 1e-2)["known"] == 0


@pytest.fixture
def planted(monkeypatch):
    """A sweep grown as `grow` does, of methods that hold so many bits, whole neurons by size."""
    def plant(holds, noise=0.002):
        rows, rng = [], np.random.default_rng(0)
        monkeypatch.setattr(filling, "read_if_any", lambda name: rows)
        while new := [p for p in RUNS.points()
                      if not any(p.items() <= row.items() for row in rows)]:
            for p in new:
                size = p["size"] * (6336 if p["kind"] == "LoRA" else 1728)
                best = RUNS.begin[p["kind"], p["size"]][1]
                bits = min(holds(p["kind"], size), p["people"] * BITS_PER_PERSON) * (
                    1 - 0.1 * abs(math.log2(p["lr"] / best)) + noise * rng.standard_normal())
                rows.append(p | {"steps": smol_facts.STEPS, "known": bits, "numbers": size,
                                 "missing": p["people"] * BITS_PER_PERSON - bits})
        return {v.claim: v for v in smol_facts.verdicts()}, rows
    return plant


def test_the_verdicts_follow_what_is_planted(planted):
    found, rows = planted(lambda kind, size: 0.2 * size * (0.5 if kind == "whole" and
                                                           size < 1e5 else 1))
    assert found[smol_facts.GROWS.text].verdict == HOLDS
    assert found[ALIKE.text].verdict == DOES_NOT               # 0.2 over 0.1 bits for a number
    assert found[MORE.text].verdict == "holds if it has rank 1 for 200 people or " \
        "rank 2 for 200 people"
    ends = {m: RUNS.ladder(m) for m in (*ADAPTERS, SOME)}
    assert ends[ADAPTERS[0]] == (50, 100, 200) and ends[SOME] == (200, 400)
    assert {p["people"] for p in rows if p["size"] == ALL[1]} == {FEW, MANY}
    assert {p["seed"] for p in rows} == {*RUNS.seeds, *RUNS.tuning}


def test_more_is_known_by_none_where_all_hold_it(planted):
    found, _ = planted(lambda kind, size: math.inf)
    assert found[MORE.text].verdict == DOES_NOT
    assert found[smol_facts.GROWS.text].verdict == found[ALIKE.text].verdict == UNTESTED
    assert "not full with 800 people: rank 1, rank 2" in found[ALIKE.text].effect


def test_facts_that_all_numbers_do_not_learn_test_nothing(planted):
    found, _ = planted(lambda kind, size: 500)
    assert found[MORE.text].verdict == UNTESTED and f"of {FEW} people" in found[MORE.text].effect
    assert found[smol_facts.GROWS.text].verdict == DOES_NOT    # no more for more numbers
    assert MANY * BITS_PER_PERSON > 500
