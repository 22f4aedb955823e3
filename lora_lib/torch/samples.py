"""A few values of the base's weights, by which `load_adapter` knows the base again."""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lora_lib.torch.experts import LoRAExperts
from lora_lib.torch.linear import full, is_conv1d, is_linear, is_quantized, stored, weight_of
from lora_lib.torch.lora import LoRALinear
from lora_lib.torch.parts import saved_modules
from lora_lib.torch.targets import base_modules, within


def check_same(name, here, there, what):
    """Raise ValueError if two samples of a weight differ by more than bfloat16's rounding."""
    if here is None or there is None:
        return
    here, there = torch.tensor(here), torch.tensor(there)
    if here.shape != there.shape or not torch.allclose(
            here, there, rtol=2**-7, atol=1e-3 * float(there.abs().max())):
        raise ValueError(f"{name}: the weight is {what}; load the right base, or pass "
                         "check_base=False if you mean it")


def sample(module):
    """A few values of the base's weight, or None: keeping an adapter must not fail for them."""
    try:
        if isinstance(module, Tensor | LoRAExperts):
            W = getattr(module, "original", module).detach()
            W = module.unmerge_weights(W) if getattr(module, "merged", False) else W
            return spread(W.reshape(-1, W.shape[-1]))
        layer = module.linear if isinstance(module, LoRALinear) else module
        W = weight_of(layer) if is_quantized(layer) else full(stored(layer, "weight"))
        W = W.detach().T if is_conv1d(layer) else W.detach()
        if getattr(module, "merged", False):
            W = module.unmerge_weights(W)
        return spread(W)
    except Exception:                            # a class of tensor that nobody here knows
        return None


def sample_rows(W, rows):
    """The same of an embedding's weight, with `rows` {token: row} in the place of its own."""
    return None if hasattr(W, "full_tensor") else spread(W.detach(), rows=rows)


def spread(W, count=8, rows=()):
    """`count` values, spread evenly over a matrix; None where there are no plain numbers."""
    if W.is_meta or not W.numel() or not W.is_floating_point():
        return None
    places = [divmod(i * (W.numel() - 1) // (count - 1), W.shape[1]) for i in range(count)]
    values = W[[row for row, _ in places], [column for _, column in places]].float()
    for i, (row, column) in enumerate(places):
        if row in rows:
            values[i] = rows[row][column]
    return values.tolist() if torch.isfinite(values).all() else None


def embeddings(model):
    """The paths of the input and output embeddings of a model of transformers."""
    found = []
    for kind in ("input", "output"):
        try:
            found.append(getattr(model, f"get_{kind}_embeddings", lambda: None)())
        except NotImplementedError:              # a model of images or sound has none
            pass
    return {name for name, m in base_modules(model).items() if any(m is f for f in found)}


def ends(model):
    """Embeddings, and linear layers outside the numbered blocks, without an adapter, by path.

    They are where a model is not its base: rows for new tokens, a new head.
    """
    whole = saved_modules(model)
    return {name: m for name, m in base_modules(model).items()
            if not any(part.isdigit() for part in name.split(".")) and not within(name, whole)
            and not is_parametrized(m)
            and (isinstance(m, nn.Embedding) or is_linear(m) and not is_quantized(m))}
