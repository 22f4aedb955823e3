"""The NumPy network against finite differences and torch.autograd; freezing, injecting, merging."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lib.numpy import (Linear, LoRALinear, Network, ReLU, freeze, inject, merge, mlp,
                            softmax_cross_entropy)


def randomize(network, seed=0):
    """Leave no array at its start: zeros hide errors."""
    rng = np.random.default_rng(seed)
    for layer in network.layers:
        for name in ("bias", "B"):
            if getattr(layer, name, None) is not None:
                setattr(layer, name, rng.normal(size=getattr(layer, name).shape))
    return network


def in_torch(network, x, labels):
    """The same loss by torch's own functions; returns it, and each trained array as a tensor."""
    h, leaves = torch.tensor(x), []
    for layer in network.layers:
        if isinstance(layer, ReLU):
            h = torch.relu(h)
            continue
        tensors = {name: torch.tensor(getattr(layer, name), requires_grad=name in layer.trainable)
                   for name in ("weight", "bias", "A", "B") if hasattr(layer, name)}
        W = tensors["weight"]
        if isinstance(layer, LoRALinear):
            W = W + layer.scaling * tensors["B"] @ tensors["A"]
        h = torch.nn.functional.linear(h, W, tensors["bias"])
        leaves += [tensors[name] for name in layer.trainable]
    return torch.nn.functional.cross_entropy(h, torch.tensor(labels)), leaves


def backward(network, x, labels):
    loss, grad = softmax_cross_entropy(network(x), labels)
    return loss, network.backward(grad)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(widths=st.lists(st.integers(2, 6), min_size=2, max_size=4), rows=st.integers(1, 5),
       lora=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_gradients_are_torchs_and_finite_differences(widths, rows, lora, seed):
    rng = np.random.default_rng(seed)
    network = mlp(*widths, seed=seed)
    if lora:
        inject(network, rank=2, alpha=3.0, seed=seed)
    randomize(network, seed)
    x, labels = rng.normal(size=(rows, widths[0])), rng.integers(0, widths[-1], rows)

    loss, x_grad = backward(network, x, labels)
    reference, leaves = in_torch(network, x, labels)
    reference.backward()
    assert loss == pytest.approx(reference.item(), rel=1e-12)
    assert len(leaves) == len(network.parameters()) > 0
    for (layer, name), leaf in zip(network.parameters(), leaves):
        np.testing.assert_allclose(getattr(layer, f"{name}_grad"), leaf.grad, rtol=1e-9, atol=1e-13)

    # Along one random direction of everything, input included, without torch.
    arrays = [(getattr(a, n), getattr(a, f"{n}_grad")) for a, n in network.parameters()]
    arrays.append((x, x_grad))
    steps = [rng.normal(size=a.shape) for a, _ in arrays]
    slope = sum(np.sum(grad * s) for (_, grad), s in zip(arrays, steps))
    at = []
    for h in (1e-6, -2e-6):
        for (a, _), s in zip(arrays, steps):
            a += h * s
        at.append(softmax_cross_entropy(network(x), labels)[0])
    assert (at[0] - at[1]) / 2e-6 == pytest.approx(slope, rel=1e-5, abs=1e-7)


class TestCrossEntropy:
    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(rows=st.integers(1, 5), classes=st.integers(1, 6), scale=st.sampled_from([1, 30, 1e4]),
           seed=st.integers(0, 2**32 - 1))
    def test_it_is_torchs(self, rows, classes, scale, seed):
        rng = np.random.default_rng(seed)
        logits, labels = scale * rng.normal(size=(rows, classes)), rng.integers(0, classes, rows)
        loss, grad = softmax_cross_entropy(logits, labels)
        leaf = torch.tensor(logits, requires_grad=True)
        expected = torch.nn.functional.cross_entropy(leaf, torch.tensor(labels))
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=1e-12, abs=1e-15)
        np.testing.assert_allclose(grad, leaf.grad, rtol=1e-9, atol=1e-15)

    def test_by_hand(self):
        loss, grad = softmax_cross_entropy(np.array([[0.0, np.log(3)]]), np.array([1]))
        assert loss == pytest.approx(np.log(4 / 3))
        np.testing.assert_allclose(grad, [[0.25, -0.25]])

    @pytest.mark.parametrize("logits, labels, message", [
        ((5, 3), [0, 1], r"\(5, 3\) and \(2,\)"),
        ((3,), [0, 1, 2], r"\(3,\) and \(3,\)"),
        ((2, 4, 3), [0, 1], r"\(2, 4, 3\) and \(2,\)"),
        ((2, 3), [0, 3], r"0 .. 2, got 0 .. 3"),
        ((2, 3), [-100, 1], r"got -100 .. 1"),
    ])
    def test_labels_that_do_not_fit(self, logits, labels, message):
        with pytest.raises(ValueError, match=message):
            softmax_cross_entropy(np.zeros(logits), np.array(labels))


