"""Trained rows of an embedding, `trainable_token_indices`: beside PEFT's, in both directions."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from lora_lib.torch import (Adapters, LanguageModel, LanguageModelConfig, check, fine_tune, inject,
                            load_adapter, lora_parameters, merge, remove, save_adapter, save_gguf,
                            unmerge)
from lora_lib.torch.peft_format import CONFIG, ROWS, WEIGHTS
from lora_lib.torch.tokens import token_rows
from tests.torch.conftest import randomize

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

IDS = torch.tensor([[3, 7, 1, 49, 3, 20]])
NEW = torch.tensor([[3, 50, 1, 51, 51, 20]])
TOKENS = [7, 3, 49]                                  # in no order
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
tied_or_not = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


@pytest.fixture
def resized(llama):
    """A base with two tokens more, whose rows are others for another seed."""
    def make(tied=False, seed=1, size=52):
        model = llama(tied)
        model.resize_token_embeddings(size, mean_resizing=False)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            for module in (model.get_input_embeddings(), model.get_output_embeddings()):
                module.weight[50:].normal_()
        return model.eval()
    return make


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def with_peft(base, tokens):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False,
                             trainable_token_indices=tokens)
    model = peft.get_peft_model(base, config)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "trainable_tokens_delta" in name:
                p.add_(torch.randn_like(p))
    return model


def ours(base, tokens=TOKENS, **options):
    return randomize(inject(base, ["q_proj"], rank=2, seed=0, trainable_token_indices=tokens,
                            **options), seed=3)


def embed(model):
    return model.get_input_embeddings()


# --- with PEFT ------------------------------------------------------------------------------------

EVERY = [TOKENS, {"embed_tokens": TOKENS}, {"embed_tokens": [3], "lm_head": [3]},
         {"model.embed_tokens": [3, 49], "lm_head": [7]}, {"lm_head": TOKENS}]


@tied_or_not
@pytest.mark.parametrize("tokens", EVERY, ids=str)
def test_what_peft_saves_loads_here(tokens, tied, llama, tmp_path):
    theirs = with_peft(llama(tied), tokens)
    theirs.save_pretrained(tmp_path)
    if tied and "lm_head" in tokens and tokens.get("embed_tokens") != tokens["lm_head"]:
        # One weight, of which PEFT gives each of its two readers other rows.
        with pytest.raises(ValueError, match="shares its weight with another|holds no rows of model"):
            load_adapter(llama(tied), tmp_path)
        return
    model = load_adapter(llama(tied), tmp_path)
    close(logits(model), logits(theirs))
    assert not torch.allclose(logits(theirs), logits(llama(tied)), atol=1e-2)
    save_adapter(model, tmp_path / "again")
    assert load_file(tmp_path / "again" / WEIGHTS).keys() == load_file(tmp_path / WEIGHTS).keys()
    close(logits(merge(model)), logits(theirs))


@tied_or_not
@pytest.mark.parametrize("tokens", EVERY, ids=str)
def test_what_is_saved_here_loads_in_peft_and_here(tokens, tied, llama, tmp_path):
    if tied and "lm_head" in tokens and "model.embed_tokens" in tokens:
        with pytest.raises(ValueError, match="lm_head shares its weight with another module"):
            ours(llama(tied), tokens)
        return
    model = ours(llama(tied), tokens)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(tied), tmp_path)
    close(logits(theirs), logits(model))
    close(logits(load_adapter(llama(tied), tmp_path)), logits(model))
    assert not torch.allclose(logits(model), logits(llama(tied)), atol=1e-2)


@tied_or_not
def test_new_tokens_both_ways(tied, resized, llama, tmp_path):
    """The base's own new rows are others each time, and the file's take their place."""
    both = {"embed_tokens": [50, 51], "lm_head": [50, 51]}
    model = ours(resized(tied, seed=1), both)
    save_adapter(model, tmp_path / "ours")
    theirs = with_peft(resized(tied, seed=1), both)
    theirs.save_pretrained(tmp_path / "theirs")
    for name, trained in (("ours", model), ("theirs", theirs)):
        path = tmp_path / name
        for size in (52, 56):                        # with more tokens, which came later
            again = load_adapter(resized(tied, 2, size), path)
            close(logits(again, NEW)[..., :52], logits(trained, NEW))
        other = peft.PeftModel.from_pretrained(resized(tied, seed=2), path)
        close(logits(other, NEW), logits(trained, NEW))
        with pytest.raises(ValueError, match=r"resize_token_embeddings\(\)"):
            load_adapter(llama(tied), path)
    with pytest.raises(ValueError, match="there is no row for token 51, the weight has 51"):
        load_adapter(resized(tied, 2, 51), tmp_path / "theirs")


def test_a_new_row_that_is_not_trained_is_noticed(resized, tmp_path):
    save_adapter(ours(resized(seed=1), {"embed_tokens": [50], "lm_head": [50, 51]}), tmp_path)
    with pytest.raises(ValueError, match="embed_tokens: the weight is not the one that the rows"):
        load_adapter(resized(seed=2), tmp_path)
    load_adapter(resized(seed=2), tmp_path, check_base=False)


def test_a_head_that_is_tied_by_memory_alone(tmp_path):
    """The course's model has no setting of transformers that would tell PEFT so."""
    def base():
        return LanguageModel(LanguageModelConfig(vocab_size=50, hidden_size=16, num_layers=1,
                                                 num_heads=2, intermediate_size=24), seed=0)

    model = ours(base(), {"embed_tokens": TOKENS})
    assert len(token_rows(model)) == 1
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path)
    close(theirs(IDS), model(IDS))
    close(load_adapter(base(), tmp_path)(IDS), model(IDS))


