"""The language model against transformers' Llama, and its weights against simpler predictors."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lora_lib.text import Tokenizer, questions, tales
from lora_lib.models import tales as tales_model
from lora_lib.torch import complete, exact_match, inject, load_pretrained, lora_modules, mean_loss
from lora_lib.models.tales import LanguageModel, LanguageModelConfig, rotary, rotate

ROOT = Path(__file__).parents[2]
SMALL = LanguageModelConfig(vocab_size=50, hidden_size=24, intermediate_size=40, num_layers=2,
                            num_heads=2)


def tokens(batch: int, length: int, vocab: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def llama(model: LanguageModel) -> LlamaForCausalLM:
    """transformers' model with the same sizes and weights."""
    c = model.config
    twin = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=True, attn_implementation="sdpa"))
    twin.load_state_dict(model.state_dict())                # strict: the keys are the same
    return twin.to(next(model.parameters()).dtype).eval()


@pytest.fixture(scope="module")
def pretrained() -> LanguageModel:
    return load_pretrained("tales")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("which", ["small", "pretrained"])
@torch.no_grad()
def test_logits_are_those_of_transformers(which, dtype, tolerance, monkeypatch):
    if dtype == torch.float64:                 # transformers rounds its norms to float32
        monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: F.rms_norm(
            x, self.weight.shape, self.weight, self.variance_epsilon))
    model = (LanguageModel(SMALL, seed=0) if which == "small" else load_pretrained()).to(dtype)
    x = tokens(3, 70)
    ours, theirs = model(x), llama(model)(x, use_cache=False).logits
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_a_bigger_rope_theta_is_the_same_in_both():
    model = LanguageModel(LanguageModelConfig(50, 24, 40, 2, 2, rope_theta=5e5), seed=1)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens(2, 30)), llama(model)(tokens(2, 30)).logits,
                                   atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_no_position_sees_what_comes_after_it():
    model = LanguageModel(SMALL, seed=0).double()
    x = tokens(2, 20)
    for cut in (1, 7, 19):
        y = x.clone()
        y[:, cut:] = (y[:, cut:] + 1) % 50
        before, after = model(x), model(y)
        torch.testing.assert_close(before[:, :cut], after[:, :cut], atol=1e-12, rtol=0)
        assert (before[:, cut] - after[:, cut]).abs().min(dim=-1).values.min() > 0


def test_rotated_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cosines, sines = rotary(60, 16, 10000.0, like=q)
    turned_q, turned_k = rotate(q, cosines, sines), rotate(k, cosines, sines)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(60), atol=1e-6, rtol=0)
    products = turned_q @ turned_k.T
    for distance in (0, 1, 5, 30):
        same = products.diagonal(-distance)
        torch.testing.assert_close(same, same[:1].expand_as(same), atol=1e-4, rtol=0)
    assert products[:, 0].std() > 0.1                        # and they do depend on it


def test_the_head_is_the_embedding_and_is_not_adapted():
    model = LanguageModel(SMALL, seed=0)
    assert model.get_output_embeddings() is model.lm_head
    assert model.lm_head.weight is model.model.embed_tokens.weight
    names = set(lora_modules(inject(model, "all-linear", rank=2)))
    assert len(names) == 7 * SMALL.num_layers and not any("lm_head" in name for name in names)
    assert "model.layers.1.self_attn.q_proj" in names and "model.layers.0.mlp.down_proj" in names


def test_first_weights_come_from_the_seed_alone():
    one, two, three = (LanguageModel(SMALL, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], three["lm_head.weight"])


@pytest.mark.parametrize("options, message", [
    ({"hidden_size": 25}, "even multiple of num_heads"), ({"hidden_size": 6}, "even multiple"),
    ({"num_layers": 0}, "num_layers must be positive"), ({"norm_eps": -1.0}, "norm_eps")])
