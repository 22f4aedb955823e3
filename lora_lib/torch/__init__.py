"""LoRA in PyTorch: inject adapters into a model, train them, save them, merge them."""

from lora_lib.torch.checkpoint import load_adapter, save_adapter
from lora_lib.torch.inject import (inject, lora_modules, lora_parameters, lora_state_dict, merge,
                                   remove, unmerge)
from lora_lib.torch.lora import LoRALayer, LoRALinear

__all__ = ["LoRALayer", "LoRALinear", "inject", "load_adapter", "lora_modules", "lora_parameters",
           "lora_state_dict", "merge", "remove", "save_adapter", "unmerge"]
