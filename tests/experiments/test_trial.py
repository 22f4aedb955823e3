"""The trial against the pieces that it is made of, on a run of a few steps."""

import math

import pytest
import torch

from lora_lib.experiments import trial as t
from lora_lib.tasks import BIOGRAPHY, Task, biographies
from lora_lib.text import tales
from lora_lib.torch import exact_match, load_pretrained, lora_modules, mean_loss


@pytest.fixture
def few(monkeypatch):
    """Small tasks, so that a trial takes a second."""
    made = t.made
    monkeypatch.setattr(t, "made", lambda name: made(name, train=64, test=16))
    monkeypatch.setattr(t, "held_out_tales", lambda: tales(8, seed=99))


def test_targets_are_names_of_the_model():
    layers = {"q": 4, "q,v": 8, "q,k,v,o": 16, "mlp": 12, "all": 28}
    for targets, count in layers.items():
        adapters = lora_modules(t.adapted(targets, 2, 4, dtype="float32"))
        assert len(adapters) == count
        assert {a.rank for a in adapters.values()} == {2}
    assert not lora_modules(t.adapted("full", dtype="float32"))


def test_full_fine_tuning_and_lora_learn_and_a_seed_repeats(few):
    for targets, lr in (("full", 2e-3), ("q,v", 1e-2)):
        how = {"lr": lr, "steps": 12, "batch_size": 8, "dtype": "float32"}
        once, again = (t.trial("lookup 2", targets, 4, 8, seed=3, **how) for _ in range(2))
        assert once == again != t.trial("lookup 2", targets, 4, 8, seed=4, **how)
        assert once["loss"] < t.measure(t.base("float32"), t.made("lookup 2"))["loss"] - 1


def test_measure_is_match_and_losses(few):
    model = load_pretrained()
    task = Task("t", [], [(" Mira was at the", " mill."), ("A", "b")], [("Mira was at the", " mill")])
    found = t.measure(model, task)
    assert found == {"match": exact_match(model, model.tokenizer, task.probes),
                     "loss": mean_loss(model, model.tokenizer, task.test),
                     "tales": mean_loss(model, model.tokenizer, tales(8, seed=99))}


def test_a_run_that_blows_up_has_no_right_answer(few, monkeypatch):
    def broken(*_, **__):
        raise FloatingPointError("the loss is nan")
    monkeypatch.setattr(t, "train", broken)
    assert t.trial("lookup 2", "q", dtype="float32") == {
        "match": 0.0, "loss": math.inf, "tales": math.inf, "train": math.inf}


def test_bits_known_are_those_of_the_chances():
    """Against the definition, an answer at a time: log2(answers) + log2 p(answer)."""
    model, pairs = load_pretrained(), biographies(3, seed=1)
    bits = 0.0
    for i, (prompt, answer) in enumerate(pairs):
        answers = list(BIOGRAPHY.values())[i % len(BIOGRAPHY)][1]
        tokens = torch.tensor([[model.tokenizer.end, *model.tokenizer.encode(prompt)]])
        with torch.no_grad():
            chances = model(tokens)[0, -1].softmax(-1)
        p = chances[model.tokenizer.encode(f" {answer.strip()}")[0]].item()
        bits += math.log2(len(answers)) + math.log2(p)
    assert t.bits_known(model, pairs) == pytest.approx(bits, abs=1e-3)
