"""A frozen weight in four bits: NF4 and double quantization (QLoRA, Dettmers et al. 2023).

A weight is cut into blocks. A block keeps its largest magnitude, `absmax`, and for each number the
nearest of 16 levels between -1 and 1. The levels are quantiles of the normal distribution, since
that is how weights are spread: close together around zero, far apart at the ends.
https://arxiv.org/abs/2305.14314
"""

import numbers
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lib.torch.inject import replace_modules
from lora_lib.torch.linear import is_linear, is_quantized, shape_of, weight_of
from lora_lib.torch.lora import LoRALinear
from lora_lib.torch.parts import saved_modules
from lora_lib.torch.targets import adaptable, check_target, find_targets, owners_of


def normal_levels(bits: int = 4) -> Tensor:
    """The 2^bits levels of a NormalFloat, rising from -1 to 1; with 4 bits NF4's: 7, zero, and 8.

    Each side takes equal steps in probability, from the middle of the normal distribution out to
    `outermost`. At probability 1 the quantile would be infinite, so that is half a step short of
    it: halfway between half of 1 / 15 and half of 1 / 16, since the 16 levels make 15 gaps.
    """
    n = 2**bits
    outermost = 1 - (1 / (2 * n - 2) + 1 / (2 * n)) / 2

    def side(steps):
        return [NormalDist().inv_cdf(0.5 + (outermost - 0.5) * i / steps)
                for i in range(1, steps + 1)]
    below, above = side(n // 2 - 1), side(n // 2)
    levels = [*(-q for q in reversed(below)), 0.0, *above]
    return (torch.tensor(levels, dtype=torch.float64) / above[-1]).float()


NF4 = normal_levels()
PAIRS = torch.cartesian_prod(NF4, NF4)           # (256, 2): the two levels that a byte stands for
EIGHT_BIT = torch.linspace(-1, 1, 255)           # equal steps, with a zero: for the absmaxes
SCALE_BLOCK = 256


def encode(W: Tensor, block: int = 64, levels: Tensor = NF4) -> tuple[Tensor, Tensor]:
    """Numbers of the nearest levels, uint8 (blocks, block), and each block's absmax, (blocks,).

    W has any shape and is read row by row; zeros fill the last block. `levels` (up to 256) rise
    from -1 to 1.
    """
    flat = W.detach().flatten().float()
    flat = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
    absmax = flat.abs().amax(dim=1)
    levels = levels.to(flat.device)
    between = (levels[1:] + levels[:-1]) / 2
    unit = flat / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]   # a block of zeros
    return torch.bucketize(unit, between, out_int32=True).to(torch.uint8), absmax


def decode(codes: Tensor, absmax: Tensor, shape: tuple[int, ...], levels: Tensor = NF4) -> Tensor:
    """What `encode` kept of a tensor of this shape: levels[codes] * absmax, in float32.

    With `levels=PAIRS` the codes are bytes from `pack`.
    """
    flat = codes.flatten().int()                 # uint8 would be taken for a mask
    values = levels.to(codes.device).index_select(0, flat).view(len(codes), -1)
    return values.mul_(absmax[:, None]).flatten()[:torch.Size(shape).numel()].view(shape)


