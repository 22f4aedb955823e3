"""What an update of SmolLM2 forgets and is made of: planted intruders, ranks, merges and fronts."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lora_lib import models
from lora_lib.experiments import foundations, smol
from lora_lib.experiments import smol_updates as u
from lora_lib.experiments.claims import DOES_NOT, HOLDS, UNDECIDED, UNTESTED
from lora_lib.experiments.intervals import by_seeds
from lora_lib.models import smollm2
from lora_lib.torch import LoRALayer, inject, load_pretrained, lora_modules, warmup_cosine


def matrix(d=48, k=32, seed=0):
    """A random W (d, k) whose singular values fall slowly."""
    return torch.randn(d, k, generator=torch.Generator().manual_seed(seed)) / k ** 0.5


def unit(n, seed, outside=None):
    """A random direction (n,), at a right angle to the columns of `outside`."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    if outside is not None:
        x -= outside @ (outside.T @ x)
    return x / x.norm()


# ----------------------------------------------------------------------------- what is in a matrix
def test_a_planted_intruder_is_found_and_nothing_else():
    W = matrix()
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    new = unit(48, 1, outside=U)                               # W has no such direction
    trained = W + 3 * torch.outer(new, unit(32, 2))
    part, closest = u.intruders(W, trained)
    assert closest.shape == (32,) and (closest[:u.TOP] < u.BELOW).sum() == 1
    assert part[0].shape == (48, 1) and abs(part[0][:, 0] @ new) > 0.85
    assert 3 < part[1] < 4
    for same in (W, 1.5 * W, W + 0.5 * torch.outer(U[:, 2], Vh[2]), W + 1e-4 * matrix(seed=3)):
        assert u.intruders(W, same)[0][1].shape == (0,)
    small = W + 0.1 * s[u.TOP] * torch.outer(new, unit(32, 2))     # not among the first ten
    assert u.intruders(W, small)[0][1].shape == (0,)
    assert torch.equal(u.product(*u.intruders(W, W)[0]), torch.zeros(48, 32))


