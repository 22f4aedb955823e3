"""What people have and toys do not: real sizes, layers that are read and not called, wrappers,
weights that are elsewhere or in another library's bits, heads and rows that no base has."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from lora_lib.torch import (LoRALinear, check, fine_tune, inject, load_adapter, lora_modules, merge,
                            quantize, remove, save_adapter)
from lora_lib.torch.samples import spread
from lora_lib.torch.peft_format import CONFIG, WEIGHTS
from tests.torch.conftest import randomize

transformers = pytest.importorskip("transformers")
IDS = torch.arange(10)[None]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


# --- saving is not stopped by bookkeeping ---------------------------------------------------------

@pytest.mark.parametrize("shape", [(14336, 4096), (4096, 11008), (40, 40), (1, 1), (3, 2)])
@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
def test_the_samples_are_spread_evenly_at_any_size(shape, default):
    class Watched:
        """A matrix that says which of its numbers are asked for."""
        is_meta, shape = False, None
        numel = lambda self: self.shape[0] * self.shape[1]
        is_floating_point = lambda self: True

        def __getitem__(self, where):
            self.asked = [i * self.shape[1] + j for i, j in zip(*where)]
            return torch.zeros(8)

    W = Watched()
    W.shape, n = shape, shape[0] * shape[1]
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        spread(W)
    finally:
        torch.set_default_dtype(before)
    assert W.asked[0] == 0 and W.asked[-1] == n - 1
    assert all(abs(asked - i * (n - 1) / 7) < 1 for i, asked in enumerate(W.asked))


def test_a_layer_of_a_7b_model_is_saved_and_known_again(tmp_path):
    def base(seed=0):
        torch.manual_seed(seed)
        return nn.ModuleDict({"up": nn.Linear(4096, 11008, bias=False, dtype=torch.bfloat16)})

    model = randomize(inject(base(), ["up"], rank=2, seed=0))
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(base(), tmp_path)["up"].B, model["up"].B)
    with pytest.raises(ValueError, match="up: the weight is not the one"):
        load_adapter(base(1), tmp_path)


class Codes(nn.Linear):
    """int8 and a scale for each row, as LLM.int8 keeps them."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        W = linear.weight.data
        self.scale = W.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((W / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.float() * self.scale)


class Ternary(nn.Linear):
    """BitNet: the float weight is rounded whenever it is used."""

    def forward(self, x):
        scale = self.weight.abs().mean()
        return F.linear(x, (self.weight / scale).round().clamp(-1, 1) * scale, self.bias)


class Plain(nn.Linear):
    """A class of somebody's own that computes what its base does."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


def of(kind):
    torch.manual_seed(0)
    linear = nn.Linear(32, 24)
    if kind is Codes:
        return nn.Sequential(Codes(linear))
    own = kind(32, 24)
    own.load_state_dict(linear.state_dict())
    return nn.Sequential(own)


@pytest.mark.parametrize("kind", [Codes, Ternary])
def test_a_weight_that_is_not_what_the_layer_computes_with_is_not_merged(kind, tmp_path, unchanged):
    model = randomize(inject(of(kind), ["0"], rank=2, seed=0))
    x = torch.randn(4, 32)
    before = model(x)
    for function in (lambda: merge(model), lambda: model[0].merge()):
        with unchanged(model), pytest.raises(ValueError, match="scale beside|does not compute W x"):
            function()
    save_adapter(model, tmp_path)                                    # the adapter is as good as any
    assert torch.equal(load_adapter(of(kind), tmp_path)(x), before)


def test_what_the_file_does_not_know_of_the_base_it_says(tmp_path):
    from safetensors import safe_open
    save_adapter(inject(of(Codes), ["0"], rank=2, seed=0), tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert json.loads(file.metadata()["lora_lib_base"]) == {"0": None}


def test_a_class_of_ones_own_is_merged_if_it_computes_the_same():
    model = randomize(inject(of(Plain), ["0"], rank=2, seed=0))
    x = torch.randn(4, 32)
    expected = model(x)
    torch.testing.assert_close(merge(model)(x), expected, rtol=1e-4, atol=1e-4)


class Pair(nn.Linear):
    """A router: it gives scores and choices."""

    def forward(self, x):
        scores = super().forward(x)
        return scores, scores.argmax(-1)


class Grouped(nn.Linear):
    """Each half of the input has its own half of the rows."""

    def forward(self, x):
        halves = x.unflatten(-1, (2, -1)) @ self.weight.view(2, -1, self.in_features // 2).mT
        return halves.flatten(-2)


@pytest.mark.parametrize("make, message", [
    (lambda: Pair(32, 24), "a Pair does not turn x"),
    (lambda: Grouped(32, 24), "a Grouped does not turn x"),
    (lambda: nn.Linear(32, 24).to(torch.float8_e4m3fn), "stored as torch.float8_e4m3fn"),
    (lambda: nn.LazyLinear(24), "no weight before its first input"),
])
def test_what_cannot_be_adapted_is_refused_at_inject(make, message, unchanged):
    model = nn.Sequential(make())
    with pytest.raises(TypeError, match=f"^0: .*{message}"):
        inject(model, ["0"], rank=2)


def test_all_linear_leaves_out_what_gives_no_such_output():
    model = nn.Sequential(nn.Linear(32, 32), Pair(32, 24))
    with pytest.warns(UserWarning, match="leaves out 1: .*a Pair does not turn x"):
        assert [*lora_modules(inject(model, "all-linear", rank=2))] == ["0"]


def test_a_model_without_embeddings(tmp_path):
    """transformers raises NotImplementedError where a model of images is asked for them."""
    class Images(Net):
        def get_input_embeddings(self):
            raise NotImplementedError

    save_adapter(randomize(inject(Images(), ["0"], rank=2, seed=0)), tmp_path)
    assert lora_modules(load_adapter(Images(), tmp_path))


def test_two_parameters_in_one_place_of_memory_are_tied(unchanged):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(model[0].weight.data)
    with unchanged(model), pytest.raises(ValueError, match="0 shares its weight.*1.weight"):
        inject(model, ["0"], rank=2)


# --- layers that a model reads and does not call ------------------------------------------------

class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.called, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(self.called(x), self.read.weight, self.read.bias)


def test_who_reads_the_weight_gets_the_update_and_gives_it_a_gradient():
    model, x = randomize(inject(Reads(), "all-linear", rank=2, seed=0)), torch.randn(3, 8)
    called = lambda m: F.linear(x, m.linear.weight, m.linear.bias) + m.update(x)
    expected = F.linear(model.called(x), model.read.linear.weight + model.read.delta_weight(),
                        model.read.bias)
    torch.testing.assert_close(model(x), expected)
    grads = torch.autograd.grad(model(x).square().sum(), [model.read.A, model.read.B])
    for ours, theirs in zip(grads, torch.autograd.grad(expected.square().sum(),
                                                       [model.read.A, model.read.B])):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(called(model.called), model.called(x))
    outs = model(x)
    torch.testing.assert_close(merge(model)(x), outs, rtol=1e-4, atol=1e-4)
    assert fine_tune(inject(Reads(), "all-linear", rank=2, seed=0),
                     (torch.randn(8, 8), torch.arange(8)), steps=2, batch_size=4, progress=False)


def test_the_fast_path_of_an_encoder_in_eval():
    """nn.TransformerEncoderLayer hands its weights to one kernel, where no gradient is asked."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    model, x = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2)}), torch.randn(2, 5, 16)
    plain = model.eval()["encoder"](x).detach()
    randomize(inject(model, ["linear1", "linear2"], rank=2, seed=0))
    training = model.train()["encoder"](x)
    with torch.no_grad():
        fast = model.eval()["encoder"](x)
    assert (training - plain).abs().max() > 0.1
    torch.testing.assert_close(fast, training, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merge(model)["encoder"](x), training, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind, options", [
    ("Swin", {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2,
              "image_size": 16, "patch_size": 2}),
    ("Mamba", {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4,
               "pad_token_id": 0}),
    ("WavLM", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
               "intermediate_size": 24, "conv_dim": [8], "conv_kernel": [4], "conv_stride": [2],
               "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}),
])
def test_every_adapter_of_a_real_architecture_learns_and_merges(kind, options):
    config = getattr(transformers, f"{kind}Config")(**options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    x = {"Swin": torch.randn(1, 3, 16, 16), "Mamba": IDS, "WavLM": torch.randn(1, 400)}[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        randomize(inject(model, "all-linear", rank=2, alpha=0.5, seed=0))
    before = model(x)[0]
    before.square().sum().backward()
    unread = {n for n, m in lora_modules(model).items() if m.A.grad is None}
    assert unread <= {"masked_spec_embed"} and len(lora_modules(model)) > 4
    torch.testing.assert_close(merge(model)(x)[0], before, rtol=1e-3, atol=1e-3)


class Idle(nn.Module):
    """Of two layers one is never used: an expert that no token chose."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        return self.used(x)


def test_an_adapter_that_no_gradient_reaches_is_named():
    data = torch.randn(8, 8), torch.arange(8) % 4
    options = {"steps": 2, "batch_size": 4, "progress": False}
    with pytest.warns(UserWarning, match="adapters of unused, which stay"):
        fine_tune(inject(Idle(), "all-linear", rank=2, seed=0), data, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fine_tune(inject(Idle(), ["used"], rank=2, seed=0), data, **options)
    model = inject(Idle(), "all-linear", rank=2, seed=0)
    assert not check(model)
    model(data[0]).sum().backward()
    assert [(f.code, f.where) for f in check(model)] == [("no gradient", ("unused",))]


# --- wrappers -----------------------------------------------------------------------------------

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.block(x))


def checkpointed(model):
    model.block = checkpoint_wrapper(model.block)
    return model


def compiled_inside(model):
    model.block = torch.compile(model.block)
    return model


WRAPPERS = [checkpointed, compiled_inside, nn.DataParallel, AveragedModel, torch.compile]


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("targets", [["0", "2"], ["block.0"]])
def test_a_wrappers_name_is_in_no_file(wrap, targets, tmp_path):
    model = randomize(inject(Net(), targets, rank=2, modules_to_save=["head"], seed=0))
    x = torch.randn(3, 8)
    expected = model(x)
    save_adapter(model, tmp_path / "bare")
    save_adapter(wrap(model), tmp_path / "wrapped")
    for name in (CONFIG, WEIGHTS):
        ours, theirs = ((tmp_path / f / name) for f in ("wrapped", "bare"))
        if name == CONFIG:
            assert ours.read_bytes() == theirs.read_bytes()
        else:
            assert load_file(ours).keys() == load_file(theirs).keys()
    torch.testing.assert_close(load_adapter(Net(), tmp_path / "wrapped")(x), expected)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_model_is_not_taken_apart(wrap, tmp_path):
    save_adapter(inject(Net(), ["0"], rank=2), tmp_path)
    for function in (lambda m: inject(m, ["0"], rank=2), lambda m: load_adapter(m, tmp_path)):
        with pytest.raises(ValueError, match="is wrapped in .*: pass what is inside, its "):
            function(wrap(Net()))


@pytest.mark.parametrize("name", ["_checkpoint_wrapped_module", "_fsdp_wrapped_module",
                                  "_orig_mod"])
def test_a_file_that_carries_a_wrappers_name_is_read(name, tmp_path):
    model, x = randomize(inject(Net(), ["0", "2"], rank=2, seed=0)), torch.randn(3, 8)
    save_adapter(model, tmp_path)
    save_file({key.replace("block.", f"block.{name}."): t
               for key, t in load_file(tmp_path / WEIGHTS).items()}, tmp_path / WEIGHTS)
    torch.testing.assert_close(load_adapter(Net(), tmp_path)(x), model(x))


@pytest.mark.parametrize("part, value", [("A", torch.zeros(0)), ("B", torch.zeros(16)),
                                         ("A", torch.zeros(2, 8, device="meta"))])
def test_a_part_that_is_not_whole_is_not_written(part, value, tmp_path):
    """FSDP 1 leaves flat or empty tensors, ZeRO-3 empty ones."""
    model = inject(Net(), ["0"], rank=2)
    setattr(model.block[0], part, nn.Parameter(value))
    with pytest.raises(ValueError, match=f"block.0: {part} has shape .*summon_full_params"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


# --- weights that are elsewhere ------------------------------------------------------------------

def offloaded(model):
    from accelerate import cpu_offload
    return cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("peft", [False, True])
def test_an_offloaded_base(llama, tmp_path, peft, unchanged):
    pytest.importorskip("accelerate")
    model = randomize(inject(llama(), ["q_proj"], rank=2, seed=0))
    want = logits(model)
    save_adapter(model, tmp_path / "one")
    if peft:                                                     # without what we note of the base
        save_file(load_file(tmp_path / "one" / WEIGHTS), tmp_path / "one" / WEIGHTS)
    before = load_adapter(offloaded(llama()), tmp_path / "one")
    after = offloaded(load_adapter(llama(), tmp_path / "one"))
    for i, one in enumerate((before, after)):
        torch.testing.assert_close(logits(one), want, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="q_proj: the weight is on the meta device"):
            merge(one)
        torch.testing.assert_close(logits(one), want, rtol=1e-4, atol=1e-4)
        save_adapter(one, tmp_path / f"again{i}")
        torch.testing.assert_close(logits(load_adapter(llama(), tmp_path / f"again{i}")), want)
    if not peft:
        with pytest.raises(ValueError, match="not the one that the adapter was trained on"):
            load_adapter(offloaded(llama(seed=1)), tmp_path / "one")


def test_a_model_of_shapes_alone(llama, tmp_path):
    """On the meta device an adapter has shapes and no values; putting some there would lose them."""
    save_adapter(inject(llama(), ["q_proj"], rank=2, seed=0), tmp_path)
    meta = llama().to("meta")
    with pytest.raises(ValueError, match="on the meta device, where values are lost"):
        load_adapter(meta, tmp_path)
    assert not lora_modules(meta)
    inject(meta, ["q_proj"], rank=2)
    out = meta(input_ids=IDS.to("meta")).logits
    assert out.is_meta and out.shape == (1, 10, 50)
    with pytest.raises(ValueError, match="meta"):
        merge(meta)
    with pytest.raises(ValueError, match="meta"):
        save_adapter(meta, tmp_path / "b")


# --- frozen weights that are not the base's --------------------------------------------------------

def classifier(seed, folder):
    torch.manual_seed(seed)
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder,
                                                                           num_labels=3).eval()


def test_a_frozen_new_head_is_noticed_by_check_and_at_load(tmp_path):
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 4}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(tmp_path / "base")
    model = randomize(inject(classifier(1, tmp_path / "base"), ["query", "value"], rank=2, seed=0))
    assert [(f.code, f.where) for f in check(model)] == [("new head", ("classifier",))]
    save_adapter(model, tmp_path / "a")
    other = classifier(2, tmp_path / "base")
    with pytest.raises(ValueError, match="classifier: the weight is neither in the file nor"):
        load_adapter(other, tmp_path / "a")
    assert not lora_modules(other)
    load_adapter(other, tmp_path / "a", check_base=False)

    model = inject(classifier(1, tmp_path / "base"), ["query", "value"], rank=2, seed=0,
                   modules_to_save=["classifier"])
    assert not check(model)
    save_adapter(model, tmp_path / "b")
    again = load_adapter(classifier(2, tmp_path / "base"), tmp_path / "b")
    torch.testing.assert_close(logits(again), logits(model))


def test_a_trained_head_is_no_new_one(llama):
    config = transformers.BertConfig(vocab_size=50, hidden_size=32, intermediate_size=24,
                                     num_hidden_layers=1, num_attention_heads=4, num_labels=3)
    model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.bias += 0.01
    assert not check(inject(model, ["query"], rank=2))
    assert not check(inject(llama(), ["q_proj"], rank=2))


@pytest.mark.parametrize("tied", [False, True])
def test_rows_for_new_tokens(llama, tmp_path, tied):
    """Resized and not saved: refused. Saved by PEFT, as it does when it sees them: read."""
    from peft import LoraConfig, get_peft_model

    def resized(seed):
        model = llama(tied)
        torch.manual_seed(seed)
        model.resize_token_embeddings(52)
        with torch.no_grad():                    # the library's own new rows are the old ones' mean
            for module in (model.get_input_embeddings(), model.get_output_embeddings()):
                module.weight[50:].normal_()
        return model

    model = randomize(inject(resized(1), ["q_proj"], rank=2, seed=0))
    save_adapter(model, tmp_path / "ours")
    with pytest.raises(ValueError, match="embed_tokens: the weight is neither in the file"):
        load_adapter(resized(2), tmp_path / "ours")
    with pytest.raises(ValueError, match="neither in the file nor the one"):
        load_adapter(llama(tied), tmp_path / "ours")

    theirs = get_peft_model(resized(1), LoraConfig(r=2, target_modules=["q_proj"],
                                                   init_lora_weights=False)).eval()
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    again = load_adapter(resized(2), tmp_path / "theirs")
    torch.testing.assert_close(logits(again), logits(theirs))
    torch.testing.assert_close(logits(remove(again)), logits(resized(2)))
    with pytest.raises(ValueError, match=r"has shape \(52, 16\) in the file.*resize_token_embeddings"):
        load_adapter(llama(tied), tmp_path / "theirs")


# --- what PEFT accepts ---------------------------------------------------------------------------

def test_an_adapted_head_with_its_copy_of_the_base(llama, tmp_path):
    from peft import LoraConfig, get_peft_model
    theirs = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"],
                                                init_lora_weights=False)).eval()
    theirs.save_pretrained(tmp_path)
    assert any("base_layer" in key for key in load_file(tmp_path / WEIGHTS))
    torch.testing.assert_close(logits(load_adapter(llama(), tmp_path)), logits(theirs))
    with pytest.raises(ValueError, match="lm_head: the weight is not the one in the file"):
        load_adapter(llama(seed=1), tmp_path)


def test_a_rank_above_a_layers_size(tmp_path):
    from peft import LoraConfig, get_peft_model

    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))

    theirs = get_peft_model(base(), LoraConfig(r=4, target_modules=["0", "1"],
                                               init_lora_weights=False)).eval()
    theirs.save_pretrained(tmp_path)
    x, ours = torch.randn(3, 8), load_adapter(base(), tmp_path)
    torch.testing.assert_close(ours(x), theirs(x))
    save_adapter(ours, tmp_path / "again")
    torch.testing.assert_close(load_adapter(base(), tmp_path / "again")(x), theirs(x))
    torch.testing.assert_close(merge(ours)(x), theirs(x))
    with pytest.warns(UserWarning, match="leaves out 1: rank must be between 1 and .* = 1, got 4"):
        assert [*lora_modules(inject(base(), "all-linear", rank=4))] == ["0"]
    with pytest.raises(ValueError, match="1: rank must be between"):
        inject(base(), ["0", "1"], rank=4)


def test_all_linear_leaves_out_what_cannot_be_adapted():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8),
                           "attention": nn.MultiheadAttention(8, 2)})
    model["c"].weight = model["b"].weight
    with pytest.warns(UserWarning, match=r"leaves out b, c and 1 more: b shares its weight"):
        inject(model, "all-linear", rank=2)
    assert [*lora_modules(model)] == ["a"]


def test_modules_left_out_by_name():
    model = inject(Net(), "all-linear", rank=2, exclude_modules=["head", "block.2"])
    assert [*lora_modules(model)] == ["block.0"]
    model = inject(Net(), ["0", "2"], rank=2, exclude_modules=r".*\.2")
    assert [*lora_modules(model)] == ["block.0"]
    with pytest.raises(ValueError, match="exclude_modules: nothing in the model is called 'x'"):
        inject(Net(), ["0"], rank=2, exclude_modules=["x"])
    with pytest.raises(ValueError, match=r"exclude_modules=\['block'\] leaves out"):
        inject(Net(), ["0"], rank=2, exclude_modules=["block"])


class Twice(nn.Module):
    """One block at two places, and one layer under two names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(8, 8))
        self.second, self.one = self.first, nn.Linear(8, 8)
        self.other = nn.ModuleList([self.one])

    def forward(self, x):
        return self.other[0](torch.tanh(self.second(torch.tanh(self.one(self.first(x))))))


def test_shared_blocks_and_layers(tmp_path):
    model, x = randomize(inject(Twice(), "all-linear", rank=2, seed=0)), torch.randn(3, 8)
    assert model.other[0] is model.one and isinstance(model.second[0], LoRALinear)
    assert [*lora_modules(model)] == ["first.0", "one"]
    expected = model(x)
    save_adapter(model, tmp_path)
    again = load_adapter(Twice(), tmp_path)
    torch.testing.assert_close(again(x), expected)
    torch.testing.assert_close(merge(model)(x), expected, rtol=1e-4, atol=1e-4)
    assert model.other[0] is model.one and type(model.one) is nn.Linear
    torch.testing.assert_close(remove(again)(x), Twice()(x))


def test_a_setting_that_nobody_here_knows(tmp_path):
    save_adapter(inject(Net(), ["0"], rank=2), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    for value, refused in ((True, True), (None, False), (False, False), ({}, False), (2, True)):
        (tmp_path / CONFIG).write_text(json.dumps(config | {"use_new_thing": value}))
        if refused:
            with pytest.raises(ValueError, match=f"use_new_thing = {value} is not known here"):
                load_adapter(Net(), tmp_path)
        else:
            load_adapter(Net(), tmp_path)


# --- readers that take one scaling ------------------------------------------------------------------

def uneven():
    torch.manual_seed(0)
    model = nn.ModuleDict({n: nn.Linear(16, 16) for n in "abc"})
    inject(model, ["a", "c"], rank=4, alpha=8, seed=0)
    return randomize(inject(model, ["b"], rank=8, alpha=8, seed=0))


def servers(folder, name):
    """B A as vLLM and as llama.cpp scale it."""
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    A, B = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    return [config["lora_alpha"] / r * B @ A for r in (config["r"], len(A))]


def test_differing_scalings_are_told_or_folded(tmp_path):
    from peft import PeftModel
    model = uneven()
    with pytest.warns(UserWarning, match="one_scaling=True"):
        save_adapter(model, tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path / "b", one_scaling=True)
    differ = 0
    for name, layer in lora_modules(model).items():
        delta = layer.delta_weight()
        differ += sum(not torch.allclose(d, delta) for d in servers(tmp_path / "a", name))
        for read in servers(tmp_path / "b", name):
            torch.testing.assert_close(read, delta, rtol=1e-4, atol=1e-5)
    assert differ
    config = json.loads((tmp_path / "b" / CONFIG).read_text())
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    plain = lambda: nn.Sequential(*remove(uneven()).values())
    rename = lambda f: save_file({k.replace("model.a", "model.0").replace("model.b", "model.1")
                                  .replace("model.c", "model.2"): t for k, t in
                                  load_file(f / WEIGHTS).items()}, f / WEIGHTS)
    rename(tmp_path / "b")
    (tmp_path / "b" / CONFIG).write_text(json.dumps(config | {"target_modules": ["0", "1", "2"]}))
    x = torch.randn(3, 16)
    expected = model["c"](model["b"](model["a"](x)))
    theirs = PeftModel.from_pretrained(plain(), tmp_path / "b").eval()
    for again in (load_adapter(plain(), tmp_path / "b"), theirs):
        torch.testing.assert_close(again(x), expected, rtol=1e-4, atol=1e-4)


def test_rank_stabilized_scalings_are_folded(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)})
    randomize(inject(model, "all-linear", rank=4, alpha=8, use_rslora=True, seed=0))
    save_adapter(model, tmp_path, one_scaling=True)
    for name, layer in lora_modules(model).items():
        for read in servers(tmp_path, name):
            torch.testing.assert_close(read, layer.delta_weight(), rtol=1e-4, atol=1e-5)


# --- the rest ---------------------------------------------------------------------------------

def test_unusual_names(tmp_path):
    from peft import PeftModel

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            names = ("c++", "c", "java (8)", "lora_A", "d|e", "[x")
            self.heads = nn.ModuleDict({name: nn.Linear(8, 8) for name in names})

        def forward(self, x):
            return sum(head(x) for head in self.heads.values())

    model = inject(Heads(), ["c", "lora_A", "d|e", "[x"], rank=2, seed=0)
    inject(model, ["heads.c++"], rank=3, seed=0)
    randomize(inject(model, ["heads.java (8)"], rank=4, alpha=5, seed=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_adapter(model, tmp_path)
    x = torch.randn(2, 8)
    for again in (load_adapter(Heads(), tmp_path), PeftModel.from_pretrained(Heads(), tmp_path)):
        torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-4)


def test_models_that_look_at_a_quantized_layers_weight():
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2,
                                   num_heads=4, decoder_start_token_id=0)
    torch.manual_seed(0)
    model = quantize(transformers.T5ForConditionalGeneration(config).eval())
    before = model(input_ids=IDS, decoder_input_ids=IDS).logits
    randomize(inject(model, ["q", "wo"], rank=2, seed=0))
    assert not torch.allclose(model(input_ids=IDS, decoder_input_ids=IDS).logits, before)


def experts(n):
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj, self.down_proj = (nn.Linear(2, 2, bias=False) for _ in range(2))
    torch.manual_seed(0)
    model = nn.Module()
    model.experts = nn.ModuleList([Expert() for _ in range(n // 2)])
    return model


def test_the_work_grows_with_the_number_of_layers(tmp_path):
    """In calls of Python's functions, which no busy machine changes: four times the layers take
    four times as many."""
    def calls(n):
        count = 0

        def seen(frame, event, arg):
            nonlocal count
            count += event in ("call", "c_call")

        base, fresh = experts(n), experts(n)
        sys.setprofile(seen)
        try:
            model = inject(base, ["up_proj", "down_proj"], rank=1, seed=0)
            save_adapter(model, tmp_path / str(n))
            load_adapter(fresh, tmp_path / str(n))
            remove(fresh)
        finally:
            sys.setprofile(None)
        return count

    assert calls(400) / calls(100) < 4.4


def test_every_label_of_a_batch_masked_is_said_so():
    x, y = torch.randn(8, 8), torch.full((8,), -100)
    y[::2] = 1
    model = inject(Net(), ["head"], rank=2)
    with pytest.raises(ValueError, match="every label in the batch of step .* is -100"):
        fine_tune(model, (x, y), steps=30, batch_size=1, progress=False)


def test_a_configuration_in_utf_8(tmp_path):
    model = nn.ModuleDict({"größe": nn.Linear(4, 4)})
    save_adapter(inject(model, ["größe"], rank=2), tmp_path, base_model_name_or_path="é/模型")
    raw = (tmp_path / CONFIG).read_text("utf-8")
    (tmp_path / CONFIG).write_bytes(json.dumps(json.loads(raw), ensure_ascii=False).encode())
    code = ("import sys, torch; from torch import nn; from lora_lib.torch import load_adapter\n"
            "load_adapter(nn.ModuleDict({'gr\\xf6\\xdfe': nn.Linear(4, 4)}), sys.argv[1],"
            " check_base=False)")
    plain = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, tmp_path], env=plain, check=True)


@pytest.mark.filterwarnings("ignore:.*jit", "ignore:Converting a tensor")
def test_traced():
    model, x = randomize(inject(Net(), "all-linear", rank=2, seed=0)).eval(), torch.randn(3, 8)
    traced = torch.jit.trace(model, x)
    other = torch.randn(5, 8)
    torch.testing.assert_close(traced(other), model(other), rtol=1e-4, atol=1e-4)
