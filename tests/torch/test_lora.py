"""The torch layer against autograd's own checks, plain matrix algebra, and what it computes."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lib.torch import LoRALayer, LoRALinear

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(6,), (5, 6), (2, 3, 6), (2, 1, 3, 6), (0, 6), (2, 0, 6)]


def lora(k=6, d=5, rank=2, alpha=3.0, *, bias=True, dtype=torch.float64, seed=0, **options):
    """A LoRALinear with a B that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(k, d, bias=bias, dtype=dtype)
    with torch.no_grad():
        for p in linear.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    layer = LoRALinear(linear, rank, alpha, seed=generator, **options)
    with torch.no_grad():
        layer.B.copy_(torch.randn(layer.B.shape, generator=generator))
    return layer


def randn(*shape, dtype=torch.float64, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class TestGradients:
    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(k=st.integers(1, 5), d=st.integers(1, 5), seed=st.integers(0, 2**31 - 1), data=st.data())
    def test_gradcheck(self, k, d, seed, data):
        layer = lora(k, d, data.draw(st.integers(1, min(k, d))), data.draw(st.floats(-8, 8)),
                     seed=seed)
        lead = data.draw(st.sampled_from([(), (3,), (2, 3), (2, 1, 3)]))
        x = randn(*lead, k, seed=seed).requires_grad_()

        def function(x, A, B):
            return torch.func.functional_call(layer, {"A": A, "B": B}, (x,))

        assert torch.autograd.gradcheck(function, (x, layer.A, layer.B))

    @pytest.mark.parametrize("shape", SHAPES)
    def test_output_and_gradients_are_the_full_matrixs(self, shape):
        layer, x = lora(), randn(*shape).requires_grad_()
        g = randn(*shape[:-1], 5, seed=2)
        layer(x).backward(g)
        grads = x.grad, layer.A.grad, layer.B.grad
        A, B = (p.detach().requires_grad_() for p in (layer.A, layer.B))
        x2 = x.detach().requires_grad_()
        W = layer.linear.weight + 1.5 * B @ A                           # alpha / rank
        out = x2 @ W.T + layer.bias
        torch.testing.assert_close(layer(x), out, rtol=1e-12, atol=1e-12)
        out.backward(g)
        for ours, reference in zip(grads, (x2.grad, A.grad, B.grad)):
            torch.testing.assert_close(ours, reference, rtol=1e-11, atol=1e-11)

    def test_only_A_and_B_get_a_gradient(self):
        layer = lora()
        assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"A", "B"}
        layer(randn(3, 6)).sum().backward()
        assert layer.linear.weight.grad is None and layer.bias.grad is None

    def test_at_the_start_A_has_no_gradient_and_B_has(self):
        linear = nn.Linear(6, 5)
        layer, x = LoRALinear(linear, rank=2, seed=0), randn(3, 6, dtype=torch.float32)
        assert torch.equal(layer(x), linear(x))
        layer(x).square().sum().backward()
        assert not layer.A.grad.any() and layer.B.grad.all()


class Shapes(TorchDispatchMode):
    """Notes the shape of each tensor that an operation makes in memory of its own."""

    def __init__(self, *known):
        super().__init__()
        self.storages, self.seen = {t.untyped_storage().data_ptr() for t in known}, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.storages:
                self.seen.add(tuple(t.shape))
        return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("training", [False, True])
