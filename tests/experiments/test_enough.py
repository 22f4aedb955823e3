"""Chapter 8's runs against the pieces they are made of, its verdicts against planted runs."""

import math

import numpy as np
import pytest
import torch

from lora_lib.experiments import enough, small_rates
from lora_lib.experiments.enough import (BODY, DOMAIN, FAR, FOLLOW, FORMAT, FRONTS, FULL, HIGH, LOW,
                                       METHODS, SEEDS, STYLE, setting)
from lora_lib.tasks import INSTRUCTIONS, Task
from lora_lib.text import in_present
from lora_lib.torch import complete, exact_match, fine_tune, mean_loss, merge, warmup_cosine


@pytest.fixture
def few(monkeypatch):
    """Small tasks and few tales, so that a trial takes a second."""
    parts = enough.parts.__wrapped__
    def cut(name, seed):
        on, validation = parts(name, seed)
        return Task(name, on.train[:64], on.test[:24], on.probes[:24]), validation[:8]
    monkeypatch.setattr(enough, "parts", cut)
    monkeypatch.setattr(enough, "SPOKEN", 6)
    monkeypatch.setattr("lora_lib.experiments.trial.held_out_tales", lambda: ["Ada was at the mill."])
    monkeypatch.setattr(enough, "held_out_tales", lambda: ["Ada was at the mill."])


def short(task, method, **other):
    return setting(task, method) | {"steps": 8, "lr": 4e-3} | other


def test_a_trial_is_fine_tuning_and_looking_at_it_does_not_disturb_it(few):
    found = enough.trial(**short(STYLE, HIGH, seed=3))
    model, (on, validation) = enough.adapted(*HIGH, 32, seed=3, dtype="float32"), enough.parts(STYLE, 3)
    data = tuple(map(torch.from_numpy, model.tokenizer.batch(on.train)))
    fine_tune(model, data, steps=8, batch_size=8, lr=4e-3, seed=3, progress=False,
              schedule=warmup_cosine(8, warmup=0))
    loss = lambda pairs: mean_loss(model, model.tokenizer, pairs)
    assert found["loss"] == pytest.approx(loss(on.test), rel=1e-6)
    assert found["valid"] == pytest.approx(loss(validation), rel=1e-6)
    assert found["tales"] == pytest.approx(loss(["Ada was at the mill."]), rel=1e-6)
    losses, sizes = ([found[f"{what} {q}"] for q in (1, 2, 3)] + [found[what]]
                     for what in ("loss", "size"))
    assert losses[0] > losses[-1] and len(set(losses)) == 4
    assert 0 < sizes[0] < sizes[-1]
    assert found != enough.trial(**short(STYLE, HIGH, seed=4))


def test_only_fronts_are_measured_on_the_way(few):
    assert set(FRONTS) == {STYLE, FOLLOW}
    assert "loss 1" in enough.trial(**short(FOLLOW, FULL)) and "loss 1" not in enough.trial(
        **short(FORMAT, FULL))


@pytest.mark.parametrize("method", [FULL, HIGH])
def test_the_size_is_that_of_the_difference_of_merged_weights(method, monkeypatch, few):
    kept = {}
    monkeypatch.setattr(enough, "measure", lambda model, on: kept.update(model=model) or {})
    size = enough.trial(**short(FORMAT, method, seed=1))["size"]
    model = kept["model"]
    if method == HIGH:
        merge(model)
    before = dict(enough.base("float32").named_parameters())
    total = [0.0, 0.0]
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            inner = getattr(module, "linear", module)
            first = before[f"{name}.weight"]
            total[0] += (inner.weight - first).double().square().sum().item()
            total[1] += first.double().square().sum().item()
    assert size == pytest.approx(math.sqrt(total[0] / total[1]), rel=1e-4) and size > 1e-3


@pytest.mark.parametrize("method", [FULL, BODY])
def test_a_frozen_embedding_stays_and_all_else_moves(method, monkeypatch, few):
    kept = {}
    monkeypatch.setattr(enough, "measure", lambda model, on: kept.update(model=model) or {})
    enough.trial(**short(FORMAT, method, steps=2))
    start = dict(enough.base("float32").named_parameters())
    same = [n for n, p in kept["model"].named_parameters() if torch.equal(p, start[n])]
    assert same == (["model.embed_tokens.weight"] if method == BODY else [])


