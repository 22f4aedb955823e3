"""A small network in NumPy: linear, ReLU, softmax cross-entropy; whole or with LoRA inside.

A layer has `forward(x)`, which remembers what `backward` needs, and `backward(grad)`, which returns
the gradient of the input. A trainable array `X` has its gradient in `X_grad`, and the layer's
`trainable` names its trainable arrays.
"""

import numpy as np

from lora_lib.numpy.lora import LoRALinear


class Linear:
    """y = W x + b with W (out_features, in_features), b (out_features,), x (..., in_features).

    W starts as N(0, 2 / in_features), right for a ReLU behind it (He et al. 2015); b as zeros.
    """

    def __init__(self, in_features: int, out_features: int, seed=None, dtype=np.float64):
        std = np.sqrt(2 / in_features)
        draw = np.random.default_rng(seed).normal(0, std, (out_features, in_features))
        self.weight, self.bias = draw.astype(dtype), np.zeros(out_features, dtype)
        self.trainable: tuple[str, ...] = ("weight", "bias")

    def forward(self, x):
        self.x = x
        return x @ self.weight.T + self.bias

    def backward(self, grad_output):
        if self.trainable:
            g = grad_output.reshape(-1, grad_output.shape[-1])
            self.weight_grad = g.T @ self.x.reshape(-1, self.x.shape[-1])
            self.bias_grad = g.sum(0)
        return grad_output @ self.weight


class ReLU:
    """max(x, 0), entry by entry."""

    trainable = ()

    def forward(self, x):
        self.positive = x > 0
        return np.maximum(x, 0)

    def backward(self, grad_output):
        return grad_output * self.positive


class Network:
    """Layers applied one after the other: network(x) is network.forward(x)."""

    def __init__(self, layers):
        self.layers = list(layers)

    def __call__(self, x):
        return self.forward(x)

    def forward(self, x):
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, grad_output):
        for layer in reversed(self.layers):
            grad_output = layer.backward(grad_output)
        return grad_output

    def parameters(self) -> list[tuple[object, str]]:
        """What is trained: pairs (layer, name of one of its arrays), first layer first."""
        return [(layer, name) for layer in self.layers for name in layer.trainable]

    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(getattr(layer, name).size for layer, name in self.parameters())


def mlp(*widths: int, seed: int = 0) -> Network:
    """Linear layers of the given widths with ReLU between: mlp(64, 128, 10) has two of them."""
    rng = np.random.default_rng(seed)
    layers = []
    for in_features, out_features in zip(widths, widths[1:]):
        layers += [Linear(in_features, out_features, seed=rng), ReLU()]
    return Network(layers[:-1])


def softmax_cross_entropy(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean of -log softmax(logits)[label], and its gradient with respect to the logits.

    logits (n, classes), labels (n,) integers. The gradient is (softmax - one_hot) / n.
    Raises ValueError for other shapes or a label that is not in 0 .. classes - 1.
    """
    if np.ndim(logits) != 2 or np.shape(labels) != logits.shape[:1]:
        raise ValueError(f"expected logits (n, classes) and labels (n,), got {np.shape(logits)} "
                         f"and {np.shape(labels)}")
    if len(labels) and not 0 <= np.min(labels) <= np.max(labels) < logits.shape[1]:
        raise ValueError(f"labels must be in 0 .. {logits.shape[1] - 1}, got {np.min(labels)} .. "
                         f"{np.max(labels)}")
    shifted = logits - logits.max(axis=-1, keepdims=True)        # exp cannot overflow
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    rows = np.arange(len(labels))
    grad = np.exp(log_p)
    grad[rows, labels] -= 1
    return -log_p[rows, labels].mean(), grad / len(labels)


def freeze(network: Network) -> Network:
    """Leave nothing trainable. Raises nothing; a frozen network stays frozen."""
    for layer in network.layers:
        layer.trainable = ()
    return network


def inject(network: Network, rank: int = 8, alpha: float = 16.0, *, layers=None, seed: int = 0,
           **options) -> Network:
    """Freeze the network and put a LoRALinear in the place of its Linear layers.

    `layers` are the indices in `network.layers` to adapt, all Linear layers by default; a rank
    above min(d, k) of a layer is an error there, as in LoRALayer. The weights are shared with
    the layers replaced, not copied. Returns the same network.

    Raises TypeError if an index does not name a Linear layer (it may hold an adapter already),
    IndexError if it names none, ValueError if there is nothing to adapt.
    """
    n = len(network.layers)
    chosen = range(n) if layers is None else list(layers)
    if layers is None:
        chosen = [i for i in chosen if isinstance(network.layers[i], Linear)]
    if not chosen:
        raise ValueError("nothing to adapt: the network has no Linear layer left")
    for i in chosen:
        if not -n <= i < n:
            raise IndexError(f"the network has {n} layers, there is no layer {i}")
        if not isinstance(network.layers[i], Linear):
            raise TypeError(f"layer {i} is a {type(network.layers[i]).__name__}, "
                            f"expected a Linear")
    rng = np.random.default_rng(seed)
    adapted = {i % n: LoRALinear(network.layers[i].weight, network.layers[i].bias, rank, alpha,
                                 seed=rng, **options) for i in chosen}
    freeze(network)
    network.layers = [adapted.get(i, layer) for i, layer in enumerate(network.layers)]
    return network


def merge(network: Network) -> Network:
    """Fold every adapter into its weight and put a plain, frozen Linear back in its place.

    Raises ValueError, before anything has changed, if there is no adapter, or if a merged weight
    would hold NaN or infinity.
    """
    adapted = {i: a for i, a in enumerate(network.layers) if isinstance(a, LoRALinear)}
    if not adapted:
        raise ValueError("the network holds no LoRALinear; inject() adapters first")
    for layer in adapted.values():
        if not layer.merged:
            layer.merge_weights(layer.weight)
    for i, layer in adapted.items():
        layer.merge()
        plain = Linear.__new__(Linear)
        plain.weight, plain.trainable = layer.weight, ()
        plain.bias = layer.bias if layer.bias is not None else \
            np.zeros(layer.out_features, layer.weight.dtype)
        network.layers[i] = plain
    return network
