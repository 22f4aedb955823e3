"""Which modules get an adapter: choosing them by name, and whether each can have one."""

import difflib
import re
import warnings
from collections.abc import Collection

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lora_lib.rules import check_rank
from lora_lib.torch.experts import lora_experts
from lora_lib.torch.linear import check_adaptable, is_linear, is_quantized, shape_of
from lora_lib.torch.lora import LoRALinear
from lora_lib.torch.parts import all_adapters, lora_modules, saved_modules
from lora_lib.torch.tokens import token_rows


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its path, without the model itself and without an adapter's own parts."""
    layers = lora_modules(model)
    return {n: m for n, m in model.named_modules()
            if n and not within(n.rpartition(".")[0], layers)
            and "parametrizations" not in n.split(".")}


def within(name: str, paths: Collection[str]) -> bool:
    """Whether the module `name` is one of `paths` or inside one."""
    parts = name.split(".")
    return any(".".join(parts[:i + 1]) in paths for i in range(len(parts)))


def find_targets(model, target_modules, argument="target_modules"):
    """The paths that `target_modules` names, in the model's order."""
    modules = base_modules(model)
    if target_modules == "all-linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        names = [n for n, m in modules.items()
                 if (is_linear(m) or isinstance(m, LoRALinear)) and m is not head]
        if not names:
            raise ValueError("target_modules='all-linear': the model has no nn.Linear to adapt")
        return names
    regex = isinstance(target_modules, str)
    targets = [target_modules] if regex else target_modules
    if not isinstance(targets, Collection) or not all(isinstance(t, str) for t in targets):
        raise TypeError(f"{argument} must be a name or a list of names, "
                        f"got {target_modules!r}")
    if not targets or not all(targets):
        raise ValueError(f"{argument} must name at least one module, got {target_modules!r}")
    chosen = set()
    for target in targets:
        found = {n for n in modules if n == target or n.endswith(f".{target}")}
        if regex and not found:
            found = {n for n in modules if _full_match(target, n, argument)}
        if not found:
            raise ValueError(f"{argument}: nothing in the model is called {target!r}; "
                             f"{nearest(model, target)}")
        chosen |= found
    return [n for n in modules if n in chosen]


def _full_match(pattern, name, argument):
    try:
        return re.fullmatch(pattern, name)
    except re.error as error:
        raise ValueError(f"{argument}: {pattern!r} is no regular expression: "
                         f"{error}") from error


def nearest(model: nn.Module, name: str) -> str:
    """A sentence that lists the linear layers whose names are nearest to `name`."""
    paths = [n for n, m in model.named_modules()
             if n and (is_linear(m) or isinstance(m, LoRALinear))]
    leaves = dict.fromkeys(n.rpartition(".")[2] for n in paths)
    pool = paths if "." in name else list(leaves)
    close = difflib.get_close_matches(name, pool, n=4, cutoff=0.3) or pool[:8]
    return f"the nearest linear layers are {close}" if close else "it has no linear layer"


def adaptable(model: nn.Module, names: list[str], rank: int, whole: Collection[str]) -> list[str]:
    """Those of "all-linear" that can have an adapter; a warning tells of the others, and why."""
    owners, reasons = owners_of(model), {}
    for name in names:
        module = model.get_submodule(name)
        try:
            check_target(model, name, whole, owners)
            out_features, in_features = shape_of(module)
            check_rank(rank, in_features, out_features)
        except (TypeError, ValueError) as error:
            reasons[name] = error
    if len(reasons) == len(names) or isinstance(rank, bool) or not isinstance(rank, int):
        return names                             # inject_each says what is wrong
    adapted = [name for name in reasons if isinstance(model.get_submodule(name), LoRALinear)]
    if adapted:
        raise reasons[adapted[0]]
    if reasons:
        warnings.warn(f"target_modules='all-linear' leaves out {few(reasons)}: "
                      f"{next(iter(reasons.values()))}", stacklevel=3)
    return [name for name in names if name not in reasons]


