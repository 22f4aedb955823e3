"""SGD and Adam on the (layer, name) pairs that `Network.parameters` gives. They update in place."""

import numpy as np


class SGD:
    """p <- p - lr * v, with v <- momentum * v + gradient."""

    def __init__(self, parameters, lr: float, momentum: float = 0.0):
        self.parameters, self.lr, self.momentum = list(parameters), lr, momentum
        self.v = [np.zeros_like(getattr(layer, name)) for layer, name in self.parameters]

    def step(self) -> None:
        for (layer, name), v in zip(self.parameters, self.v):
            v *= self.momentum
            v += getattr(layer, f"{name}_grad")
            p = getattr(layer, name)
            p -= self.lr * v


class Adam:
    """Adam (Kingma & Ba 2015), with AdamW's decoupled weight decay (Loshchilov & Hutter 2019).

    It keeps two running means for each parameter, of the gradient and of its square: the
    optimizer's memory is twice that of what is trained.
    """

    def __init__(self, parameters, lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0):
        self.parameters, self.lr, self.betas, self.eps = list(parameters), lr, betas, eps
        self.weight_decay, self.t = weight_decay, 0
        self.m = [np.zeros_like(getattr(layer, name)) for layer, name in self.parameters]
        self.v = [np.zeros_like(m) for m in self.m]

    def step(self) -> None:
        self.t += 1
        beta1, beta2 = self.betas
        for (layer, name), m, v in zip(self.parameters, self.m, self.v):
            p, g = getattr(layer, name), getattr(layer, f"{name}_grad")
            p *= 1 - self.lr * self.weight_decay
            m += (1 - beta1) * (g - m)
            v += (1 - beta2) * (g * g - v)
            m_hat, v_hat = m / (1 - beta1**self.t), v / (1 - beta2**self.t)
            p -= self.lr * m_hat / (np.sqrt(v_hat) + self.eps)
