"""Putting adapters into a model, finding them again, merging them, taking them out."""

import difflib
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import TypeAlias

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.optim.swa_utils import AveragedModel

from lora_lib.rules import check_rank
from lora_lib.torch.experts import LoRAExperts, find_parameters, lora_experts, nested
from lora_lib.torch.linear import (check_adaptable, full, is_linear, is_quantized, shape_of,
                                   stored)
from lora_lib.torch.lora import LoRALinear, generator_of
from lora_lib.torch.peft_format import HALVES, INNER, ROWS
from lora_lib.torch.tokens import (TokenIndices, TokenRows, find_rows, saved_rows, token_rows)

Adapter: TypeAlias = LoRALinear | LoRAExperts


def inject(model: nn.Module, target_modules: str | list[str], rank: int = 8, alpha: float = 16.0,
           dropout: float = 0.0, *, target_parameters: Collection[str] = (),
           exclude_modules: str | Collection[str] = (),
           modules_to_save: str | Collection[str] = (),
           trainable_token_indices: TokenIndices = (), seed=None, **options) -> nn.Module:
    """Put a LoRALinear in the place of every target and freeze all but the adapters.

    `target_modules` is what PEFT takes: a list of names, each matching a module of that name or
    whose path ends in it ("q_proj"); one such name; one regular expression that matches whole
    paths; or "all-linear", every nn.Linear except the output head that
    `model.get_output_embeddings()` gives, and except those that cannot have an adapter, of which a
    warning tells. `exclude_modules`, named in the same way, get none. `modules_to_save`, too, are
    named so: they are trained whole and saved with the adapters, such as a classifier's new head;
    a target inside one gets no adapter. `seed` is LoRALayer's, and so are `options` (dtype,
    init_std, use_rslora; LoRALinear's lora_bias). Returns the same model; on an error it is as it
    was before.

    `target_parameters` lists parameters that belong to no layer, by their path or an end of it,
    such as the experts' "mlp.experts.gate_up_proj": each becomes W + scaling B A for whoever reads
    it (lora_lib.torch.experts). `target_modules` may then be []; there is no dropout.

    `trainable_token_indices` lists tokens, such as new ones, whose rows of the input embedding are
    trained too and saved with the adapters, and no other row (lora_lib.torch.tokens); or it gives
    {name of an embedding, or of the head: tokens}. A head that is tied to the embedding keeps to it.

    Raises ValueError when a name matches nothing (the nearest names are listed), when a target
    has an adapter already, when its weight, or one of a module to save, is tied to another
    module's, for a token without a row, or for a rank, alpha, or dropout that cannot be; TypeError when a target is not an
    nn.Linear, or its weight is computed, or a module to save has nothing to train.
    """
    check_bare(model)
    whole = find_targets(model, modules_to_save, "modules_to_save") if modules_to_save else []
    out = find_targets(model, exclude_modules, "exclude_modules") if exclude_modules else []
    parameters = find_parameters(base_modules(model), target_parameters)
    rows = find_rows(model, base_modules(model), trainable_token_indices)
    names = [name for name in find_targets(model, target_modules)
             if not within(name, {*whole, *out})] if target_modules or not parameters else []
    if not names and not parameters:
        raise ValueError(f"target_modules={target_modules!r} names only modules that "
                         f"modules_to_save={modules_to_save!r} trains whole"
                         + (f" or exclude_modules={out} leaves out" if out else ""))
    if target_modules == "all-linear":
        names = adaptable(model, names, rank, {*whole, *saved_modules(model)})
    plan = {name: (rank, alpha) for name in [*names, *parameters]}
    return inject_each(model, plan, dropout, parameters=parameters, modules_to_save=whole,
                       rows=rows, seed=seed, **options)


