"""Adapters on disk, in PEFT's own format: adapter_config.json and adapter_model.safetensors."""

import json
import os
import re
import warnings
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from lora_lib.files import atomic
from lora_lib.torch.experts import find_parameters, lora_experts, nested, shortest_names
from lora_lib.torch.fit import (by_own_path, check_complete, check_layer, check_parameter,
                                check_present, check_present_rows, check_rest, check_shared,
                                check_whole, module_at, rows_for)
from lora_lib.torch.inject import inject_each, remove
from lora_lib.torch.linear import is_conv1d
from lora_lib.torch.parts import (all_adapters, bare_path, check_bare, has_bias, lora_modules,
                                  lora_state_dict, saved_modules)
from lora_lib.torch.peft_format import (CONFIG, HALVES, PREFIX, WEIGHTS, check_patterns, digest,
                                        read_config, read_weights, settings, sort,
                                        taken_for_experts)
from lora_lib.torch.samples import check_same, embeddings, ends, sample, sample_rows, spread
from lora_lib.torch.targets import base_modules, few, within
from lora_lib.torch.tokens import find_rows, saved_rows, token_rows

# Modules that PEFT trains whole, and looks for in the file, under a task_type of their own.
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"),
         "QUESTION_ANS": ("qa_outputs",)}


def save_adapter(model: nn.Module, path: str | os.PathLike, *,
                 base_model_name_or_path: str | None = None, task_type: str | None = None,
                 one_scaling: bool = False) -> Path:
    """Write the model's adapters and modules to save to `path`, for PEFT, vLLM, `load_adapter`.

    Both files are written whole before either takes its place. The metadata holds a checksum and a
    few values of each adapted weight, of the embeddings and of the heads, by which `load_adapter`
    knows the base again; null for a weight that cannot be read (offloaded, or another library's
    codes). Give `task_type="CAUSAL_LM"` for PEFT's Auto classes. Returns the folder. In a model that
    FSDP has split, every process must call this; the first one writes.

    vLLM takes one factor for all layers, lora_alpha / r, and llama.cpp lora_alpha over the layer's
    own rank. Where layers differ in it a warning says so; `one_scaling` multiplies their B's in
    the file, and writes one alpha, so that every reader means the same. Other warnings tell the
    size of a file of megabytes that is mostly embeddings, trained whole, and name adapters that PEFT
    loses when it loads.

    Raises ValueError if the model has no adapter, one holds NaN or infinity, or PEFT's file has no
    way to say what it holds, and FileExistsError if `path` is a file.
    """
    bare = bare_path(model)
    layers = {bare(name): layer for name, layer in all_adapters(model).items()}
    experts = {bare(name) for name in lora_experts(model)}
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
    rslora = _one("use_rslora", {layer.use_rslora for layer in layers.values()})
    if one_scaling:
        if experts:
            raise ValueError(f"one_scaling: {few(experts)} have adapters of parameters "
                             "(target_parameters), which are not folded here")
        rank, alpha = _fold(tensors, layers)
        ranks, alphas, rslora = {}, {}, False
    elif any(alpha / r != layer.alpha / layer.rank for layer in layers.values()
             for r in (rank, layer.rank)):
        warnings.warn("the layers differ in alpha / rank or in rank. PEFT and load_adapter read it "
                      "right; vLLM takes one factor for all, llama.cpp one alpha: save with "
                      "one_scaling=True for them", stacklevel=2)
    modules = {bare(name): module for name, module in base_modules(model).items()}
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": _one("dropout", {0.0 if name in experts else layer.dropout.p
                                         for name, layer in layers.items()}),
        "use_rslora": rslora,
        "target_modules": _targets(model, {n: m for n, m in layers.items() if n not in experts}),
        "target_parameters": shortest_names(modules, experts) or None,
        # Regular expressions, anchored: PEFT would let "fc" match "block.fc" as well.
        "rank_pattern": {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(name)}": a for name, a in alphas.items() if a != alpha},
        "bias": "none",
        "fan_in_fan_out": any(is_conv1d(layer.linear) for layer in
                              lora_modules(model).values()),
        "init_lora_weights": True,
        "lora_bias": _one("lora_bias", {has_bias(layer) for layer in layers.values()}),
        "modules_to_save": _whole(model, task_type) or None,
        "trainable_token_indices": _tokens(model) or None,
    }
    samples = {name: sample(layer) for name, layer in layers.items()}
    samples |= {bare(name): sample(module) for name, module in ends(model).items()}
    for name, part in token_rows(model).items():
        W = part.original
        samples[bare(name)] = sample_rows(W, dict(zip(part.tokens.tolist(), part.rows.detach())))
        samples[f"{bare(name)}.rows"] = [len(W)]
    samples = json.dumps(samples)
    path = Path(path)
    _warn_of_size(tensors, model)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if lost := taken_for_experts(model_type, layers.keys() - experts):
        warnings.warn(f"PEFT will lose the adapters of {few(sorted(lost))}, or not load the file: in "
                      f"{model_type} it takes their names for those of experts' parameters. "
                      "load_adapter reads them; for PEFT, leave them out (exclude_modules)",
                      stacklevel=2)
    if any(hasattr(p, "full_tensor") for p in model.parameters()) and torch.distributed.get_rank():
        return path
    path.mkdir(parents=True, exist_ok=True)
    with atomic(path / WEIGHTS) as weights, atomic(path / CONFIG) as written:
        save_file(tensors, weights, {"format": "pt", "lora_lib_base": samples,
                                     "lora_lib_sha256": digest(tensors, samples)})
        written.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return path


