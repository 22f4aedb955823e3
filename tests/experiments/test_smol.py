"""SmolLM2's short runs: their rows, their start, their grids; and the claims on planted grids."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from lora_lib.experiments import (rates, small_rates, smol, smol_rates, smol_studies,
                                  sweep, widths)
from lora_lib.experiments.claims import DOES_NOT, HOLDS, UNTESTED
from lora_lib.models import pretraining, smollm2, tales
from lora_lib.torch import inject, load_pretrained
from lora_lib.torch.lora import LoRALinear


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(smollm2.folder())


@pytest.mark.parametrize("name", ["instructions 6", "lookup 2", "facts 20"])
def test_rows_have_the_answer_alone_to_learn(tokenizer, name):
    pairs = smol.parts(name, 64, seed=1)["train"]
    rows = smol.encoded(tokenizer, pairs)
    assert len(rows) == len(pairs) and rows.lengths.max() <= smol.LENGTH
    for (prompt, answer), inputs, labels in zip(pairs, rows.inputs, rows.labels):
        assert tokenizer.decode(labels[labels != -100]) == answer
        assert tokenizer.decode(torch.cat([inputs[:1], torch.where(
            labels == -100, inputs.roll(-1), labels)])) == prompt + answer
    with pytest.raises(ValueError, match=f"at most {smol.LENGTH} tokens, got"):
        smol.encoded(tokenizer, [("a b " * 40, " c\n")])


def test_parts_share_no_example_and_a_seed_draws_others():
    one, other = (smol.parts("instructions 6", 128, seed) for seed in (0, 1))
    assert [len(part) for part in one.values()] == [128, smol.VALIDATION, smol.TEST]
    sets = {name: set(part) for name, part in one.items()}
    assert not sets["train"] & (sets["validation"] | sets["test"])
    assert not sets["validation"] & sets["test"]
    assert len(sets["train"] & set(other["train"])) < 30          # there are short tales in both


def test_the_exchanged_start_leaves_the_outputs_and_has_a_zero():
    model = load_pretrained("tales")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        before = model(tokens)
        smol.exchange(inject(model, "all-linear", rank=4, alpha=8, seed=0), seed=0)
        torch.testing.assert_close(model(tokens), before)
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    assert not any(m.A.any() for m in layers)
    assert torch.cat([m.B.flatten() for m in layers]).std().item() == pytest.approx(0.5, rel=0.05)


def test_a_grid_goes_on_where_its_best_stands():
    rows = lambda *losses: [{"lr": lr, "valid": loss, "seed": 0}
                            for lr, loss in zip((1e-3, 2e-3, 4e-3), losses)]
    begin = (1e-3, 2e-3, 4e-3)
    assert sweep.wider([], begin) == list(begin)
    assert sweep.wider(rows(3, 2), begin) == list(begin)             # not all have been run
    assert sweep.wider(rows(3, 2, 3), begin) == list(begin)
    assert sweep.wider(rows(3, 2, 1), begin) == [*begin, 8e-3]
    assert sweep.wider(rows(1, 2, 3), begin) == [5e-4, *begin]
    mixed = rows(3, 2, 1) + [{"lr": 4e-3, "valid": 9, "seed": 1}]    # the mean decides
    assert sweep.wider(mixed, begin) == list(begin)


def test_after_the_first_seed_a_grid_has_three_rates_and_goes_on_together():
    begin = (1e-3, 2e-3, 4e-3, 8e-3)
    row = lambda seed, lr, loss: {"seed": seed, "lr": lr, "valid": loss}
    first = [row(0, lr, loss) for lr, loss in zip(begin, (3, 2, 1, 4))]
    ahead = [(0, lr) for lr in begin]
    assert sweep.narrowed(first[:3], (0, 1), begin) == ahead
    assert sweep.narrowed(first, (0, 1), begin) == ahead + [(1, lr) for lr in begin[1:]]
    inside = first + [row(1, lr, loss) for lr, loss in zip(begin[1:], (2, 1, 2))]
    assert sweep.narrowed(inside, (0, 1), begin) == ahead + [(1, lr) for lr in begin[1:]]
    outside = first + [row(1, lr, loss) for lr, loss in zip(begin[1:], (0, 3, 9))]
    assert sweep.narrowed(outside, (0, 1), begin) == ahead + [(1, lr) for lr in begin]
    points = [{"a": 1, "seed": 1}, {"a": 1, "seed": 0}, {"seed": 0, "a": 1}]
    assert sweep.by_seed(points) == [{"a": 1, "seed": 0}, {"a": 1, "seed": 1}]


def test_a_table_has_the_rates_that_every_seed_has():
    rows = [{"lr": lr, "seed": seed, "loss": 10 * seed + i}
            for seed in (1, 0) for i, lr in enumerate((1e-3, 2e-3, 4e-3))][:-1]
    lrs, losses = sweep.table(rows, "loss")
    assert lrs == (1e-3, 2e-3)
    np.testing.assert_array_equal(losses, [[0, 1], [10, 11]])
    lrs, losses = sweep.table(rows, "loss", every=False)
    assert lrs == (1e-3, 2e-3, 4e-3)
    np.testing.assert_array_equal(losses, [[0, 1, np.nan], [10, 11, 12]])
    with pytest.raises(ValueError, match="no rate at which every seed"):
        sweep.table([], "loss")


def test_schemes_with_one_scaling_are_one_run():
    points = smol_rates.points()
    assert smol_rates.scaling("alpha = 16", 4) == 4 == smol_rates.scaling("rsLoRA, alpha = 8", 4)
    assert smol_rates.method("alpha = 2r", 16) == smol_rates.method("rsLoRA, alpha = 8", 16)
    methods = {(p["targets"], p["rank"], p["alpha"]) for p in points}
    assert len(methods) == 8 and len({str(p) for p in points}) == len(points)
    assert {p["seed"] for p in small_rates.points()} == set(small_rates.SEEDS)


def planted(best, least=lambda scheme, rank: 0.5, seeds=5):
    """grid(scheme, rank) with parabolas over log2(rate), least at `best`."""
    lrs = 1e-4 * 2.0 ** np.arange(12)

    def grid(scheme, rank):
        rng = np.random.default_rng(rank)
        far = np.log2(lrs / best(scheme, rank))
        noise = 0.002 * rng.standard_normal((seeds, len(lrs)))
        losses = least(scheme, rank) + 0.1 * far**2 + noise
        return rates.Grid(tuple(lrs), losses, losses)
    return grid


def test_the_claims_on_rates_follow_what_is_planted():
    """Best rates that do not move at alpha / r and do at alpha / sqrt(r), ten times full's."""
    def best(scheme, rank):
        s = {"full": 1, rates.FIXED: 1, rates.DOUBLE: rank**0.5, rates.ROOT: rank**0.5}[scheme]
        return 4e-4 if scheme == "full" else 3.2e-3 / s
    found = {v.claim: v.verdict for v in rates.judged(planted(best), "SmolLM2")}
    assert found[rates.NORMAL.text] == HOLDS and found[rates.NORMAL_ROOT.text] == DOES_NOT
    assert found[rates.HIGHER.text] == found[rates.TENFOLD.text] == HOLDS
    assert found[rates.FROM_FULL.text] == "holds if rank 64"
    assert found[rates.ONLY_RATE.text] == HOLDS and found[rates.ROOT_LEARNS.text] == DOES_NOT
    assert found[rates.MORE_RANK.text] == DOES_NOT
    learns = planted(best, lambda scheme, rank: 0.6 - 0.02 * np.log2(max(rank, 1)) * (
        scheme != rates.FIXED))
    found = {v.claim: v.verdict for v in rates.judged(learns, "SmolLM2")}
    assert found[rates.ONLY_RATE.text] == DOES_NOT and found[rates.ROOT_LEARNS.text] == HOLDS
    assert found[rates.MORE_RANK.text] == "holds if alpha = 2r or rsLoRA, alpha = 8"
    few = {v.claim: v for v in rates.judged(planted(best, seeds=2), "small")}
    assert few[rates.USUAL.text].verdict == UNTESTED and few[rates.USUAL.text].model == "small"
    assert few[rates.ONLY_RATE.text].verdict == HOLDS


