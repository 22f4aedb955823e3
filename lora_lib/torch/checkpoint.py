"""Adapters on disk, in PEFT's own format: adapter_config.json and adapter_model.safetensors."""

import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lora_lib.files import atomic
from lora_lib.torch.inject import (base_modules, inject_each, lora_modules, lora_state_dict,
                                   nearest)
from lora_lib.torch.linear import is_conv1d, is_linear, shape_of, weight_of
from lora_lib.torch.lora import LoRALinear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Settings of PEFT's that change what the adapter computes and that this library has no code for.
UNSUPPORTED = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save",
               "trainable_token_indices", "layer_replication", "target_parameters",
               "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config")

# Initializations of PEFT's that change the base's weights too: the adapter alone is not enough.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def save_adapter(model: nn.Module, path: str | os.PathLike, *,
                 base_model_name_or_path: str | None = None, task_type: str | None = None) -> Path:
    """Write the model's adapters to the folder `path`, for PEFT, vLLM, or `load_adapter`.

    Both files are written whole before either takes its place. The metadata holds a checksum and a
    few values of each adapted weight, by which `load_adapter` knows the base again. Give
    `task_type="CAUSAL_LM"` for PEFT's Auto classes. Returns the folder.

    Raises ValueError if the model has no adapter or one holds NaN or infinity, and FileExistsError
    if `path` is a file.
    """
    layers = lora_modules(model)
    if not layers or "" in layers:
        raise ValueError("the model holds no LoRALinear with a name: there is no adapter to save")
    tensors = {key: t.cpu().contiguous() for key, t in lora_state_dict(model).items()}
    for key, t in tensors.items():
        if not torch.isfinite(t).all():
            raise ValueError(f"{key} holds NaN or infinity; nothing was saved")
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: _plain(layer.alpha) for name, layer in layers.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": _one("dropout", {layer.dropout.p for layer in layers.values()}),
        "use_rslora": _one("use_rslora", {layer.use_rslora for layer in layers.values()}),
        "target_modules": _targets(model, layers),
        # Anchored: PEFT would let "fc" match "block.fc" as well.
        "rank_pattern": {f"^{name}": r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{name}": a for name, a in alphas.items() if a != alpha},
        "bias": "none",
        "fan_in_fan_out": any(is_conv1d(layer.linear) for layer in layers.values()),
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    samples = {name: _sample(layer) for name, layer in layers.items()}
    samples = json.dumps(samples)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with atomic(path / WEIGHTS) as weights, atomic(path / CONFIG) as settings:
        save_file(tensors, weights, {"format": "pt", "lora_lib_base": samples,
                                     "lora_lib_sha256": _digest(tensors, samples)})
        settings.write_text(json.dumps(config, indent=2) + "\n")
    return path


def load_adapter(model: nn.Module, path: str | os.PathLike, *,
                 check_base: bool = True) -> nn.Module:
    """Put the adapter in the folder `path`, saved by PEFT or `save_adapter`, into the model.

    A model without adapters is injected as the files say; one with adapters must have the same
    ones (modules, rank, alpha), whose A and B are replaced. Everything is checked first: on an
    error the model is as it was. Returns the same model.

    `check_base` compares a few values of the base's weights with those that `save_adapter` noted,
    to the precision of bfloat16, and refuses a base that the adapter was not trained on.

    Raises FileNotFoundError for a missing file; ValueError for a corrupt one, a setting that is
    not supported, a wrong shape, a NaN, or a base that does not fit; TypeError for a setting of
    the wrong type, or a module that inject() would refuse.
    """
    path = Path(path)
    config, (tensors, samples) = _read_config(path / CONFIG), _read_weights(path / WEIGHTS)
    parts = _pair(tensors, path / WEIGHTS)
    plan = {name: (_setting(config, "r", "rank_pattern", name),
                   _setting(config, "lora_alpha", "alpha_pattern", name)) for name in parts}
    rslora = bool(config.get("use_rslora", False))
    present = lora_modules(model)
    if present:
        _check_present(present, plan, rslora)
    for name, (A, B) in parts.items():
        _check_fit(model, name, A, B, plan[name][0], samples.get(name) if check_base else None)
    if not present:
        dropout = config.get("lora_dropout", 0.0)
        inject_each(model, plan, dropout, use_rslora=rslora)
    with torch.no_grad():
        for name, layer in lora_modules(model).items():
            layer.A.copy_(parts[name][0])
            layer.B.copy_(parts[name][1])
    return model


def _read_config(file):
    try:
        config = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{file}: expected peft_type 'LORA'")
    for key in ("r", "lora_alpha"):
        if key not in config:
            raise ValueError(f"{file}: {key!r} is missing")
    for key in UNSUPPORTED:
        if config.get(key):
            raise ValueError(f"{file}: {key} = {config[key]!r} is not supported here")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{file}: bias = {config['bias']!r} is not supported, expected 'none'")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
        raise ValueError(f"{file}: init_lora_weights = {init!r} changed the base's weights too; "
                         "let PEFT convert the adapter (path_initial_model_for_weight_conversion)")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise ValueError(f"{file}: {key} must be an object, got {config[key]!r}")
    return config


def _read_weights(file):
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    try:
        with safe_open(file, framework="pt") as f:
            noted = f.metadata() or {}
            tensors = {key: f.get_tensor(key) for key in f.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from error
    samples = noted.get("lora_lib_base", "{}")
    digest = noted.get("lora_lib_sha256")                    # PEFT's own files have none
    if digest is not None and digest != _digest(tensors, samples):
        raise ValueError(f"{file} is damaged: its checksum does not fit its contents")
    return tensors, json.loads(samples)


def _digest(tensors, samples):
    """A checksum of what the file holds; safetensors has none of its own."""
    digest = hashlib.sha256(samples.encode())
    for key, t in sorted(tensors.items()):
        digest.update(f"{key} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _pair(tensors, file):
    """{module path: (A, B)} from PEFT's keys."""
    halves = {}
    for key, t in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if not match or t.ndim != 2 or not t.is_floating_point():
            raise ValueError(f"{file}: {key} {tuple(t.shape)} is not the A or B of a linear layer")
        if not torch.isfinite(t).all():
            raise ValueError(f"{file}: {key} holds NaN or infinity")
        halves.setdefault(match[1], {})[match[2]] = t
    for name, half in halves.items():
        if len(half) != 2:
            raise ValueError(f"{file}: {name} has no lora_{'B' if 'A' in half else 'A'}")
    if not halves:
        raise ValueError(f"{file} holds no adapter")
    return {name: (half["A"], half["B"]) for name, half in halves.items()}


def _setting(config, key, pattern_key, name):
    """PEFT's rule: the first pattern that matches the end of the path, else the common value."""
    for pattern, value in (config.get(pattern_key) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except re.error as error:
            raise ValueError(f"{pattern_key}: {pattern!r} is no regular expression: "
                             f"{error}") from error
    return config[key]


def _check_present(present, plan, rslora):
    if set(present) != set(plan):
        raise ValueError("the model's adapters and the file's differ in "
                         f"{sorted(set(present) ^ set(plan))}; remove() the model's first")
    for name, layer in present.items():
        if layer.merged:
            raise ValueError(f"{name}: the adapter in the model is merged; unmerge() it first")
        if (layer.rank, layer.alpha, layer.use_rslora) != (*plan[name], rslora):
            raise ValueError(
                f"{name}: the model has (rank, alpha, use_rslora) = "
                f"{(layer.rank, layer.alpha, layer.use_rslora)}, the file {(*plan[name], rslora)}")


def _check_fit(model, name, A, B, rank, sample):
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the model has no {name}, which the adapter is for: is it another base? "
                         f"{nearest(model, name)}") from None
    adapted = isinstance(module, LoRALinear)
    if not (adapted or is_linear(module)):
        return                                   # inject_each says what is wrong with it
    out_features, in_features = shape_of(module.linear if adapted else module)
    expected = (rank, in_features), (out_features, rank)
    if (tuple(A.shape), tuple(B.shape)) != expected:
        raise ValueError(f"{name}: A and B have shapes {tuple(A.shape)} and {tuple(B.shape)}, "
                         f"expected {expected[0]} and {expected[1]}")
    if sample is not None:
        there, here = torch.tensor(sample), torch.tensor(_sample(module))
        if not torch.allclose(here, there, rtol=2**-7, atol=1e-3 * float(there.abs().max())):
            raise ValueError(f"{name}: the weight is not the one that the adapter was trained on; "
                             "load the right base, or pass check_base=False if you mean it")


def _sample(layer, count=8):
    """A few values of the base's weight, spread evenly over it."""
    W = (layer.weight if isinstance(layer, LoRALinear) else weight_of(layer)).detach()
    if getattr(layer, "merged", False):
        W = layer.unmerge_weights(W)
    W = W.flatten()
    return [float(v) for v in W[torch.linspace(0, W.numel() - 1, count).long()].float()]


def _targets(model, layers):
    """Short names where they say the same: "q_proj" if every module called that is adapted.

    A name in PEFT's list also stands for each path that ends in it; where that would reach a
    module too many, a regular expression says it exactly.
    """
    modules = base_modules(model)
    everywhere = Counter(name.rpartition(".")[2] for name in modules)
    adapted = Counter(name.rpartition(".")[2] for name in layers)
    names = {leaf if adapted[leaf] == everywhere[leaf] else name
             for name in layers for leaf in [name.rpartition(".")[2]]}
    if any(path.endswith(tuple(f".{name}" for name in names)) for path in modules.keys() - layers):
        return "|".join(map(re.escape, layers))
    return sorted(names)


def _commonest(values):
    return Counter(values.values()).most_common(1)[0][0]


def _one(what, values):
    if len(values) > 1:
        raise ValueError(f"PEFT's format has one {what} for all adapters, the model has "
                         f"{sorted(values)}")
    return values.pop()


def _plain(alpha):
    return int(alpha) if float(alpha).is_integer() else float(alpha)
