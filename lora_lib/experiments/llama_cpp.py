"""Ask llama.cpp, by the package xllamacpp: what does it answer with a GGUF file?

    python -m lora_lib.experiments.llama_cpp      some minutes on one core

trains an adapter on tool calls, answers requests of the test in PyTorch, and counts the files with
which llama.cpp answers the same. Both bases hold the same numbers. But beside weights in four bits
llama.cpp rounds activations to eight, in blocks of 32; such rounding inside PyTorch is one row.
"""

import json
import os
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn


def connect(gguf: str | os.PathLike, lora: str | os.PathLike | None = None, *,
            context: int = 512) -> Callable[..., dict]:
    """Load a model and perhaps an adapter; returns `ask(path, **body)`, its server's answers.

    On one thread, with keys and values in float32, so that two runs give the same. The server,
    https://github.com/ggml-org/llama.cpp/tree/master/tools/server, lives as long as `ask`.
    """
    try:
        import xllamacpp
    except ModuleNotFoundError:
        raise ModuleNotFoundError("llama.cpp is asked through the package xllamacpp: "
                                  "pip install xllamacpp", name="xllamacpp") from None
    p = xllamacpp.CommonParams()
    p.model.path = os.fspath(gguf)
    if lora is not None:
        p.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(os.fspath(lora), 1.0)]
    p.n_ctx, p.n_parallel, p.n_gpu_layers, p.verbosity = context, 1, 0, -1
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
    p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    p.fit_params = p.warmup = p.ui = p.cache_prompt = False
    server = xllamacpp.Server(p)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(path, **body):
        request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with opener.open(request) as reply:
            return json.load(reply)
    return ask


def answers(gguf: str | os.PathLike, prompts: Sequence[str | list[int]], *,
            lora: str | os.PathLike | None = None, max_new_tokens: int = 32) -> list[str]:
    """The greedy answer to every prompt, a text (with its chat template around it) or token ids."""
    ask = connect(gguf, lora)
    return [ask("/completion", prompt=prompt, n_predict=max_new_tokens, temperature=0)["content"]
            for prompt in prompts]


@contextmanager
def rounded_activations(model: nn.Module, block: int = 32):
    """Round what goes into every linear layer to eight bits, as llama.cpp does beside few bits."""
    def round_input(module, args):
        blocks = args[0].unflatten(-1, (-1, block))
        step = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-20) / 127
        return ((blocks / step).round() * step.half().float()).flatten(-2)

    hooks = [m.register_forward_pre_hook(round_input) for m in model.modules()
             if type(m) is nn.Linear]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def measure(requests: int = 20, steps: int = 24, max_new_tokens: int = 48) -> list[dict]:
    """For every way to serve an adapter, how many greedy answers are PyTorch's in float32."""
    from lora_lib.experiments import assistant
    from lora_lib.experiments.sweep import read
    from lora_lib.models import load_pretrained, smollm2
    from lora_lib.torch import merge, save_gguf
    from lora_lib.tuning.data import encode, prompt_ids
    from lora_lib.tuning.evaluation import replies

    base, model = load_pretrained("smollm2"), assistant.fresh("LoRA", seed=0)
    tokenizer = model.tokenizer
    assistant.train(model, encode(tokenizer, assistant.chats("calls", 400, 0, "train")),
                    lr=assistant.best_lr(read("assistant"), "calls", "LoRA"), steps=steps)
    asked = [assistant.asked(chat) for chat in assistant.chats("calls", requests, 0, "test")]
    ids = [prompt_ids(tokenizer, messages) for messages in asked]
    here = lambda m: replies(m, tokenizer, asked, max_new_tokens=max_new_tokens)
    there = lambda *files: [text.strip() for text in answers(
        files[0], ids, lora=files[1] if files[1:] else None, max_new_tokens=max_new_tokens)]
    with tempfile.TemporaryDirectory() as folder:
        folder, packaged = Path(folder), smollm2.gguf_path()
        bare = save_gguf(base, folder / "base.gguf")
        adapter = save_gguf(model, folder / "adapter.gguf")
        merge(model)
        alone, adapted = here(base), here(model)
        with rounded_activations(model):
            rounded = here(model)
        whole = save_gguf(model, folder / "whole.gguf")
        half = save_gguf(model, folder / "half.gguf", dtype=torch.float16)
        said = {"merged, float32": (there(whole), adapted),
                "merged, float16": (there(half), adapted),
                "adapter beside the base in float32": (there(bare, adapter), adapted),
                "adapter beside the package's base in four bits": (there(packaged, adapter),
                                                                   adapted),
                "PyTorch, merged, activations rounded to eight bits": (rounded, adapted),
                "no adapter, the base in float32": (there(bare), alone),
                "no adapter, the package's base in four bits": (there(packaged), alone)}
    return [{"file": name, "same": sum(a == b for a, b in zip(*both, strict=True)),
             "requests": requests} for name, both in said.items()]


if __name__ == "__main__":
    from lora_lib.experiments.sweep import RESULTS, write
    torch.set_num_threads(1)
    write(RESULTS / "llama_cpp.csv", measure())
