"""Models and adapters as GGUF files, which llama.cpp and all that is built on it read."""

import os
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_lib.files import atomic
from lora_lib.torch.experts import refuse_experts
from lora_lib.torch.gguf_tokenizer import tokenizer_fields
from lora_lib.torch.linear import is_quantized
from lora_lib.torch.parts import check_bare, has_bias, lora_modules, saved_modules
from lora_lib.torch.tokens import token_rows

# The class in transformers: GGUF's name for it, and whether q and k are kept with pairs together.
# Rope turns pairs of rows in every head of q and k. transformers pairs row i with row i + half;
# llama.cpp does too for some architectures, and pairs row 2 i with row 2 i + 1 for the others.
ARCHITECTURES = {"LlamaForCausalLM": ("llama", True), "MistralForCausalLM": ("llama", True),
                 "Qwen2ForCausalLM": ("qwen2", False), "Qwen3ForCausalLM": ("qwen3", False)}
DTYPES = (torch.float32, torch.float16)


def save_gguf(model: nn.Module, path: str | os.PathLike, *, dtype: torch.dtype = torch.float32,
              tokenizer=None) -> Path:
    """Write the model's adapters, or the whole model, to the GGUF file `path`, for llama.cpp.

    With unmerged adapters in the model, the file holds these alone and goes beside a GGUF of the
    base, quantized or not: `llama-cli -m base.gguf --lora adapter.gguf`. Without any, or with all
    of them merged, it holds the whole model with `tokenizer` (by default `model.tokenizer`) and
    its chat template: `llama-cli -m model.gguf`.

    `dtype` is that of the matrices, float32 or float16; vectors are float32 always. llama.cpp
    scales every adapter by the file's one alpha over its own rank. Where that is not the layer's
    `scaling` (other alphas, rsLoRA), the rest of the factor goes into B, so that the update is the
    same. The file is written whole or not at all, and the model is not changed. Returns the path.

    Raises, before anything is written, ValueError for an architecture that is not in
    `ARCHITECTURES`, a setting, module or tokenizer that GGUF has no place for, a mixture of merged
    and unmerged adapters, a quantized weight in a whole model, a value that is not finite in
    `dtype`; TypeError for a dtype or model that cannot be; FileNotFoundError if the folder does
    not exist, IsADirectoryError if `path` is one; ModuleNotFoundError without the package gguf.
    """
    try:
        import gguf
    except ModuleNotFoundError:
        raise ModuleNotFoundError("save_gguf needs the package gguf: pip install gguf",
                                  name="gguf") from None
    path = Path(path)
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be one of {DTYPES}, got {dtype!r}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected the name of a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} in")
    check_bare(model)
    name, paired = _architecture(model)
    _check_config(model.config, name)
    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        raise TypeError("the model is split over processes: save_adapter() there, then load the "
                        "adapter in one process")
    refuse_experts(model, "save_gguf")
    layers = lora_modules(model)
    merged = {layer.merged for layer in layers.values()}
    if len(merged) > 1:
        raise ValueError("some adapters are merged and some are not: merge() or unmerge() all")
    writer = gguf.GGUFWriter(None, name)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()],
                                     model.config.num_hidden_layers)
    if merged == {False}:
        tensors = _adapter(writer, model, layers, names, paired)
    else:
        tokenizer = tokenizer or getattr(model, "tokenizer", None)
        tensors = _whole(writer, model, layers, names, paired, tokenizer)
    writer.add_file_type(int(gguf.LlamaFileType.ALL_F32 if dtype == torch.float32
                             else gguf.LlamaFileType.MOSTLY_F16))
    tensors = {key: (t, dtype if t.dim() > 1 else torch.float32) for key, t in tensors.items()}
    for key, (t, kept) in tensors.items():
        if not torch.isfinite(t.to(kept)).all():
            raise ValueError(f"{key} holds NaN, infinity, or a number too large for {kept}; "
                             "nothing was saved")
        writer.add_tensor_info(key, t.shape, torch.empty(0, dtype=kept).numpy().dtype,
                               t.numel() * kept.itemsize)
    with atomic(path) as file:
        try:
            writer.write_header_to_file(file)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for t, kept in tensors.values():             # one at a time: no second copy of a model
                writer.write_tensor_data(t.to("cpu", kept).contiguous().numpy())
        finally:
            writer.close()
    return path


