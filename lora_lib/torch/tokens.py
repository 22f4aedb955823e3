"""Trained rows of an embedding, such as those of new tokens: PEFT's `trainable_token_indices`.

The weight (vocabulary, d) becomes a parametrized one: whoever reads it gets the trained rows in
the place of its own, and only they get a gradient. A head that is tied to the embedding does too.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lora_lib.torch.experts import parametrized, plain

TokenIndices = Collection[int] | Mapping[str, Collection[int]]


class TokenRows(nn.Module):
    """Some rows of the weight that `modules` share, trained in the place of the frozen ones.

    Shapes, with d the embedding's width:
        tokens (n,)         which rows, in PEFT's order; not in the state dict
        rows (n, d)         their values, at first the weight's own; in `dtype`, by default the
                            weight's, or float32 beside a 16-bit weight
        W (vocabulary, d)   the frozen weight

    The first of `modules` is the one by which the rows are named. Each call of one of them copies
    W once; `merge` to serve. Raises TypeError for a weight that is no plain float parameter,
    ValueError for one on the meta device, or a token that W has no row for.
    """

    def __init__(self, modules: Sequence[Any], tokens: Collection[int], *, dtype=None):
        super().__init__()
        W = getattr(modules[0], "weight", None)
        if not isinstance(modules[0], nn.Embedding | nn.Linear) or type(W) is not nn.Parameter \
                or is_traceable_wrapper_subclass(W) or W.element_size() < 2:
            raise TypeError("only an nn.Embedding, or an nn.Linear, with a float weight can have "
                            f"trained rows, got a {type(modules[0]).__name__}")
        if W.is_meta:
            raise ValueError("the weight is on the meta device, offloaded or not loaded yet: load "
                             "the base's weights first")
        if beyond := [token for token in tokens if token >= len(W)]:
            raise ValueError(f"there is no row for token {beyond[0]}, the weight has {len(W)}: "
                             f"call model.resize_token_embeddings() for {max(beyond) + 1} or more")
        # In a tuple, so that torch does not take the modules for parts of this one.
        self.places = tuple((m, tuple(m._parameters)) for m in modules)
        self.tokens: Tensor
        self.register_buffer("tokens", torch.tensor([*tokens], device=W.device), persistent=False)
        dtype = dtype or torch.promote_types(W.dtype, torch.float32)
        self.rows = nn.Parameter(W.detach()[self.tokens].to(dtype))
        self.merged, self.before = False, torch.empty(0)

    def forward(self, W: Tensor) -> Tensor:
        """What a reader of the weight gets."""
        return W if self.merged else W.index_copy(0, self.tokens, self.rows.to(W.dtype))

    @property
    def original(self) -> nn.Parameter:
        """The frozen weight; once `merged`, with the rows in it."""
        return self.places[0][0].parametrizations.weight.original  # type: ignore

    def check_finite(self) -> None:
        """Raise ValueError for rows that hold NaN or infinity, in the weight's dtype."""
        if not torch.isfinite(self.rows.detach().to(self.original.dtype)).all():
            raise ValueError("the trained rows hold NaN or infinity; the weight is left alone")

    def merge(self) -> None:
        """Write the rows into the weight; twice is once."""
        if not self.merged:
            self.check_finite()
            W = self.original.data
            self.before = W[self.tokens]
            W[self.tokens] = self.rows.detach().to(W.dtype)
            self.merged = True

    def unmerge(self) -> None:
        """Write the weight's own rows back, bit for bit."""
        if self.merged:
            self.original.data[self.tokens] = self.before.to(self.original.device)
            self.merged, self.before = False, torch.empty(0)

    def put(self) -> None:
        """Make the modules' weight the one with the trained rows."""
        self.train(self.places[0][0].training)
        for module, _ in self.places:
            parametrized(module, "weight", self)

    def take_out(self) -> None:
        """The modules as they were, with the weight as it is now."""
        for module, order in self.places:
            plain(module, "weight", order)

    def extra_repr(self) -> str:
        return f"rows={len(self.rows)}, width={self.rows.shape[1]}"


