"""Adapters on disk, in PEFT's own format: adapter_config.json and adapter_model.safetensors."""

import json
import os
import re
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from lora_lib.files import atomic
from lora_lib.torch.inject import (base_modules, inject_each, lora_modules, lora_state_dict,
                                   nearest, saved_modules)
from lora_lib.torch.linear import full, is_conv1d, is_linear, shape_of, weight_of
from lora_lib.torch.lora import LoRALinear
from lora_lib.torch.peft_format import (CONFIG, WEIGHTS, digest, names_module, read_config,
                                        read_weights, setting, sort)

# Modules that PEFT trains whole, and looks for in the file, under a task_type of their own.
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"),
         "QUESTION_ANS": ("qa_outputs",)}


def save_adapter(model: nn.Module, path: str | os.PathLike, *,
                 base_model_name_or_path: str | None = None, task_type: str | None = None) -> Path:
    """Write the model's adapters and modules to save to `path`, for PEFT, vLLM, `load_adapter`.

    Both files are written whole before either takes its place. The metadata holds a checksum and a
    few values of each adapted weight, by which `load_adapter` knows the base again. Give
    `task_type="CAUSAL_LM"` for PEFT's Auto classes. Returns the folder. In a model that FSDP has
    split, every process must call this; the first one writes.

    Raises ValueError if the model has no adapter, one holds NaN or infinity, or PEFT's file has no
    way to say what it holds, and FileExistsError if `path` is a file.
    """
    layers = lora_modules(model)
    if not layers or "" in layers:
        raise ValueError("the model holds no LoRALinear with a name: there is no adapter to save")
    tensors = {key: t.to("cpu", copy=True).contiguous()      # copies: safetensors refuses tied ones
               for key, t in lora_state_dict(model).items()}
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
        "modules_to_save": _whole(model, task_type) or None,
    }
    samples = {name: _sample(layer) for name, layer in layers.items()}
    samples = json.dumps(samples)
    path = Path(path)
    if any(hasattr(p, "full_tensor") for p in model.parameters()) and torch.distributed.get_rank():
        return path
    path.mkdir(parents=True, exist_ok=True)
    with atomic(path / WEIGHTS) as weights, atomic(path / CONFIG) as settings:
        save_file(tensors, weights, {"format": "pt", "lora_lib_base": samples,
                                     "lora_lib_sha256": digest(tensors, samples)})
        settings.write_text(json.dumps(config, indent=2) + "\n")
    return path


def load_adapter(model: nn.Module, path: str | os.PathLike, *,
                 check_base: bool = True) -> nn.Module:
    """Put the adapter in the folder `path`, saved by PEFT or `save_adapter`, into the model.

    A model without adapters is injected as the files say; one with adapters must have the same
    ones (modules, rank, alpha) and modules to save, whose values are replaced. Everything is
    checked first: on an error the model is as it was. Returns the same model.

    `check_base` compares a few values of the base's weights with those that `save_adapter` noted,
    to the precision of bfloat16, and refuses a base that the adapter was not trained on.

    Raises FileNotFoundError for a missing file; ValueError for a corrupt one, a setting that is
    not supported, a wrong shape, a NaN, or a base that does not fit; TypeError for a setting of
    the wrong type, or a module that inject() would refuse.
    """
    path = Path(path)
    config, (tensors, samples) = read_config(path / CONFIG), read_weights(path / WEIGHTS)
    parts, whole = sort(tensors, config, path / WEIGHTS)
    plan = {name: (setting(config, "r", "rank_pattern", name),
                   setting(config, "lora_alpha", "alpha_pattern", name)) for name in parts}
    rslora = bool(config.get("use_rslora", False))
    present = lora_modules(model)
    if present:
        _check_present(present, plan, rslora, {*saved_modules(model)} ^ {*whole})
    for name, (A, B) in parts.items():
        _check_fit(model, name, A, B, plan[name][0], samples.get(name) if check_base else None)
    for name, state in whole.items():
        _check_whole(model, name, state)
    _check_complete(model, config, {*parts, *whole})
    if not present:
        dropout = config.get("lora_dropout", 0.0)
        inject_each(model, plan, dropout, modules_to_save=whole, use_rslora=rslora)
    with torch.no_grad():
        for name, layer in lora_modules(model).items():
            layer.A.copy_(parts[name][0])
            layer.B.copy_(parts[name][1])
    for name, state in whole.items():
        model.get_submodule(name).load_state_dict(state)
    return model