def check_target(model: nn.Module, name: str, whole: Collection[str],
                 owners: dict[int, list[tuple[str, int]]], loading: bool = False) -> None:
    """Raise ValueError or TypeError, naming the module and why, unless it can have an adapter.

    `whole` holds the paths of the modules that are trained whole, `owners` is `owners_of(model)`.
    """
    module = model.get_submodule(name)
    if within(name, whole):
        raise ValueError(f"{name} is trained whole (modules_to_save), and needs no adapter")
    if isinstance(module, LoRALinear):
        state = "is merged into its weight" if module.merged else "is there"
        raise ValueError(f"{name} has been adapted before, and the adapter {state}; "
                         "remove() or merge() it before another inject()")
    if isinstance(module, NonDynamicallyQuantizableLinear) and not loading:
        raise TypeError(f"{name} belongs to an nn.MultiheadAttention, which reads the weight "
                        "without calling the layer: in PEFT an adapter there does nothing")
    if not is_linear(module):
        raise TypeError(f"{name} is a {type(module).__name__}, expected an nn.Linear")
    try:
        check_adaptable(module)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error
    if not is_quantized(module):
        _check_untied(name, [module.weight], owners, {name})


def check_rows(model, name, others):
    if within(name, others) or f"{name}.weight" in others:
        raise ValueError(f"{name} has an adapter or is trained whole (modules_to_save), and cannot "
                         "have trained rows (trainable_token_indices) beside it")
    if name in token_rows(model):
        raise ValueError(f"{name} has trained rows already; remove() or merge() them before "
                         "another inject()")


def sharers(model, name, owners):
    """The module, and those that share its weight: a head tied to the embedding."""
    module = model.get_submodule(name)
    paths = [path for path, _ in owners.get(_place(getattr(module, "weight", None)), [])]
    if odd := [path for path in paths if path.rpartition(".")[2] != "weight"]:
        raise ValueError(f"its weight is {odd[0]} too, which is not read as a weight")
    held = [model.get_submodule(path.rpartition(".")[0]) for path in paths]
    return [module, *{id(m): m for m in held if m is not module}.values()]


def check_parameter(model, name, held, others, owners, dropout, options):
    path = name.rpartition(".")[0]
    if within(path, others):
        raise ValueError(f"{name}: {path}, or what it is in, has an adapter of its own or is "
                         "trained whole (modules_to_save)")
    if name in lora_experts(model):
        raise ValueError(f"{name} has been adapted before; remove() or merge() it before another "
                         "inject()")
    if dropout:
        raise ValueError(f"{name}: a parameter's adapter has no dropout, for it does not see the "
                         f"inputs; expected dropout=0 with target_parameters, got {dropout}")
    if options.get("lora_bias"):
        raise ValueError(f"{name}: a parameter's adapter has no bias; expected lora_bias=False "
                         "with target_parameters")
    _check_untied(name, [getattr(*held)], owners, {path})


def check_whole(model, name, owners, whole):
    module = model.get_submodule(name)
    if all_adapters(module) or saved_modules(module).keys() - {""}:
        raise ValueError(f"{name} holds an adapter or a module to save already, and cannot be "
                         "trained whole (modules_to_save)")
    parameters = list(module.parameters())
    if not parameters or not all(p.is_floating_point() for p in parameters):
        raise TypeError(f"{name} is a {type(module).__name__} without floating-point parameters: "
                        "as one of modules_to_save it has nothing to train")
    _check_untied(name, parameters, owners, whole)


def owners_of(model: nn.Module) -> dict[int, list[tuple[str, int]]]:
    """The paths of the parameters that lie in one place of memory, each with its module's id.

    A module that stands at two paths, as in a model that uses one block twice, is one owner.
    """
    found: dict[int, list[tuple[str, int]]] = {}
    for path, module in model.named_modules():
        for leaf, p in module._parameters.items():
            if p is not None:
                found.setdefault(_place(p), []).append((f"{path}.{leaf}" if path else leaf,
                                                        id(module)))
    return found


def _place(p):
    """Where a parameter's numbers begin; the object where that says nothing (meta, ZeRO-3)."""
    return (not p.is_meta and type(p) is nn.Parameter and p.data_ptr()) or id(p)


def _check_untied(name, parameters, owners, inside):
    """Raise ValueError if memory of the module `name` is that of one outside `inside` too."""
    for p in parameters:
        paths = owners.get(_place(p), [])
        if len({owner for _, owner in paths}) > 1 and not all(
                within(path.rpartition(".")[0], inside) for path, _ in paths):
            names = ", ".join(path for path, _ in paths)
            raise ValueError(f"{name} shares its weight with another module ({names}): "
                             "training or merging it would change both. Untie them, or choose "
                             "others")


def few(paths: Collection[str]) -> str:
    """Two of the paths, and how many more there are."""
    paths = list(paths)
    return ", ".join(paths[:2]) + (f" and {len(paths) - 2} more" if len(paths) > 2 else "")