def inject_each(model: nn.Module, plan: dict[str, tuple[int, float]], dropout: float = 0.0, *,
                parameters: Mapping[str, tuple[nn.Module, str]] = {},
                modules_to_save: Collection[str] = (),
                rows: Mapping[str, Collection[int]] = {}, seed=None, loading: bool = False,
                **options) -> nn.Module:
    """`inject` with a rank and an alpha of its own for each path in `plan`.

    A path is a module's, or one of `parameters` (find_parameters). `modules_to_save` holds whole
    paths too, `rows` the tokens of each path (find_rows). `loading` allows what PEFT's files may hold: ranks above a layer's size, and an
    nn.MultiheadAttention's out_proj, which PEFT adapts in vain.
    """
    all_whole = {*modules_to_save, *saved_modules(model)}
    whole = [name for name in modules_to_save if not within(name, all_whole - {name})]
    owners = owners_of(model)
    for name in plan:
        if name in parameters:
            _check_parameter(model, name, parameters[name], {*all_whole, *plan}, owners, dropout,
                             options)
        else:
            check_target(model, name, all_whole, owners, loading)
    for name in whole:
        _check_whole(model, name, owners, all_whole)
    for name in rows:
        _check_rows(model, name, {*all_whole, *plan})
    without_bias = {key: value for key, value in options.items() if key != "lora_bias"}
    seed = generator_of(seed)                      # one generator: each A is another draw
    flags = [(p, p.requires_grad) for p in model.parameters()]
    adapters, experts, tokens = {}, {}, []
    try:
        for name, (rank, alpha) in plan.items():
            if name in parameters:
                experts[name] = LoRAExperts(*parameters[name], rank, alpha, seed=seed,
                                            any_rank=loading, **without_bias)
                continue
            adapters[name] = LoRALinear(model.get_submodule(name), rank, alpha, dropout, seed=seed,
                                        any_rank=loading, **options)
        for name, indices in rows.items():
            tokens.append(TokenRows(_sharers(model, name, owners), indices,
                                    dtype=options.get("dtype")))
        states = {name: model.get_submodule(name).state_dict()
                  for name in whole if name not in saved_modules(model)}
        before = {name: {key: t.clone() for key, t in state.items()}
                  for name, state in states.items()}
    except Exception as error:
        for p, flag in flags:
            p.requires_grad_(flag)
        if type(error) in (ValueError, TypeError):
            raise type(error)(f"{name}: {error}") from error
        raise
    replace_modules(model, adapters)
    for part in [*experts.values(), *tokens]:
        part.put()
    for name, state in before.items():
        # The marker of a module to save: what it was, for remove(). It is not in the state dict.
        model.get_submodule(name).before_lora = state
    model.requires_grad_(False)
    for p in lora_parameters(model):
        p.requires_grad_(True)
    return model


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


def lora_modules(model: nn.Module) -> dict[str, LoRALinear]:
    """Every LoRALinear in the model, by its path."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that is trained whole beside the adapters (`modules_to_save`), by its path."""
    return {name: m for name, m in model.named_modules() if "before_lora" in vars(m)}


def all_adapters(model: nn.Module) -> dict[str, Adapter]:
    """Every LoRALinear by its path, then every LoRAExperts by its parameter's."""
    return lora_modules(model) | lora_experts(model)


def shapes_of(layer: Adapter) -> dict[str, tuple[int, ...]]:
    """The shapes that an adapter's A and B must have, and its B_bias if there is one."""
    lead = (layer.experts,) if isinstance(layer, LoRAExperts) else ()
    shapes: dict[str, tuple[int, ...]] = {"A": (*lead, layer.rank, layer.in_features),
                                          "B": (*lead, layer.out_features, layer.rank)}
    return shapes | ({"B_bias": (layer.out_features,)} if has_bias(layer) else {})


def has_bias(layer: Adapter) -> bool:
    """Whether the adapter's B has a bias (lora_bias)."""
    return getattr(layer, "B_bias", None) is not None