def _check_present(present, plan, rslora, whole):
    if differ := {*present} ^ {*plan} | whole:
        raise ValueError("the model's adapters and modules to save and the file's differ in "
                         f"{sorted(differ)}; remove() the model's first")
    for name, layer in present.items():
        if layer.merged:
            raise ValueError(f"{name}: the adapter in the model is merged; unmerge() it first")
        if hasattr(layer.A, "full_tensor"):
            raise ValueError(f"{name} is split over processes: load_adapter() first, then "
                             "fully_shard()")
        if (layer.rank, layer.alpha, layer.use_rslora) != (*plan[name], rslora):
            raise ValueError(
                f"{name}: the model has (rank, alpha, use_rslora) = "
                f"{(layer.rank, layer.alpha, layer.use_rslora)}, the file {(*plan[name], rslora)}")


def _module(model, name):
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the model has no {name}, which the adapter is for: is it another base? "
                         f"{nearest(model, name)}") from None


def _check_whole(model, name, state):
    expected = {key: tuple(t.shape) for key, t in _module(model, name).state_dict().items()}
    found = {key: tuple(t.shape) for key, t in state.items()}
    for key in sorted(expected.keys() | found):
        if expected.get(key) != found.get(key):
            raise ValueError(f"modules_to_save: {name}.{key} has shape {found.get(key)} in the "
                             f"file, expected {expected.get(key)}")


def _check_complete(model, config, found):
    """What else the configuration names in this model, such as the layers of a deeper base."""
    whole = tuple(config.get("modules_to_save") or ())
    names = {name for name in base_modules(model) if name.endswith(whole)
             or not config.get("layers_to_transform")
             and names_module(config, "target_modules", name)
             and not names_module(config, "exclude_modules", name)}
    more = sorted(name for name in names - found
                  if not any(f"{name}.".startswith(f"{path}.") for path in found))
    if more:
        raise ValueError(f"the configuration names {len(more)} modules of this model for which the "
                         f"file holds nothing, such as {more[0]}: is it another base?")


def _check_fit(model, name, A, B, rank, sample):
    module = _module(model, name)
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
    W = full(W).flatten()
    return [float(v) for v in W[torch.linspace(0, W.numel() - 1, count).long()].float()]


def _targets(model, layers):
    """Short names where they say the same: "q_proj" if every module called that is adapted.

    A name in PEFT's list also stands for each path that ends in it; where that would reach a
    module too many, a regular expression says it exactly.
    """
    whole = tuple(f"{name}." for name in saved_modules(model))    # PEFT puts no adapter in these
    modules = {n for n in base_modules(model) if not f"{n}.".startswith(whole)}
    everywhere = Counter(name.rpartition(".")[2] for name in modules)
    adapted = Counter(name.rpartition(".")[2] for name in layers)
    names = {leaf if adapted[leaf] == everywhere[leaf] else name
             for name in layers for leaf in [name.rpartition(".")[2]]}
    if any(path.endswith(tuple(f".{name}" for name in names)) for path in modules - layers.keys()):
        return "|".join(map(re.escape, layers))
    return sorted(names)


def _whole(model, task_type):
    """The paths of the modules to save. In PEFT's list each stands for all paths that end so."""
    names = list(saved_modules(model))
    ends = (*names, *HEADS.get(task_type, ()))
    more = [n for n in base_modules(model) if n not in names and n.endswith(ends)]
    if more:
        raise ValueError(f"PEFT would look for {more} in the file, since it trains whole every "
                         f"module whose path ends in one of {ends}: name those in modules_to_save "
                         "too" + (", or leave task_type out" if task_type in HEADS else ""))
    return names


def _commonest(values):
    return Counter(values.values()).most_common(1)[0][0]


def _one(what, values):
    if len(values) > 1:
        raise ValueError(f"PEFT's format has one {what} for all adapters, the model has "
                         f"{sorted(values)}")
    return values.pop()


def _plain(alpha):
    return int(alpha) if float(alpha).is_integer() else float(alpha)