@pytest.mark.parametrize("factor", u.SHRUNK)
def test_shrinking_intruders_is_what_peft_does(factor):
    """At the full rank, PEFT's adapter after the fact holds the shrunk update exactly."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(24, 24, bias=False)),
                           LoraConfig(target_modules=["0"], r=24, lora_alpha=24))
    layer = model.base_model.model[0]
    W = layer.get_base_layer().weight.detach()
    layer.lora_A["default"].weight.data = torch.randn(24, 24)
    layer.lora_B["default"].weight.data = torch.diag(torch.tensor([2., 1, 1] + 21 * [0.01])) / 5
    trained = W + layer.get_delta_weight("default").detach()
    found, _ = u.intruders(W, trained)
    assert 0 < len(found[1]) <= u.TOP
    reduce_intruder_dimension(model, top_k=u.TOP, threshold_epsilon=u.BELOW,
                              mitigation_lambda=factor, logging_sink=None)
    theirs = W + layer.get_delta_weight("intruder_reduced").detach()
    torch.testing.assert_close(trained + (factor - 1) * u.product(*found), theirs,
                               atol=2e-5, rtol=1e-4)
    again = torch.linalg.svdvals(theirs) if factor else None
    assert again is None or again.sum() < torch.linalg.svdvals(trained).sum()


def test_the_directions_of_a_planted_rank():
    D = matrix(40, 5, seed=1) @ matrix(5, 30, seed=2)
    spectrum = torch.linalg.svd(D, full_matrices=False)
    torch.testing.assert_close(u.product(*spectrum, 5), D, atol=1e-5, rtol=0)
    assert torch.linalg.matrix_rank(u.product(*spectrum, 3), atol=1e-4) == 3
    assert u.directions(spectrum[1], 0.99999) == 5
    s = torch.tensor([3., 1, 1, 1, 1e-9])                      # energies of 9 and 1, 1, 1
    assert [u.directions(s, share) for share in (0.5, 0.75, 0.76, 0.99)] == [1, 1, 2, 4]


def test_what_a_merge_keeps_is_the_projection():
    W, layer = matrix().bfloat16(), LoRALayer(32, 48, 4, 8, seed=0)
    layer.B.data.normal_(generator=torch.Generator().manual_seed(1))
    delta = {"a": layer.delta_weight().detach(), "b": torch.ones(2, 2)}
    before = {"a": W, "b": torch.zeros(2, 2)}
    merged = {"a": layer.merge_weights(W), "b": torch.ones(2, 2)}
    assert torch.equal(merged["a"], (W + delta["a"]).bfloat16())
    assert u.kept(before, merged, delta) == pytest.approx(1, abs=1e-3)
    assert u.kept(before, before, delta) == 0
    half = {"a": (W + 0.5 * delta["a"]), "b": 0.5 * torch.ones(2, 2)}
    assert u.kept(before, half, delta) == pytest.approx(0.5, abs=1e-3)


def test_matrices_are_those_that_adapters_go_beside():
    base, adapted = (load_pretrained("tales") for _ in range(2))
    inject(adapted, "all-linear", rank=2, seed=0)
    found = u.matrices(base)
    assert set(found) == set(lora_modules(adapted))
    name, W = next(iter(found.items()))
    W.zero_()                                                  # a view: the model has it too
    assert not base.get_submodule(name).weight.any()


# ------------------------------------------------------------------------- learned and forgotten
def test_a_front_leaves_out_what_another_beats():
    losses, forgotten = [0.5, 0.2, 0.3, 0.9, np.inf, 0.3], [3.0, 3.6, 3.4, 3.1, np.inf, 3.5]
    found = u.front(losses, forgotten)
    np.testing.assert_array_equal(found, [[0.2, 0.3, 0.5], [3.6, 3.4, 3.0]])
    assert u.forgotten_at(0.3, *found) == 3.4
    assert u.forgotten_at(np.sqrt(0.2 * 0.3), *found) == pytest.approx(3.5)
    np.testing.assert_array_equal(u.forgotten_at([0.1, 2.0], *found), [3.6, 3.0])
    np.testing.assert_array_equal(u.front([1.0, 1.0], [2.0, 2.0]), [[1.0], [2.0]])


def test_the_gap_is_taken_where_both_have_been():
    """Forgetting falls by one nat from a task loss of 0.1 to e times that; the other lies above."""
    curve = lambda losses, more=0.0: (np.asarray(losses), 3 + more - np.log(losses))
    assert u.gap(curve([0.1, 0.2, 1.0], 0.3), curve([0.15, 0.9])) == pytest.approx(0.3)
    far = (np.array([0.01, 0.1, 1.0]), np.array([99.0, 3 - np.log(0.1), 3 - np.log(1.0)]))
    assert u.gap(far, curve([0.1, 1.0])) == pytest.approx(0)   # what one alone reaches is not asked


@pytest.mark.parametrize("shift, right", [(0.02, UNDECIDED), (0.5, HOLDS), (-0.5, DOES_NOT)])
def test_at_most_five_percent_of_random_fronts_are_judged_wrongly(shift, right):
    """Full's true front lies `shift` above LoRA's; at the margin both other verdicts are wrong."""
    rng, wrong, runs = np.random.default_rng(0), 0, 500
    for _ in range(runs):
        def seed(more):
            own = 0.03 * rng.standard_normal()
            losses = 0.15 * np.exp(2 * rng.random(16))
            prose = 3.5 + own + more - 0.2 * np.log(losses) + 0.05 * np.abs(rng.standard_normal(16))
            return u.front(losses, prose)
        found = by_seeds([u.gap(seed(shift), seed(0)) for _ in u.SEEDS])
        wrong += u.FORGETS.judged(found).verdict != right
    assert wrong / runs < 0.07                                 # 5 %, and what 500 draws allow


# ------------------------------------------------------------------------------------- the runs
@pytest.fixture
def tiny(monkeypatch):
    """A random Llama in SmolLM2's place, with its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2.folder())

    def load(name, device):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, tie_word_embeddings=True))
        model.tokenizer = tokenizer
        return model.to(device)
    monkeypatch.setattr(models, "load_pretrained", load)
    monkeypatch.setattr(u, "TESTED", 12)
    few = smol.prose()[:2]
    for module in (smol, u):
        monkeypatch.setattr(module, "prose", lambda: few)


SHORT = {"lr": 0.02, "steps": 8, "seed": 1}
METHODS = pytest.mark.parametrize("method", [u.FULL, {"targets": "all", "rank": 2, "alpha": 4}],
                                  ids=["full", "LoRA"])


@METHODS
def test_looking_on_the_way_changes_no_run(tiny, method, monkeypatch):
    monkeypatch.setattr(u, "TESTED", smol.TEST)
    found = u.trial(**method, **SHORT)
    plain = smol.trial(u.TASK, **method, **SHORT)
    assert (found["valid"], found["loss 4"], found["prose 4"]) == (
        plain["valid"], plain["loss"], plain["prose"])
    half = smol.fresh(**method, seed=1)
    smol.train(half, smol.parts(u.TASK, u.EXAMPLES, 1)["train"], lr=0.02, steps=4, seed=1,
               schedule=warmup_cosine(8))
    assert found["loss 2"] == u.score(half, smol.parts(u.TASK, u.EXAMPLES, 1))["loss"]
    assert len({found[f"loss {quarter}"] for quarter in u.QUARTERS}) == 4


@METHODS
def test_a_dissected_update_is_that_of_the_run(tiny, method):
    run, found = u.trial(**method, **SHORT), u.dissected(**method, **SHORT)
    assert found["loss whole"] == pytest.approx(run["loss 4"], abs=1e-5)
    assert found["prose base"] == u.score(smol.fresh(**u.FULL), smol.parts(
        u.TASK, u.EXAMPLES, 1))["prose"] != found["prose whole"]
    assert 0 <= found["intruders"] <= 1 and found["size"] > 0.01
    assert 1 <= found["90 %"] <= found["99 %"] <= (32 if method is u.FULL else 2)
    assert 1 <= found["stable rank"] <= found["99 %"] + 1
    if found["intruders"] == 0:
        assert found["loss intruders x 0"] == found["loss whole"]
    if method is u.FULL:
        assert found["loss rank 64"] == pytest.approx(found["loss whole"], abs=1e-5)
        assert found["loss rank 1"] != pytest.approx(found["loss whole"], abs=1e-5)
    else:
        assert found["loss beside bfloat16"] == pytest.approx(found["loss whole"], abs=0.01)
        assert found["kept"] == pytest.approx(1, abs=0.01) and 0 < found["not back"] < 1
        assert found["loss update x 0.25"] != found["loss whole"]


