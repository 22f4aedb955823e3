"""The training loop of the NumPy network: it trains what is trainable, all or the adapters."""

import numpy as np

from lora_lib.numpy.network import Network, softmax_cross_entropy
from lora_lib.numpy.optim import Adam


def train(network: Network, x: np.ndarray, y: np.ndarray, *, steps: int, lr: float = 1e-3,
          batch_size: int = 64, seed: int = 0, optimizer=Adam, progress: bool = False):
    """Minimize the softmax cross-entropy of `network(x)` against `y`; return the losses, (steps,).

    x (n, features), y (n,) class numbers. Batches come from seeded permutations of the data, so
    the same call gives the same result. `optimizer` is a class: optimizer(parameters, lr=lr).
    Raises ValueError if nothing is trainable or the data do not fit together, and
    FloatingPointError when the loss is no longer finite.
    """
    if not network.parameters():
        raise ValueError("nothing is trainable: every layer is frozen; call inject() for adapters")
    if len(x) != len(y) or not 1 <= batch_size <= len(x):
        raise ValueError(f"expected x and y of one length, at least batch_size = {batch_size}; "
                         f"got {len(x)} and {len(y)}")
    rng, order = np.random.default_rng(seed), np.empty(0, int)
    optim, losses = optimizer(network.parameters(), lr=lr), np.empty(steps)
    for step in _steps(steps, progress):
        if len(order) < batch_size:                   # the rest of an epoch goes to the next one
            order = np.concatenate([order, rng.permutation(len(x))])
        batch, order = order[:batch_size], order[batch_size:]
        losses[step], grad = softmax_cross_entropy(network.forward(x[batch]), y[batch])
        if not np.isfinite(losses[step]):
            raise FloatingPointError(f"the loss is {losses[step]} at step {step}; "
                                     f"lower the learning rate {lr}")
        network.backward(grad)
        optim.step()
    return losses


def accuracy(network: Network, x: np.ndarray, y: np.ndarray) -> float:
    """The share of rows whose largest output is the label's."""
    return float(np.mean(network.forward(x).argmax(axis=-1) == y))


def _steps(steps, progress):
    if not progress:
        return range(steps)
    from tqdm import tqdm                             # only the progress bar needs it
    return tqdm(range(steps), unit="step", leave=False)
