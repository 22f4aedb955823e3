"""LoRA on parameters that no layer holds: the experts of Mixtral, Qwen3-MoE, gpt-oss.

A mixture of experts keeps one matrix per expert in one parameter (experts, d, k), or (experts, k,
d) where its module says `is_transposed`, and multiplies with it itself. Here the parameter becomes
a parametrized one: whoever reads it gets W + scaling * B A, and A and B the gradient. PEFT calls
this `target_parameters`.
"""

import difflib
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lora_lib.rules import check_rank, init_std_of, scaling_of
from lora_lib.torch.lora import LoRALinear, generator_of


class LoRAExperts(nn.Module):
    """A low-rank update `scaling * B @ A` for each expert of a parameter of `module`.

    Shapes, with k = in_features, d = out_features, r = rank:
        A (experts, r, k)   drawn from N(0, init_std^2), init_std = 1 / sqrt(k) by default
        B (experts, d, r)   zeros, so that the update starts at zero
        W (experts, d, k)   the frozen parameter, or (experts, k, d) where `module.is_transposed`;
                            or one matrix (d, k), which counts as one expert

    The arguments are LoRALinear's, without dropout: x is not seen here. `put` brings it into the
    module, `take_out` leaves the parameter as it was. Raises TypeError or ValueError for a
    parameter that cannot be adapted, or a rank or alpha that cannot be.
    """

    def __init__(self, module: nn.Module, name: str, rank: int = 8, alpha: float = 16.0, *,
                 seed: int | torch.Generator | None = None, dtype=None,
                 init_std: float | None = None, use_rslora: bool = False, any_rank: bool = False):
        super().__init__()
        W = module.get_parameter(name)
        transposed = W.ndim == 3 and bool(getattr(module, "is_transposed", False))
        _check(W, transposed)
        experts, d, k = W.shape if W.ndim == 3 else (1, *W.shape)
        d, k = (k, d) if transposed else (d, k)
        self.experts, self.in_features, self.out_features = experts, k, d
        self.rank, self.alpha = check_rank(rank, *((rank, rank) if any_rank else (k, d))), alpha
        self.scaling, self.use_rslora = scaling_of(self.rank, alpha, use_rslora), use_rslora
        self.transposed, self.merged = transposed, False
        # In a tuple, so that torch does not take the module for a part of this one.
        self.place, self.order = (module, name), parameter_names(module)
        dtype = dtype or torch.promote_types(W.dtype, torch.float32)
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating torch.dtype, got {dtype!r}")
        A = torch.randn(experts, self.rank, k, generator=generator_of(seed), dtype=torch.float32,
                        device="cpu") * init_std_of(init_std, k)
        self.A = nn.Parameter(A.to(W.device, dtype))
        self.B = nn.Parameter(torch.zeros(experts, d, self.rank, device=W.device, dtype=dtype))

    def forward(self, W: Tensor) -> Tensor:
        """What a reader of the parameter gets, in W's shape and dtype."""
        if self.merged:                          # the update is in W already
            return W
        left, right = self._factors(W.dtype)
        with torch.autocast(W.device.type, enabled=False):      # it would change W's dtype
            return torch.baddbmm(W if W.ndim == 3 else W[None], left, right,
                                 alpha=self.scaling).reshape(W.shape)

    def delta_weight(self) -> Tensor:
        """The update itself, in the parameter's own shape; products in float32 or better."""
        left, right = self._factors(torch.promote_types(self.A.dtype, torch.float32))
        return (self.scaling * (left @ right)).reshape(self.original.shape)

    def _factors(self, dtype):
        A, B = self.A.to(dtype), self.B.to(dtype)
        return (A.mT, B.mT) if self.transposed else (B, A)

    @property
    def original(self) -> nn.Parameter:
        """The frozen parameter; once `merged`, with the update in it."""
        module, name = self.place
        return _parametrizations(module)[name].original  # type: ignore[return-value]

    @torch.no_grad()
    def merge_weights(self, W: Tensor) -> Tensor:
        """A new tensor W + scaling * B A, rounded once. Raises ValueError for NaN or infinity."""
        return self._plus(W, 1)

    @torch.no_grad()
    def unmerge_weights(self, W: Tensor) -> Tensor:
        """A new tensor W - scaling * B A."""
        return self._plus(W, -1)

    def _plus(self, W, sign):
        delta = self.delta_weight()
        total = (W.to(torch.promote_types(W.dtype, delta.dtype)) + sign * delta).to(W.dtype)
        if not torch.isfinite(total).all():
            raise ValueError("W and scaling * B A add up to NaN or infinity; W is left alone")
        return total

    def merge(self) -> "LoRAExperts":
        """Fold the update into the parameter, in place; twice is once."""
        if not self.merged:
            self.original.data.copy_(self.merge_weights(self.original))
            self.merged = True
        return self

    def unmerge(self) -> "LoRAExperts":
        """Take the update out of the parameter again, up to rounding."""
        if self.merged:
            self.original.data.copy_(self.unmerge_weights(self.original))
            self.merged = False
        return self

    def put(self) -> None:
        """Make the module's parameter W + scaling * B A, computed once per call of the module."""
        module, name = self.place
        self.train(module.training)
        parametrized(module, name, self)
        if _begin not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_begin)
            module.register_forward_hook(_end, always_call=True)

    def take_out(self) -> None:
        """The module as it was, with the parameter as it is now, in its old place in the order."""
        module, name = self.place
        plain(module, name, self.order)
        if not lora_experts(module, recurse=False):
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if hook in (_begin, _end)]:
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)

    def to_file(self, part: str, tensor: Tensor) -> Tensor:
        """A or B as PEFT lays it out: (experts * r, k) by expert; (d, r * experts) by rank."""
        return tensor.flatten(0, 1) if part == "A" else tensor.permute(1, 2, 0).flatten(1)

    def from_file(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The reverse of `to_file`."""
        return (A.view(self.A.shape),
                B.view(self.out_features, self.rank, self.experts).permute(2, 0, 1))

    def extra_repr(self) -> str:
        return (f"experts={self.experts}, in_features={self.in_features}, "
                f"out_features={self.out_features}, rank={self.rank}, alpha={self.alpha}")


def _parametrizations(module) -> nn.ModuleDict:
    return module.parametrizations


def parametrized(module: nn.Module, name: str, part: nn.Module) -> None:
    """Make the module's parameter `part(parameter)` for whoever reads it."""
    if parametrize.is_parametrized(module):
        _class_of_its_own(module)
    parametrize.register_parametrization(module, name, part, unsafe=True)


def plain(module: nn.Module, name: str, order: tuple[str, ...]) -> None:
    """The reverse of `parametrized`; the parameters in the order of the names in `order`."""
    original, held = _parametrizations(module)[name].original, module._parameters
    _class_of_its_own(module, without=name)
    del _parametrizations(module)[name]
    if not _parametrizations(module):
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
    module.register_parameter(name, original)  # type: ignore[arg-type]
    for leaf in order:
        if leaf in held:
            held[leaf] = held.pop(leaf)


def _class_of_its_own(module, without=None):
    """Undo that a deep copy shares the class in which torch keeps the parametrized names."""
    shared = type(module)
    module.__class__ = type(shared.__name__, shared.__bases__, {
        key: value for key, value in vars(shared).items()
        if key not in (without, "__dict__", "__weakref__")})


_open: list = []


def _begin(module, inputs):
    _open.append(parametrize.cached())           # a module may read its parameter once an expert
    _open[-1].__enter__()


def _end(module, inputs, output):
    _open.pop().__exit__(None, None, None)


def _check(W, transposed):
    if type(W) is not nn.Parameter or not W.is_floating_point() or W.element_size() < 2:
        raise TypeError(f"the parameter is a {type(W).__name__} of {W.dtype}, split over processes "
                        "or quantized: expected a plain one of 16 bits or more")
    if W.ndim not in (2, 3):
        raise ValueError(f"the parameter has shape {tuple(W.shape)}, expected a matrix, or one for "
                         "each expert")
    if W.is_meta:
        raise ValueError("the parameter is on the meta device, offloaded or not loaded yet: load "
                         "the base's weights first")
    if transposed and len(W) == 1:
        raise ValueError("the parameter holds one expert, transposed, which PEFT reads wrong")


def lora_experts(model: nn.Module, recurse: bool = True) -> dict[str, LoRAExperts]:
    """Every LoRAExperts in the model, by its parameter's path; or those of the module alone."""
    return {f"{path}.{name}" if path else name: part
            for path, module in (model.named_modules() if recurse else [("", model)])
            if parametrize.is_parametrized(module)
            for name, parts in _parametrizations(module).items()
            for part in parts.children() if isinstance(part, LoRAExperts)}


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """The names of the module's own parameters in the order in which it made them."""
    parts = lora_experts(module, recurse=False).values()
    return next(iter(parts)).order if parts else tuple(
        name for name, p in module._parameters.items() if p is not None)


def refuse_experts(model: nn.Module, what: str) -> None:
    """Raise ValueError if the model has a LoRAExperts, for `what` has no code for it."""
    if names := list(lora_experts(model)):
        raise ValueError(f"{what} handles adapters of layers alone, and {names[0]} is a parameter "
                         "with an adapter (target_parameters)")


def find_parameters(modules: dict[str, nn.Module],
                    target_parameters: Collection[str], loading: bool = False,
                    ) -> dict[str, tuple[nn.Module, str]]:
    """{path: (module, name)} of the parameters whose path is a target or ends in one.

    Raises TypeError unless the targets are a list of names; ValueError for one that names nothing,
    but not when `loading`: PEFT writes what it looked for, and some of it may not be there.
    """
    if isinstance(target_parameters, str) or not isinstance(target_parameters, Collection) \
            or not all(isinstance(t, str) for t in target_parameters):
        raise TypeError(f"target_parameters must be a list of names, got {target_parameters!r}")
    if not target_parameters:
        return {}
    every = {f"{path}.{name}": (module, name) for path, module in modules.items()
             if not isinstance(module, LoRALinear) for name in parameter_names(module)}
    targets = set(target_parameters)             # a file may name one a million times
    for target in targets:
        if not target or not loading and not any(_names(target, path) for path in every):
            close = difflib.get_close_matches(target, every, n=4, cutoff=0.3)
            raise ValueError(f"target_parameters: no parameter in the model is called {target!r}; "
                             f"the nearest are {close}")
    return {path: held for path, held in every.items()
            if any(_names(target, path) for target in targets)}


def _names(target, path):
    return path == target or path.endswith(f".{target}")


def shortest_names(modules: dict[str, nn.Module], chosen: Collection[str]) -> list[str]:
    """Names by which `find_parameters` finds exactly the chosen paths: short ends where it can.

    Raises ValueError where PEFT's rule would find one more.
    """
    ends = {path: ".".join(path.split(".")[-3:]) for path in chosen}
    for names in (sorted(set(ends.values())), sorted(chosen)):
        found = find_parameters(modules, names)
        if found.keys() == set(chosen):
            return names
    raise ValueError("target_parameters: PEFT would adapt "
                     f"{sorted(found.keys() - set(chosen))[0]} too, whose path ends in the same")


def nested(paths: Collection[str], modules: dict[str, nn.Module]) -> dict[str, str]:
    """{parameter's path: the path under which PEFT's file holds its A and B}.

    PEFT wraps the module once for each of its parameters, in their order: the last is outermost.
    """
    by_module: dict[str, list[str]] = {}
    for path in paths:
        module, _, name = path.rpartition(".")
        by_module.setdefault(module, []).append(name)
    found = {}
    for module, names in by_module.items():
        ordered = [name for name in parameter_names(modules[module]) if name in names]
        for depth, name in enumerate(reversed(ordered)):
            found[f"{module}.{name}"] = module + ".base_layer" * depth
    return found