def test_a_run_that_diverges_is_nowhere_on_the_front(tiny, monkeypatch):
    def broken(model, pairs, *, schedule, **_):
        for step in range(3):
            schedule(step)
        raise FloatingPointError("the loss is nan")
    monkeypatch.setattr(u, "train", broken)
    found = u.trial(**u.FULL, **SHORT)
    assert np.isfinite(found["loss 1"]) and np.isinf(found["loss 2"]) and np.isinf(found["valid"])
    assert len(u.front_of([found])[0]) == 1


# ---------------------------------------------------------------------------------- the verdicts
def planted(less, *, lora_intruders=0.2, full_intruders=0.0, back=0.5, cost=0.01, cut=0.01,
            rounding=0.001):
    """Rows of both kinds: full's fronts lie `less` above LoRA's, and so on."""
    rng = np.random.default_rng(0)
    noise = lambda: 1e-3 * rng.standard_normal()
    runs, parts = [], []
    for seed in u.SEEDS:
        for method in (u.FULL, u.LORA):
            lora = method is u.LORA
            for i, lr in enumerate(u.RATES[method["targets"]]):
                losses = 0.2 + 0.1 * abs(i - 2) + 0.2 * np.arange(4)[::-1]
                runs.append(method | {"seed": seed, "lr": lr, "valid": losses[-1] + noise()} | {
                    f"loss {q}": loss for q, loss in zip(u.QUARTERS, losses)} | {
                    f"prose {q}": 4 - np.log(loss) - less * lora + noise()
                    for q, loss in zip(u.QUARTERS, losses)})
            row = method | {"seed": seed, "lr": u.RATES[method["targets"]][2], "90 %": 9,
                            "99 %": 30, "kept": 0.99, "loss base": 2.0, "prose base": 3.0,
                            "loss whole": 0.2 + noise(), "prose whole": 4.0,
                            "intruders": lora_intruders if lora else full_intruders}
            for way, share in ((u.HALF, back), (u.NONE, 1.5 * back)):
                row |= {f"loss {way}": row["loss whole"] + cost + noise(),
                        f"prose {way}": 4 - share + noise()}
            row |= {f"loss update x {f:g}": 0.2 + 0.1 * (1 - f) for f in u.SCALED}
            row |= {f"prose update x {f:g}": 3 + f for f in u.SCALED}
            row |= {f"loss rank {r}": row["loss whole"] + cut + noise() for r in u.RANKS}
            row |= {"loss beside bfloat16": 0.2, "loss merged in bfloat16": 0.2 + rounding + noise()}
            parts.append(row)
    return {u.NAME: runs, u.DISSECTED: parts}


def said(monkeypatch, **what):
    rows = planted(**what)
    monkeypatch.setattr(u, "read_if_any", rows.__getitem__)
    assert {p["lr"] for p in u.own_points()} == {p["lr"] for p in rows[u.DISSECTED]}
    assert len(u.points()) == len(rows[u.NAME])                # the best is inside
    return {v.claim: v.verdict for v in u.verdicts() if v.model == "SmolLM2"}


def test_the_verdicts_follow_what_is_planted(monkeypatch):
    found = said(monkeypatch, less=0.3)
    assert set(found.values()) == {HOLDS} and len(found) == 8
    found = said(monkeypatch, less=-0.3, lora_intruders=0.005, full_intruders=0.05, back=0.1,
                 cost=0.2, cut=0.3, rounding=0.1)
    assert set(found.values()) == {DOES_NOT}


def test_the_whole_update_shrunk_is_what_intruders_are_held_against(monkeypatch):
    """At x 0.5 the intruders cost 0.05, where the whole update at x 0.5 gives back 0.5 nats."""
    for back, verdict in ((0.6, HOLDS), (0.4, DOES_NOT)):
        assert said(monkeypatch, less=0, cost=0.05, back=back)[u.BETTER.text] == verdict


def test_where_nothing_intrudes_shrinking_it_is_not_judged(monkeypatch):
    found = said(monkeypatch, less=0, lora_intruders=0.0)
    assert [claim.text for claim in (u.RETURNS, u.CHEAP, u.BETTER)] == [
        text for text, verdict in found.items() if verdict == UNTESTED]
    assert found[u.INTRUDES.text] == DOES_NOT


def test_claims_that_other_models_test_too_are_worded_alike():
    assert (u.LOW.text, u.LOSSLESS.text) == (foundations.LOW.text, foundations.LOSSLESS.text)
