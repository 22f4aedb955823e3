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
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lora_lib.files import atomic
from lora_lib.torch.experts import (LoRAExperts, find_parameters, lora_experts, nested,
                                    shortest_names)
from lora_lib.torch.inject import (all_adapters, bare_path, base_modules, check_bare, few,
                                   inject_each, lora_modules, lora_state_dict, nearest, remove,
                                   saved_modules, within)
from lora_lib.torch.linear import (full, is_conv1d, is_linear, is_quantized, shape_of, stored,
                                   weight_of)
from lora_lib.torch.lora import LoRALinear
from lora_lib.torch.peft_format import (CONFIG, WEIGHTS, check_patterns, digest, names_module,
                                        read_config, read_weights, settings, sort)

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
    the file, and writes one alpha, so that every reader means the same.

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
        "modules_to_save": _whole(model, task_type) or None,
    }
    samples = {name: _sample(layer) for name, layer in layers.items()}
    samples |= {bare(name): _sample(module) for name, module in _ends(model).items()}
    samples = json.dumps(samples)
    path = Path(path)
    if any(hasattr(p, "full_tensor") for p in model.parameters()) and torch.distributed.get_rank():
        return path
    path.mkdir(parents=True, exist_ok=True)
    with atomic(path / WEIGHTS) as weights, atomic(path / CONFIG) as written:
        save_file(tensors, weights, {"format": "pt", "lora_lib_base": samples,
                                     "lora_lib_sha256": digest(tensors, samples)})
        written.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return path


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
    Embeddings in PEFT's files, kept since there are new tokens, become modules to save.

    Raises FileNotFoundError for a missing file; ValueError for a corrupt one, a setting that is
    not supported, a wrong shape, a NaN, or a base that does not fit; TypeError for a setting of
    the wrong type, or a module that inject() would refuse.
    """
    path = Path(path)
    config, (tensors, samples) = read_config(path / CONFIG), read_weights(path / WEIGHTS)
    check_bare(model)
    parts, whole, copies = sort(tensors, config, path / WEIGHTS, _embeddings(model))
    modules, targets = base_modules(model), config.get("target_parameters") or ()
    parameters = find_parameters(modules, targets)
    keys = nested(parameters, modules)
    if lost := [name for name, key in keys.items() if key not in parts]:
        raise ValueError(f"target_parameters names {few(lost)}, for which the file holds nothing: "
                         "is it another base?")
    held = {name: parts.pop(key) for name, key in keys.items()}
    parts, whole = _by_own_path(model, parts) | held, _by_own_path(model, whole)
    check_patterns(config, {*base_modules(model), *parts}, path / CONFIG)
    ranks = settings(config, "r", "rank_pattern", parts)
    alphas = settings(config, "lora_alpha", "alpha_pattern", parts)
    plan = {name: (ranks[name], alphas[name]) for name in parts}
    rslora = bool(config.get("use_rslora", False))
    present = all_adapters(model)
    if present:
        _check_present(present, plan, rslora, {*saved_modules(model)} ^ {*whole})
    for name, (A, B) in parts.items():
        check = _check_parameter if name in parameters else _check_fit
        check(model, name, A, B, plan[name][0], samples.get(name) if check_base else None)
    for name, state in whole.items():
        _check_whole(model, name, state)
    _check_complete(model, config, {*parts, *whole})
    for name, module in _ends(model).items():
        if check_base and name not in parts and not within(name, whole):
            _check_same(name, _sample(module), samples.get(name), "neither in the file nor the one at "
                        "saving (a new head, new tokens: name it in modules_to_save to train)")
    for name, t in copies.items() if check_base else ():
        _check_same(name, _spread(t), _sample(_module(model, name)), "not the one in the file")
    if not present:
        dropout = config.get("lora_dropout", 0.0)
        inject_each(model, plan, dropout, parameters=parameters, modules_to_save=whole,
                    use_rslora=rslora, loading=True)
    layers = all_adapters(model)
    if gone := [name for name, layer in layers.items() if layer.A.is_meta]:
        if not present:
            remove(model)
        raise ValueError(f"{few(gone)}: A and B are on the meta device, where values are lost; load "
                         "the base's weights first")
    with torch.no_grad():
        for name, layer in layers.items():
            A, B = parts[name]
            A, B = layer.from_file(A, B) if name in parameters else (A, B)
            layer.A.copy_(A)
            layer.B.copy_(B)
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


def _by_own_path(model, found):
    """The same by the paths of `named_modules`: others lead to a module too, such as a property."""
    paths, own = {id(module): name for name, module in model.named_modules()}, {}
    for name, held in found.items():
        try:
            path = paths.get(id(model.get_submodule(name)))
        except AttributeError:                       # _module says so
            path = name
        if path is None or path in own:
            raise ValueError(f"the file names {name}, which is " + (
                "no part of the model" if path is None else f"{path} once more"))
        own[path] = held
    return own


def _check_whole(model, name, state):
    there = _module(model, name).state_dict()
    expected = {key: tuple(t.shape) for key, t in there.items()}
    found = {key: tuple(t.shape) for key, t in state.items()}
    for key in sorted(expected.keys() | found):
        if expected.get(key) != found.get(key):
            hint = ("; call model.resize_token_embeddings() as was done for the training"
                    if name in _embeddings(model) else "")
            raise ValueError(f"modules_to_save: {name}.{key} has shape {found.get(key)} in the "
                             f"file, expected {expected.get(key)}{hint}")
        t, like = state[key], there[key]
        if t.dtype != like.dtype and not (t.is_floating_point() and like.is_floating_point()):
            raise ValueError(f"modules_to_save: {name}.{key} is {t.dtype} in the file, expected "
                             f"{like.dtype}")
        if t.is_floating_point() and not t.is_meta and not torch.isfinite(t.to(like.dtype)).all():
            raise ValueError(f"modules_to_save: {name}.{key} is too large for {like.dtype}")


def _check_complete(model, config, found):
    """What else the configuration names in this model, such as the layers of a deeper base."""
    whole = tuple(config.get("modules_to_save") or ())
    names = {name for name in base_modules(model) if name.endswith(whole)
             or not config.get("layers_to_transform")
             and names_module(config, "target_modules", name)
             and not names_module(config, "exclude_modules", name)}
    more = sorted(name for name in names - found if not within(name, found))
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
    _check_same(name, _sample(module), sample, "not the one that the adapter was trained on")


def _check_parameter(model, name, A, B, rank, sample):
    path, _, leaf = name.rpartition(".")
    module, part = model.get_submodule(path), lora_experts(model).get(name)
    W = part.original if part else module._parameters[leaf]
    if W.ndim not in (2, 3):
        return                                   # LoRAExperts says what is wrong with it
    experts = len(W) if W.ndim == 3 else 1
    d, k = W.shape[-2:]
    if W.ndim == 3 and getattr(module, "is_transposed", False):
        d, k = k, d
    expected = (rank * experts, k), (d, rank * experts)
    if (tuple(A.shape), tuple(B.shape)) != expected:
        raise ValueError(f"{name}: A and B have shapes {tuple(A.shape)} and {tuple(B.shape)}, "
                         f"expected {expected[0]} and {expected[1]} for {experts} experts")
    _check_same(name, _sample(part or W), sample, "not the one that the adapter was trained on")


def _check_same(name, here, there, what):
    """Raise ValueError if two samples of a weight differ by more than bfloat16's rounding."""
    if here is None or there is None:
        return
    here, there = torch.tensor(here), torch.tensor(there)
    if here.shape != there.shape or not torch.allclose(
            here, there, rtol=2**-7, atol=1e-3 * float(there.abs().max())):
        raise ValueError(f"{name}: the weight is {what}; load the right base, or pass "
                         "check_base=False if you mean it")