def test_relu_agrees_with_torch_at_zero_and_at_infinity():
    x = np.array([-np.inf, -1.0, 0.0, 2.0, np.inf])
    layer, leaf = ReLU(), torch.tensor(x, requires_grad=True)
    out = torch.relu(leaf)
    np.testing.assert_array_equal(layer.forward(x), out.detach())
    out.backward(torch.full((5,), 3.0, dtype=torch.float64))
    np.testing.assert_array_equal(layer.backward(np.full(5, 3.0)), leaf.grad)
    assert np.isnan(layer.forward(np.array([np.nan]))).all()


@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 3, 4), (2, 1, 3, 4), (0, 4)])
def test_linear_takes_any_leading_dimensions(shape):
    rng = np.random.default_rng(0)
    layer, reference = Linear(4, 3, seed=0), torch.nn.Linear(4, 3, dtype=torch.float64)
    layer.bias += 1
    with torch.no_grad():
        reference.weight.copy_(torch.tensor(layer.weight))
        reference.bias.copy_(torch.tensor(layer.bias))
    x, g = rng.normal(size=shape), rng.normal(size=(*shape[:-1], 3))
    leaf = torch.tensor(x, requires_grad=True)
    out = reference(leaf)
    out.backward(torch.tensor(g))
    np.testing.assert_allclose(layer.forward(x), out.detach(), rtol=1e-12)
    np.testing.assert_allclose(layer.backward(g), leaf.grad, rtol=1e-12)
    np.testing.assert_allclose(layer.weight_grad, reference.weight.grad, rtol=1e-12)
    np.testing.assert_allclose(layer.bias_grad, reference.bias.grad, rtol=1e-12)


def test_mlp_has_he_weights_and_no_relu_at_the_end():
    network = mlp(400, 300, 10, seed=3)
    assert [type(layer) for layer in network.layers] == [Linear, ReLU, Linear]
    first, _, last = network.layers
    assert first.weight.shape == (300, 400) and last.weight.shape == (10, 300)
    assert first.weight.std() == pytest.approx((2 / 400) ** 0.5, rel=0.01)
    assert not first.bias.any()
    assert network.num_parameters() == 400 * 300 + 300 + 300 * 10 + 10
    np.testing.assert_array_equal(mlp(400, 300, 10, seed=3).layers[2].weight, last.weight)
    assert (mlp(400, 300, 10, seed=4).layers[2].weight != last.weight).any()


