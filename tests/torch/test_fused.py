"""The fast layer against the formula, in values, gradients, and what is kept for backward."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lora_lib.torch import LoRALinear, inject, load_pretrained, merge, quantize, shared_input
from lora_lib.torch import fused
from lora_lib.torch.fused import lora_linear, lora_linears

SHAPES = [(6,), (5, 6), (2, 3, 6), (0, 6), (2, 0, 6)]


def randn(*shape, dtype=torch.float64, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parts(k=6, d=5, rank=2, bias=True, dtype=torch.float64, wide=torch.float64, seed=0,
          scaling=1.5):
    """W, bias, A, B, scaling, of which A and B are trained."""
    W, b, A, B = (randn(*shape, dtype=dtype, seed=seed + i)
                  for i, shape in enumerate([(d, k), (d,), (rank, k), (d, rank)]))
    return (W, b if bias else None, A.to(wide).requires_grad_(), B.to(wide).requires_grad_(),
            scaling)


def formula(x, W, bias, A, B, scaling):
    return F.linear(x, W, bias) + scaling * F.linear(F.linear(x, A), B)


def gradients(function, x, *layers):
    """Outputs and gradients for x and every A and B, with one random gradient for each output."""
    x = x.detach().requires_grad_()
    outs = function(x)
    outs = outs if isinstance(outs, tuple) else (outs,)
    torch.autograd.backward(outs, [randn(*y.shape, dtype=y.dtype, seed=70 + i)
                                   for i, y in enumerate(outs)])
    found = [x.grad] + [t.grad for _, _, A, B, _ in layers for t in (A, B)]
    for t in (t for layer in layers for t in layer[2:4]):
        t.grad = None
    return [*outs, *found]


def three(**options):
    return [parts(d=d, rank=rank, bias=bias, seed=10 * i, **options)
            for i, (d, rank, bias) in enumerate([(5, 2, True), (7, 3, False), (4, 1, True)])]


def close(ours, expected, tolerance=1e-12):
    assert len(ours) == len(expected)
    for one, other in zip(ours, expected):
        assert one.dtype == other.dtype and one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestTheFormula:
    def test_one(self, shape, bias):
        layer, x = parts(bias=bias), randn(*shape)
        close(gradients(lambda x: lora_linear(x, *layer), x, layer),
              gradients(lambda x: formula(x, *layer), x, layer))
        with torch.no_grad():
            close([lora_linear(x, *layer)], [formula(x, *layer)])

    def test_several_of_one_input(self, shape, bias):
        layers, x = three(), randn(*shape)
        close(gradients(lambda x: lora_linears(x, layers), x, *layers),
              gradients(lambda x: tuple(formula(x, *layer) for layer in layers), x, *layers))
        with torch.no_grad():
            close(lora_linears(x, layers), [formula(x, *layer) for layer in layers])


def test_several_scalings():
    layers, x = [parts(seed=i, scaling=1 + i) for i in range(3)], randn(4, 6)
    close(gradients(lambda x: lora_linears(x, layers), x, *layers),
          gradients(lambda x: tuple(formula(x, *layer) for layer in layers), x, *layers))


def test_strided_arguments():
    W, b, A, B, s = parts()
    strided = (W.T.contiguous().T, b, A, B, s)
    for x in (randn(6, 10).T[::2], randn(3, 4, 6).transpose(0, 1), randn(1, 6).expand(4, 6)):
        for layers in ([strided], [strided, parts(seed=7)]):
            close(gradients(lambda x: lora_linears(x, layers), x, *layers),
                  gradients(lambda x: tuple(formula(x, *layer) for layer in layers), x, *layers))


@pytest.mark.parametrize("frozen", ["x", "A", "B"])
@pytest.mark.parametrize("count", [1, 3])
def test_what_needs_no_gradient_gets_none(frozen, count):
    layers, x = three()[:count], randn(4, 6).requires_grad_(frozen != "x")
    for layer in layers:
        for name, t in zip("AB", layer[2:4]):
            t.requires_grad_(frozen != name)
    function = lora_linears if count > 1 else lambda x, layers: (lora_linear(x, *layers[0]),)
    sum(y.square().sum() for y in function(x, layers)).backward()
    found = [x.grad] + [t.grad for layer in layers for t in layer[2:4]]
    expected = copy.deepcopy([None if g is None else g.clone() for g in found])
    for t in [x] + [t for layer in layers for t in layer[2:4]]:
        t.grad = None
    sum(formula(x, *layer).square().sum() for layer in layers).backward()
    for g, t in zip(expected, [x] + [t for layer in layers for t in layer[2:4]]):
        assert (g is None) == (t.grad is None) == (not t.requires_grad)
        if g is not None:
            torch.testing.assert_close(g, t.grad)


@pytest.mark.parametrize("count", [1, 3])
def test_derivatives_of_the_gradient(count):
    layers, x = three()[:count], randn(3, 6).requires_grad_()
    inputs = [x] + [t for layer in layers for t in layer[2:4]]

    def function(x, *trained):
        new = [(W, b, *trained[2 * i:2 * i + 2], s) for i, (W, b, _, _, s) in enumerate(layers)]
        return lora_linears(x, new) if count > 1 else lora_linear(x, *new[0])

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


class TestMixedPrecision:
    @pytest.mark.parametrize("dtype, eps", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
    @pytest.mark.parametrize("count", [1, 3])
    def test_wide_adapters_beside_a_narrow_base(self, dtype, eps, count):
        layers = three(dtype=dtype, wide=torch.float32)[:count]
        x = randn(40, 6, dtype=dtype)
        exact = [tuple(t.detach().double().requires_grad_(t.requires_grad)
                       if isinstance(t, torch.Tensor) else t for t in layer) for layer in layers]
        ours = gradients(lambda x: lora_linears(x, layers), x, *layers)
        reference = gradients(lambda x: tuple(formula(x, *l) for l in exact), x.double(), *exact)
        assert [t.dtype for t in ours] == [dtype] * (count + 1) + [torch.float32] * 2 * count
        for one, other in zip(ours, reference):
            assert (one - other).norm() < 4 * eps * other.norm()

    @pytest.mark.parametrize("share, factor", [(0.05, 1), (0.3, 1), (2, 2)])
    def test_as_accurate_as_peft(self, share, factor):
        """In bfloat16, against float64: the output and the input's gradient, for an update of a
        share of the layer's output. PEFT computes the update in float32 and rounds twice, the
        output without it and with it; we round the update's parts and the output once."""
        from peft import LoraConfig, get_peft_model
        torch.manual_seed(0)
        errors = {"ours": 0, "peft": 0}
        for _ in range(3):
            linear = nn.Linear(512, 384, bias=False, dtype=torch.bfloat16)
            W, A, B = linear.weight.detach().double(), torch.randn(8, 512), torch.randn(384, 8)
            B *= share * W.norm() / (2 * B @ A).norm()
            layer = LoRALinear(copy.deepcopy(linear), 8, 16)
            peft = get_peft_model(nn.Sequential(copy.deepcopy(linear)), LoraConfig(
                r=8, lora_alpha=16, target_modules=["0"]))
            theirs = peft.base_model.model[0]
            for module, own in ((theirs.lora_A.default, A), (theirs.lora_B.default, B)):
                assert module.weight.dtype == torch.float32
                module.weight.data.copy_(own)
            layer.A.data.copy_(A), layer.B.data.copy_(B)
            x, g = (torch.randn(128, n).bfloat16() for n in (512, 384))
            exact = x.double().requires_grad_()
            y = formula(exact, W, None, A.double(), B.double(), 2)
            y.backward(g.double())
            for name, module in (("ours", layer), ("peft", peft)):
                x.grad = None
                out = module(x.requires_grad_())
                out.backward(g)
                errors[name] += torch.stack([(one - other).norm() / other.norm() for one, other in
                                             ((out, y), (x.grad, exact.grad))]).detach()
        assert (errors["ours"] <= factor * errors["peft"]).all(), errors
        assert (errors["peft"] < 3 * 2**-8).all()

    @pytest.mark.parametrize("count", [1, 3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_autocast_does_what_it_does_to_the_formula(self, dtype, count):
        layers, x = three(dtype=dtype, wide=dtype)[:count], randn(30, 6, dtype=dtype)

        def cast(function):
            def run(x):
                with torch.autocast("cpu", torch.bfloat16):
                    return function(x)
            return run

        ours = gradients(cast(lambda x: lora_linears(x, layers)), x, *layers)
        expected = gradients(cast(lambda x: tuple(formula(x, *l) for l in layers)), x, *layers)
        assert [t.dtype for t in ours] == [t.dtype for t in expected]
        assert ours[0].dtype == (torch.bfloat16 if dtype == torch.float32 else dtype)
        for one, other in zip(ours, expected):
            assert (one - other).norm() < 0.02 * other.norm()


def kept(function, x, *parameters):
    """The bytes that autograd keeps beside the parameters, and whether x is among them."""
    saved = {}
    pack = lambda t: saved.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()})
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (pack(t), t)[1], lambda t: t):
        out = function(x)                        # alive: a freed tensor's address is used again
    for t in parameters:
        saved.pop(t.untyped_storage().data_ptr(), None)
    return sum(saved.values()), x.untyped_storage().data_ptr() in saved, out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3])