def test_sizes_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        LanguageModelConfig(**{"vocab_size": 50, "hidden_size": 24, "num_heads": 2} | options)


def test_tokens_of_a_wrong_shape():
    with pytest.raises(ValueError, match=r"\(batch, length\), got \(5,\)"):
        LanguageModel(SMALL, seed=0)(torch.zeros(5, dtype=torch.long))


@torch.no_grad()
def test_bfloat16(pretrained):
    x = tokens(2, 40)
    half = load_pretrained(dtype=torch.bfloat16)(x)
    assert half.dtype == torch.bfloat16
    p, q = pretrained(x).log_softmax(-1), half.float().log_softmax(-1)
    assert (p.exp() * (p - q)).sum(-1).mean() < 0.02          # the divergence, in nats


# ------------------------------------------------------------------------------ generation
def test_generation_takes_the_likeliest_token():
    model, start = LanguageModel(SMALL, seed=0), tokens(3, 5)
    out = model.generate(start, 6)
    assert out.shape == (3, 11) and torch.equal(out[:, :5], start)
    with torch.no_grad():
        assert torch.equal(model(out)[:, 4:-1].argmax(-1), out[:, 5:])


def test_generation_stops_each_row_on_its_own():
    model, start = LanguageModel(SMALL, seed=0), tokens(4, 5)
    free = model.generate(start, 8)
    stop = free[0, 7].item()                                  # what row 0 says third
    out = model.generate(start, 8, stop=[stop])
    for row, unstopped in zip(out[:, 5:].tolist(), free[:, 5:].tolist(), strict=True):
        end = unstopped.index(stop) + 1 if stop in unstopped else 8
        assert row == (unstopped[:end] + [stop] * 8)[:len(row)]
    assert model.generate(start[:1], 8, stop=[stop]).shape[1] <= 8


def test_temperature():
    model, start = LanguageModel(SMALL, seed=0), tokens(1, 5).expand(4000, 5)
    drawn = model.generate(start, 1, temperature=2.0, seed=3)[:, -1]
    assert torch.equal(drawn, model.generate(start, 1, temperature=2.0, seed=3)[:, -1])
    with torch.no_grad():
        chances = (model(start[:1])[0, -1] / 2.0).softmax(-1)
    shares = torch.bincount(drawn, minlength=50) / 4000
    assert (shares - chances).abs().max() < 0.04              # five standard errors at a half
    with pytest.raises(ValueError, match="temperature"):
        model.generate(start, 1, temperature=-1.0)


def test_exact_match_is_what_greedy_decoding_does(pretrained):
    tokenizer = pretrained.tokenizer
    pairs = []
    for tale in tales(60, seed=9):
        words = tale.split(" ")                               # the ending's last word
        pairs.append((" ".join(words[:-1]), f" {words[-1]}"))
    pairs[0] = (pairs[0][0], " nonsense.")
    greedy = 0
    for prompt, answer in pairs:
        greedy += complete(pretrained, tokenizer, prompt, len(tokenizer.encode(answer))) == answer
    assert exact_match(pretrained, tokenizer, pairs) == greedy / len(pairs)
    assert exact_match(pretrained, tokenizer, pairs, batch_size=7) == greedy / len(pairs)
    assert 0 < greedy < len(pairs)


def test_mean_loss_counts_tokens_not_rows():
    tokenizer, model = Tokenizer(), LanguageModel(LanguageModelConfig(len(Tokenizer())), seed=0)
    examples = [*tales(5, seed=9), ("Mira was at the mill.", " Yes.\n")]
    total = count = 0
    for example in examples:
        inputs, labels = map(torch.from_numpy, tokenizer.batch([example]))
        kept = labels[0] != -100
        logs = model(inputs)[0].log_softmax(-1)
        total -= sum(logs[t, labels[0, t]].item() for t in kept.nonzero().flatten())
        count += kept.sum().item()
    measured = mean_loss(model, tokenizer, examples, batch_size=4)
    assert measured == pytest.approx(total / count, rel=1e-5)
    with pytest.raises(ValueError, match="at least one example"):
        mean_loss(model, tokenizer, [])


