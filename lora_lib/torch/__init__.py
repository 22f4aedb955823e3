"""LoRA in PyTorch: inject adapters into a model, train them, save them, merge them."""

from lora_lib.torch.adapters import Adapters
from lora_lib.torch.check import Finding, check
from lora_lib.torch.checkpoint import load_adapter, save_adapter
from lora_lib.torch.inject import (inject, lora_modules, lora_parameters, lora_state_dict, merge,
                                   remove, saved_modules, unmerge)
from lora_lib.torch.language_model import (LanguageModel, LanguageModelConfig, complete,
                                           exact_match, load_pretrained, mean_loss)
from lora_lib.torch.lora import LoRALayer, LoRALinear, shared_input
from lora_lib.torch.memory import measure_memory
from lora_lib.torch.nf4 import NF4Linear, quantize
from lora_lib.torch.training import cross_entropy, fine_tune, warmup_cosine

__all__ = ["Adapters", "Finding", "LanguageModel", "LanguageModelConfig", "LoRALayer", "LoRALinear",
           "NF4Linear", "check", "complete", "cross_entropy", "exact_match", "fine_tune", "inject",
           "load_adapter", "load_pretrained", "lora_modules", "lora_parameters", "lora_state_dict",
           "mean_loss", "measure_memory", "merge", "quantize", "remove", "save_adapter",
           "saved_modules", "shared_input", "unmerge", "warmup_cosine"]
