"""The NumPy layer against finite differences, plain matrix algebra, and the memory it takes."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lib.numpy import LoRALayer, LoRALinear

EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True)
LEADING = st.sampled_from([(), (1,), (5,), (2, 3), (2, 1, 3)])            # x from 1-D to 4-D


@st.composite
def problems(draw, leading=LEADING):
    """A layer with a B that is not zero, W, x, and a gradient to send back."""
    k, d = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    layer = LoRALayer(k, d, draw(st.integers(1, min(d, k))), draw(st.floats(-8, 8)), seed=rng,
                      use_rslora=draw(st.booleans()))
    layer.B = rng.normal(size=layer.B.shape)
    lead = draw(leading)
    return layer, rng.normal(size=(d, k)), rng.normal(size=(*lead, k)), rng.normal(size=(*lead, d))


def finite_differences(loss, array, step=1e-3):
    """dloss/darray by central differences; exact up to rounding where loss is quadratic."""
    grad = np.empty_like(array)
    for i in np.ndindex(array.shape):
        kept = array[i]
        array[i] = kept + step
        above = loss()
        array[i] = kept - step
        grad[i] = (above - loss()) / (2 * step)
        array[i] = kept
    return grad


@EXAMPLES
@given(problems())
def test_gradients_are_finite_differences(problem):
    layer, W, x, g = problem

    def loss():
        return float(np.sum(layer.forward(x, W) * g))

    x_grad = layer.backward(g, x, W)
    for grad, array in [(x_grad, x), (layer.A_grad, layer.A), (layer.B_grad, layer.B)]:
        assert grad.shape == array.shape
        np.testing.assert_allclose(grad, finite_differences(loss, array), rtol=1e-8, atol=1e-8)


@EXAMPLES
@given(problems())
def test_forward_is_the_sum_over_indices(problem):
    layer, W, x, _ = problem
    full = W + layer.scaling * np.einsum("dr,rk->dk", layer.B, layer.A)
    expected = np.einsum("...k,dk->...d", x, full)
    np.testing.assert_allclose(layer.forward(x, W), expected, rtol=1e-12, atol=1e-12)


@EXAMPLES
@given(problems())
def test_merged_is_unmerged_and_back_again(problem):
    layer, W, x, _ = problem
    before = W.copy()
    merged = layer.merge_weights(W)
    np.testing.assert_allclose(x @ merged.T, layer.forward(x, W), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(layer.unmerge_weights(merged), W, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(W, before)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (0, 3, 4)])
def test_an_empty_batch_has_no_output_and_zero_gradients(shape):
    layer = LoRALayer(4, 3, 2, seed=0)
    x, W = np.zeros(shape), np.ones((3, 4))
    out = layer.forward(x, W)
    assert out.shape == (*shape[:-1], 3)
    assert layer.backward(out, x, W).shape == shape
    assert not layer.A_grad.any() and not layer.B_grad.any()
    assert layer.A_grad.shape == (2, 4) and layer.B_grad.shape == (3, 2)


def test_strided_input_gives_what_a_copy_gives():
    rng = np.random.default_rng(0)
    layer = LoRALayer(4, 3, 2, seed=rng)
    layer.B = rng.normal(size=(3, 2))
    W, x = rng.normal(size=(4, 3)).T, rng.normal(size=(4, 10)).T[::2]
    g = rng.normal(size=(3, 5)).T
    assert not (x.flags.c_contiguous or W.flags.c_contiguous or g.flags.c_contiguous)
    strided = layer.forward(x, W), layer.backward(g, x, W), layer.A_grad, layer.B_grad
    x, W, g = x.copy(), W.copy(), g.copy()
    whole = layer.forward(x, W), layer.backward(g, x, W), layer.A_grad, layer.B_grad
    for one, other in zip(strided, whole):
        np.testing.assert_allclose(one, other, rtol=1e-13)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("alpha", [16, 16.0, np.float64(16), np.float32(16)])
def test_the_dtype_stays(dtype, alpha):
    layer = LoRALayer(6, 5, 2, alpha, seed=0, dtype=dtype)
    layer.B += 1
    x, W = np.ones((3, 6), dtype), np.ones((5, 6), dtype)
    out = layer.forward(x, W)
    assert out.dtype == layer.backward(out, x, W).dtype == layer.A_grad.dtype == dtype
    assert layer.merge_weights(W).dtype == layer.delta_weight().dtype == dtype
    exact = x.astype(float) @ (W + 8 * layer.B.astype(float) @ layer.A.astype(float)).T
    np.testing.assert_allclose(out, exact, rtol=0, atol=200 * np.finfo(dtype).eps)


def test_the_start_is_the_frozen_layer():
    rng = np.random.default_rng(3)
    layer, W, x = LoRALayer(50, 40, 4, seed=1), rng.normal(size=(40, 50)), rng.normal(size=(7, 50))
    np.testing.assert_array_equal(layer.forward(x, W), x @ W.T)
    layer.backward(np.ones((7, 40)), x, W)
    assert not layer.A_grad.any() and layer.B_grad.all()


def test_the_first_A():
    A = LoRALayer(400, 300, 300, seed=5).A
    assert A.std() == pytest.approx(1 / 20, rel=0.01) and abs(A.mean()) < 1e-3
    np.testing.assert_array_equal(A, LoRALayer(400, 300, 300, seed=5).A)
    assert (A != LoRALayer(400, 300, 300, seed=6).A).any()
    np.testing.assert_allclose(LoRALayer(400, 300, 300, seed=5, init_std=0.5).A, A * 10, rtol=1e-12)
    assert not LoRALayer(4, 3, 2, init_std=0).A.any()
    rng = np.random.default_rng(5)                              # a generator moves on
    np.testing.assert_array_equal(LoRALayer(400, 300, 300, seed=rng).A, A)
    assert (LoRALayer(400, 300, 300, seed=rng).A != A).any()


@pytest.mark.parametrize("k, d, rank, alpha, rslora, scaling, count, ratio", [
    (4096, 4096, 8, 16.0, False, 2.0, 65536, 256.0),            # the paper's 4096 x 4096 case
    (4, 3, 3, 6.0, False, 2.0, 21, 12 / 21),
    (5, 5, 4, 6.0, True, 3.0, 40, 25 / 40),
    (5, 5, 4, 0, False, 0.0, 40, 25 / 40),
    (5, 5, 4, -4, False, -1.0, 40, 25 / 40),
    (5, 5, np.int64(4), 4, False, 1.0, 40, 25 / 40),
])
def test_counts_and_scaling(k, d, rank, alpha, rslora, scaling, count, ratio):
    layer = LoRALayer(k, d, rank, alpha, seed=0, use_rslora=rslora)
    assert layer.scaling == scaling and type(layer.scaling) is float
    assert layer.num_parameters() == layer.A.size + layer.B.size == count
    assert layer.compression_ratio() == pytest.approx(ratio)


def test_alpha_zero_switches_the_adapter_off():
    layer = LoRALayer(4, 3, 2, 0, seed=0)
    layer.B += 1
    x, W = np.ones((2, 4)), np.ones((3, 4))
    np.testing.assert_array_equal(layer.forward(x, W), x @ W.T)
    np.testing.assert_array_equal(layer.merge_weights(W), W)


@pytest.mark.parametrize("options, error, message", [
    ({"rank": 0}, ValueError, "between 1 and .* = 3, got 0"),
    ({"rank": -2}, ValueError, "got -2"),
    ({"rank": 4}, ValueError, "between 1 and .* = 3, got 4"),
    ({"rank": 2.0}, TypeError, "integer, got 2.0"),
    ({"rank": True}, TypeError, "integer, got True"),
    ({"rank": "2"}, TypeError, "integer, got '2'"),
    ({"rank": None}, TypeError, "integer, got None"),
    ({"alpha": float("nan")}, ValueError, "finite, got nan"),
    ({"alpha": float("inf")}, ValueError, "finite, got inf"),
    ({"alpha": "16"}, TypeError, "number, got '16'"),
    ({"alpha": True}, TypeError, "number, got True"),
    ({"alpha": 1j}, TypeError, "number, got 1j"),
    ({"dtype": int}, TypeError, "floating type, got int64"),
    ({"dtype": complex}, TypeError, "floating type, got complex128"),
    ({"dtype": "nonsense"}, TypeError, "nonsense"),
    ({"init_std": -1.0}, ValueError, "got -1.0"),
    ({"init_std": float("inf")}, ValueError, "got inf"),
    ({"init_std": "big"}, TypeError, "number, got 'big'"),
])
def test_what_cannot_be_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        LoRALayer(4, 3, **{"rank": 2, **options})
    with pytest.raises(error, match=message):
        LoRALinear(np.ones((3, 4)), **{"rank": 2, **options})


@pytest.mark.parametrize("W, x, g, message", [
    ((4, 3), (4,), (3,), r"\(3, 4\), got \(4, 3\)"),
    ((3, 5), (4,), (3,), r"\(3, 4\), got \(3, 5\)"),
    ((3, 4, 1), (4,), (3,), r"got \(3, 4, 1\)"),
    ((3, 4), (2, 3), (2, 3), r"\(..., 4\), got \(2, 3\)"),
    ((3, 4), (), (3,), r"\(..., 4\), got \(\)"),
    ((3, 4), (2, 4), (3,), r"output's shape \(2, 3\), got \(3,\)"),
    ((3, 4), (6, 4), (2, 3, 3), r"output's shape \(6, 3\), got \(2, 3, 3\)"),
])
def test_shapes_that_do_not_fit_are_named(W, x, g, message):
    layer = LoRALayer(4, 3, 2, seed=0)
    with pytest.raises(ValueError, match=message):
        layer.backward(np.ones(g), np.ones(x), np.ones(W))
    if "output" not in message:
        with pytest.raises(ValueError, match=message):
            layer.forward(np.ones(x), np.ones(W))
    assert layer.A_grad is None and layer.B_grad is None


def test_merge_refuses_what_is_not_finite():
    layer = LoRALayer(4, 3, 2, 2, seed=0, dtype=np.float16, init_std=0)
    layer.A[:], layer.B[:] = 200, 200
    W = np.ones((3, 4), np.float16)
    with pytest.raises(ValueError, match="NaN or infinity"):    # 80,000 is beyond float16
        layer.merge_weights(W)
    with pytest.raises(ValueError, match="NaN or infinity"):
        LoRALayer(4, 3, 2).unmerge_weights(np.full((3, 4), np.nan))
    linear = LoRALinear(W, rank=2)
    linear.B[0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        linear.merge()
    assert linear.weight is W and not linear.merged


@pytest.mark.parametrize("rows", [1, 4])
def test_forward_and_backward_never_hold_a_d_by_k_array(rows):
    size = 1024                                                 # a d x k array takes 8 MiB
    layer, W = LoRALayer(size, size, 4, seed=0), np.zeros((size, size))
    x = g = np.ones((rows, size))

    def peak(function, *arguments):
        tracemalloc.start()
        function(*arguments)
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(layer.delta_weight) >= W.nbytes                 # what we look for would be seen
    assert peak(layer.forward, x, W) < W.nbytes / 20
    assert peak(layer.backward, g, x, W) < W.nbytes / 20


class TestLoRALinear:
    def make(self, bias=True, **options):
        rng = np.random.default_rng(0)
        W, b = rng.normal(size=(3, 4)), rng.normal(size=3)
        layer = LoRALinear(W, b if bias else None, 2, 4.0, seed=rng, **options)
        layer.B = rng.normal(size=(3, 2))
        return layer, W, b, rng.normal(size=(5, 2, 4))

    @pytest.mark.parametrize("bias", [True, False])
    def test_forward_backward_merge_unmerge(self, bias):
        layer, W, b, x = self.make(bias)
        expected = x @ (W + 2.0 * layer.B @ layer.A).T + (b if bias else 0)
        np.testing.assert_allclose(layer.forward(x), expected, rtol=1e-12)
        grad = np.ones((5, 2, 3))
        outer = layer.backward(grad)
        plain = LoRALayer(4, 3, 2, 4.0)
        plain.A, plain.B = layer.A, layer.B
        np.testing.assert_array_equal(outer, plain.backward(grad, x, W))
        np.testing.assert_array_equal(layer.A_grad, plain.A_grad)

        frozen = W.copy()
        assert layer.merge() is layer and layer.merged
        once = layer.weight
        assert layer.merge().weight is once                     # merging twice changes nothing
        np.testing.assert_allclose(layer.forward(x), expected, rtol=1e-12)
        with pytest.raises(RuntimeError, match="unmerge"):
            layer.backward(grad)
        assert layer.unmerge().unmerge() is layer and not layer.merged
        np.testing.assert_allclose(layer.weight, W, rtol=1e-13, atol=1e-15)
        np.testing.assert_array_equal(W, frozen)                # the caller's array is not written
        layer.forward(x)
        np.testing.assert_allclose(layer.backward(grad), outer, rtol=1e-12)

    def test_the_weight_is_shared_not_copied(self):
        layer, W, b, _ = self.make()
        assert layer.weight is W and layer.bias is b

    def test_the_adapter_has_the_weights_dtype(self):
        assert LoRALinear(np.ones((3, 4), np.float32), rank=1).A.dtype == np.float32
        wide = LoRALinear(np.ones((3, 4), np.float32), rank=1, dtype=np.float64)
        assert wide.A.dtype == np.float64 and wide.merge().weight.dtype == np.float32

    @pytest.mark.parametrize("weight, bias, error, message", [
        (np.ones(4), None, ValueError, r"two dimensions .* got shape \(4,\)"),
        (np.ones((2, 3, 4)), None, ValueError, r"got shape \(2, 3, 4\)"),
        (np.ones((3, 4)), np.ones(4), ValueError, r"bias must have shape \(3,\), got \(4,\)"),
        (np.ones((3, 4)), np.ones((1, 3)), ValueError, r"got \(1, 3\)"),
        (np.ones((3, 4), int), None, TypeError, "int64"),
    ])
    def test_weights_that_do_not_fit(self, weight, bias, error, message):
        with pytest.raises(error, match=message):
            LoRALinear(weight, bias, rank=2)

    @pytest.mark.parametrize("merged", [False, True])
    def test_input_that_does_not_fit(self, merged):
        layer, *_ = self.make()
        if merged:
            layer.merge()
        with pytest.raises(ValueError, match=r"\(..., 4\), got \(2, 5\)"):
            layer.forward(np.ones((2, 5)))