def test_a_rate_is_chosen_on_validation_and_judged_on_the_test():
    valid = np.array([[3., 1, 2], [1, 2, 3]])
    test = np.array([[10., 20, 30], [40, 50, 60]])
    grid = rates.Grid((1e-3, 2e-3, 4e-3), valid, test)
    np.testing.assert_array_equal(grid.own(), [20, 40])
    np.testing.assert_array_equal(grid.at(4e-3), [30, 60])
    assert grid.best == 2e-3
    partly = rates.Grid((1e-3, 2e-3, 4e-3), valid + [[0, 0, 0], [np.nan, 0, 0]], test)
    np.testing.assert_array_equal(partly.own(), [20, 50])        # of what both have
    for rate in (1e-3, 8e-3):
        with pytest.raises(ValueError, match="not every seed has been run at"):
            partly.at(rate)


def test_the_law_of_widths():
    assert widths.predicted(widths.BASE_WIDTH) == widths.BASE_RATIO
    assert widths.predicted(4 * widths.BASE_WIDTH) == pytest.approx(2 * widths.BASE_RATIO)


@pytest.mark.parametrize("power, verdict", [(0.5, HOLDS), (1.0, DOES_NOT), (0.0, DOES_NOT)])
def test_the_slope_is_that_of_the_planted_ratios(monkeypatch, power, verdict):
    def grid(width, method):
        best = 1e-3 * (width ** power if method == "LoRA" else 1)
        lrs = best * 2.0 ** np.arange(-2, 3)
        noise = 0.005 * np.random.default_rng(width).standard_normal((5, 5))
        losses = 0.1 * np.log2(lrs / best) ** 2 + noise
        return rates.Grid(tuple(lrs), losses, losses)
    monkeypatch.setattr(widths, "grid", grid)
    assert widths.slope().middle == pytest.approx(power, abs=0.05)
    assert [v.verdict for v in widths.judged()] == [verdict]