def _warn_of_size(tensors, model):
    """Say so if embeddings that are trained whole make a file of megabytes what it is."""
    bare, ends = bare_path(model), embeddings(model)
    large = [name for name, module in saved_modules(model).items()
             if isinstance(module, nn.Embedding) or name in ends]
    total = sum(t.nbytes for t in tensors.values())
    size = sum(t.nbytes for key, t in tensors.items()
               if key.startswith(tuple(f"{PREFIX}{bare(name)}." for name in large)))
    if size > max(total / 2, 2**20):
        warnings.warn(f"{size / 1e6:.1f} of the file's {total / 1e6:.1f} MB are {few(large)}, trained "
                      "whole. If only new tokens matter, inject(trainable_token_indices=[...]) "
                      "trains and saves their rows alone", stacklevel=3)


def _fold(tensors, layers):
    """Make all layers of one rank and one scaling, in place: zeros in A, factors in B."""
    rank = max(layer.rank for layer in layers.values())
    scaling = _commonest({name: layer.scaling for name, layer in layers.items()})
    for name, layer in layers.items():
        key, more = f"base_model.model.{name}.lora_{{}}.weight", rank - layer.rank
        A, B = (tensors[key.format(part)] for part in "AB")
        if layer.scaling != scaling:
            B = (B.double() * (layer.scaling / scaling)).to(B.dtype)
        tensors[key.format("A")] = F.pad(A, (0, 0, 0, more))
        tensors[key.format("B")] = F.pad(B, (0, more))
        if has_bias(layer):
            tensors[f"{PREFIX}{name}.{HALVES['B_bias']}"] *= layer.scaling / scaling
    return rank, _plain(scaling * rank)