def test_a_run_that_diverges_has_no_right_answer(few, monkeypatch):
    def broken(*_, **__):
        raise FloatingPointError
    monkeypatch.setattr(enough, "fine_tune", broken)
    found = enough.trial(**short(STYLE, HIGH))
    assert found.pop("match") == 0 and set(found.values()) == {math.inf} and "size 3" in found


def test_answers_are_what_complete_says():
    model = enough.base("float32")
    prompts = [prompt for prompt, _ in enough.parts(FOLLOW, 0)[0].test[:12]]
    assert enough.answers(model, prompts, 9) == [
        complete(model, model.tokenizer, prompt, 9) for prompt in prompts]


def test_a_style_is_the_tense_and_instructions_are_told_apart(few, monkeypatch):
    model, (on, _) = enough.base("float32"), enough.parts(STYLE, 0)
    monkeypatch.setattr(enough, "answers", lambda model, prompts: [
        " Ada is sad.\n", " Ada was sad.\n", " Omar met Zoe.\n"])
    assert enough.by_kind(model, on) == {"present": 1 / 3}
    on, _ = enough.parts(FOLLOW, 0)
    right = enough.by_kind(model, on)
    assert list(right) == list(INSTRUCTIONS) and enough.by_kind(model, enough.parts(FAR, 0)[0]) == {}
    shares = [right[prompt.split("Do: ")[1].split("\n")[0]] for prompt, _ in on.test]
    assert np.mean(shares) == pytest.approx(exact_match(model, model.tokenizer, on.test))


@pytest.mark.parametrize("task, count", [(STYLE, 300), (DOMAIN, 100)])
def test_a_seed_draws_its_own_examples_and_validation_is_apart(task, count):
    on, validation = enough.parts(task, 1)
    assert len(on.test) == len(on.probes) == count and len(validation) == 100
    assert not set(on.test) & set(validation) and not set(on.train) & {*on.test, *validation}
    assert on.train != enough.parts(task, 2)[0].train
    if task == STYLE:
        assert not any("One " in prompt for prompt, _ in [*on.test, *validation])
        assert all(in_present(answer) for _, answer in on.test)


def test_at_one_size_two_lines_are_as_far_apart_as_they_are():
    sizes = np.geomspace(0.01, 1, 7)
    line = lambda sizes, start: (sizes, start + 0.5 * np.log(sizes))
    assert enough.at_one_size(line(sizes, 2), line(sizes[::-1] * 3, 1.7)) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="no size is common"):
        enough.at_one_size(line(sizes, 2), line(sizes * 1000, 2))


# ------------------------------------------------------------------------------- planted outcomes
BEST = {FULL: 2e-3, LOW: 8e-3, HIGH: 4e-3, BODY: 2e-3}
LOSS = {FULL: 0.4, LOW: 0.5, HIGH: 0.4, BODY: 0.4}


def outcome(task, method, lr, seed):
    """Losses least at the rate above, the validation's too; what is forgotten grows with the rate
    and the steps, by LoRA one nat more at equal loss; sizes are alike, and so what is forgotten at
    one size is 1 nat more, too."""
    noise = 0.001 * ((seed * 7 + len(task)) % 5)
    away = np.log2(lr / BEST[method])
    loss = LOSS[method] + 0.1 * away ** 2 + noise
    loss += {(FAR, LOW): 0.3, (FORMAT, BODY): 0.3}.get((task, method), 0)
    row = {"match": 0.8, "loss": loss, "valid": loss, "tales": 3 + away + (method == HIGH),
           "size": 0.1 * 2 ** away, "present": 1.0} | dict.fromkeys(INSTRUCTIONS, 0.5)
    for q in (1, 2, 3):
        row |= {f"loss {q}": loss + (4 - q) * 0.3, f"tales {q}": row["tales"] - (4 - q) * 0.3,
                f"size {q}": row["size"] * 0.8 ** (4 - q)}
    return row