def test_only_x_and_its_projection_are_kept(dtype, count):
    layers = three(dtype=dtype, wide=torch.float32)[:count]
    x = randn(40, 6, dtype=dtype).requires_grad_()
    tensors = [t for layer in layers for t in layer[:4] if t is not None]
    size, has_x, _ = kept(lambda x: lora_linears(x, layers), x, *tensors)
    assert has_x and size == x.nbytes + 40 * sum(len(layer[2]) for layer in layers) * x.itemsize


class Calls:
    """Counts the calls of the fused functions."""

    def __init__(self, monkeypatch):
        self.count = 0
        for name in ("lora_linear", "lora_linears"):
            function = getattr(fused, name)
            monkeypatch.setattr(f"lora_lib.torch.lora.{name}", self.counting(function))

    def counting(self, function):
        def call(*arguments):
            self.count += 1
            return function(*arguments)
        return call


def layer_of(linear=None, **options):
    layer = LoRALinear(linear or nn.Linear(6, 5).double(), 2, 3, seed=0, **options)
    with torch.no_grad():
        layer.B.copy_(randn(5, 2))
    return layer


def halve(y):
    y /= 2
    return y


def zero_the_first(y):
    y[..., 0] = 0
    return y


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 4, 6), (2, 3, 4, 6), (0, 6), (2, 0, 6)],
                         ids=str)