def _sample(module):
    """A few values of the base's weight, or None: keeping an adapter must not fail for them."""
    try:
        if isinstance(module, Tensor | LoRAExperts):
            W = getattr(module, "original", module).detach()
            W = module.unmerge_weights(W) if getattr(module, "merged", False) else W
            return _spread(W.reshape(-1, W.shape[-1]))
        layer = module.linear if isinstance(module, LoRALinear) else module
        W = weight_of(layer) if is_quantized(layer) else full(stored(layer, "weight"))
        W = W.detach().T if is_conv1d(layer) else W.detach()
        if getattr(module, "merged", False):
            W = module.unmerge_weights(W)
        return _spread(W)
    except Exception:                            # a class of tensor that nobody here knows
        return None


def _spread(W, count=8):
    """`count` values, spread evenly over a matrix; None where there are no plain numbers."""
    if W.is_meta or not W.numel() or not W.is_floating_point():
        return None
    rows, columns = zip(*(divmod(i * (W.numel() - 1) // (count - 1), W.shape[1])
                          for i in range(count)))
    values = W[list(rows), list(columns)].float()
    return values.tolist() if torch.isfinite(values).all() else None


def _embeddings(model):
    """The paths of the input and output embeddings of a model of transformers."""
    found = []
    for kind in ("input", "output"):
        try:
            found.append(getattr(model, f"get_{kind}_embeddings", lambda: None)())
        except NotImplementedError:              # a model of images or sound has none
            pass
    return {name for name, m in base_modules(model).items() if any(m is f for f in found)}


def _ends(model):
    """Embeddings, and linear layers outside the numbered blocks, without an adapter, by path.

    They are where a model is not its base: rows for new tokens, a new head.
    """
    whole = saved_modules(model)
    return {name: m for name, m in base_modules(model).items()
            if not any(part.isdigit() for part in name.split(".")) and not within(name, whole)
            and not is_parametrized(m)
            and (isinstance(m, nn.Embedding) or is_linear(m) and not is_quantized(m))}


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


def _commonest(values):
    return Counter(values.values()).most_common(1)[0][0]


def _one(what, values):
    if len(values) > 1:
        raise ValueError(f"PEFT's format has one {what} for all adapters, the model has "
                         f"{sorted(values)}")
    return values.pop()


def _plain(alpha):
    return int(alpha) if float(alpha).is_integer() else float(alpha)
