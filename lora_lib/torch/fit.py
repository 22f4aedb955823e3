"""Does an adapter's file fit a model? Each check raises ValueError, before anything is changed."""

import torch

from lora_lib.torch.experts import lora_experts
from lora_lib.torch.linear import is_linear, shape_of
from lora_lib.torch.lora import LoRALinear
from lora_lib.torch.parts import has_bias
from lora_lib.torch.peft_format import names_module
from lora_lib.torch.samples import check_same, embeddings, sample, sample_rows
from lora_lib.torch.targets import base_modules, nearest, within
from lora_lib.torch.tokens import frozen_weight, named_for_peft


def check_present(present, plan, rslora, biased, whole):
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
        if has_bias(layer) != biased:
            raise ValueError(f"{name}: the model has lora_bias={has_bias(layer)}, the file "
                             f"{biased}")


def rows_for(model, tokens, found, file):
    """The rows in the file by the paths in `tokens`: of one weight the file may hold them twice."""
    names = {id(frozen_weight(model.get_submodule(name))): name for name in tokens}
    rows = {}
    for path, t in found.items():
        W = frozen_weight(module_at(model, path))
        name = names.get(id(W))
        if name is None:
            raise ValueError(f"{file} holds rows of {path}, which the configuration's "
                             "trainable_token_indices does not name")
        if t.shape != (len(tokens[name]), W.shape[-1]):
            raise ValueError(f"{path}: the trained rows have shape {tuple(t.shape)}, expected "
                             f"{(len(tokens[name]), W.shape[-1])}")
        if not torch.equal(rows.setdefault(name, t), t):
            raise ValueError(f"{name} and {path} share one weight, and the file has other rows for "
                             "each")
    for name in tokens:
        if lacking := [path for path in named_for_peft(model, name) if path not in found]:
            raise ValueError(f"{file} holds no rows of {lacking[0]}, to which its "
                             "trainable_token_indices apply in this model")
    return rows


def check_present_rows(present, tokens):
    if {name: part.tokens.tolist() for name, part in present.items()} != tokens:
        raise ValueError(f"the model has trained rows of {[*present]} and the file of {[*tokens]}, "
                         "or of other tokens; remove() the model's first")
    if merged := [name for name, part in present.items() if part.merged]:
        raise ValueError(f"{merged[0]}: the rows in the model are merged; unmerge() them first")


def check_rest(model, name, tokens, values, samples):
    """The embedding's other rows are the base's; the model may have more of them than the file."""
    W, count = frozen_weight(model.get_submodule(name)), samples.get(f"{name}.rows")
    if not count or W.ndim != 2:
        return                                   # PEFT's file, or TokenRows says what is wrong
    if len(W) < count[0]:
        raise ValueError(f"{name}: the weight has {len(W)} rows, expected {count[0]}: call "
                         "model.resize_token_embeddings() as was done for the training")
    here = sample_rows(W[:int(count[0])], dict(zip(tokens, values)))
    check_same(name, here, samples.get(name), "not the one that the rows were trained in")


def module_at(model, name):
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the model has no {name}, which the adapter is for: is it another base? "
                         f"{nearest(model, name)}") from None


def by_own_path(model, found):
    """The same by the paths of `named_modules`: others lead to a module too, such as a property."""
    paths, own = {id(module): name for name, module in model.named_modules()}, {}
    for name, held in found.items():
        try:
            path = paths.get(id(model.get_submodule(name)))
        except AttributeError:                       # module_at says so
            path = name
        if path is None or path in own:
            raise ValueError(f"the file names {name}, which is " + (
                "no part of the model" if path is None else f"{path} once more"))
        own[path] = held
    return own


def check_whole(model, name, state):
    there = module_at(model, name).state_dict()
    expected = {key: tuple(t.shape) for key, t in there.items()}
    found = {key: tuple(t.shape) for key, t in state.items()}
    for key in sorted(expected.keys() | found):
        if expected.get(key) != found.get(key):
            hint = ("; call model.resize_token_embeddings() as was done for the training"
                    if name in embeddings(model) else "")
            raise ValueError(f"modules_to_save: {name}.{key} has shape {found.get(key)} in the "
                             f"file, expected {expected.get(key)}{hint}")
        t, like = state[key], there[key]
        if t.dtype != like.dtype and not (t.is_floating_point() and like.is_floating_point()):
            raise ValueError(f"modules_to_save: {name}.{key} is {t.dtype} in the file, expected "
                             f"{like.dtype}")
        if t.is_floating_point() and not t.is_meta and not torch.isfinite(t.to(like.dtype)).all():
            raise ValueError(f"modules_to_save: {name}.{key} is too large for {like.dtype}")


def check_shared(model, whole):
    """Of a weight that two modules to save share, the file holds one; PEFT may train two apart."""
    first = {}
    for name, state in whole.items():
        for key, p in model.get_submodule(name).named_parameters():
            other, t = first.setdefault(id(p), (name, state[key]))
            if not torch.equal(t, state[key]):
                raise ValueError(f"modules_to_save: {other} and {name} share {key} in this model, "
                                 "and the file holds another for each: load the base with "
                                 "tie_word_embeddings=False")


def check_complete(model, config, found):
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


def check_layer(model, name, part, rank, noted):
    module = module_at(model, name)
    adapted = isinstance(module, LoRALinear)
    if not (adapted or is_linear(module)):
        return                                   # inject_each says what is wrong with it
    out_features, in_features = shape_of(module.linear if adapted else module)
    expected = (rank, in_features), (out_features, rank), (out_features,)
    A, B, *bias = (tuple(t.shape) for t in part.values())
    if (A, B, *bias) != expected[:len(part)]:
        raise ValueError(f"{name}: A and B have shapes {A} and {B}, expected {expected[0]} and "
                         f"{expected[1]}"
                         + (f"; B's bias {bias[0]}, {expected[2]}" if bias else ""))
    check_same(name, sample(module), noted, "not the one that the adapter was trained on")


def check_parameter(model, name, part, rank, noted):
    path, _, leaf = name.rpartition(".")
    module, adapter = model.get_submodule(path), lora_experts(model).get(name)
    W = adapter.original if adapter else module._parameters[leaf]
    if W.ndim not in (2, 3):
        return                                   # LoRAExperts says what is wrong with it
    experts = len(W) if W.ndim == 3 else 1
    d, k = W.shape[-2:]
    if W.ndim == 3 and getattr(module, "is_transposed", False):
        d, k = k, d
    expected = (rank * experts, k), (d, rank * experts)
    A, B, *bias = (tuple(t.shape) for t in part.values())
    if (A, B, *bias) != expected:
        raise ValueError(f"{name}: A and B have shapes {A} and {B}, expected {expected[0]} and "
                         f"{expected[1]} for {experts} experts"
                         + (", without a bias" if bias else ""))
    check_same(name, sample(adapter or W), noted, "not the one that the adapter was trained on")