# --- training -------------------------------------------------------------------------------------

@tied_or_not
def test_only_these_rows_are_trained(tied, llama):
    """Against a copy of which the whole embedding is trained: the same gradient, in these rows."""
    model = inject(llama(tied), ["q_proj"], rank=2, seed=0, trainable_token_indices=TOKENS)
    whole = llama(tied)
    embed(whole).weight.requires_grad_(True)
    for each in (model, whole):
        out = each.train()(input_ids=IDS).logits
        F.cross_entropy(out[0, :-1], IDS[0, 1:]).backward()
    part = token_rows(model)["model.embed_tokens"]
    close(part.rows.grad, embed(whole).weight.grad[TOKENS])
    frozen, before = part.original.clone(), part.rows.detach().clone()
    assert frozen.requires_grad is False and part.original.grad is None
    torch.optim.AdamW(lora_parameters(model), lr=0.1, weight_decay=0.5).step()
    assert torch.equal(part.original, frozen)
    assert not torch.isclose(part.rows, before, atol=1e-3).any()
    others = [token for token in range(50) if token not in TOKENS]
    assert torch.equal(embed(model).weight[others], embed(llama(tied)).weight[others])
    head = model.get_output_embeddings().weight
    assert torch.equal(head[TOKENS], part.rows) is tied


@pytest.mark.parametrize("tied", [True])
def test_trained_as_in_peft(tied, llama, tmp_path):
    theirs = with_peft(llama(tied), TOKENS)
    theirs.save_pretrained(tmp_path)
    model = load_adapter(llama(tied), tmp_path)
    for each, trained in ((theirs, [p for p in theirs.parameters() if p.requires_grad]),
                          (model, lora_parameters(model))):
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            out = each.train()(input_ids=IDS).logits
            F.cross_entropy(out[0, :-1], IDS[0, 1:]).backward()
            optimizer.step()
    close(logits(model), logits(theirs))


