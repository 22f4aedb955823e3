"""The NumPy training loop: against the same steps in torch, and what it refuses."""

import copy

import numpy as np
import pytest
import torch

from lora_lib.numpy import SGD, Network, accuracy, freeze, inject, mlp, train


def data(n=90, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 6))
    return x, (x @ rng.normal(size=(6, 4))).argmax(1)


class Recorder(Network):
    """Keeps every batch that it is shown."""

    def __init__(self, layers):
        super().__init__(layers)
        self.batches = []

    def forward(self, x):
        self.batches.append(x.copy())
        return super().forward(x)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("ours, theirs", [(None, torch.optim.Adam), (SGD, torch.optim.SGD)])
def test_each_step_is_torchs(lora, ours, theirs):
    x, y = data()
    network = mlp(6, 8, 4, seed=0)
    if lora:
        inject(network, rank=3, alpha=6.0, seed=1)
    start = copy.deepcopy(network)
    recorder = Recorder(network.layers)
    options = {} if ours is None else {"optimizer": ours}
    losses = train(recorder, x, y, steps=25, lr=0.01, batch_size=32, seed=4, **options)

    arrays = [[torch.tensor(getattr(a, n)) for n in ("weight", "bias", "A", "B") if hasattr(a, n)]
              for a in start.layers[::2]]
    trained = [t.requires_grad_() for layer in arrays for t in (layer[2:] if lora else layer)]
    optimizer = theirs(trained, lr=0.01)
    for loss, batch in zip(losses, recorder.batches, strict=True):
        h = torch.tensor(batch)
        for i, (W, b, *adapter) in enumerate(arrays):
            h = torch.relu(h) if i else h
            h = h @ (W + 2.0 * adapter[1] @ adapter[0] if adapter else W).T + b
        labels = [np.flatnonzero((x == row).all(1))[0] for row in batch]
        reference = torch.nn.functional.cross_entropy(h, torch.tensor(y[labels]))
        assert loss == pytest.approx(reference.item(), rel=1e-9)
        optimizer.zero_grad()
        reference.backward()
        optimizer.step()
    for (layer, name), t in zip(network.parameters(), trained, strict=True):
        np.testing.assert_allclose(getattr(layer, name), t.detach(), rtol=1e-8, atol=1e-12)
    if lora:
        for a, b in zip(network.layers[::2], start.layers[::2]):
            np.testing.assert_array_equal(a.weight, b.weight)


def test_every_row_is_seen_once_an_epoch():
    x, y = data(90)
    network = Recorder(mlp(6, 4).layers)
    train(network, x, y, steps=9, batch_size=30)
    epochs = np.concatenate(network.batches).reshape(3, 90, 6)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch, axis=0), np.sort(x, axis=0))
    assert (epochs[0] != epochs[1]).any()                        # in another order
    network.batches.clear()
    train(network, x, y, steps=6, batch_size=75)                 # 5 epochs in uneven batches
    seen = np.concatenate(network.batches)
    assert all((seen == row).all(1).sum() == 5 for row in x)


def test_the_seed_decides_and_learning_happens():
    x, y = data(400)
    runs = []
    for seed in (0, 0, 1):
        network = mlp(6, 16, 4, seed=0)
        runs.append(train(network, x, y, steps=150, lr=0.01, seed=seed))
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0] != runs[2]).any()
    assert runs[0].shape == (150,) and runs[0][-10:].mean() < runs[0][:10].mean() / 3
    assert accuracy(network, x, y) > 0.9


def test_accuracy_counts():
    network = Network([])
    assert accuracy(network, np.eye(4), np.array([0, 1, 2, 0])) == 0.75


def test_progress_gives_the_same_losses():
    x, y = data()
    runs = [train(mlp(6, 4), x, y, steps=3, progress=progress) for progress in (False, True)]
    np.testing.assert_array_equal(*runs)


def test_what_cannot_be_is_refused():
    x, y = data()
    with pytest.raises(ValueError, match="nothing is trainable"):
        train(freeze(mlp(6, 4)), x, y, steps=1)
    with pytest.raises(ValueError, match="got 90 and 89"):
        train(mlp(6, 4), x, y[:-1], steps=1)
    for batch_size in (0, -1, 91):
        with pytest.raises(ValueError, match=f"batch_size = {batch_size}; got 90 and 90"):
            train(mlp(6, 4), x, y, steps=1, batch_size=batch_size)
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 0.*learning rate 0.001"):
        train(mlp(6, 4), np.full_like(x, np.nan), y, steps=1)
    assert len(train(mlp(6, 4), x, y, steps=0)) == 0