@pytest.mark.parametrize("after", [nn.ReLU(inplace=True), halve, zero_the_first])
@pytest.mark.parametrize("bias", [False, True])
def test_what_follows_may_work_in_place(shape, after, bias):
    """Wav2Vec2, Longformer: an output is no view, whatever the shape."""
    layers, x = [parts(bias=bias), parts(d=3, seed=5, bias=bias)], randn(*shape)
    together = lambda f: lambda x: tuple(after(f(x, *layer)) for layer in layers)
    expected = gradients(together(formula), x, *layers)
    close(gradients(together(lora_linear), x, *layers), expected)
    close(gradients(lambda x: tuple(map(after, lora_linears(x, layers))), x, *layers), expected)


class TestStepsAside:
    """The formula runs wherever leaving out the base layer's own forward would be noticed."""

    @pytest.mark.parametrize("prepare", [
        lambda layer: layer.linear.register_forward_hook(lambda *_: None),
        lambda layer: layer.linear.register_forward_pre_hook(lambda *_: None),
        lambda layer: layer.linear.register_full_backward_hook(lambda *_: None),
        lambda layer: layer.linear.weight.requires_grad_(),
        lambda layer: layer.linear.bias.requires_grad_(),
        lambda layer: setattr(layer.linear, "forward", layer.linear.forward),
    ], ids=["hook", "pre-hook", "backward hook", "weight", "bias", "forward"])
    def test_for_what_was_done_to_the_base(self, monkeypatch, prepare):
        calls, layer, x = Calls(monkeypatch), layer_of(), randn(4, 6)
        fast = layer(x)
        assert calls.count == 1
        prepare(layer)
        torch.testing.assert_close(layer(x), fast)
        assert calls.count == 1

    def test_for_dropout_while_training(self, monkeypatch):
        calls, layer, x = Calls(monkeypatch), layer_of(dropout=0.5), randn(4, 6)
        layer(x)
        assert calls.count == 0
        layer.eval()(x)
        assert calls.count == 1

    def test_for_quantized_weights_and_not_for_conv1d(self, monkeypatch):
        calls = Calls(monkeypatch)
        quantized = quantize(nn.Sequential(nn.Linear(64, 64)), "all-linear")[0]
        LoRALinear(quantized, 2, seed=0)(randn(4, 64, dtype=torch.float32))
        assert calls.count == 0
        layer, x = layer_of(Conv1D(5, 6).double()), randn(2, 4, 6)
        torch.testing.assert_close(layer(x), formula(x, layer.linear.weight.T, layer.bias, layer.A,
                                                     layer.B, layer.scaling))
        assert calls.count == 1

    def test_for_transforms_of_torch_func(self, monkeypatch):
        calls, layer, x = Calls(monkeypatch), layer_of(), randn(4, 6)
        jacobian = torch.func.jacrev(layer)(x[0])
        torch.testing.assert_close(jacobian, layer.linear.weight + layer.delta_weight())
        torch.testing.assert_close(torch.func.vmap(layer)(x), layer.eval()(x))
        _, tangent = torch.func.jvp(layer, (x[0],), (x[1],))
        torch.testing.assert_close(tangent, jacobian @ x[1])
        assert calls.count == 1                  # vmap's right answer

    def test_for_the_compiler(self, monkeypatch):
        calls, layer, x = Calls(monkeypatch), layer_of(), randn(4, 6)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x))
        assert calls.count == 1