def test_fine_tune_and_check_know_them(llama, tmp_path):
    model = inject(llama(), ["q_proj"], rank=2, seed=0, trainable_token_indices=TOKENS)
    optimizer = torch.optim.AdamW(lora_parameters(model))
    assert not check(model, optimizer, stage="start", base=llama())
    part = token_rows(model)["model.embed_tokens"]
    before = part.rows.detach().clone()
    inputs = IDS.repeat(4, 1)
    fine_tune(model, (inputs[:, :-1], inputs[:, 1:]), steps=2, batch_size=2, lr=1e-2,
              checkpoint=tmp_path / "run")
    assert not torch.equal(part.rows[1], before[1])              # token 3 is in the rows
    assert not check(model, base=llama())
    with torch.no_grad():
        part.original[20] += 1
    assert [f.code for f in check(model, base=llama())] == ["base changed"]
    with torch.no_grad():
        part.original.copy_(embed(llama()).weight)
        part.original[3] += 1                                    # a row that nobody reads
    assert not check(model, base=llama())
    part.rows.requires_grad_(False)
    without = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    assert [f.code for f in check(model, without)] == ["adapter frozen"]
    part.rows.requires_grad_(True)
    assert [(f.code, f.where) for f in check(model, without)] == [
        ("optimizer", ("model.embed_tokens.parametrizations.weight.0.rows",))]
    with torch.no_grad():
        part.rows[0, 0] = float("nan")
    assert "not finite" in [f.code for f in check(model)]
    model.bfloat16()
    assert "16-bit adapter" in [f.code for f in check(model)]


# --- in and out -----------------------------------------------------------------------------------

@tied_or_not
def test_merge_unmerge_remove(tied, llama, unchanged):
    base = llama(tied)
    with unchanged(base):
        assert remove(ours(base)) is base
        base.requires_grad_(True)
    model = ours(llama(tied))
    expected = logits(model)
    merge(model, keep_adapters=True)
    close(logits(model), expected)
    assert "merged" in [f.code for f in check(model)]
    unmerge(model)
    close(logits(model), expected)
    assert torch.equal(token_rows(model)["model.embed_tokens"].original, embed(llama(tied)).weight)
    merge(model)
    close(logits(model), expected)
    assert model.state_dict().keys() == llama(tied).state_dict().keys()
    assert (model.lm_head.weight is embed(model).weight) is tied
    model = merge(ours(llama(tied)), keep_adapters=True)
    close(logits(remove(model)), logits(llama(tied)))


def test_a_nan_is_refused_before_anything_is_written(llama, tmp_path, unchanged):
    model = ours(llama())
    with torch.no_grad():
        token_rows(model)["model.embed_tokens"].rows[1, 2] = float("inf")
    with unchanged(model), pytest.raises(ValueError, match="model.embed_tokens: the trained rows"):
        merge(model)
    with pytest.raises(ValueError, match="trainable_tokens_delta holds NaN or infinity"):
        save_adapter(model, tmp_path)


def test_a_copy_has_rows_of_its_own(llama):
    model = ours(llama(True))
    twin = copy.deepcopy(model)
    expected = logits(model)
    remove(model)
    close(logits(twin), expected)
    assert len(token_rows(twin)) == 1
    close(logits(remove(twin)), logits(llama(True)))


def test_beside_16_bits_the_rows_are_float32(llama, tmp_path):
    model = ours(llama().to(torch.bfloat16))
    part = token_rows(model)["model.embed_tokens"]
    assert part.rows.dtype == torch.float32 and embed(model).weight.dtype == torch.bfloat16
    save_adapter(model, tmp_path)
    assert load_file(tmp_path / WEIGHTS)[f"base_model.model.model.embed_tokens.{ROWS}"].dtype == \
        torch.float32
    again = load_adapter(llama().to(torch.bfloat16), tmp_path)
    assert torch.equal(logits(again), logits(model))


class Scaled(nn.Embedding):
    """As Gemma has it."""

    def forward(self, ids):
        return super().forward(ids) * 4


