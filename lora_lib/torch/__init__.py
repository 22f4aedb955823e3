"""LoRA in PyTorch: inject adapters into a model, train them, save them, merge them."""

from lora_lib.torch.adapters import Adapters
from lora_lib.torch.check import Finding, check
from lora_lib.torch.checkpoint import load_adapter, save_adapter
from lora_lib.torch.experts import LoRAExperts, lora_experts
from lora_lib.torch.gguf_format import save_gguf
from lora_lib.torch.inject import inject, merge, remove, unmerge
from lora_lib.torch.lora import LoRALayer, LoRALinear, shared_input
from lora_lib.torch.nf4 import NF4Linear, quantize
from lora_lib.torch.parts import lora_modules, lora_parameters, lora_state_dict, saved_modules

# The course's rooms beside it; they stand last, since they import what is above.
from lora_lib.models.pretrained import load_pretrained
from lora_lib.models.tales import LanguageModel, LanguageModelConfig
from lora_lib.tuning.evaluation import complete, exact_match, mean_loss
from lora_lib.tuning.loop import cross_entropy, fine_tune, warmup_cosine
from lora_lib.tuning.memory import measure_memory

__all__ = ["Adapters", "Finding", "LanguageModel", "LanguageModelConfig", "LoRAExperts",
           "LoRALayer", "LoRALinear", "NF4Linear", "check", "complete", "cross_entropy",
           "exact_match", "fine_tune", "inject", "load_adapter", "load_pretrained", "lora_experts",
           "lora_modules", "lora_parameters", "lora_state_dict", "mean_loss", "measure_memory",
           "merge", "quantize", "remove", "save_adapter", "save_gguf", "saved_modules",
           "shared_input", "unmerge", "warmup_cosine"]
