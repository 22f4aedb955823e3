"""`lora_bias`, a bias of B: beside PEFT's, in both directions."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_lib.torch import (Adapters, LoRALinear, check, inject, load_adapter, lora_modules,
                            lora_parameters, merge, quantize, remove, save_adapter, save_gguf,
                            shared_input, unmerge)
from lora_lib.torch.peft_format import WEIGHTS
from tests.torch.conftest import randomize

peft = pytest.importorskip("peft")
ignored = pytest.mark.filterwarnings("ignore:.*lora_bias=True", "ignore:.*have invalid shape",
                                     "ignore:the layers differ")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.up, self.down, self.bare = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 4, False)

    def forward(self, x):
        return self.bare(self.down(torch.tanh(self.up(x))))


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(7))
LAYERS = ["up", "down"]


def ours(targets=LAYERS, base=None, **options):
    return randomize(inject(base or Net(), targets, rank=2, alpha=3, seed=0, lora_bias=True,
                            **options)).eval()


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@ignored
@pytest.mark.parametrize("targets", [LAYERS, ["up", "bare"]], ids=str)
@pytest.mark.parametrize("rslora", [False, True])
def test_both_ways_with_peft(targets, rslora, tmp_path):
    model = ours(targets, use_rslora=rslora)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours", is_trainable=True)
    close(theirs.eval()(X), model(X))
    close(load_adapter(Net(), tmp_path / "ours")(X), model(X))

    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "theirs")
    keys = load_file(tmp_path / "theirs" / WEIGHTS).keys()
    assert keys == load_file(tmp_path / "ours" / WEIGHTS).keys()
    assert f"base_model.model.{targets[0]}.lora_B.bias" in keys
    again = load_adapter(Net(), tmp_path / "theirs")
    close(again(X), theirs(X))
    for each in (theirs, again):                       # and the gradients
        each(X).square().sum().backward()
    for name, layer in lora_modules(again).items():
        B = theirs.get_submodule(f"base_model.model.{name}.lora_B.default")
        close(layer.B_bias.grad, B.bias.grad)
        close(layer.B.grad, B.weight.grad)


def test_the_closed_form_and_what_is_trained():
    layer = randomize(LoRALinear(nn.Linear(6, 4), 2, 3.0, lora_bias=True, seed=0))
    W, b, s = layer.linear.weight, layer.linear.bias, 1.5
    expected = X @ W.T + b + s * (X @ layer.A.T @ layer.B.T + layer.B_bias)
    close(layer(X), expected)
    close(X @ layer.weight.T + layer.bias, expected)             # for whoever reads them
    assert shared_input(X, layer, layer)[0].equal(layer(X))
    assert layer.num_parameters() == sum(p.numel() for p in lora_parameters(layer)) == 2 * 10 + 4
    fresh = LoRALinear(nn.Linear(6, 4), 2, lora_bias=True)
    assert torch.equal(fresh(X), fresh.linear(X)) and not fresh.B_bias.any()
    half = LoRALinear(nn.Linear(6, 4, dtype=torch.bfloat16), 2, lora_bias=True)
    assert half.B_bias.dtype == torch.float32 and half(X.bfloat16()).dtype == torch.bfloat16


def test_merge_unmerge_remove():
    model, expected = ours(), ours()(X)
    merge(model, keep_adapters=True)
    close(model(X), expected)
    assert [f.code for f in check(model, base=Net())] == ["merged"]
    close(model.up.bias, model.up.linear.bias)
    unmerge(model)
    close(model(X), expected)
    assert not check(model, base=Net())
    close(remove(model)(X), Net()(X))
    close(merge(ours())(X), expected)
    with torch.no_grad():
        model = merge(ours(), keep_adapters=True)
        model.up.linear.bias.add_(1)
    assert {f.code: f.where for f in check(model, base=Net())}["base changed"] == ("up.linear.bias",)


def test_a_layer_without_a_bias_is_not_merged(unchanged):
    model = ours(["up", "bare"])
    with unchanged(model), pytest.raises(ValueError, match="bare: the adapter has a bias"):
        merge(model)
    with torch.no_grad():
        model = ours()
        model.down.B_bias[1] = float("inf")
    with unchanged(model), pytest.raises(ValueError, match="down: the bias and scaling . B_bias"):
        merge(model)


def test_a_quantized_base():
    base = quantize(nn.Sequential(nn.Linear(64, 64)), ["0"])
    x, model = torch.randn(3, 64), ours(["0"], base)
    close(model(x), model[0].linear(x) + 1.5 * (x @ model[0].A.T @ model[0].B.T + model[0].B_bias))
    expected, bias = model(x), model[0].bias.clone()
    merged = merge(model)
    close(merged[0].bias, bias)
    assert (merged(x) - expected).norm() < 0.2 * expected.norm()


def test_several_on_one_base(tmp_path):
    base = Net()
    adapters = Adapters(base)
    adapters.add("a", LAYERS, 2, lora_bias=True)
    adapters.add("b", ["up"], 2)
    for seed, name in enumerate("ab"):
        adapters.activate(name)
        randomize(base, seed)
    outputs = {}
    for name in "ab":
        adapters.activate(name)
        outputs[name] = base(X)
    adapters.activate({"a": 0.5, "b": 2.0})
    expected = base(X)
    up = [adapters.layers(name)["up"] for name in "ab"]
    bias = Net().up.bias + 0.5 * up[0].scaling * up[0].B_bias
    close(base.up.bias, bias)
    adapters.merge({"a": 0.5, "b": 2.0})
    close(base(X), expected)
    adapters.activate("a")
    assert torch.equal(base(X), outputs["a"])
    adapters.save("a", tmp_path)
    close(load_adapter(Net(), tmp_path)(X), outputs["a"])


@ignored
def test_folded_to_one_scaling(tmp_path):
    from lora_lib.torch.inject import inject_each
    model = randomize(inject_each(Net(), {"up": (2, 3.0), "down": (1, 5.0)}, lora_bias=True))
    save_adapter(model, tmp_path, one_scaling=True)
    close(peft.PeftModel.from_pretrained(Net(), tmp_path)(X), model(X))


def test_what_cannot_be_is_refused(llama, tmp_path, unchanged):
    with pytest.raises(ValueError, match="up.weight: a parameter's adapter has no bias"):
        inject(Net(), [], 2, target_parameters=["up.weight"], lora_bias=True)
    assert inject(Net(), [], 2, target_parameters=["up.weight"], lora_bias=False)
    mixed = inject(ours(["up"]), ["down"], rank=2)
    with pytest.raises(ValueError, match="one lora_bias for all adapters"):
        save_adapter(mixed, tmp_path)
    save_adapter(ours(), tmp_path)
    model = inject(Net(), LAYERS, rank=2, alpha=3)
    with unchanged(model), pytest.raises(ValueError, match="lora_bias=False, the file True"):
        load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="no place for a bias of B"):
        pytest.importorskip("gguf")
        save_gguf(randomize(inject(llama(), ["q_proj"], rank=2, lora_bias=True)), tmp_path / "a")


@pytest.mark.parametrize("change, words", [
    (lambda t, c: t.pop("base_model.model.up.lora_B.bias"), "up has no lora_B.bias"),
    (lambda t, c: c.update(lora_bias=False), "has a lora_B.bias, expected none"),
    (lambda t, c: t.update({"base_model.model.up.lora_B.bias": torch.zeros(7)}),
     r"B's bias \(7,\), \(8,\)"),
    (lambda t, c: t.update({"base_model.model.up.lora_A.bias": torch.zeros(2)}),
     "lora_A.bias .* is not the A or B"),
    (lambda t, c: t.update({"base_model.model.up.lora_B.bias": torch.full((8,), torch.nan)}),
     "holds NaN"),
])
def test_a_file_that_does_not_fit_is_refused(change, words, tmp_path, unchanged):
    import json

    from safetensors.torch import save_file
    save_adapter(ours(), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = Net()
    with unchanged(model), pytest.raises(ValueError, match=words):
        load_adapter(model, tmp_path)