def test_an_embedding_with_a_forward_of_its_own():
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": Scaled(6, 3), "fc": nn.Linear(3, 3)})
    inject(model, ["fc"], rank=1, trainable_token_indices={"embed": [4]})
    with torch.no_grad():
        token_rows(model)["embed"].rows.fill_(1)
    assert torch.equal(model["embed"](torch.tensor([4])), torch.full((1, 3), 4.0))


def test_loading_into_a_model_that_has_them(llama, tmp_path):
    save_adapter(ours(llama()), tmp_path)
    model = inject(llama(), ["q_proj"], rank=2, trainable_token_indices=TOKENS)
    close(logits(load_adapter(model, tmp_path)), logits(ours(llama())))
    for other in ([7, 3], [3, 7, 49], ()):
        model = inject(llama(), ["q_proj"], rank=2, trainable_token_indices=other)
        with pytest.raises(ValueError, match="the model has trained rows of"):
            load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="the rows in the model are merged"):
        model = inject(llama(), ["q_proj"], rank=2, trainable_token_indices=TOKENS)
        token_rows(model)["model.embed_tokens"].merge()
        load_adapter(model, tmp_path)


# --- embeddings that are trained whole ------------------------------------------------------------

ENDS = ["embed_tokens", "lm_head"]


@tied_or_not
@pytest.mark.parametrize("options", [
    {"modules_to_save": ENDS, "ensure_weight_tying": True},
    {"modules_to_save": ENDS}, {"modules_to_save": ENDS[:1]}, {"modules_to_save": ENDS[1:]}], ids=str)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings", "ignore:.*ensure_weight_tying")