def test_measuring_leaves_the_mode_alone():
    model = LanguageModel(LanguageModelConfig(len(Tokenizer()), 24, 40, 1, 2), seed=0)
    assert model.training
    exact_match(model, Tokenizer(), questions(2))
    assert model.training


# ------------------------------------------------------------------------- the pretrained weights
def test_pretrained_has_the_recorded_loss(pretrained):
    record = pretrained.pretraining
    held_out = tales(record["held_out_tales"], record["held_out_seed"])
    loss = mean_loss(pretrained, pretrained.tokenizer, held_out)
    assert loss == pytest.approx(record["held_out_loss"], abs=1e-4)


def test_pretrained_beats_counting_word_pairs(pretrained):
    tokenizer = pretrained.tokenizer
    pairs, firsts, vocab = Counter(), Counter(), len(tokenizer)
    for tale in tales(20_000, seed=0):
        ids = [tokenizer.end, *tokenizer.encode(tale), tokenizer.end]
        pairs.update(zip(ids, ids[1:]))
        firsts.update(ids[:-1])
    held_out = tales(300, seed=1)
    total = count = 0
    for tale in held_out:
        ids = [tokenizer.end, *tokenizer.encode(tale), tokenizer.end]
        for first, second in zip(ids, ids[1:]):
            total -= math.log((pairs[first, second] + 0.01) / (firsts[first] + 0.01 * vocab))
            count += 1
    assert mean_loss(pretrained, tokenizer, held_out) < total / count - 0.3


def test_pretrained_looks_facts_up(pretrained):
    """The last word of a tale follows from the rest, and no pair of words gives it away."""
    endings = []
    for tale in tales(500, seed=1):
        words = tale.removesuffix(".").split(" ")
        endings.append((" ".join(words[:-1]), f" {words[-1]}"))
    assert exact_match(pretrained, pretrained.tokenizer, endings) > 0.9


def test_pretrained_is_small_and_ready(pretrained):
    assert sum(p.numel() for p in pretrained.parameters()) < 1_000_000
    assert (tales_model.WEIGHTS / "tales.safetensors").stat().st_size < 2_000_000
    assert not pretrained.training
    wide = load_pretrained(dtype=torch.float64).state_dict()
    assert all(torch.equal(p.double(), wide[name]) for name, p in pretrained.state_dict().items())


def test_unknown_name():
    with pytest.raises(ValueError, match=r"one of \('tales', .* got 'tails'"):
        load_pretrained("tails")


def test_changed_words(monkeypatch):
    monkeypatch.setattr(tales_model.Tokenizer, "__init__",
                        lambda self: setattr(self, "tokens", ["<pad>", "<end>", "a"]))
    with pytest.raises(ValueError, match="trained on other words"):
        load_pretrained()


def script(*args):
    command = [sys.executable, "scripts/pretrain_language_model.py", *args]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_pretraining_script_explains_itself():
    done = script("--help")
    assert done.returncode == 0 and "--steps" in done.stdout


def test_pretraining_script_writes_weights_that_load(tmp_path):
    done = script("--steps", "20", "--tales", "1000", "--out", str(tmp_path / "few.safetensors"))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["few.safetensors"]
    model = tales_model.load(tmp_path / "few.safetensors")
    assert model.pretraining["steps"] == 20
    assert f"held-out loss {model.pretraining['held_out_loss']:.4f}" in done.stdout
    assert model.pretraining["held_out_loss"] < math.log(len(model.tokenizer)) - 1
    with safe_open(tmp_path / "few.safetensors", "pt") as file:
        assert json.loads(file.metadata()["seed"]) == 0
        assert all(file.get_tensor(name).dtype == torch.bfloat16 for name in file.keys())