def parts_of(layer: Adapter) -> list[nn.Parameter]:
    """What of an adapter is trained: A, B, and B_bias if there is one."""
    return [getattr(layer, part) for part in shapes_of(layer)]


def idle_adapters(model: nn.Module) -> list[str]:
    """After a backward pass: the adapters that are trained and got no gradient, by path."""
    return [name for name, layer in all_adapters(model).items()
            if layer.A.grad is None and layer.B.grad is None
            and (layer.A.requires_grad or layer.B.requires_grad)]


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every adapter, the rows of tokens, then the modules to save: what the optimizer
    gets."""
    return [*(p for layer in all_adapters(model).values() for p in parts_of(layer)),
            *(part.rows for part in token_rows(model).values()),
            *(p for module in saved_modules(model).values() for p in module.parameters())]


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every adapter, trained rows and modules to save, under PEFT's names for its files.

    In a model that FSDP 2 has split, every process must call this, and gets whole tensors. The
    names that wrappers put into paths (torch.compile, DataParallel, checkpoint_wrapper) are left
    out. Raises ValueError for an A or B that is not whole, or not there (flattened by FSDP 1, on
    the meta device), and if DistributedDataParallel wraps the model, or a part of it.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(f"{name or 'the model'} is wrapped in DistributedDataParallel, and "
                             "every process would write: pass its .module, in one process")
    bare = bare_path(model)
    state, adapters = {}, all_adapters(model)
    paths = nested(lora_experts(model), dict(model.named_modules()))
    for name, layer in adapters.items():
        for part, shape in shapes_of(layer).items():
            tensor = full(stored(layer, part).detach())
            if tuple(tensor.shape) != shape or tensor.is_meta:
                raise ValueError(
                    f"{name}: {part} has shape {tuple(tensor.shape)} on {tensor.device}, expected "
                    f"{shape} with its values. Under FSDP 1 or ZeRO-3 gather the parameters first "
                    "(FSDP.summon_full_params, deepspeed.zero.GatheredParameters)")
            if name in paths:
                tensor = layer.to_file(part, tensor)
            state[f"{bare(paths.get(name, name))}.{HALVES[part]}"] = tensor
    for name, rows in saved_rows(model).items():
        state[f"{bare(name)}.{ROWS}"] = full(rows.rows.detach())
    for name, module in saved_modules(model).items():
        state |= {f"{bare(name)}.{key}": full(t) for key, t in module.state_dict().items()}
    return {f"base_model.model.{key}": t for key, t in state.items()}


def inner_name(module: nn.Module) -> str | None:
    """The name under which a wrapper holds what it wraps; None for what is no wrapper."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
    found = [name for name in INNER if name in module._modules]
    return found[0] if found else "module" if isinstance(module, wrappers) else None


def bare_path(model: nn.Module) -> Callable[[str], str]:
    """A function from a module's path to the same without the names that wrappers put into it."""
    inner = {f"{name}.{leaf}" if name else leaf for name, module in model.named_modules()
             if (leaf := inner_name(module))}

    def bare(path):
        parts = path.split(".")
        return ".".join(part for i, part in enumerate(parts)
                        if ".".join(parts[:i + 1]) not in inner)
    return bare if inner else lambda path: path


def check_bare(model: nn.Module) -> None:
    """Raise ValueError if a wrapper's name would be in the paths of the model's modules."""
    for name, module in model.named_modules():
        if inner := inner_name(module):
            raise ValueError(f"{name or 'the model'} is wrapped in {type(module).__name__}: pass "
                             f"what is inside, its .{inner}; inject() first, then wrap")


