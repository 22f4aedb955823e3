"""Many adapters on one base: keep them by name, put one or a sum of several in force, go back."""

import math
import numbers
import os
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from functools import reduce
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_lib.torch.checkpoint import load_adapter, save_adapter
from lora_lib.torch.experts import refuse_experts
from lora_lib.torch.inject import inject, remove, replace_modules
from lora_lib.torch.lora import LoRALinear
from lora_lib.torch.parts import lora_modules, lora_state_dict, parts_of, saved_modules
from lora_lib.torch.targets import few
from lora_lib.torch.tokens import token_rows

Selection = str | Mapping[str, float] | None


class Adapters:
    """Named adapters for one base model, of which one selection is in force at a time.

    A selection is a name, {name: weight} for the weighted sum of several, or None: the base alone.
    `activate` puts it beside the weights, `merge` into them; either takes the place of what was in
    force, whichever it was. Adapters may differ in modules, rank, alpha, use_rslora and dropout.

    Only what is in force is in the model: a name alone, or with weight 1, as its own LoRALinear
    modules, so that `fine_tune(model, ...)` trains it, and it alone. Nothing is copied. A sum is
    one frozen adapter of stacked rank for each module, a copy:
        B = [w1 s1 B1, w2 s2 B2, ...] (d, r1 + r2 + ...), A = [A1; A2; ...] (r1 + r2 + ..., k)
    Later training of a part shows in it when it is put in force again.

    `present` names the adapter that the model has already. Raises ValueError if it has one and
    there is no name, or a name and none, or if it is merged. Every method raises ValueError for a
    name that is not there, and if the model's adapters were changed by other means than these
    methods; on an error the model is as it was.
    """

    def __init__(self, model: nn.Module, present: str | None = None):
        refuse_experts(model, "Adapters")
        layers = lora_modules(model)
        if present is None and layers:
            raise ValueError(f"the model holds an adapter already, in {few(layers)}; give it a "
                             "name, Adapters(model, present=...), or remove(model) it")
        if whole := saved_modules(model) | token_rows(model):
            raise ValueError(f"the model trains {few(whole)} whole, or rows of it "
                             "(modules_to_save, trainable_token_indices), of which several "
                             "adapters on one base cannot each have their own")
        if present is not None and (not layers or "" in layers):
            raise ValueError(f"present={present!r}, but the model holds no LoRALinear with a path")
        self.model = model
        self._adapters: dict[str, dict[str, LoRALinear]] = {}
        self._originals: dict[str, dict[str, Tensor]] = {}   # of the merged weights, on the host
        self._installed = layers
        self._active: dict[str, float] = {}
        self._check_untouched()
        if present is not None:
            self._adapters[_new_name(present, self.names)] = layers
            self._active = {present: 1}

    @property
    def names(self) -> list[str]:
        """The adapters there are, in the order in which they came."""
        return list(self._adapters)

    @property
    def active(self) -> dict[str, float]:
        """The weight of each adapter in force, beside the weights or merged; {} for the base."""
        return dict(self._active)

    @property
    def merged(self) -> bool:
        """Whether the selection in force is in the weights."""
        return bool(self._originals)

    @property
    def host_bytes(self) -> int:
        """What `unmerge` costs: the bytes of the adapted layers, whatever the rank; else 0."""
        return sum(t.nbytes for tensors in self._originals.values() for t in tensors.values())

    def layers(self, name: str) -> dict[str, LoRALinear]:
        """The LoRALinear modules of one adapter by path; they share the base's linear layers."""
        return dict(self._adapters[next(iter(self._weights(name)))])

    def add(self, name: str, target_modules: str | list[str], rank: int = 8, alpha: float = 16.0,
            dropout: float = 0.0, **options) -> None:
        """A new adapter, whose arguments and errors are `inject`'s. `activate` it to train it.

        As `inject` does, this freezes the base.
        """
        self._gain(name, lambda: inject(self.model, target_modules, rank, alpha, dropout,
                                        **options))

    def load(self, name: str, path: str | os.PathLike, *, check_base: bool = True) -> None:
        """The adapter in the folder `path`; errors are `load_adapter`'s."""
        self._gain(name, lambda: load_adapter(self.model, path, check_base=check_base))

    def combine(self, name: str, selection: Selection) -> None:
        """A weighted sum as an adapter of its own, which can be trained, saved and summed."""
        weights = self._weights(selection, "combine")
        self._adapters[_new_name(name, self.names)] = layers = self._modules(weights, copies=True)
        for p in chain.from_iterable(map(parts_of, layers.values())):
            p.requires_grad_(True)

    def remove(self, name: str) -> None:
        """Forget an adapter. Raises ValueError if it is in force."""
        self._weights(name)
        if name in self._active:
            raise ValueError(f"adapter {name!r} is in force ({self._active}); activate another "
                             "selection, or None, before you remove it")
        del self._adapters[name]

    def activate(self, selection: Selection) -> None:
        """Put the selection beside the weights. What was merged is taken out of them, exactly."""
        weights = self._weights(selection)
        self._check_untouched()
        layers = self._modules(weights)
        self._restore()
        self._put(layers)
        self._active = weights

    @torch.no_grad()
    def merge(self, selection: Selection) -> None:
        """Put the selection into the weights, W + sum of w s B A, rounded once to W's dtype.

        Always from the original weights: what was merged before leaves nothing behind. The
        originals of the adapted layers stay in host memory, `host_bytes` of them, since
        (W + D) - D is not W in floating point. The model holds plain linear layers.

        Raises ValueError for the empty selection, and if a sum holds NaN or infinity.
        """
        weights, before = self._weights(selection, "merge"), (self._active, self.merged)
        self._check_untouched()
        layers = self._modules(weights)
        self.activate(None)
        for path, layer in layers.items():
            self._originals[path] = {key: t.to("cpu", copy=True)
                                     for key, t in _tensors(layer.linear).items()}
            try:
                layer.write(1)
            except Exception as error:
                self._restore()
                self._force(*before)
                if type(error) is ValueError:
                    raise ValueError(f"{path}: {error}") from error
                raise
        self._active = weights

    def unmerge(self) -> None:
        """The base's weights again, bit for bit, and the same selection beside them.

        Raises ValueError if none is merged.
        """
        if not self.merged:
            raise ValueError(f"nothing is merged; in force, beside the weights: {self._active}")
        self.activate(self._active)

    def save(self, selection: Selection, path: str | os.PathLike, **options) -> Path:
        """Write a selection to the folder `path` as one adapter; `options` are `save_adapter`'s."""
        with self._for_a_while(selection):
            return save_adapter(self.model, path, **options)

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """A and B of one adapter under PEFT's names: the tensors themselves, not copies."""
        layers, installed = self.layers(name), self._installed
        self._check_untouched()
        self._put(layers)
        try:
            return lora_state_dict(self.model)
        finally:
            self._put(installed)

    @torch.no_grad()
    def load_state_dict(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Copy what `state_dict` gave into one adapter; keys and shapes must be the same."""
        own = self.state_dict(name)
        there, here = ({key: tuple(t.shape) for key, t in d.items()} for d in (tensors, own))
        if there != here:
            wrong = sorted(key for key in there | here if there.get(key) != here.get(key))
            raise ValueError(f"adapter {name!r} does not fit: {wrong[0]} has shape "
                             f"{here.get(wrong[0])} in it and {there.get(wrong[0])} in the tensors"
                             f" ({len(wrong)} of {len(there | here)} differ)")
        for key, t in own.items():
            t.copy_(tensors[key])

    def _weights(self, selection, to="") -> dict[str, float]:
        """The selection as {name: weight}, checked; not empty where there is something `to` do."""
        weights = {selection: 1} if isinstance(selection, str) else selection or {}
        if to and not weights:
            raise ValueError(f"there is nothing to {to} in {selection!r}; choose from {self.names}")
        if not isinstance(weights, Mapping):
            raise TypeError("a selection is a name, {name: weight}, or None, "
                            f"got {type(selection).__name__}")
        for name, weight in weights.items():
            if name not in self._adapters:
                raise ValueError(f"there is no adapter {name!r}; there are {self.names}")
            if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
                raise TypeError(f"the weight of {name!r} must be a number, got {weight!r}")
            if not math.isfinite(weight):
                raise ValueError(f"the weight of {name!r} must be finite, got {weight}")
        return dict(weights)

    def _force(self, selection, merged):
        (self.merge if merged else self.activate)(selection)

    def _modules(self, weights, copies=False) -> dict[str, LoRALinear]:
        """What a selection puts into the model, by path."""
        if [*weights.values()] == [1] and not copies:
            return self._adapters[next(iter(weights))]
        terms = {}
        for name, weight in weights.items():
            for path, layer in self._adapters[name].items():
                terms.setdefault(path, []).append((weight, layer))
        return {path: _sum(found) for path, found in terms.items()}

    def _check_untouched(self):
        """What other functions of the library did to the model would be lost, or done twice."""
        present = lora_modules(self.model)
        if present != self._installed:
            changed = sorted(path for path in present | self._installed
                             if present.get(path) is not self._installed.get(path))
            raise ValueError(f"the adapters in {few(changed)} were put in or taken out by other "
                             "means than Adapters; undo that first")
        if merged := [path for path, layer in present.items() if layer.merged]:
            raise ValueError(f"{few(merged)} is merged by merge(model); unmerge(model) it first, "
                             "then use the method merge() of Adapters")

    def _put(self, layers):
        """Make `layers` the adapters in the model: references change, no number does."""
        replace_modules(self.model, {path: layer.linear
                                     for path, layer in lora_modules(self.model).items()})
        for layer in layers.values():
            # While it was out, the model may have moved, or changed to eval().
            layer.to(_device(layer.linear))
            layer.train(layer.linear.training)
        replace_modules(self.model, layers)
        self._installed = layers

    @torch.no_grad()
    def _restore(self):
        """Write the original weights back."""
        for path, tensors in self._originals.items():
            for key, t in _tensors(self.model.get_submodule(path)).items():
                t.copy_(tensors[key])
        self._originals = {}

    @contextmanager
    def _for_a_while(self, selection):
        """The selection beside the weights, then what was in force before."""
        before = self._active, self.merged
        self.activate(selection)
        try:
            yield
        finally:
            self._force(*before)

    def _gain(self, name, put_in: Callable[[], nn.Module]):
        """Let `put_in` put an adapter into the bare base, and keep it under `name`."""
        name = _new_name(name, self.names)
        with self._for_a_while(None):
            try:
                put_in()
                try:
                    refuse_experts(self.model, "Adapters")
                except ValueError:
                    remove(self.model)
                    raise
                if whole := saved_modules(self.model) | token_rows(self.model):
                    remove(self.model)                   # gives them their values back
                    raise ValueError(f"adapter {name!r} trains {few(whole)} whole, or rows of it "
                                     "(modules_to_save, trainable_token_indices), of which a base "
                                     "has but one; use load_adapter() on a base of its own")
                self._adapters[name] = lora_modules(self.model)
            finally:
                self._put({})


@torch.no_grad()
def _sum(terms: list[tuple[float, LoRALinear]]) -> LoRALinear:
    """One frozen adapter that adds up several of one module, each with its weight."""
    linear = terms[0][1].linear
    dtype = reduce(torch.promote_types, (layer.A.dtype for _, layer in terms), torch.float32)
    place = {"device": _device(linear), "dtype": dtype}
    A = torch.cat([layer.A.to(**place) for _, layer in terms])
    B = torch.cat([w * layer.scaling * layer.B.to(**place) for w, layer in terms], dim=1)
    d, k = len(B), A.shape[1]
    if len(A) > min(d, k):                     # more rank than the matrix has: the matrix itself
        A, B = (torch.eye(k, **place), B @ A) if k <= d else (B @ A, torch.eye(d, **place))
    layer = LoRALinear(linear, rank=len(A), alpha=len(A), seed=0, dtype=dtype)   # scaling 1
    layer.A, layer.B = (nn.Parameter(t, requires_grad=False) for t in (A, B))
    biases = [w * part.scaling * part.B_bias.to(**place) for w, part in terms
              if part.B_bias is not None]
    if biases:
        layer.B_bias = nn.Parameter(torch.stack(biases).sum(0), requires_grad=False)
    return layer


def _tensors(module):
    """All that a linear layer holds, a quantized one too."""
    return dict(chain(module.named_parameters(), module.named_buffers()))


def _device(module):
    return next(iter(_tensors(module).values())).device


def _new_name(name, names):
    if not isinstance(name, str) or not name:
        raise TypeError(f"the name of an adapter must be a string with a letter, got {name!r}")
    if name in names:
        raise ValueError(f"there is an adapter {name!r} already, of {names}; remove() it, "
                         "or choose another name")
    return name