def load_adapter(model: nn.Module, path: str | os.PathLike, *,
                 check_base: bool = True) -> nn.Module:
    """Put the adapter in the folder `path`, saved by PEFT or `save_adapter`, into the model.

    A model without adapters is injected as the files say; one with adapters must have the same
    ones (modules, rank, alpha) and modules to save, whose values are replaced. Everything is
    checked first: on an error the model is as it was. Returns the same model.

    `check_base` compares a few values of the base's weights with those that `save_adapter` noted,
    to the precision of bfloat16, and refuses a base that the adapter was not trained on: another
    model, or one with a new classifier's head of its own, or with other rows for new tokens.
    Embeddings in PEFT's files, kept since there are new tokens, become modules to save. Rows of
    tokens (trainable_token_indices) need a model that has these rows; it may have more.

    Raises FileNotFoundError for a missing file; ValueError for a corrupt one, a setting that is
    not supported, a wrong shape, a NaN, or a base that does not fit; TypeError for a setting of
    the wrong type, or a module that inject() would refuse.
    """
    path = Path(path)
    config, (tensors, samples) = read_config(path / CONFIG), read_weights(path / WEIGHTS)
    check_bare(model)
    held = sort(tensors, config, path / WEIGHTS, embeddings(model))
    parts, copies = held.parts, held.copies
    modules, targets = base_modules(model), config.get("target_parameters") or ()
    parameters = find_parameters(modules, targets, loading=True)
    keys = nested(parameters, modules)
    if lost := [name for name, key in keys.items() if key not in parts]:
        raise ValueError(f"target_parameters names {few(lost)}, for which the file holds nothing: "
                         "is it another base?")
    experts = {name: parts.pop(key) for name, key in keys.items()}
    parts, whole = by_own_path(model, parts) | experts, by_own_path(model, held.whole)
    tokens = find_rows(model, modules, config.get("trainable_token_indices") or ())
    rows = rows_for(model, tokens, by_own_path(model, held.rows), path / WEIGHTS)
    check_patterns(config, {*base_modules(model), *parts}, path / CONFIG)
    ranks = settings(config, "r", "rank_pattern", parts)
    alphas = settings(config, "lora_alpha", "alpha_pattern", parts)
    plan = {name: (ranks[name], alphas[name]) for name in parts}
    rslora = bool(config.get("use_rslora", False))
    biased = bool(config.get("lora_bias", False))
    present = all_adapters(model)
    if present:
        check_present(present, plan, rslora, biased, {*saved_modules(model)} ^ {*whole})
        check_present_rows(token_rows(model), tokens)
    for name, part in parts.items():
        check = check_parameter if name in parameters else check_layer
        check(model, name, part, plan[name][0], samples.get(name) if check_base else None)
    for name, state in whole.items():
        check_whole(model, name, state)
    check_shared(model, whole)
    check_complete(model, config, {*parts, *whole})
    for name in rows if check_base else ():
        check_rest(model, name, tokens[name], rows[name], samples)
    for name, module in ends(model).items():
        if check_base and name not in {*parts, *rows} and not within(name, whole):
            check_same(name, sample(module), samples.get(name), "neither in the file nor the one at "
                       "saving (a new head: name it in modules_to_save to train; new tokens: in "
                       "trainable_token_indices)")
    for name, t in copies.items() if check_base else ():
        check_same(name, spread(t), sample(module_at(model, name)), "not the one in the file")
    if not present:
        dropout = config.get("lora_dropout", 0.0)
        inject_each(model, plan, dropout, parameters=parameters, modules_to_save=whole,
                    rows=tokens, use_rslora=rslora, loading=True,
                    **({"lora_bias": True} if biased else {}))
    layers = all_adapters(model)
    if gone := [name for name, layer in layers.items() if layer.A.is_meta]:
        if not present:
            remove(model)
        raise ValueError(f"{few(gone)}: A and B are on the meta device, where values are lost; load "
                         "the base's weights first")
    with torch.no_grad():
        for name, layer in layers.items():
            part = parts[name]
            if name in parameters:
                part = dict(zip("AB", layer.from_file(part["A"], part["B"])))
            for half, t in part.items():
                getattr(layer, half).copy_(t)
        for name, rows_here in token_rows(model).items():
            rows_here.rows.copy_(rows[name])
    for name, state in whole.items():
        model.get_submodule(name).load_state_dict(state)
    return model


def _targets(model, layers):
    """Short names where they say the same: "q_proj" if every module called that is adapted.

    A name in PEFT's list also stands for each path that ends in it; where that would reach a
    module too many, a regular expression says it exactly.
    """
    bare = bare_path(model)
    whole = saved_modules(model)                     # PEFT puts no adapter in these
    modules = {bare(n) for n in base_modules(model) if not within(n, whole)}
    everywhere = Counter(name.rpartition(".")[2] for name in modules)
    adapted = Counter(name.rpartition(".")[2] for name in layers)
    names = {leaf if adapted[leaf] == everywhere[leaf] else name
             for name in layers for leaf in [name.rpartition(".")[2]]}
    if any(_ends_in(path, names) for path in modules - layers.keys()):
        return "|".join(map(re.escape, layers))
    return sorted(names)


def _ends_in(path, names):
    """Whether a name is the end of the path, and not all of it."""
    parts = path.split(".")
    return any(".".join(parts[i:]) in names for i in range(1, len(parts)))


def _whole(model, task_type):
    """The paths of the modules to save. In PEFT's list each stands for all paths that end so."""
    bare = bare_path(model)
    names = [bare(name) for name in saved_modules(model)]
    ends = (*names, *HEADS.get(task_type, ()))
    more = [n for n in map(bare, base_modules(model)) if n not in names and n.endswith(ends)]
    if more:
        raise ValueError(f"PEFT would look for {more} in the file, since it trains whole every "
                         f"module whose path ends in one of {ends}: name those in modules_to_save "
                         "too" + (", or leave task_type out" if task_type in HEADS else ""))
    return names


def _tokens(model):
    """{path: tokens}, as PEFT's setting. In it each path stands for all that end so."""
    bare = bare_path(model)
    found = {bare(name): part.tokens.tolist() for name, part in saved_rows(model).items()}
    if more := [n for n in map(bare, base_modules(model))
                if n not in found and n.endswith((*found,))]:
        raise ValueError(f"PEFT would train rows of {more[0]} too, whose path ends in the same")
    return found


def _commonest(values):
    return Counter(values.values()).most_common(1)[0][0]


def _one(what, values):
    if len(values) > 1:
        raise ValueError(f"PEFT's format has one {what} for all adapters, the model has "
                         f"{sorted(values)}")
    return values.pop()


def _plain(alpha):
    return int(alpha) if float(alpha).is_integer() else float(alpha)