class TestSharedInput:
    def modules(self):
        return [layer_of(), nn.Linear(6, 4).double(), layer_of(), layer_of()]

    def test_gives_what_each_gives(self, monkeypatch):
        calls, modules, x = Calls(monkeypatch), self.modules(), randn(2, 4, 6)
        outs = shared_input(x, *modules)
        assert calls.count == 1 and isinstance(outs, tuple)
        close(outs, [m(x) for m in modules])

    @pytest.mark.parametrize("prepare", [
        lambda layer: layer.merge(),
        lambda layer: layer.register_forward_hook(lambda m, args, out: out + 1),
        lambda layer: layer.linear.register_forward_hook(lambda m, args, out: out + 1),
    ], ids=["merged", "hook", "hook on the base"])
    def test_leaves_out_what_must_be_called(self, prepare):
        modules, x = self.modules(), randn(4, 6)
        prepare(modules[2])
        close(shared_input(x, *modules), [m(x) for m in modules])

    def test_of_none_that_is_adapted(self, monkeypatch):
        calls, linear, x = Calls(monkeypatch), nn.Linear(6, 5).double(), randn(4, 6)
        assert torch.equal(shared_input(x, linear)[0], linear(x)) and calls.count == 0


@pytest.mark.parametrize("target", [["q_proj", "v_proj"], "all-linear"])
def test_the_language_models_gradients_are_the_formulas(target, monkeypatch):
    model = inject(load_pretrained(dtype=torch.float64), target, seed=0)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, LoRALinear):
                layer.B.copy_(randn(*layer.B.shape) / 20)
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(3))
    trained = [p for p in model.parameters() if p.requires_grad]

    def run(forward):
        return torch.autograd.grad(forward(tokens).square().mean(), trained)

    fast = run(model)
    rerun = run(lambda tokens: checkpoint(model, tokens, use_reentrant=False))
    monkeypatch.setattr("lora_lib.torch.lora.fast_parts", lambda *_: None)
    close(fast, run(model), 1e-9)
    close(rerun, fast, 1e-12)
    merged = merge(copy.deepcopy(model))
    torch.testing.assert_close(merged(tokens), model(tokens))