def test_widths_are_pretrained_and_begin_around_the_law(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_LIB_CACHE", str(tmp_path / "cache"))
    record = pretraining.pretrain(tmp_path / "a.safetensors", width=48, steps=2, texts=300)
    model = tales.load(tmp_path / "a.safetensors")
    assert model.config.hidden_size == 48 and model.pretraining["steps"] == record["steps"] == 2
    assert pretraining.config(96, 7) == tales.LanguageModelConfig(7)
    with pytest.raises(ValueError, match="multiple of 24, got 50"):
        pretraining.config(50, 7)
    assert widths.begin(96, "full")[2] == 2e-3 and widths.begin(384, "LoRA")[2] == 2.8e-3
    monkeypatch.setattr(widths, "read_if_any", lambda name: [])
    assert len(widths.points()) == 4 * 2 * 5                   # the first seed's whole grids


def test_a_diverged_run_has_no_right_answer(monkeypatch):
    def broken(*_, **__):
        raise FloatingPointError("the loss is nan")
    monkeypatch.setattr(smol, "train", broken)
    monkeypatch.setattr(smol, "fresh", lambda *_, **__: None)
    found = smol.trial("instructions 6", "all", 4, 8, 1e-3)
    assert found["match"] == 0 and math.isinf(found["loss"]) and math.isinf(found["valid"])


def test_a_studys_claims_follow_its_rows(monkeypatch):
    """All linear layers best on facts, LoRA behind full only on many examples and large batches."""
    def loss(row):
        far = 0.1 * np.log2(row["lr"] / (1e-3 if row["targets"] != "full" else 1e-4)) ** 2
        lora = row["targets"] != "full"
        behind = 0.3 * lora * (row.get("examples") == 4096 or row.get("batch_size") == 64)
        targets = {"q,v": 0.2, "q,k,v,o": 0.1}.get(row["targets"], 0)
        noise = 0.001 * np.random.default_rng(int(row["lr"] * 1e7) + row["seed"]).normal()
        return far + behind + targets * (row["name"] == smol_studies.FACTS) + noise
    usual = {"examples": 512, "steps": 64, "batch_size": 8, "start": "B = 0", "use_rslora": False}
    rows = []
    for module in (smol_studies, sweep):
        monkeypatch.setattr(module, "read_if_any", lambda name: rows)
    for _ in range(4):                                         # as `grow` does
        wanted = [usual | p for study in smol_studies.studies() for p in smol_studies.points(study)]
        rows = list({str(p): p | {"valid": loss(p), "loss": loss(p)} for p in wanted}.values())
    found = {v.claim: v.verdict for v in smol_studies.verdicts()}
    s = smol_studies
    assert found[s.FEED_FORWARD.text] == f"holds if the task is {s.FACTS}"
    assert found[s.AS_GOOD.text] == "holds if the number of examples is 256 or 1,024"
    assert found[s.BATCH.text] == HOLDS and found[s.START.text] == DOES_NOT
    assert found[s.QV.text].startswith("holds if compared on instructions 6")
    assert all(s.points(study) for study in s.studies())
    most = [row for row in rows if row["examples"] == 4096]      # at the rate of 1,024 examples
    assert {row["seed"] for row in most} == set(s.SEEDS) and len(most) == 2 * len(s.SEEDS)
    assert {row["lr"] for row in most} == {1e-3, 1e-4}
    rows.remove(most[0])                                         # a study that is not whole
    assert {v.claim for v in s.verdicts()} == set(found) - {s.AS_GOOD.text}
