"""One LoRA layer as one step of autograd: the same numbers as `LoRALayer.forward`, sooner.

With g = dL/dy, u = scaling * x A^T, and v = scaling * g B, all of them n rows (Hu et al. 2021, eq. 3):

    y  = u B^T + b + x W^T          dA = v^T x          dx = v A + g W          dB = g^T u

What makes it fast is the shape of the computation, not less of it:
* The large product adds to the small one's output in place, forward and backward. The
  formula's own sum would write, and read, one more n x d array; autograd's sum one more n x k.
* Only x and u are kept for backward. A and B are cast to x's dtype when they are needed, and again
  in backward: r (k + d) numbers, where keeping the casts would take memory in every layer.
* v and dB are computed as their transposes, B^T g^T and u^T g, which BLAS does up to five times
  faster than the tall products g B and g^T u of a small rank.
* Layers that read the same x (queries, keys and values) share one product x [A1; A2; A3]^T, one
  [v1, v2, v3]^T x, and one array for dx.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from lora_lib.torch.linear import is_conv1d


def lora_linear(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor,
                scaling: float) -> Tensor:
    """x W^T + bias + scaling * (x A^T) B^T, (..., k) -> (..., d); W and bias get no gradient.

    W (d, k), bias (d,) or None, A (r, k), B (d, r). A and B may be wider than x, which stays as it
    is: float32 beside bfloat16. Gradients have the dtype of what they belong to. Differentiable
    twice. Under autocast x, W and bias are cast as F.linear would.
    """
    x, W, bias = _autocast(x, W, bias)
    if torch.is_grad_enabled() and (x.requires_grad or A.requires_grad or B.requires_grad):
        return _One.apply(x, W, bias, A, B, scaling)
    return _forward(_rows(x), W, bias, A.to(x.dtype), B.to(x.dtype), scaling)[0].view(
        *x.shape[:-1], len(W))


def lora_linears(x: Tensor, layers: list[tuple]) -> tuple[Tensor, ...]:
    """`lora_linear` for several (W, bias, A, B, scaling) that read the same x (..., k)."""
    if not torch.is_grad_enabled():
        return tuple(lora_linear(x, *layer) for layer in layers)
    *tensors, scalings = zip(*layers)
    x, *cast = _autocast(x, *tensors[0], *tensors[1])
    return _Shared.apply(x, scalings, *cast, *tensors[2], *tensors[3])


class _One(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, bias, A, B, scaling):
        y, u = _forward(_rows(x), W, bias, A.to(x.dtype), B.to(x.dtype), scaling)
        ctx.save_for_backward(x, u, W, A, B)
        ctx.scaling = scaling
        return y if x.ndim == 2 else y.view(*x.shape[:-1], len(W))

    @staticmethod
    def backward(ctx, g):
        x, u, W, A, B = ctx.saved_tensors
        rows, g = _rows(x), _rows(g)
        a, b = A.to(x.dtype), B.to(x.dtype)
        if torch.is_grad_enabled():              # differentiated twice: u must depend on x and A
            u = F.linear(rows, a) * ctx.scaling
        dx = dA = dB = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
            v_t = torch.mm(b.t(), g.t()).mul_(ctx.scaling)
        if ctx.needs_input_grad[0]:
            dx = _plus(torch.mm(v_t.t(), a), g, W).view(x.shape)
        if ctx.needs_input_grad[3]:
            dA = torch.mm(v_t, rows).to(A.dtype)
        if ctx.needs_input_grad[4]:
            dB = torch.mm(u.t(), g).t().to(B.dtype)
        return dx, None, None, dA, dB, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scalings, *tensors):
        Ws, biases, As, Bs = _fours(tensors)
        rows = _rows(x)
        us = F.linear(rows, torch.cat(As).to(x.dtype)).split([len(A) for A in As], dim=1)
        ys = [_expand(rows, W, bias, B.to(x.dtype), u.mul_(scaling))
              for W, bias, B, u, scaling in zip(Ws, biases, Bs, us, scalings)]
        ctx.save_for_backward(x, *us, *tensors)
        ctx.scalings = scalings
        return tuple(y.view(*x.shape[:-1], len(W)) for y, W in zip(ys, Ws))

    @staticmethod
    def backward(ctx, *gs):
        n = len(gs)
        x, *saved = ctx.saved_tensors            # once: a checkpoint gives each a single time
        us, (Ws, _, As, Bs) = saved[:n], _fours(saved[n:])
        rows, gs, sizes = _rows(x), [_rows(g) for g in gs], [len(A) for A in As]
        a = torch.cat(As).to(x.dtype)
        if torch.is_grad_enabled():
            us = [u * scaling for u, scaling in
                  zip(F.linear(rows, a).split(sizes, dim=1), ctx.scalings)]
        v_t = torch.cat([torch.mm(B.to(x.dtype).t(), g.t()).mul_(scaling)
                         for B, g, scaling in zip(Bs, gs, ctx.scalings)])
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(v_t.t(), a)
            for g, W in zip(gs, Ws):
                dx = _plus(dx, g, W)
            dx = dx.view(x.shape)
        dAs = [dA.to(A.dtype) for dA, A in zip(torch.mm(v_t, rows).split(sizes), As)]
        dBs = [torch.mm(u.t(), g).t().to(B.dtype) for u, g, B in zip(us, gs, Bs)]
        return dx, None, *[None] * (2 * n), *dAs, *dBs


def _forward(x, W, bias, A, B, scaling):
    """y (n, d) and u (n, r)."""
    u = F.linear(x, A).mul_(scaling)
    return _expand(x, W, bias, B, u), u


def _expand(x, W, bias, B, u):
    y = torch.mm(u, B.t()) if bias is None else torch.addmm(bias, u, B.t())
    return _plus(y, x, W.t())


def _plus(total, a, b):
    """total + a b, in place unless that is to be differentiated (addmm_, but FLOP counters see it)."""
    return torch.addmm(total, a, b, out=None if torch.is_grad_enabled() else total)


def _rows(x):
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _fours(tensors):
    n = len(tensors) // 4
    return (tensors[i:i + n] for i in range(0, 4 * n, n))


def _autocast(*tensors):
    """What F.linear does to its arguments under autocast."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None else t.to(dtype) for t in tensors]


def is_plain(module: nn.Module) -> bool:
    """Whether calling `module` does what its class's forward does, and nothing beside it."""
    own = vars(module)
    return not ("forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]
                or own["_backward_hooks"] or own["_backward_pre_hooks"])


def can_fuse(linear: nn.Module, x: Tensor) -> bool:
    """Whether the frozen layer's own forward may be left out: no one would miss it.

    Not if it is quantized or another subclass, has hooks (FSDP's, offloading's, yours), or is
    trained; nor while torch.compile, torch.func or forward-mode differentiation look on, or if x
    is no ordinary tensor. Then the formula itself is what runs.
    """
    return ((type(linear) is nn.Linear or is_conv1d(linear)) and is_plain(linear)
            and type(x) in ORDINARY and type(linear.weight) in ORDINARY
            and not linear.weight.requires_grad
            and (linear.bias is None or not linear.bias.requires_grad)
            and not torch.compiler.is_compiling() and forward_ad._current_level < 0
            and not torch._C._are_functorch_transforms_active())


ORDINARY = (Tensor, nn.Parameter)