def _architecture(model):
    name = type(model).__name__
    if name not in ARCHITECTURES:
        raise ValueError(f"save_gguf cannot write a {name}; it writes {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def _check_config(config, name):
    """What these models may be told to do, and llama.cpp would not."""
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None                                    # a number that nothing reads
    slow = ("linear", "llama3") if name == "llama" else ()
    for key, value, allowed in (("hidden_act", config.hidden_act, ("silu",)),
                                ("sliding_window", window, (None,)),
                                ("rope_type", _rope(config)[0], ("default", *slow))):
        if value not in allowed:
            raise ValueError(f"save_gguf cannot write a {type(config).__name__} with {key} = "
                             f"{value!r}, expected one of {allowed}")


def _rope(config):
    """The kind of rope, and its base: transformers 5 keeps both in one place, 4 in two."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    return kind, rope.get("rope_theta", getattr(config, "rope_theta", 10000.0))


def _head_dim(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _adapter(writer, model, layers, names, paired):
    """The adapter's fields go to `writer`; its tensors by GGUF's names, A (r, k) and B (d, r)."""
    import gguf
    if whole := [*saved_modules(model), *token_rows(model)]:
        raise ValueError("an adapter file has no place for modules trained whole, or rows of them, "
                         f"{whole}: merge(model), then save_gguf(model, ...) writes them all")
    if biased := [name for name, layer in layers.items() if has_bias(layer)]:
        raise ValueError(f"{biased[0]}: an adapter file has no place for a bias of B (lora_bias): "
                         "merge(model), then save_gguf(model, ...)")
    # The alpha with which llama.cpp's alpha / rank is the layer's scaling; zero would mean "off".
    alphas = {name: layer.scaling * layer.rank for name, layer in layers.items()}
    alpha = next((a for a, _ in Counter(alphas.values()).most_common() if a), 1.0)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    tensors = {}
    for name, layer in layers.items():
        if name == "lm_head" and model.config.tie_word_embeddings:
            raise ValueError("lm_head: GGUF's base has no head of its own, since it is tied to the "
                             "embedding; merge(model) writes one")
        key = _name(names, f"{name}.weight")
        A, B = layer.A.detach().float(), layer.B.detach().float() * (alphas[name] / alpha)
        tensors[f"{key}.lora_a"] = A
        tensors[f"{key}.lora_b"] = _rows(name, B, model.config) if paired else B
    return tensors


def _whole(writer, model, layers, names, paired, tokenizer):
    """The model's fields go to `writer`; its tensors by GGUF's names."""
    for name, module in model.named_modules():
        if is_quantized(module) or not all(p.is_floating_point() for p in module.parameters(False)):
            raise ValueError(f"{name} is a {type(module).__name__}, whose weight is quantized: "
                             "save the adapter alone, or merge it into a model in float32")
    if tokenizer is None:
        raise ValueError("a whole model needs its tokenizer: pass tokenizer=..., or set "
                         "model.tokenizer")
    config, tensors = model.config, {}
    for name, p in model.named_parameters():             # a tied head is not named twice
        module, _, leaf = name.rpartition(".")
        if module not in layers:                         # else it is A or B, merged already
            module = module.removesuffix(".linear")
            rows = _rows(module, p.detach(), config) if paired else p.detach()
            tensors[_name(names, f"{module}.{leaf}")] = rows
    factors = _rope_factors(config)
    if factors is not None:
        tensors["rope_freqs.weight"] = factors
    heads, size = config.num_attention_heads, _head_dim(config)
    writer.add_type("model")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(_rope(config)[1])
    rows = len(tensors["token_embd.weight"])
    writer.add_vocab_size(rows)
    tokenizer_fields(writer, tokenizer, rows)
    return tensors


def _name(names, key):
    found = names.get_name(key, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ValueError(f"GGUF has no name for {key}")
    return found


def _rows(name, rows, config):
    """The rows of a q or k with rope's pairs together, (d, ...); those of another as they are."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    heads = heads.get(name.rpartition(".")[2])
    return rows if heads is None else pair(rows, heads)


def pair(rows: Tensor, heads: int) -> Tensor:
    """In every head, row i of the first half and row i of the second side by side, (d, ...)."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _rope_factors(config):
    """By how much each of rope's frequencies is slowed down, (head size / 2,), or None."""
    kind, theta = _rope(config)
    if kind == "default":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    slowed, _ = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    size = _head_dim(config)
    return theta ** (-torch.arange(0, size, 2, dtype=torch.float32) / size) / slowed
