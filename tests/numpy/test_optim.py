"""SGD and Adam against torch.optim on the same gradients."""

import numpy as np
import pytest
import torch

from lora_lib.numpy import SGD, Adam


class Arrays:
    def __init__(self):
        rng = np.random.default_rng(0)
        self.P, self.Q = rng.normal(size=(4, 3)), rng.normal(size=5)


@pytest.mark.parametrize("ours, reference", [
    (lambda p: SGD(p, lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    (lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    (lambda p: Adam(p), lambda p: torch.optim.Adam(p)),
    (lambda p: Adam(p, lr=0.02, betas=(0.8, 0.95), eps=1e-3),
     lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.8, 0.95), eps=1e-3)),
    (lambda p: Adam(p, lr=0.02, weight_decay=0.3),
     lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.3)),
], ids=["SGD", "momentum", "Adam", "Adam with all its numbers", "AdamW"])
def test_twenty_steps_are_torchs(ours, reference):
    layer, rng = Arrays(), np.random.default_rng(1)
    tensors = [torch.tensor(a) for a in (layer.P, layer.Q)]
    kept = layer.P
    ours, reference = ours([(layer, "P"), (layer, "Q")]), reference(tensors)
    for _ in range(20):
        layer.P_grad, layer.Q_grad = rng.normal(size=(4, 3)), rng.normal(size=5)
        tensors[0].grad, tensors[1].grad = torch.tensor(layer.P_grad), torch.tensor(layer.Q_grad)
        ours.step()
        reference.step()
        np.testing.assert_allclose(layer.P, tensors[0], rtol=1e-11)
        np.testing.assert_allclose(layer.Q, tensors[1], rtol=1e-11)
    assert layer.P is kept                                       # in place


def test_float32_stays_float32():
    layer = Arrays()
    layer.P = layer.P.astype(np.float32)
    for optimizer in (SGD, Adam):
        layer.P_grad = np.ones_like(layer.P)
        optimizer([(layer, "P")], lr=0.1).step()
        assert layer.P.dtype == np.float32
