"""lora_lib.numpy, lora_lib.torch, torch.autograd, and PEFT's layer on the same numbers."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora_lib.numpy as lora_np
import lora_lib.torch as lora_pt

TYPES = {torch.float32: (np.float32, 1e-5), torch.float64: (np.float64, 1e-11)}

pytestmark = pytest.mark.usefixtures("one_thread")


@st.composite
def problems(draw):
    k, d = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    lead = draw(st.sampled_from([(), (4,), (2, 3), (2, 1, 3)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    arrays = {"W": (d, k), "b": (d,), "x": (*lead, k), "g": (*lead, d)}
    arrays = {name: rng.normal(size=shape) for name, shape in arrays.items()}
    options = {"rank": draw(st.integers(1, min(d, k))), "alpha": draw(st.floats(0.5, 8)),
               "use_rslora": draw(st.booleans())}
    arrays |= {"A": rng.normal(size=(options["rank"], k)),
               "B": rng.normal(size=(d, options["rank"]))}
    return arrays, options


def in_numpy(W, b, x, g, A, B, rank, alpha, use_rslora):
    layer = lora_np.LoRALinear(W, b, rank, alpha, use_rslora=use_rslora)
    layer.A, layer.B = A, B
    out, x_grad = layer.forward(x), layer.backward(g)
    return out, x_grad, layer.A_grad, layer.B_grad, layer.merge().weight


def linear_of(W, b):
    linear = nn.Linear(*W.T.shape, dtype=W.dtype)
    with torch.no_grad():
        linear.weight.copy_(W)
        linear.bias.copy_(b)
    return linear


def in_torch(W, b, x, g, A, B, rank, alpha, use_rslora):
    layer = lora_pt.LoRALinear(linear_of(W, b), rank, alpha, use_rslora=use_rslora)
    layer.A.data, layer.B.data = A, B
    out = layer(x.requires_grad_())
    out.backward(g)
    return out, x.grad, layer.A.grad, layer.B.grad, layer.merge().weight


def in_autograd(W, b, x, g, A, B, rank, alpha, use_rslora):
    x, A, B = (t.clone().requires_grad_() for t in (x, A, B))
    full = W + alpha / (rank**0.5 if use_rslora else rank) * B @ A
    out = x @ full.T + b
    out.backward(g)
    return out, x.grad, A.grad, B.grad, full


def in_peft(W, b, x, g, A, B, rank, alpha, use_rslora):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(nn.Sequential(linear_of(W, b)), LoraConfig(
        r=rank, lora_alpha=alpha, use_rslora=use_rslora, target_modules=["0"]))
    layer = model.base_model.model[0]
    lora_A, lora_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    lora_A.data, lora_B.data = A, B
    x = x.clone().requires_grad_()
    out = model(x)
    out.backward(g)
    grads = x.grad, lora_A.grad, lora_B.grad
    return out, *grads, model.merge_and_unload()[0].weight


@settings(max_examples=25, deadline=None, derandomize=True)
@given(problems(), st.sampled_from(list(TYPES)))
def test_output_gradients_and_merged_weight_agree(problem, dtype):
    arrays, options = problem
    numpy_dtype, tolerance = TYPES[dtype]
    arrays = {name: a.astype(numpy_dtype) for name, a in arrays.items()}
    ours = in_numpy(**arrays, **options)
    assert all(a.dtype == numpy_dtype for a in ours)
    for other in (in_torch, in_autograd, in_peft):
        tensors = {name: torch.tensor(a) for name, a in arrays.items()}
        for a, t in zip(ours, other(**tensors, **options), strict=True):
            assert t.dtype == dtype
            np.testing.assert_allclose(t.detach(), a, rtol=tolerance, atol=10 * tolerance,
                                       err_msg=other.__name__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_peft_in_half_precision(dtype):
    """The base in 16 bits, the adapters in float32; PEFT casts x up, we cast A and B down."""
    from peft import LoraConfig, get_peft_model

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 32)).to(dtype)

    theirs = get_peft_model(net(), LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"],
                                              init_lora_weights=False))
    ours = lora_pt.inject(net(), ["0", "2"], rank=4, alpha=8)
    names = dict(theirs.named_parameters())
    for name, layer in lora_pt.lora_modules(ours).items():
        for part in "AB":
            t = names[f"base_model.model.{name}.lora_{part}.default.weight"]
            assert t.dtype == getattr(layer, part).dtype == torch.float32
            getattr(layer, part).data.copy_(t)
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours(x), theirs(x), rtol=tolerance, atol=8 * tolerance)


def test_a_network_trains_alike_in_both():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 6)), rng.integers(0, 4, 64)
    network = lora_np.mlp(6, 8, 4, seed=0)
    model = nn.Sequential(linear_of(*(torch.tensor(a) for a in vars_of(network.layers[0]))),
                          nn.ReLU(),
                          linear_of(*(torch.tensor(a) for a in vars_of(network.layers[2]))))
    lora_np.inject(network, rank=3, alpha=6.0, seed=1)
    lora_pt.inject(model, "all-linear", rank=3, alpha=6.0)
    for ours, theirs in zip(network.layers[::2], model[::2]):
        theirs.A.data = torch.tensor(ours.A)
    losses = lora_np.train(network, x, y, steps=30, lr=0.01, batch_size=64)     # whole batches

    optimizer = torch.optim.Adam(lora_pt.lora_parameters(model), lr=0.01)
    for loss in losses:
        reference = nn.functional.cross_entropy(model(torch.tensor(x)), torch.tensor(y))
        assert loss == pytest.approx(reference.item(), rel=1e-9)
        optimizer.zero_grad()
        reference.backward()
        optimizer.step()
    for ours, theirs in zip(network.layers[::2], model[::2]):
        np.testing.assert_allclose(ours.B, theirs.B.detach(), rtol=1e-8, atol=1e-12)
    lora_np.merge(network)
    lora_pt.merge(model)
    for ours, theirs in zip(network.layers[::2], model[::2]):
        np.testing.assert_allclose(ours.weight, theirs.weight.detach(), rtol=1e-9, atol=1e-12)


def vars_of(layer):
    return layer.weight, layer.bias


@pytest.mark.parametrize("options", [
    {"rank": 0}, {"rank": 4}, {"rank": 1.0}, {"rank": True}, {"alpha": float("nan")},
    {"alpha": "1"}, {"init_std": -1}, {"init_std": "1"},
], ids=str)
def test_the_same_mistake_is_the_same_error(options):
    said = []
    for layer in (lora_np.LoRALayer, lora_pt.LoRALayer):
        with pytest.raises((TypeError, ValueError)) as error:
            layer(5, 3, **{"rank": 2, **options})
        said.append((error.type, str(error.value)))
    assert said[0] == said[1]


def test_the_same_names_and_arguments():
    for name in ("LoRALayer", "LoRALinear"):
        ours, theirs = (vars(getattr(m, name)) for m in (lora_np, lora_pt))
        public = {n for n in ours if not n.startswith("_")} - {"trainable", "backward"}
        assert public <= set(theirs), name                       # autograd is torch's backward
    ours, theirs = (inspect.signature(m.LoRALayer).parameters for m in (lora_np, lora_pt))
    assert set(ours) <= set(theirs)
    for name, parameter in ours.items():
        assert name == "dtype" or parameter.default == theirs[name].default, name


@pytest.mark.parametrize("k, d, rank", [(4096, 4096, 8), (6, 5, 5), (1, 1, 1)])
def test_the_same_counts(k, d, rank):
    ours, theirs = (m.LoRALayer(k, d, rank, 3.0, seed=0) for m in (lora_np, lora_pt))
    for what in ("num_parameters", "compression_ratio"):
        assert getattr(ours, what)() == getattr(theirs, what)()
    assert ours.scaling == theirs.scaling and ours.A.shape == theirs.A.shape


@pytest.mark.parametrize("module", [lora_np, lora_pt], ids=["numpy", "torch"])
def test_every_public_name_has_a_docstring(module):
    assert module.__doc__
    for name in module.__all__:
        thing = getattr(module, name)
        own = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
        assert own and len(own) > 20, name
        assert inspect.getmodule(thing).__doc__, name