def token_rows(model: nn.Module) -> dict[str, TokenRows]:
    """Every TokenRows in the model, by the path of the first module that has it."""
    found = {id(m): m for m in model.modules() if isinstance(m, TokenRows)}
    names = {id(m): name for name, m in model.named_modules()}
    return {next(names[id(m)] for m, _ in part.places if id(m) in names): part
            for part in found.values()}


def named_for_peft(model: nn.Module, name: str) -> list[str]:
    """The paths under which PEFT keeps rows that are `name`'s here: of each module that shares the
    weight, unless transformers' configuration, by which alone PEFT knows it, says that it is tied.
    """
    W = frozen_weight(model.get_submodule(name))
    return [name] if getattr(getattr(model, "config", None), "tie_word_embeddings", False) else [
        path for path, module in model.named_modules()
        if not isinstance(module, ParametrizationList) and frozen_weight(module) is W]


def saved_rows(model: nn.Module) -> dict[str, TokenRows]:
    """Every TokenRows by its paths in PEFT's file."""
    return {path: part for name, part in token_rows(model).items()
            for path in named_for_peft(model, name)}


def find_rows(model: nn.Module, modules: Mapping[str, nn.Module],
              trainable_token_indices: TokenIndices) -> dict[str, list[int]]:
    """{path: tokens}, from PEFT's argument: tokens of the input embedding, or {name: tokens}.

    Of modules that share one weight the input embedding is named, or the first. Raises TypeError
    or ValueError for what is no such argument, a name that is no module's, a token twice, or
    modules that share a weight and differ in their tokens.
    """
    named: Any = trainable_token_indices
    embedding = getattr(model, "get_input_embeddings", lambda: None)() if named else None
    first = next((name for name, m in modules.items() if m is embedding), None)
    if not isinstance(named, Mapping):
        if named and first is None:
            raise ValueError("trainable_token_indices: the model names no input embedding; "
                             "expected {name of the embedding: tokens}")
        named = {first: named} if named else {}
    found: dict[str, list[int]] = {}
    for name, tokens in named.items():
        _check_tokens(name, tokens)
        paths = [path for path in modules if path == name or path.endswith(f".{name}")]
        if not paths:
            raise ValueError(f"trainable_token_indices: nothing in the model is called {name!r}; "
                             f"the input embedding is {first!r}")
        for path in paths:
            if found.setdefault(path, [*tokens]) != [*tokens]:
                raise ValueError(f"trainable_token_indices names {path} twice, with other tokens")
    one = {id(frozen_weight(embedding)): first} if first else {}
    rows: dict[str, list[int]] = {}
    for path, tokens in found.items():
        owner = one.setdefault(id(frozen_weight(modules[path])), path)
        if rows.setdefault(owner, tokens) != tokens:
            raise ValueError(f"trainable_token_indices: {path} shares its weight with another "
                             "module that is named, and cannot have other tokens")
    return rows


def _check_tokens(name, tokens):
    if isinstance(tokens, str | Mapping) or not isinstance(tokens, Collection) \
            or not all(type(token) is int for token in tokens):
        raise TypeError("trainable_token_indices must be a list of tokens' numbers, or "
                        f"{{name: such a list}}, got {tokens!r:.200} for {name!r}")
    if not tokens or min(tokens) < 0 or len(set(tokens)) < len(tokens):
        raise ValueError(f"trainable_token_indices: expected numbers from 0, each once, got "
                         f"{tokens!r:.200} for {name!r}")


def frozen_weight(module: Any) -> Any:
    """The module's weight, or what is behind a parametrized one; itself where it has none."""
    return module.parametrizations.weight.original if is_parametrized(module, "weight") \
        else getattr(module, "weight", module)
