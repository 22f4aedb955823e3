"""LoRA in PyTorch: inject adapters into a model, train them, save them, merge them."""

from lora_lib.torch.checkpoint import load_adapter, save_adapter
from lora_lib.torch.inject import (inject, lora_modules, lora_parameters, lora_state_dict, merge,
                                   remove, unmerge)
from lora_lib.torch.lora import LoRALayer, LoRALinear
from lora_lib.torch.memory import measure_memory
from lora_lib.torch.training import cross_entropy, fine_tune, warmup_cosine

__all__ = ["LoRALayer", "LoRALinear", "cross_entropy", "fine_tune", "inject", "load_adapter",
           "lora_modules", "lora_parameters", "lora_state_dict", "measure_memory", "merge",
           "remove", "save_adapter", "unmerge", "warmup_cosine"]
