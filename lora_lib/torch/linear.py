"""What counts as a linear layer, and its weight as one matrix (out_features, in_features).

Three kinds: nn.Linear; GPT-2's Conv1D of transformers, which stores the transpose; and a quantized
layer, which has `in_features`, `out_features`, `dequantize()` and `quantize_(W)`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter can stand beside this module."""
    return isinstance(module, nn.Linear) or is_conv1d(module) or is_quantized(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D: a linear layer with its weight stored as (k, d)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_quantized(module: nn.Module) -> bool:
    """Whether the weight is stored in few bits, and computed when it is needed."""
    return hasattr(module, "dequantize") and hasattr(module, "quantize_")


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features), d and k."""
    if is_conv1d(module):
        return module.weight.shape[1], module.weight.shape[0]
    return module.out_features, module.in_features


def weight_of(module: nn.Module) -> Tensor:
    """The weight (d, k): the tensor itself, a transposed view of it, or computed from its bits."""
    if is_quantized(module):
        return module.dequantize()
    return module.weight.T if is_conv1d(module) else module.weight


def check_adaptable(module: nn.Module) -> None:
    """Raise TypeError unless an adapter beside this module can do what it should."""
    if not is_linear(module):
        raise TypeError(f"expected an nn.Linear to adapt, got {type(module).__name__}")
    if is_quantized(module):
        return
    W = module.weight
    if not isinstance(W, nn.Parameter):
        raise TypeError("the layer's weight is not a parameter but computed, by a parametrization "
                        "or a hook: remove that first")
    if isinstance(W, nn.UninitializedParameter):
        raise TypeError("the layer has no weight before its first input: send one batch through "
                        "the model first")
    if hasattr(W, "full_tensor"):                # FSDP would neither split A and B nor average them
        raise TypeError("the layer's weight is a DTensor, split over processes already: inject() "
                        "first, then fully_shard()")
    if is_traceable_wrapper_subclass(W):
        raise TypeError(f"the layer's weight is a {type(W).__name__}, another library's tensor: "
                        "dequantize it first, or quantize with lora_lib.torch.quantize")
    if W.is_floating_point() and W.element_size() < 2:
        raise TypeError(f"the layer's weight is stored as {W.dtype}, without its scale no number: "
                        "dequantize it first, or quantize with lora_lib.torch.quantize")
    if not (_is_known(module) or W.is_meta) and W.is_floating_point() and W.ndim == 2:
        try:
            theirs, plain = _tried(module)
            alike = theirs.shape == plain.shape
        except Exception:                        # it wants other arguments, or gives no tensor
            alike = False
        if not alike:
            raise TypeError(f"a {type(module).__name__} does not turn x (..., in_features) into "
                            "(..., out_features), as the adapter beside it does")


@torch.no_grad()
def check_writable(module: nn.Module) -> None:
    """Raise ValueError unless `write_weight` changes what the module computes, and that alone.

    A layer of an unknown class is asked what it makes of a few numbers.
    """
    if is_quantized(module):
        return
    W = weight_of(module)
    if W.is_meta:
        raise ValueError("the weight is on the meta device, offloaded or not loaded yet: a merge "
                         "would be lost. Load the model without offloading")
    if tuple(W.shape) != shape_of(module) or not W.is_floating_point():
        raise ValueError(f"the weight is stored as {W.dtype}, {tuple(W.shape)}: split over "
                         "processes, or quantized by another library, which keeps a scale beside "
                         "it. Gather or dequantize it first")
    if _is_known(module):
        return
    theirs, plain = _tried(module)
    off = (theirs - plain).norm() / plain.norm()
    if not off <= max(1e-3, 8 * torch.finfo(W.dtype).eps):
        raise ValueError(f"a {type(module).__name__} does not compute W x + b with the weight that "
                         "it holds: a merge would not be what the adapter does")


@torch.no_grad()
def _tried(module):
    """What a layer of an unknown class makes of a few rows x (4, k), and x W^T + b."""
    W = weight_of(module)
    x = torch.randn(4, W.shape[1], generator=torch.Generator().manual_seed(0)).to(W)
    return module(x), F.linear(x, W, module.bias)


def _is_known(module):
    """Whether the class computes x W^T + b; what a class of somebody's own does, nobody knows."""
    return is_conv1d(module) or type(module).forward in (nn.Linear.forward,
                                                         NonDynamicallyQuantizableLinear.forward)


def place_of(module: nn.Module) -> torch.device:
    """Where the module computes: its weight's device, or where accelerate brings the weight."""
    hook = _offload(module)
    held = next(module.buffers()) if is_quantized(module) else module.weight
    return torch.device(hook.execution_device) if hook else held.device


def stored(module: nn.Module, name: str) -> Tensor:
    """A parameter; one that accelerate has offloaded, from where it lies."""
    tensor, hook = getattr(module, name), _offload(module)
    return hook.weights_map[name] if tensor.is_meta and hook else tensor


def _offload(module):
    """accelerate's hook that keeps this module's tensors elsewhere, or None."""
    hook = getattr(module, "_hf_hook", None)
    return next((h for h in getattr(hook, "hooks", [hook]) if getattr(h, "offload", False)
                 and getattr(h, "weights_map", None) is not None), None)


def full(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP has split, for which every process must ask; another as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def write_weight(module: nn.Module, W: Tensor) -> None:
    """Make W (d, k) the module's weight, in place; a quantized layer rounds it."""
    if is_quantized(module):
        module.quantize_(W)
    else:
        weight_of(module).data.copy_(W)


def stored_weights(model: nn.Module) -> dict[str, Tensor]:
    """What holds the model's weights, by name: its parameters, and the bits of quantized layers."""
    bits = {f"{name}.{key}": b for name, m in model.named_modules() if is_quantized(m)
            for key, b in m.named_buffers()}
    return dict(model.named_parameters()) | bits