def test_whole_embeddings_and_heads_from_peft(options, tied, llama, tmp_path, unchanged):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False,
                             **copy.deepcopy(options))               # PEFT changes the list
    theirs = peft.get_peft_model(llama(tied), config)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "modules_to_save" in name:
                p.add_(torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    model = llama(tied)
    if tied and "ensure_weight_tying" not in options:
        # PEFT trains a copy, and the two that were one differ.
        with unchanged(model), pytest.raises(ValueError, match="shares its weight|share weight in"):
            load_adapter(model, tmp_path)
    else:
        close(logits(load_adapter(model, tmp_path)), logits(theirs))


@tied_or_not
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_whole_embeddings_and_heads_to_peft(tied, llama, tmp_path):
    model = ours(llama(tied), (), modules_to_save=ENDS)
    save_adapter(model, tmp_path)
    close(logits(peft.PeftModel.from_pretrained(llama(tied), tmp_path)), logits(model))
    close(logits(load_adapter(llama(tied), tmp_path)), logits(model))


class Large(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Embedding(5000, 64), nn.Linear(64, 64)


def test_a_large_embedding_is_told_with_its_size_and_the_remedy(tmp_path, recwarn):
    model = inject(Large(), ["fc"], rank=1, modules_to_save=["embed"])
    with pytest.warns(UserWarning, match=r"(?s)1\.3 of the file's 1\.3 MB are embed, trained whole"
                                         r".*trainable_token_indices"):
        save_adapter(model, tmp_path)
    recwarn.clear()
    save_adapter(inject(Large(), ["fc"], rank=1, trainable_token_indices={"embed": [7]}), tmp_path)
    save_adapter(inject(Large(), ["fc"], rank=1), tmp_path)
    assert not recwarn.list and (tmp_path / WEIGHTS).stat().st_size < 10_000


# --- what cannot be -------------------------------------------------------------------------------

@pytest.mark.parametrize("tokens, error, words", [
    ([50], ValueError, "model.embed_tokens: there is no row for token 50, the weight has 50"),
    ([-1], ValueError, "expected numbers from 0, each once"),
    ([3, 3], ValueError, "expected numbers from 0, each once"),
    ({"embed_tokens": []}, ValueError, "expected numbers from 0"),
    ([1.0], TypeError, "must be a list of tokens' numbers"),
    ([True], TypeError, "must be a list of tokens' numbers"),
    ("12", TypeError, "must be a list of tokens' numbers"),
    (3, TypeError, "must be a list of tokens' numbers"),
    ({"wte": [1]}, ValueError, "nothing in the model is called 'wte'; the input embedding is "
                               "'model.embed_tokens'"),
    ({"embed_tokens": [1], "model.embed_tokens": [2]}, ValueError, "twice, with other tokens"),
    ({"norm": [1]}, TypeError, "model.norm: only an nn.Embedding, or an nn.Linear"),
    ({"q_proj": [1]}, ValueError, "q_proj has an adapter or is trained whole"),
], ids=str)
def test_what_cannot_be_is_refused_and_the_model_is_as_it_was(tokens, error, words, llama,
                                                              unchanged):
    model = llama()
    with unchanged(model), pytest.raises(error, match=words):
        inject(model, ["q_proj"], rank=2, trainable_token_indices=tokens)


def test_what_has_no_code_for_them_says_so(llama, tmp_path, unchanged):
    model = llama()
    with unchanged(model):
        with pytest.raises(ValueError, match="has an adapter or is trained whole"):
            inject(model, ["q_proj"], rank=2, modules_to_save=["embed_tokens"],
                   trainable_token_indices=[1])
        with pytest.raises(ValueError, match="the model names no input embedding"):
            inject(nn.Sequential(nn.Linear(3, 3)), ["0"], rank=1, trainable_token_indices=[1])
    model = ours(llama(True))
    with pytest.raises(ValueError, match="has trained rows already"):
        inject(model, ["v_proj"], rank=2, trainable_token_indices=[1])
    with pytest.raises(TypeError, match="lm_head: the layer's weight is not a parameter"):
        inject(model, ["lm_head"], rank=2)
    with pytest.raises(ValueError, match="trains model.embed_tokens whole, or rows of it"):
        Adapters(model, present="a")
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="adapter 'a' trains model.embed_tokens whole, or rows"):
        Adapters(llama(True)).load("a", tmp_path)
    with pytest.raises(ValueError, match="no place for modules trained whole, or rows of them"):
        save_gguf(model, tmp_path / "a.gguf")


KEY = f"base_model.model.model.embed_tokens.{ROWS}"


@pytest.mark.parametrize("change, words", [
    (lambda tensors, config: tensors.pop(KEY), "holds no rows of model.embed_tokens"),
    (lambda tensors, config: config.pop("trainable_token_indices"),
     "holds rows of model.embed_tokens, which the configuration's"),
    (lambda tensors, config: config["trainable_token_indices"].update({"model.embed_tokens": [1]}),
     r"rows have shape \(3, 16\), expected \(1, 16\)"),
    (lambda tensors, config: config["trainable_token_indices"].update(lm_head=[1]),
     "holds no rows of lm_head"),
    (lambda tensors, config: tensors.update({KEY: torch.zeros(3, 15)}), r"expected \(3, 16\)"),
    (lambda tensors, config: tensors.update({KEY: torch.full((3, 16), torch.nan)}), "holds NaN"),
    (lambda tensors, config: tensors.update({KEY.replace("model.embed", "embed"): torch.zeros(3, 16)}),
     "embed_tokens"),
    (lambda tensors, config: config.update(trainable_token_indices={"model.embed_tokens": [7, 3, 99]}),
     "there is no row for token 99"),
])
def test_a_file_that_does_not_fit_is_refused(change, words, llama, tmp_path, unchanged):
    from safetensors.torch import save_file
    with_peft(llama(), {"model.embed_tokens": TOKENS}).save_pretrained(tmp_path)
    tensors, config = load_file(tmp_path / WEIGHTS), json.loads((tmp_path / CONFIG).read_text())
    change(tensors, config)
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    (tmp_path / CONFIG).write_text(json.dumps(config))
    model = llama()
    with unchanged(model), pytest.raises(ValueError, match=words):
        load_adapter(model, tmp_path)