def test_a_frozen_network_has_no_gradients_but_the_inputs():
    network, free = freeze(mlp(5, 4, 3, seed=0)), mlp(5, 4, 3, seed=0)
    x, labels = np.random.default_rng(0).normal(size=(6, 5)), np.array([0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(backward(network, x, labels)[1], backward(free, x, labels)[1])
    assert network.parameters() == [] and network.num_parameters() == 0
    assert not hasattr(network.layers[0], "weight_grad")
    assert freeze(network).parameters() == []


class TestInject:
    def test_only_A_and_B_are_trainable_and_the_output_stays(self):
        network = mlp(8, 7, 6, 5, seed=0)
        x = np.random.default_rng(0).normal(size=(4, 8))
        weights = [layer.weight for layer in network.layers[::2]]
        before = network(x)
        assert inject(network, rank=3, alpha=6.0, seed=1) is network
        np.testing.assert_array_equal(network(x), before)
        assert [name for _, name in network.parameters()] == ["A", "B"] * 3
        assert network.num_parameters() == 3 * (8 + 7 + 7 + 6 + 6 + 5)
        assert all(a.weight is w for a, w in zip(network.layers[::2], weights))      # shared
        assert (network.layers[0].A[:, :6] != network.layers[4].A).any()             # own draws

    @pytest.mark.parametrize("layers, adapted", [
        ([0], {0}), ([2, 0], {0, 2}), ([-1], {4}), (range(0, 5, 4), {0, 4}),
        (iter([0, 2]), {0, 2}), (np.array([4]), {4}),
    ])
    def test_chosen_layers(self, layers, adapted):
        network = inject(mlp(4, 4, 4, 4), rank=2, layers=layers)
        assert {i for i, a in enumerate(network.layers) if isinstance(a, LoRALinear)} == adapted
        assert len(network.parameters()) == 2 * len(adapted)

    @pytest.mark.parametrize("options, error, message", [
        ({"rank": 4}, ValueError, "= 3, got 4"),                  # too large for the last one only
        ({"rank": 0}, ValueError, "got 0"),
        ({"alpha": np.nan}, ValueError, "got nan"),
        ({"layers": [1]}, TypeError, "layer 1 is a ReLU"),
        ({"layers": [0, 9]}, IndexError, "3 layers, there is no layer 9"),
        ({"layers": []}, ValueError, "nothing to adapt"),
    ])
    def test_after_an_error_the_network_is_as_before(self, options, error, message):
        network = mlp(6, 5, 3, seed=0)
        layers, trainable = list(network.layers), network.parameters()
        with pytest.raises(error, match=message):
            inject(network, **{"rank": 2, **options})
        assert all(a is b for a, b in zip(network.layers, layers))
        assert network.parameters() == trainable

    def test_twice(self):
        network = inject(mlp(6, 5, 3), rank=2)
        with pytest.raises(ValueError, match="no Linear layer left"):
            inject(network, rank=2)
        with pytest.raises(TypeError, match="layer 0 is a LoRALinear"):
            inject(network, rank=2, layers=[0])


class TestMerge:
    def test_plain_layers_give_the_same_output(self):
        network = randomize(inject(mlp(8, 7, 6, 5, seed=0), rank=3, layers=[0, 4], seed=1))
        weights = [(a.weight, a.weight.copy()) for a in network.layers[::2]]
        x = np.random.default_rng(0).normal(size=(4, 8))
        before = network(x)
        network.layers[0].merge()                                # one of them is merged already
        assert merge(network) is network
        assert [type(a) for a in network.layers] == [Linear, ReLU, Linear, ReLU, Linear]
        np.testing.assert_allclose(network(x), before, rtol=1e-12, atol=1e-12)
        assert network.parameters() == []
        for weight, copy in weights:
            np.testing.assert_array_equal(weight, copy)

    def test_nothing_to_merge(self):
        with pytest.raises(ValueError, match="no LoRALinear"):
            merge(mlp(4, 3))

    def test_all_or_nothing(self):
        network = randomize(inject(mlp(4, 4, 3), rank=2))
        network.layers[2].B[0, 0] = np.nan
        layers = list(network.layers)
        with pytest.raises(ValueError, match="NaN"):
            merge(network)
        assert network.layers == layers and not layers[0].merged


def test_a_layer_without_a_bias_merges_into_one_that_works():
    rng = np.random.default_rng(0)
    network = Network([LoRALinear(rng.normal(size=(3, 4)), rank=2, seed=0)])
    network.layers[0].B[:] = rng.normal(size=(3, 2))
    x = rng.normal(size=(5, 4))
    adapted = network(x)
    np.testing.assert_allclose(merge(network)(x), adapted, rtol=1e-12)
