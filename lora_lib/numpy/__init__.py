"""LoRA and a small network in NumPy, to be read beside the equations."""

from lora_lib.numpy.lora import LoRALayer, LoRALinear
from lora_lib.numpy.network import (Linear, Network, ReLU, freeze, inject, merge, mlp,
                                    softmax_cross_entropy)
from lora_lib.numpy.optim import SGD, Adam
from lora_lib.numpy.training import accuracy, train

__all__ = ["Adam", "Linear", "LoRALayer", "LoRALinear", "Network", "ReLU", "SGD", "accuracy",
           "freeze", "inject", "merge", "mlp", "softmax_cross_entropy", "train"]
