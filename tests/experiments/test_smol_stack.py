"""Two adapters in force on SmolLM2: each way to combine beside PEFT's, and verdicts as planted."""

from functools import lru_cache

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lora_lib.experiments import smol_stack
from lora_lib.experiments.claims import DOES_NOT, HOLDS, UNDECIDED
from lora_lib.experiments.smol_stack import ALONE, COMBINED, DENSITY, TASKS, TOGETHER
from lora_lib.models import smollm2

# PEFT's name for each way; what it cuts to a rank keeps all of it at a full one.
PEFT = {"sum": ("cat", None), "SVD": ("svd", 16), "TIES": ("ties_svd", 32),
        "DARE": ("dare_linear_svd", 32)}


tokenizer = lru_cache(lambda: AutoTokenizer.from_pretrained(smollm2.folder()))


def tiny(seed=0):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=True)).eval()
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = None
    model.tokenizer = tokenizer()
    return model


@pytest.fixture(scope="module")
def tuned():
    """A model in PEFT's hands with two adapters that are not zero, and these as updates."""
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(tiny(), config, adapter_name="one")
    model.add_adapter("other", config)
    found = []
    for name in ("one", "other"):
        layers = {path: m for path, m in model.base_model.model.named_modules()
                  if hasattr(m, "lora_A")}
        for m in layers.values():
            torch.nn.init.normal_(m.lora_B[name].weight, std=0.1)
        found.append({path: (2 * m.lora_B[name].weight.detach(), m.lora_A[name].weight.detach())
                      for path, m in layers.items()})
    return model, found


@pytest.mark.parametrize("way", COMBINED)
def test_a_way_to_combine_is_pefts(tuned, way, monkeypatch):
    theirs, adapters = tuned
    kind, rank = PEFT[way]
    monkeypatch.setattr(torch, "bernoulli", lambda p: (          # DARE drops the same for both
        torch.rand(p.shape, generator=torch.Generator().manual_seed(p.numel())) < p).float())
    theirs.add_weighted_adapter(["one", "other"], [1.0, 1.0], way, combination_type=kind,
                                svd_rank=rank, density=DENSITY.get(way))
    model, tokens = tiny(), torch.arange(12)[None]
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        plain = model(tokens).logits
        with smol_stack.added(model, adapters, way):
            ours = model(tokens).logits
        for path in adapters[0]:
            W = theirs.base_model.model.get_submodule(path)
            mine = smol_stack.combined(way, [B @ A for B, A in (a[path] for a in adapters)])
            torch.testing.assert_close(mine, W.get_delta_weight(way), atol=1e-5, rtol=1e-4)
        theirs.set_adapter(way)
        torch.testing.assert_close(ours, theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    assert (ours - plain).abs().max() > 0.01
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_model_is_as_it_was_after_an_error(tuned):
    model = tiny()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(KeyError), smol_stack.added(model, tuned[1], "by luck"):
        pass
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_bases_answers_are_its_likeliest_tokens():
    model, prompts = tiny(1), ["One day", "Where is Ada?\nA:", "Now:", "One day"]
    said = smol_stack.own_answers(model, prompts)
    assert [prompt for prompt, _ in said] == prompts and said[0] == said[-1]
    for prompt, answer in said:
        ids = model.tokenizer.encode(prompt)
        for _ in range(smol_stack.TOKENS):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer == model.tokenizer.decode(ids[-smol_stack.TOKENS:])


def test_an_answer_of_the_base_stops_at_its_end(monkeypatch):
    model = tiny(1)
    end = model.tokenizer.eos_token_id
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: torch.cat(
        [input_ids, torch.tensor([[500, end, end]])], dim=1))
    assert smol_stack.own_answers(model, ["One day"]) == [
        ("One day", model.tokenizer.decode([500, end]))]


def test_half_of_the_rows_are_the_other_tasks_as_the_base_answers(monkeypatch):
    monkeypatch.setattr(smol_stack, "base", lambda: None)
    monkeypatch.setattr(smol_stack, "own_answers", lambda model, prompts: [
        (prompt, " as ever") for prompt in prompts])
    own, other = (smol_stack.rows(task, False, 0) for task in TASKS)
    mixed, both = smol_stack.rows(TASKS[0], True, 0), smol_stack.rows(TOGETHER, False, 0)
    assert len(own) == len(mixed) == len(both) == smol_stack.STEPS * smol_stack.BATCH
    half = len(own) // 2
    assert mixed[:half] == both[:half] == own[:half] and both[half:] == other[:half]
    assert mixed[half:] == [(prompt, " as ever") for prompt, _ in other[:half]]


def test_a_trial_trains_once_and_gives_both_tasks(monkeypatch):
    monkeypatch.setattr("lora_lib.models.load_pretrained", lambda name, device: tiny().to(device))
    monkeypatch.setattr(smol_stack, "STEPS", 2)
    monkeypatch.setattr(smol_stack, "TEST", 4)
    runs, train = [], smol_stack.smol.train
    monkeypatch.setattr(smol_stack.smol, "train", lambda *args, **options: (
        runs.append(1), train(*args, **options)))
    for cached in (smol_stack.base, smol_stack.trained):
        cached.cache_clear()
    found = {way: smol_stack.trial(way, lr=1e-2) for way in (ALONE[0], TOGETHER, "sum", "SVD")}
    smol_stack.base.cache_clear()
    smol_stack.trained.cache_clear()
    assert len(runs) == 3 and len({row["loss lookup 2"] for row in found.values()}) == 4
    assert set(found["sum"]) == {f"{what} {t}" for what in ("loss", "match") for t in TASKS}


@pytest.fixture
def planted(monkeypatch):
    def plant(lost, noise=0.01):
        """`lost(way, negatives)`: what each task loses in nats, over 0.1 alone."""
        rng, rows = np.random.default_rng(0), []
        for p in smol_stack.points():
            loss = [0.1 + more + noise * rng.normal() for more in lost(p["way"], p["negatives"])]
            rows.append(p | {f"loss {task}": x for task, x in zip(TASKS, loss)})
        monkeypatch.setattr(smol_stack, "read_if_any", lambda name: rows)
        return {v.claim: v.verdict for v in smol_stack.judged()}
    return plant


def test_the_verdicts_follow_what_is_planted(planted):
    found = planted(lambda way, negatives: (
        (0, 0) if way not in COMBINED or negatives and way != "TIES" else (0, 3)), noise=0.001)
    ways = [way for way in COMBINED if way != "TIES"]
    assert found[smol_stack.STACK.text] == DOES_NOT and found[smol_stack.BOTH.text] == HOLDS
    assert found[smol_stack.STACK_TRAINED.text] == (
        f"holds if they are combined by {' or '.join(ways)}")
    assert found[smol_stack.NEGATIVES.text] == (
        f"holds if they are combined by {' or '.join(ways)}")
    level = planted(lambda way, negatives: (0, 0), noise=0.001)
    assert level[smol_stack.STACK.text] == level[smol_stack.STACK_TRAINED.text] == HOLDS
    assert level[smol_stack.NEGATIVES.text] == DOES_NOT
    assert planted(lambda way, negatives: (0, 0), noise=0.1)[smol_stack.STACK.text] == UNDECIDED


def test_points_are_every_adapter_and_every_way_once():
    points = smol_stack.points()
    assert len(points) == len({str(p) for p in points}) == 3 * (2 * (2 + len(COMBINED)) + 1)
