"""What counts as a linear layer, and its weight as one matrix (out_features, in_features).

Three kinds: nn.Linear; GPT-2's Conv1D of transformers, which stores the transpose; and a quantized
layer, which has `in_features`, `out_features`, `dequantize()` and `quantize_(W)`.
"""

from torch import Tensor, nn


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