def pack(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte, (..., n) -> (..., n / 2); the first in the upper four bits."""
    return codes[..., ::2] << 4 | codes[..., 1::2]


class NF4Linear(nn.Module):
    """y = W x + b with a frozen W in NF4: for an nn.Linear, or transformers' Conv1D, in its place.

    `double` stores the absmaxes, too, in few bits: less their mean, which makes them small and of
    both signs, they are encoded like a weight, in blocks of 256 and 8 bits. That costs
    4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits a weight instead of 4 + 32 / 64 = 4.5.
    (bitsandbytes has other levels there: 8-bit floats.)

    W is kept in buffers, which move, copy, and save like any. `to(dtype)` changes the dtype that W
    is computed in and not what is stored. The bias is the old layer's own, unchanged.

    Raises TypeError if `linear` is neither, ValueError for a block that is not even and positive,
    or a weight that holds NaN or infinity.
    """

    def __init__(self, linear: nn.Module, block: int = 64, double: bool = True):
        super().__init__()
        if not is_linear(linear) or is_quantized(linear):
            raise TypeError(f"expected an nn.Linear to quantize, got {type(linear).__name__}")
        if isinstance(block, bool) or not isinstance(block, numbers.Integral) \
                or block < 2 or block % 2:
            raise ValueError(f"block must be an even positive integer, got {block!r}")
        W = weight_of(linear)
        self.out_features, self.in_features = shape_of(linear)
        self.block, self.double = int(block), bool(double)
        self.bias = linear.bias
        self.register_buffer("like", W.new_empty(0), persistent=False)  # to() keeps its dtype right
        for name, stored in self._encode(W).items():
            self.register_buffer(name, stored)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., k) -> (..., d)."""
        y = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        """W (d, k), computed anew, in the dtype of the layer that was quantized (or of `to`)."""
        if self.double:
            scales = decode(self.scale_codes, _floats(self.scale_absmax), (len(self.codes),),
                            EIGHT_BIT)
            absmax = (scales + _floats(self.scale_mean)).clamp(min=0)
        else:
            absmax = _floats(self.absmax)
        shape = self.out_features, self.in_features
        return decode(self.codes, absmax, shape, PAIRS).to(self.like.dtype)

    @property
    def weight(self) -> Tensor:
        """W (d, k), computed anew; some models look at a layer's weight.dtype (T5, Mamba)."""
        return self.dequantize()

    @torch.no_grad()
    def quantize_(self, W: Tensor) -> "NF4Linear":
        """Store W (d, k), rounded, in the place of what was here; blocks get a new absmax.

        Raises ValueError, with nothing changed, for another shape, NaN, or infinity.
        """
        for name, stored in self._encode(W).items():
            getattr(self, name).copy_(stored)      # in place: a pending backward notices
        return self

    def bytes(self) -> int:
        """What W takes in memory and in a state dict."""
        return sum(b.nbytes for b in self.buffers())

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, "
                f"bias={self.bias is not None}, block={self.block}, double={self.double}")

    def _encode(self, W):
        """The buffers, by name."""
        shape = self.out_features, self.in_features
        if tuple(W.shape) != shape:
            raise ValueError(f"W must have shape (out_features, in_features) = {shape}, "
                             f"got {tuple(W.shape)}")
        codes, absmax = encode(W, self.block)
        if not torch.isfinite(absmax).all():
            raise ValueError("W holds NaN or infinity (in float32)")
        if not self.double:
            return {"codes": pack(codes), "absmax": _bits(absmax)}
        mean = absmax.mean()
        scale_codes, scale_absmax = encode(absmax - mean, SCALE_BLOCK, EIGHT_BIT)
        return {"codes": pack(codes), "scale_codes": scale_codes,
                "scale_absmax": _bits(scale_absmax), "scale_mean": _bits(mean)}


def _bits(values):
    """float32 as integers, which `model.to(torch.bfloat16)` leaves alone."""
    return values.float().view(torch.int32)


def _floats(bits):
    return bits.view(torch.float32)


class _Product(torch.autograd.Function):
    """x W^T. Backward needs W again and computes it again: between the two, only codes are kept."""

    @staticmethod
    def forward(x, layer):
        return F.linear(x, layer.dequantize())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.layer = inputs[1]
        ctx.save_for_backward(*ctx.layer.buffers())

    @staticmethod
    def backward(ctx, g):
        ctx.saved_tensors                          # raises if quantize_ has written there since
        return g @ ctx.layer.dequantize().to(g.dtype), None


def quantize(model: nn.Module, target_modules: str | list[str] = "all-linear", block: int = 64,
             double: bool = True) -> nn.Module:
    """Put an NF4Linear in the place of every target; `inject` adapters afterwards.

    `target_modules` is what `inject` takes; "all-linear" leaves out the output head, and what
    `inject` leaves out then, of which a warning tells. Returns the same model; on an error it is
    as it was before. Raises ValueError when a name matches nothing, a target has an adapter or a
    weight that is tied or not finite, or for a block that cannot be; TypeError when a target is
    not a linear layer, or is quantized already.
    """
    layers, owners = {}, owners_of(model)
    names = find_targets(model, target_modules)
    for name in names:
        if isinstance(model.get_submodule(name), LoRALinear):
            raise ValueError(f"{name} has an adapter: quantize() the base first, then inject()")
    if target_modules == "all-linear":
        names = adaptable(model, names, 1, saved_modules(model))
    for name in names:
        linear = model.get_submodule(name)
        check_target(model, name, saved_modules(model), owners)
        try:
            layers[name] = NF4Linear(linear, block, double)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
    replace_modules(model, layers)
    return model