def test_forward_and_backward_never_form_the_full_update(dtype, lead, training):
    layer = lora(31, 29, dtype=dtype, dropout=0.1).train(training)
    x = randn(*lead, 31, dtype=dtype).requires_grad_()
    full = {(29, 31), (31, 29)}
    with Shapes(layer.linear.weight) as mode:
        layer(x).sum().backward()
    assert not full & mode.seen and (2, 31) in mode.seen        # A's gradient, for one, is seen
    with Shapes(layer.linear.weight) as mode:
        layer.delta_weight()
    assert full & mode.seen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_dtype_and_shape(dtype, shape):
    layer, x = lora(dtype=dtype), randn(*shape, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert layer.A.dtype == layer.B.dtype == layer.delta_weight().dtype == wide
    out = layer(x)
    assert out.dtype == dtype and out.shape == (*shape[:-1], 5)
    exact = lora(dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    tolerance = 60 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact(x.double()), rtol=tolerance, atol=tolerance)


def test_an_explicit_dtype_beside_another_weight():
    layer = lora(dtype=torch.float32, seed=0)
    narrow = LoRALinear(layer.linear, rank=2, dtype=torch.bfloat16)
    assert narrow.A.dtype == narrow.B.dtype == torch.bfloat16
    assert narrow(randn(3, 6, dtype=torch.float32)).dtype == torch.float32
    assert narrow.delta_weight().dtype == torch.float32


@pytest.mark.parametrize("rank", range(1, 6))
@pytest.mark.parametrize("k, d", [(6, 5), (5, 8)])
def test_every_rank(k, d, rank):
    layer, x = lora(k, d, rank, alpha=rank), randn(3, k)
    torch.testing.assert_close(layer(x), x @ (layer.linear.weight + layer.B @ layer.A).T + layer.bias)
    assert layer.num_parameters() == sum(p.numel() for p in layer.parameters() if p.requires_grad)
    assert layer.compression_ratio() == pytest.approx(k * d / (rank * (k + d)))


def test_strided_input_gives_what_a_copy_gives():
    layer = lora()
    for x in (randn(6, 10).T[::2], randn(3, 4, 6).transpose(0, 1), randn(1, 6).expand(4, 6)):
        assert not x.is_contiguous()
        torch.testing.assert_close(layer(x), layer(x.contiguous()))


class TestMemory:
    def test_wrapping_shares_the_weight_and_the_layer(self):
        linear = nn.Linear(6, 5)
        weight, bias, address = linear.weight, linear.bias, linear.weight.data_ptr()
        layer = LoRALinear(linear, rank=2)
        assert layer.linear is linear and layer.linear.weight is weight and layer.bias is bias
        layer.merge().unmerge()
        assert layer.linear.weight is weight and weight.data_ptr() == address     # merged in place
        assert (layer.in_features, layer.out_features) == (6, 5)
        assert LoRALinear(nn.Linear(6, 5, bias=False), rank=2).bias is None

    def test_deepcopy_is_independent(self):
        layer, x = lora(), randn(3, 6)
        clone, out = copy.deepcopy(layer), layer(x)
        assert torch.equal(clone(x), out) and not clone.linear.weight.requires_grad
        with torch.no_grad():
            clone.A.zero_()
        clone.merge()
        assert torch.equal(layer(x), out) and not layer.merged

    def test_state_dict_round_trip(self):
        layer, other = lora(seed=0), lora(seed=9)
        assert set(layer.state_dict()) == {"A", "B", "linear.weight", "linear.bias"}
        other.load_state_dict(layer.state_dict())
        assert torch.equal(layer(randn(3, 6)), other(randn(3, 6)))


class TestMerge:
    @pytest.mark.parametrize("dtype, tolerance", [
        (torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.2), (torch.float16, 0.02),
    ])
    def test_the_merged_layer_gives_the_same(self, dtype, tolerance):
        layer, x = lora(16, 12, 4, dtype=dtype), randn(7, 16, dtype=dtype)
        before, frozen = layer(x), layer.linear.weight.detach().clone()
        assert layer.merge() is layer and layer.merged
        assert not torch.equal(layer.linear.weight, frozen)
        torch.testing.assert_close(layer(x), before, rtol=tolerance, atol=tolerance)
        once = layer.linear.weight.detach().clone()
        assert torch.equal(layer.merge().weight, once)           # twice is once
        assert layer.unmerge() is layer and not layer.merged
        torch.testing.assert_close(layer.linear.weight, frozen, rtol=0,
                                   atol=float(16 * torch.finfo(dtype).eps))
        back = layer.linear.weight.detach().clone()
        assert torch.equal(layer.unmerge().linear.weight, back)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("narrow", [False, True])
    def test_a_16_bit_weight_is_rounded_once(self, dtype, narrow):
        layer = lora(64, 48, 8, dtype=dtype)
        if narrow:                                               # A and B in 16 bits as well
            layer.to(dtype)
        W, A, B = (t.detach().float().numpy() for t in (layer.linear.weight, layer.A, layer.B))
        product = np.float32(layer.scaling) * (B @ A)            # float32, by another library
        expected = torch.from_numpy(W + product).to(dtype)
        merged = layer.merge_weights(layer.linear.weight)
        assert merged.dtype == dtype
        different = (merged != expected).float().mean()          # sums in another order, at a tie
        assert different < 0.005
        torch.testing.assert_close(merged, expected, rtol=torch.finfo(dtype).eps, atol=0)

    def test_functional_merge_leaves_W_alone(self):
        layer, W = LoRALayer(6, 5, 2, 3.0, seed=0, dtype=torch.float64), randn(5, 6)
        nn.init.ones_(layer.B)
        kept, x = W.clone(), randn(4, 6)
        merged = layer.merge_weights(W)
        assert torch.equal(W, kept) and not merged.requires_grad
        torch.testing.assert_close(x @ merged.T, layer(x, W), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.unmerge_weights(merged), W, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("bad, where", [(float("nan"), "B"), (float("inf"), "A"),
                                            (float("nan"), "weight"), (6e4, "B")])
    def test_what_is_not_finite_is_refused(self, bad, where, unchanged):
        layer = lora(dtype=torch.float16)
        with torch.no_grad():
            (layer.linear.weight if where == "weight" else getattr(layer, where))[0, 0] = bad
        if bad == 6e4:                                           # finite, but its product overflows
            nn.init.constant_(layer.A, 4)
        with unchanged(layer), pytest.raises(ValueError, match="NaN or infinity"):
            layer.merge()

    def test_training_goes_on_after_unmerge(self):
        layer, x = lora(), randn(8, 6)
        optimizer = torch.optim.SGD([layer.A, layer.B], lr=0.01)
        layer.merge()(x).sum()
        layer.unmerge()
        frozen = layer.linear.weight.detach().clone()
        losses = []
        for _ in range(5):
            loss = layer(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]
        assert torch.equal(layer.linear.weight, frozen)


class TestDropout:
    def test_it_acts_on_the_adapters_input_while_training(self):
        layer, x = lora(dropout=1.0), randn(4, 6)
        assert layer.training
        assert torch.equal(layer(x), layer.linear(x))            # all of the update is dropped
        assert not torch.equal(layer.eval()(x), layer.linear(x))
        kept = lora(dropout=0.0)
        torch.testing.assert_close(layer(x), kept(x))

    def test_the_mean_over_many_draws_is_the_output(self):
        layer, x = lora(dropout=0.5), randn(1, 6)
        torch.manual_seed(0)
        many = layer(x.expand(20000, 6)).mean(0, keepdim=True)
        torch.testing.assert_close(many, layer.eval()(x), rtol=0.05, atol=0.1)

    def test_it_follows_the_mode_of_the_layer_it_wraps(self):
        assert not LoRALinear(nn.Linear(6, 5).eval(), rank=2, dropout=0.5).dropout.training

    def test_a_merged_layer_has_none(self):
        layer, x = lora(dropout=0.9), randn(4, 6)
        layer.merge()
        assert torch.equal(layer(x), layer(x))


class TestSeed:
    def test_an_integer_a_generator_and_the_global_one(self):
        A = LoRALayer(6, 5, 2, seed=3).A
        assert torch.equal(A, LoRALayer(6, 5, 2, seed=np.int64(3)).A)
        generator = torch.Generator().manual_seed(3)
        assert torch.equal(A, LoRALayer(6, 5, 2, seed=generator).A)
        assert not torch.equal(A, LoRALayer(6, 5, 2, seed=generator).A)
        torch.manual_seed(3)
        assert torch.equal(A, LoRALayer(6, 5, 2).A)
        assert not torch.equal(A, LoRALayer(6, 5, 2, seed=4).A)
        state = torch.get_rng_state()
        LoRALayer(6, 5, 2, seed=3)
        assert torch.equal(torch.get_rng_state(), state)         # the global one stays as it was

    def test_a_seed_means_the_same_A_in_every_dtype(self):
        A = LoRALayer(6, 5, 2, seed=3).A
        for dtype in DTYPES:
            assert torch.equal(LoRALayer(6, 5, 2, seed=3, dtype=dtype).A, A.to(dtype))

    def test_the_size_of_the_first_A(self):
        A = LoRALayer(400, 300, 300, seed=0).A
        assert A.std().item() == pytest.approx(1 / 20, rel=0.01)
        torch.testing.assert_close(LoRALayer(400, 300, 300, seed=0, init_std=0.5).A, A * 10)


class TestErrors:
    @pytest.mark.parametrize("options, error, message", [
        ({"rank": 0}, ValueError, "between 1 and .* = 5, got 0"),
        ({"rank": -1}, ValueError, "got -1"),
        ({"rank": 6}, ValueError, "between 1 and .* = 5, got 6"),
        ({"rank": 2.0}, TypeError, "integer, got 2.0"),
        ({"rank": True}, TypeError, "integer, got True"),
        ({"rank": torch.tensor(2)}, TypeError, r"integer, got tensor\(2\)"),
        ({"alpha": float("nan")}, ValueError, "finite, got nan"),
        ({"alpha": -float("inf")}, ValueError, "finite, got -inf"),
        ({"alpha": "16"}, TypeError, "number, got '16'"),
        ({"alpha": None}, TypeError, "number, got None"),
        ({"dtype": torch.int32}, TypeError, "got torch.int32"),
        ({"dtype": torch.complex64}, TypeError, "got torch.complex64"),
        ({"dtype": "float32"}, TypeError, "got 'float32'"),
        ({"dtype": np.float32}, TypeError, "got <class 'numpy.float32'>"),
        ({"init_std": -0.1}, ValueError, "got -0.1"),
        ({"init_std": "small"}, TypeError, "got 'small'"),
    ])
    def test_of_both_layers(self, options, error, message, unchanged):
        with pytest.raises(error, match=message):
            LoRALayer(6, 5, **{"rank": 2, **options})
        linear = nn.Linear(6, 5)
        with unchanged(linear), pytest.raises(error, match=message):
            LoRALinear(linear, **{"rank": 2, **options})

    @pytest.mark.parametrize("dropout, error", [
        (-0.1, ValueError), (1.5, ValueError), (float("nan"), ValueError), ("0.1", TypeError),
        (None, TypeError), (True, TypeError),
    ])
    def test_of_dropout(self, dropout, error, unchanged):
        linear = nn.Linear(6, 5)
        with unchanged(linear), pytest.raises(error, match=f"dropout must be .*{dropout}"):
            LoRALinear(linear, rank=2, dropout=dropout)

    @pytest.mark.parametrize("alpha, scaling", [
        (0, 0.0), (-3, -1.5), (np.float64(3), 1.5), (np.float32(3), 1.5),
    ])
    def test_legal_alphas(self, alpha, scaling):
        layer = LoRALayer(6, 5, 2, alpha, seed=0)
        assert layer.scaling == scaling and type(layer.scaling) is float

    @pytest.mark.parametrize("shape", [(6, 5), (5, 7), (5,), (5, 6, 1)])
    def test_of_a_weight_that_does_not_fit(self, shape):
        layer = LoRALayer(6, 5, 2)
        for method in (layer.merge_weights, layer.unmerge_weights,
                       lambda W: layer(torch.ones(2, 6), W)):
            with pytest.raises(ValueError, match=r"\(5, 6\), got \({}".format(shape[0])):
                method(torch.ones(shape))

    @pytest.mark.parametrize("module, name", [
        (nn.Conv1d(6, 5, 1), "Conv1d"), (nn.Embedding(6, 5), "Embedding"),
        (nn.Bilinear(2, 2, 2), "Bilinear"), (torch.ones(5, 6), "Tensor"), (None, "NoneType"),
    ])
    def test_of_what_is_no_linear(self, module, name):
        with pytest.raises(TypeError, match=f"expected an nn.Linear.*{name}"):
            LoRALinear(module)

    @pytest.mark.parametrize("compute", [nn.utils.parametrizations.weight_norm,
                                         nn.utils.parametrizations.orthogonal,
                                         nn.utils.spectral_norm])
    def test_of_a_computed_weight(self, compute):
        linear = compute(nn.Linear(6, 5))                        # merging could not write to it
        with pytest.raises(TypeError, match="computed"):
            LoRALinear(linear, rank=2)
        assert all(p.requires_grad for p in linear.parameters())


def test_autocast_trains_float32_adapters_in_bfloat16():
    layer, x = lora(dtype=torch.float32), randn(4, 6, dtype=torch.float32)
    full = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), full, rtol=0.05, atol=0.2)
    out.float().sum().backward()
    assert layer.A.grad.dtype == torch.float32 and layer.A.grad.any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype):
    cpu, x = lora(64, 48, 8, dtype=dtype), randn(9, 64, dtype=dtype)
    gpu = copy.deepcopy(cpu).cuda()
    tolerance = 200 * torch.finfo(dtype).eps
    torch.testing.assert_close(gpu(x.cuda()).cpu(), cpu(x), rtol=tolerance, atol=tolerance)
    fresh = LoRALinear(gpu.linear, rank=8, seed=5)
    assert fresh.A.is_cuda
    assert torch.equal(fresh.A.cpu(), LoRALinear(cpu.linear, rank=8, seed=5).A)
    torch.testing.assert_close(gpu.merge().weight.cpu(), cpu.merge().weight,
                               rtol=tolerance, atol=tolerance)
