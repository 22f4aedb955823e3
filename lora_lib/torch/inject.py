"""Putting adapters into a model, merging them, taking them out."""

from collections.abc import Collection, Mapping

from torch import nn

from lora_lib.torch.experts import LoRAExperts, find_parameters
from lora_lib.torch.lora import LoRALinear, generator_of
from lora_lib.torch.parts import all_adapters, check_bare, lora_parameters, saved_modules
from lora_lib.torch.targets import (adaptable, base_modules, check_parameter, check_rows,
                                    check_target, check_whole, find_targets, owners_of, sharers,
                                    within)
from lora_lib.torch.tokens import TokenIndices, TokenRows, find_rows, token_rows


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
    {name of an embedding, or of the head: tokens}. A head that is tied to the embedding keeps to
    it.

    Raises ValueError when a name matches nothing (the nearest names are listed), when a target
    has an adapter already, when its weight, or one of a module to save, is tied to another
    module's, for a token without a row, or for a rank, alpha, or dropout that cannot be; TypeError
    when a target is not an nn.Linear, or its weight is computed, or a module to save has nothing to
    train.
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
    paths too, `rows` the tokens of each path (find_rows). `loading` allows what PEFT's files may
    hold: ranks above a layer's size, and an nn.MultiheadAttention's out_proj, which PEFT adapts in
    vain.
    """
    all_whole = {*modules_to_save, *saved_modules(model)}
    whole = [name for name in modules_to_save if not within(name, all_whole - {name})]
    owners = owners_of(model)
    for name in plan:
        if name in parameters:
            check_parameter(model, name, parameters[name], {*all_whole, *plan}, owners, dropout,
                             options)
        else:
            check_target(model, name, all_whole, owners, loading)
    for name in whole:
        check_whole(model, name, owners, all_whole)
    for name in rows:
        check_rows(model, name, {*all_whole, *plan})
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
            tokens.append(TokenRows(sharers(model, name, owners), indices,
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


def replace_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Put each module in the place of the one at its path, wherever else that one stands too."""
    by_id = {id(model.get_submodule(name)): module for name, module in new.items()}
    for parent in list(model.modules()):
        for leaf, old in list(parent._modules.items()):
            if id(old) in by_id:
                setattr(parent, leaf, by_id[id(old)])


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