def merge(model: nn.Module, *, keep_adapters: bool = False) -> nn.Module:
    """Fold every adapter into its weight, in place, and leave plain nn.Linears behind.

    With `keep_adapters` the LoRALinears stay, merged, and `unmerge` can undo it. Without, modules
    to save keep what they learned and are marked no more. Returns the same model.

    Raises ValueError, before any weight is touched, if there is no adapter, or if a merged weight
    would hold NaN or infinity.
    """
    layers = _adapted(model)
    _rehearse(layers, merged=True)
    for layer in layers.values():
        layer.merge()
    if not keep_adapters:
        _take_out(model, layers)
        for module in saved_modules(model).values():
            del module.requires_grad_(False).before_lora
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge(model, keep_adapters=True)`, up to rounding. Returns the same model.

    Raises ValueError as `merge` does.
    """
    layers = _adapted(model)
    _rehearse(layers, merged=False)
    for layer in layers.values():
        layer.unmerge()
    return model


def remove(model: nn.Module) -> nn.Module:
    """Take every adapter out and put the nn.Linear that it wrapped back, still frozen.

    A merged one is unmerged first, and modules to save get the values that they had before
    inject(). Returns the same model. Raises ValueError as `merge` does.
    """
    layers = _adapted(model)
    _rehearse(layers, merged=False)
    for layer in layers.values():
        layer.unmerge()
    _take_out(model, layers)
    for module in saved_modules(model).values():
        module.requires_grad_(False).load_state_dict(module.before_lora)
        del module.before_lora
    return model


def _take_out(model, layers):
    replace_modules(model, {name: layer.linear for name, layer in layers.items()
                            if isinstance(layer, LoRALinear)})
    for layer in layers.values():
        if not isinstance(layer, LoRALinear):
            layer.take_out()


def _adapted(model):
    layers = all_adapters(model) | token_rows(model)
    if not layers:
        raise ValueError("the model holds no LoRALinear; inject() adapters first "
                         "(merge() and remove() leave none behind)")
    if "" in layers:
        raise ValueError("the model is itself a LoRALinear and cannot be replaced inside a model; "
                         "use its own merge(), unmerge() and linear")
    return layers


def _rehearse(layers, merged):
    """Compute what is about to be written, so that an error comes before the first write."""
    for name, layer in layers.items():
        if layer.merged is not merged:
            try:
                if isinstance(layer, LoRALinear):
                    layer.sums(1 if merged else -1)
                elif isinstance(layer, TokenRows):
                    layer.check_finite()
                else:
                    (layer.merge_weights if merged else layer.unmerge_weights)(layer.original)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error


def replace_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Put each module in the place of the one at its path, wherever else that one stands too."""
    by_id = {id(model.get_submodule(name)): module for name, module in new.items()}
    for parent in list(model.modules()):
        for leaf, old in list(parent._modules.items()):
            if id(old) in by_id:
                setattr(parent, leaf, by_id[id(old)])


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


def _check_rows(model, name, others):
    if within(name, others) or f"{name}.weight" in others:
        raise ValueError(f"{name} has an adapter or is trained whole (modules_to_save), and cannot "
                         "have trained rows (trainable_token_indices) beside it")
    if name in token_rows(model):
        raise ValueError(f"{name} has trained rows already; remove() or merge() them before another "
                         "inject()")


def _sharers(model, name, owners):
    """The module, and those that share its weight: a head tied to the embedding."""
    module = model.get_submodule(name)
    paths = [path for path, _ in owners.get(_place(getattr(module, "weight", None)), [])]
    if odd := [path for path in paths if path.rpartition(".")[2] != "weight"]:
        raise ValueError(f"its weight is {odd[0]} too, which is not read as a weight")
    held = [model.get_submodule(path.rpartition(".")[0]) for path in paths]
    return [module, *{id(m): m for m in held if m is not module}.values()]


def _check_parameter(model, name, held, others, owners, dropout, options):
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
        raise ValueError(f"{name}: a parameter's adapter has no bias; expected lora_bias=False with "
                         "target_parameters")
    _check_untied(name, [getattr(*held)], owners, {path})


def _check_whole(model, name, owners, whole):
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
    """Where a parameter's numbers begin; the object itself where that says nothing (meta, ZeRO-3)."""
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