@pytest.fixture
def planted(monkeypatch):
    """A whole sweep whose every outcome is known; `planted()` runs it."""
    monkeypatch.setattr(small_rates, "rows", lambda scheme, rank: [
        {"lr": lr, "seed": seed} | outcome(FOLLOW, LOW, lr, seed)
        for lr in enough.BEGIN[LOW] for seed in SEEDS])
    rows = {}
    monkeypatch.setattr(enough, "read_if_any", lambda name: list(rows.values()))

    def add(points):
        for p in points:
            key = tuple(p.values())
            method = (p["targets"], p["rank"])
            rows.setdefault(key, p | outcome(p["name"], method, p["lr"], p["seed"]))

    def run():
        for task in METHODS:
            while any(tuple(p.values()) not in rows for p in enough.points(task)):
                add(enough.points(task))
        add(enough.more())
    return run


def verdicts():
    return {v.claim: v.verdict for v in enough.verdicts()}


def test_rank_4_on_instructions_is_not_run_again():
    assert not [p for p in enough.points(FOLLOW) if p["rank"] == 4]
    ours, theirs = setting(FOLLOW, LOW), small_rates.SETTING | small_rates.method("alpha = 2r", 4)
    assert ours.items() <= theirs.items()


def test_the_embedding_is_frozen_at_the_rate_of_full_fine_tuning(planted):
    planted()
    assert [(p["targets"], p["lr"], p["seed"]) for p in enough.more()[:5]] == [
        ("body", BEST[FULL], seed) for seed in SEEDS]


def test_a_seed_that_has_fewer_rates_chooses_among_those_of_all(planted, monkeypatch):
    real = outcome
    monkeypatch.setitem(globals(), "outcome", lambda task, method, lr, seed: real(
        task, method, lr * (2 if method == FULL else 1), seed))          # best at 1e-3
    planted()
    rates = {p["lr"] for p in enough.points(FORMAT) if p["rank"] == 0 and p["seed"] == 4}
    assert BEST[FULL] * 2 not in rates                                   # which the first seed has
    assert {p["lr"] for p in enough.more()[:5]} == {1e-3}


def test_the_verdicts_follow_the_numbers(planted):
    planted()
    assert verdicts() == {
        "good for style": "holds if it has rank 16",
        "good for instruction following": "holds if it has rank 16",
        "good for a domain": "holds if it has rank 16",
        "LoRA is as good as full fine-tuning": "holds",
        "might need more for a very different output format": "does not hold",
        "might need more for an extreme domain shift": "holds",
        "95 to 100 % of the quality of full fine-tuning": "holds",
        "the frozen output head holds LoRA back": "holds",
        "LoRA forgets less than full fine-tuning": "does not hold",
        "what is forgotten follows the size of the change, whatever the method": "does not hold"}
    np.testing.assert_allclose(enough.behind(STYLE, LOW), 0.1, atol=1e-5)
    np.testing.assert_allclose(enough.saves(FAR), 0.4, atol=1e-5)
    np.testing.assert_allclose(enough.forgotten(STYLE, "size"), -1, atol=0.3)


def test_other_numbers_have_other_verdicts(planted, monkeypatch):
    monkeypatch.setitem(LOSS, HIGH, 0.45)
    monkeypatch.setitem(LOSS, BODY, 0.1)
    real = outcome
    monkeypatch.setitem(globals(), "outcome", lambda task, method, lr, seed: real(
        task, method, lr, seed) | ({} if method != HIGH else {
            "match": 0.7, "tales": real(task, FULL, BEST[FULL] * lr / BEST[HIGH], seed)["tales"]
            } | {f"tales {q}": real(task, FULL, BEST[FULL] * lr / BEST[HIGH], seed)[f"tales {q}"]
                 for q in (1, 2, 3)}))
    planted()
    found = verdicts()
    assert found["good for style"] == found["LoRA is as good as full fine-tuning"] == "does not hold"
    assert found["95 to 100 % of the quality of full fine-tuning"] == "does not hold"
    assert found["the frozen output head holds LoRA back"] == "does not hold"
    size = "what is forgotten follows the size of the change, whatever the method"
    assert found[size] == "holds"
