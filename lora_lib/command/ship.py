"""merge and export: an adapter as what other programs run."""

from pathlib import Path

import torch

from lora_lib.command.base import load_adapted
from lora_lib.command.folder import free, whole
from lora_lib.torch import merge as merge_adapters
from lora_lib.torch.gguf_format import save_gguf
from lora_lib.tuning.data import PLAIN


def merge(options) -> int:
    """A folder for AutoModelForCausalLM and AutoTokenizer, with no trace of LoRA."""
    out = Path(options.out)
    free(out, options.force)
    model = load_adapted(Path(options.adapter), options.model, options.device, options.strength)
    merge_adapters(model).to(getattr(torch, options.dtype))
    with whole(out, options.force) as fresh:
        model.save_pretrained(fresh)
        _with_template(model.tokenizer).save_pretrained(fresh)
    print(f"Saved in {out}: {sum(p.numel() for p in model.parameters()):,} numbers in "
          f"{options.dtype}. Ask it: python -m lora_lib chat {out}")
    return 0


def export(options) -> int:
    """A GGUF file of the adapter, or of the whole model."""
    out = Path(options.out)
    free(out, options.force)
    model = load_adapted(Path(options.adapter), options.model, options.device, options.strength)
    if options.merged:
        merge_adapters(model)
    _with_template(model.tokenizer)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_gguf(model, out, dtype=getattr(torch, options.dtype))
    beside = "-m" if options.merged else "-m base.gguf --lora"
    print(f"Saved in {out} ({out.stat().st_size / 1e6:.1f} MB). "
          f"In llama.cpp: llama-cli {beside} {out}")
    return 0


def _with_template(tokenizer):
    """A tokenizer without a chat template was trained with ours, behind its own begin mark."""
    if not getattr(tokenizer, "chat_template", None):
        begins = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + PLAIN
    return tokenizer
