"""Putting adapters into a model, finding them again, merging them, taking them out."""

import difflib
import re
from collections.abc import Collection

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lora_lib.torch.linear import full, is_linear, is_quantized
from lora_lib.torch.lora import LoRALinear, generator_of


def inject(model: nn.Module, target_modules: str | list[str], rank: int = 8, alpha: float = 16.0,
           dropout: float = 0.0, *, modules_to_save: str | Collection[str] = (), seed=None,
           **options) -> nn.Module:
    """Put a LoRALinear in the place of every target and freeze all but the adapters.

    `target_modules` is what PEFT takes: a list of names, each matching a module of that name or
    whose path ends in it ("q_proj"); one such name; one regular expression that matches whole
    paths; or "all-linear", every nn.Linear except the output head that
    `model.get_output_embeddings()` gives. `modules_to_save`, named in the same way, are trained
    whole and saved with the adapters, such as a classifier's new head; a target inside one gets no
    adapter. `seed` is LoRALayer's, and so are `options` (dtype, init_std, use_rslora). Returns the
    same model; on an error it is as it was before.

    Raises ValueError when a name matches nothing (the nearest names are listed), when a target
    has an adapter already, when its weight, or one of a module to save, is tied to another
    module's, or for a rank, alpha, or dropout that cannot be; TypeError when a target is not an
    nn.Linear, or its weight is computed, or a module to save has nothing to train.
    """
    check_bare(model)
    whole = find_targets(model, modules_to_save, "modules_to_save") if modules_to_save else []
    names = [name for name in find_targets(model, target_modules) if not _within(name, whole)]
    if not names:
        raise ValueError(f"target_modules={target_modules!r} names only modules that "
                         f"modules_to_save={modules_to_save!r} trains whole")
    plan = {name: (rank, alpha) for name in names}
    return inject_each(model, plan, dropout, modules_to_save=whole, seed=seed, **options)


def inject_each(model: nn.Module, plan: dict[str, tuple[int, float]], dropout: float = 0.0, *,
                modules_to_save: Collection[str] = (), seed=None, **options) -> nn.Module:
    """`inject` with a rank and an alpha of its own for each module path in `plan`.

    `modules_to_save` holds whole paths too.
    """
    all_whole = {*modules_to_save, *saved_modules(model)}
    whole = [name for name in modules_to_save if not _within(name, all_whole - {name})]
    for name in plan:
        check_target(model, name, all_whole)
    for name in whole:
        _check_whole(model, name)
    seed = generator_of(seed)                      # one generator: each A is another draw
    flags = [(p, p.requires_grad) for p in model.parameters()]
    adapters = {}
    try:
        for name, (rank, alpha) in plan.items():
            adapters[name] = LoRALinear(model.get_submodule(name), rank, alpha, dropout, seed=seed,
                                        **options)
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
    for name, adapter in adapters.items():
        replace_module(model, name, adapter)
    for name, state in before.items():
        # The marker of a module to save: what it was, for remove(). It is not in the state dict.
        model.get_submodule(name).before_lora = state
    model.requires_grad_(False)
    for p in lora_parameters(model):
        p.requires_grad_(True)
    return model


def lora_modules(model: nn.Module) -> dict[str, LoRALinear]:
    """Every LoRALinear in the model, by its path."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that is trained whole beside the adapters (`modules_to_save`), by its path."""
    return {name: m for name, m in model.named_modules() if "before_lora" in vars(m)}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every adapter, then the modules to save: what the optimizer gets."""
    return [*(p for layer in lora_modules(model).values() for p in (layer.A, layer.B)),
            *(p for module in saved_modules(model).values() for p in module.parameters())]


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every adapter, and the modules to save, under PEFT's names for its files.

    In a model that FSDP has split, every process must call this, and gets whole tensors. Raises
    ValueError if torch.compile or DistributedDataParallel wraps the model, or a part of it.
    """
    check_bare(model)
    state = {f"{name}.lora_{part}.weight": getattr(layer, part).detach()
             for name, layer in lora_modules(model).items() for part in "AB"}
    for name, module in saved_modules(model).items():
        state |= {f"{name}.{key}": t for key, t in module.state_dict().items()}
    return {f"base_model.model.{key}": full(t) for key, t in state.items()}


def check_bare(model: nn.Module) -> None:
    """Raise ValueError if a wrapper's name would be in the paths of the model's modules."""
    for name, module in model.named_modules():
        inner = "_orig_mod" if "_orig_mod" in module._modules else (
            "module" if isinstance(module, nn.parallel.DistributedDataParallel) else None)
        if inner:
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
    for name, layer in layers.items():
        layer.merge()
        if not keep_adapters:
            replace_module(model, name, layer.linear)
    if not keep_adapters:
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
    for name, layer in layers.items():
        replace_module(model, name, layer.unmerge().linear)
    for module in saved_modules(model).values():
        module.requires_grad_(False).load_state_dict(module.before_lora)
        del module.before_lora
    return model


def _adapted(model):
    layers = lora_modules(model)
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
                (layer.merge_weights if merged else layer.unmerge_weights)(layer.weight)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the one at the path `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its path, without the model itself and without an adapter's own parts."""
    inside = tuple(f"{name}." for name in lora_modules(model))
    return {n: m for n, m in model.named_modules() if n and not n.startswith(inside)}


def _within(name, paths):
    """Whether the module `name` is one of `paths` or inside one."""
    return any(f"{name}.".startswith(f"{path}.") for path in paths)


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


def check_target(model: nn.Module, name: str, whole: Collection[str]) -> None:
    """Raise ValueError or TypeError, naming the module and why, unless it can have an adapter.

    `whole` holds the paths of the modules that are trained whole.
    """
    module = model.get_submodule(name)
    if _within(name, whole):
        raise ValueError(f"{name} is trained whole (modules_to_save), and needs no adapter")
    if isinstance(module, LoRALinear):
        state = "is merged into its weight" if module.merged else "is there"
        raise ValueError(f"{name} has been adapted before, and the adapter {state}; "
                         "remove() or merge() it before another inject()")
    if isinstance(module, NonDynamicallyQuantizableLinear):
        raise TypeError(f"{name} belongs to an nn.MultiheadAttention, which reads the weight "
                        "without calling the layer: an adapter there would do nothing")
    if not is_linear(module):
        raise TypeError(f"{name} is a {type(module).__name__}, expected an nn.Linear")
    if is_quantized(module):
        return
    _check_untied(model, name, {id(module.weight)})


def _check_whole(model, name):
    module = model.get_submodule(name)
    if lora_modules(module) or saved_modules(module).keys() - {""}:
        raise ValueError(f"{name} holds an adapter or a module to save already, and cannot be "
                         "trained whole (modules_to_save)")
    parameters = list(module.parameters())
    if not parameters or not all(p.is_floating_point() for p in parameters):
        raise TypeError(f"{name} is a {type(module).__name__} without floating-point parameters: "
                        "as one of modules_to_save it has nothing to train")
    _check_untied(model, name, {id(p) for p in parameters})


def _check_untied(model, name, weights):
    """Raise ValueError if one of `weights`, ids of parameters inside `name`, is outside it too."""
    owners = [(n, p) for n, p in model.named_parameters(remove_duplicate=False)
              if id(p) in weights]
    outside = {id(p) for n, p in owners if not _within(n, [name])}
    if outside:
        names = ", ".join(n for n, p in owners if id(p) in outside)
        raise ValueError(f"{name} shares its weight with another module ({names}): "
                         "training or merging it would change both. Untie them, or choose others")
