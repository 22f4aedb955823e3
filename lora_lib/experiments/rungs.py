"""The rungs of the ladder: one LoRA layer, and three of one input, in ways that give the same.

lora_lib.experiments.ladder measures them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from lora_lib.torch.fused import lora_linear, lora_linears


class Layer(NamedTuple):
    """W (d, k) and bias (d,), frozen; A (r, k) and B (d, r), trained."""
    W: Tensor
    bias: Tensor
    A: Tensor
    B: Tensor
    scaling: float


# One layer: x (n, k) and a Layer -> y (n, d).

def frozen(x, W, bias, A, B, scaling):
    return F.linear(x, W, bias)


def formula(x, W, bias, A, B, scaling):
    return F.linear(x, W, bias) + scaling * F.linear(F.linear(x, A), B)


def narrow(x, W, bias, A, B, scaling):
    return F.linear(x, W, bias) + F.linear(F.linear(x, A) * scaling, B)


class Step(Function):
    """The layer as one step of autograd. The flags are rungs: each changes how, never what."""

    @staticmethod
    def forward(ctx, x, W, bias, A, B, scaling, in_place, transposed):
        u = F.linear(x, A).mul_(scaling)
        ctx.save_for_backward(x, u, W, A, B)
        ctx.options = scaling, in_place, transposed
        if in_place:
            y = torch.addmm(bias, u, B.t())
            return torch.addmm(y, x, W.t(), out=y)
        return F.linear(x, W, bias) + F.linear(u, B)

    @staticmethod
    def backward(ctx, g):
        x, u, W, A, B = ctx.saved_tensors
        scaling, in_place, transposed = ctx.options
        v = torch.mm(B.t(), g.t()).t() if transposed else torch.mm(g, B)
        v.mul_(scaling)
        dB = torch.mm(u.t(), g).t() if transposed else torch.mm(g.t(), u)
        dx = torch.mm(v, A)
        dx = torch.addmm(dx, g, W, out=dx) if in_place else torch.mm(g, W) + dx
        return dx, None, None, torch.mm(v.t(), x), dB, None, None, None


def one_step(x, *layer):
    return Step.apply(x, *layer, False, False)


def in_place(x, *layer):
    return Step.apply(x, *layer, True, False)


def transposed(x, *layer):
    return Step.apply(x, *layer, True, True)


class Formed(Function):
    """W' = W + scaling B A is formed, and formed again for dx: no sum of outputs is left."""

    @staticmethod
    def forward(ctx, x, W, bias, A, B, scaling):
        ctx.save_for_backward(x, W, A, B)
        ctx.scaling = scaling
        return F.linear(x, torch.addmm(W, B, A, alpha=scaling), bias)

    @staticmethod
    def backward(ctx, g):
        x, W, A, B = ctx.saved_tensors
        dx = torch.mm(g, torch.addmm(W, B, A, alpha=ctx.scaling))
        v_t = torch.mm(B.t(), g.t()).mul_(ctx.scaling)
        u = F.linear(x, A).mul_(ctx.scaling)
        return dx, None, None, torch.mm(v_t, x), torch.mm(u.t(), g).t(), None


class Stacked(Function):
    """W and A lie in one buffer [W; A], so y and x A^T are one product, (n, d + r).

    Then y is the first d columns of it: a view whose rows are d + r apart.
    """

    @staticmethod
    def forward(ctx, x, W, bias, A, B, scaling):
        d, r = B.shape
        if A.data_ptr() != W.data_ptr() + W.nbytes:
            raise ValueError("W and A must lie in one buffer, A behind W")
        both = torch.mm(x, W.as_strided((d + r, W.shape[1]), W.stride()).t())
        y, u = both[:, :d], both[:, d:] * scaling
        ctx.save_for_backward(x, u, W, A, B)
        ctx.options = scaling, True, True
        return torch.addmm(y.add_(bias), u, B.t(), out=y)

    @staticmethod
    def backward(ctx, g):
        return Step.backward(ctx, g)[:6]


def cast_input(x, W, bias, A, B, scaling):
    """PEFT's way with float32 adapters beside a bfloat16 base: x is copied to float32."""
    y = F.linear(x, W, bias)
    return (y + F.linear(F.linear(x.to(A.dtype), A), B) * scaling).to(y.dtype)


def cast_AB(x, W, bias, A, B, scaling):
    """The same layer with A and B cast to x's dtype instead: r (k + d) numbers."""
    return narrow(x, W, bias, A.to(x.dtype), B.to(x.dtype), scaling)


RUNGS = {"frozen": frozen, "formula": formula, "narrow scale": narrow, "one step": one_step,
         "in place": in_place, "transposed": transposed, "library": lora_linear,
         "W' formed": Formed.apply, "W, A stacked": Stacked.apply}


# Three layers that read one x: x and a list of Layers -> a tuple of outputs.

def each(rung: Callable) -> Callable:
    """`rung` for one layer after the other."""
    return lambda x, layers: tuple(rung(x, *layer) for layer in layers)


TOGETHER = {"frozen": each(frozen), "formula": each(formula), "library": each(lora_linear),
            "shared": lora_linears}
BESIDE_16_BITS = {"frozen": each(frozen), "cast x": each(cast_input), "cast A and B": each(cast_AB),
                  "library": each(lora_linear), "shared": lora_linears}
