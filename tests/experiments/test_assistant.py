"""SmolLM2's experiment: its rows, and what stands in its prompts."""

import inspect
import json

import pytest

from lora_lib import calls
from lora_lib.experiments import assistant, strength, sweep


def test_of_examples_in_the_prompt_no_answer_is_judged():
    tokenizer = assistant.base().tokenizer
    chat = calls.chats(1, 0, "test")[0]
    shots = assistant.examples("calls", 0)
    assert len(shots) == 20
    tools = {json.loads(m["content"])["name"] for m in shots[1::2]}
    assert tools == set(calls.TOOLS)
    rows = assistant.answers_only(tokenizer, [assistant.asked(chat, shots) + chat[-1:]])
    labels = rows.labels[0]
    assert tokenizer.decode(labels[labels != -100]) == chat[-1]["content"] + "<|im_end|>"
    assert all(m["content"] in tokenizer.decode(rows.inputs[0]) for m in [*shots, chat[0]])


def test_examples_are_short_and_no_part_has_one_of_another():
    parts = {part: assistant.chats("docstrings", 20, 0, part)
             for part in ("train", "validation", "test")}
    said = [chat[1]["content"] for chats in parts.values() for chat in chats]
    assert len(set(said)) == len(said) == 60
    rows = assistant.encode(assistant.base().tokenizer, parts["test"])
    assert rows.lengths.max() <= assistant.LENGTH["docstrings"]


def test_a_grid_goes_on_until_its_best_is_inside():
    row = lambda lr, loss: {"task": "calls", "method": "LoRA", "on": "validation", "lr": lr,
                            "loss": loss}
    rest = [row(1e-3, 1) | {"task": t, "method": m, "lr": lr, "loss": loss}
            for t in assistant.TASKS for m in assistant.RATES if (t, m) != ("calls", "LoRA")
            for lr, loss in ((1, 3), (2, 1), (4, 2))]
    assert [p["lr"] for p in assistant.widened(rest + [row(1, 3), row(2, 2), row(4, 1)])] == [8]
    assert [p["lr"] for p in assistant.widened(rest + [row(1, 1), row(2, 2), row(4, 3)])] == [0.5]
    assert assistant.widened(rest + [row(1, 2), row(2, 1), row(4, 2)]) == []


def test_the_rows_are_those_of_the_points():
    """Every run of the grids and of the comparison is there, and no grid's best is at its edge."""
    rows, signature = sweep.read("assistant"), inspect.signature(assistant.trial)
    kept = {sweep._key(signature, row) for row in rows}
    keys = lambda points: {sweep._key(signature, sweep._complete(signature, p)) for p in points}
    on = list(signature.parameters).index("on")
    assert keys(assistant.tuning()) <= kept and assistant.widened(rows) == []
    assert {key for key in kept if key[on] == "test"} == keys(assistant.points(rows))
    assert all(assistant.seeds(task) == list(assistant.SEEDS) for task in assistant.TASKS)


def test_only_seeds_that_every_method_has_are_compared(monkeypatch):
    rows = sweep.read("assistant")
    row = lambda method, seed: {"task": "calls", "method": method, "seed": seed, "on": "test",
                                "lr": assistant.best_lr(rows, "calls", method)
                                if method in assistant.RATES else 0.0, "exact": seed / 10}
    some = [row(m, seed) for m in assistant.METHODS for seed in (0, 1, 2)
            if (m, seed) != ("full", 1)]
    tuned = [r for r in rows if r["on"] == "validation"]
    monkeypatch.setattr(assistant, "read", lambda name: tuned + some)
    assert assistant.seeds("calls") == [0, 2] and assistant.seeds("docstrings") == []
    assert list(assistant.compared("calls", "LoRA", "exact")) == [0, 0.2]


def test_the_answers_that_the_pages_show_are_of_the_run():
    kept = sweep.read("assistant_answers")
    rows = [row for row in kept if row["task"] == "calls"]
    test = assistant.chats("calls", 6, 0, "test")
    assert [row["request"] for row in rows] == [chat[1]["content"] for chat in test]
    assert [row["expected"] for row in rows] == [chat[-1]["content"] for chat in test]
    assert all(row["before"] != row["after"] for row in kept)
    functions = [row["request"] for row in kept if row["task"] == "docstrings"]
    assert len(functions) == 6 and all(name.isidentifier() for name in functions)


def test_at_strength_0_stands_the_base_and_at_1_the_adapter_as_trained():
    kept, runs = sweep.read("strength"), sweep.read("assistant")
    assert sorted({row["strength"] for row in kept}) == list(strength.STRENGTHS)
    lr = assistant.best_lr(runs, "calls", "LoRA")
    for at, method, rate in ((0, "base", 0), (1, "LoRA", lr)):
        (run,) = sweep.select(runs, task="calls", method=method, lr=rate, seed=0, on="test")
        there = sweep.select(kept, strength=at)
        assert len(there) == len(strength.ASKED)
        assert all(row["loss"] == pytest.approx(run["loss"], rel=1e-3) for row in there)
