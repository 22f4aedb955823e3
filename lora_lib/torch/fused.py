"""One LoRA layer as one step of autograd: the same numbers as `LoRALayer.forward`, sooner.

With g = dL/dy, u = scaling * x A^T and v = scaling * g B, each n rows (Hu et al. 2021, eq. 3):

    y  = u B^T + b + x W^T          dA = v^T x          dx = v A + g W          dB = g^T u

What makes it fast is the shape of the computation, not less of it:
* Sums happen in place, inside the second product. The formula would write and read one more n x d
  array, autograd one more n x k for every layer that reads x. The small product comes first: in
  16 bits it would be rounded away beside a rounded x W^T or g W.
* Only x and u are kept for backward. A and B are cast to x's dtype when they are needed, and again
  in backward: r (k + d) numbers, where keeping the casts would take memory in every layer.
* v and dB are computed as their transposes, B^T g^T and u^T g, where BLAS is faster at those than
  at the tall products g B and g^T u (_thin).
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
    if torch.is_autocast_enabled(x.device.type):
        x, W, bias = _autocast(x, W, bias)
    if torch.is_grad_enabled():
        return _One.apply(x, W, bias, A, B, scaling)
    return _forward(x, W, bias, A, B, scaling)[0]


def lora_linears(x: Tensor, layers: list[tuple]) -> tuple[Tensor, ...]:
    """`lora_linear` for several (W, bias, A, B, scaling) that read the same x (..., k).

    Together if they have one scaling, else one by one.
    """
    Ws, biases, As, Bs, scalings = zip(*layers)
    if len(set(scalings)) > 1:
        return tuple(lora_linear(x, *layer) for layer in layers)
    if torch.is_autocast_enabled(x.device.type):
        n = len(layers)
        x, *cast = _autocast(x, *Ws, *biases)
        Ws, biases = cast[:n], cast[n:]
    return _Shared.apply(x, scalings[0], *Ws, *biases, *As, *Bs)


class _One(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, bias, A, B, scaling):
        y, u = _forward(x, W, bias, A, B, scaling)
        ctx.save_for_backward(x, u, W, A, B)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx, g):
        x, u, W, A, B = ctx.saved_tensors
        x_needs, _, _, A_needs, B_needs, _ = ctx.needs_input_grad
        rows, g = (x, g) if x.ndim == 2 else (_rows(x), _rows(g))
        a, b = _like(x, A), _like(x, B)
        dx = dA = dB = None
        if x_needs or A_needs:
            v = _thin(g, b).mul_(ctx.scaling)
        if x_needs:
            dx = _plus(torch.mm(v, a), g, W)
            dx = dx if x.ndim == 2 else dx.view(x.shape)
        if A_needs:
            dA = _like(A, torch.mm(v.t(), rows))
        if B_needs:
            if torch.is_grad_enabled():          # differentiated twice: u depends on x and A
                u = F.linear(rows, a) * ctx.scaling
            dB = _like(B, _thin(g.t(), u))
        return dx, None, None, dA, dB, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scaling, *tensors):
        Ws, biases, As, Bs = _fours(tensors)
        us = F.linear(_rows(x), _like(x, torch.cat(As))).mul_(scaling)
        us = us.split([len(A) for A in As], 1)
        ys = [_expand(x, W, bias, _like(x, B), u) for W, bias, B, u in zip(Ws, biases, Bs, us)]
        ctx.save_for_backward(x, *us, *tensors)
        ctx.scaling = scaling
        return tuple(ys)

    @staticmethod
    def backward(ctx, *gs):
        n = len(gs)
        x, *saved = ctx.saved_tensors            # once: a checkpoint gives each a single time
        us, (Ws, _, As, Bs) = saved[:n], _fours(saved[n:])
        rows, gs, sizes = _rows(x), [_rows(g) for g in gs], [len(A) for A in As]
        a = _like(x, torch.cat(As))
        if torch.is_grad_enabled():              # as in _One
            us = (F.linear(rows, a) * ctx.scaling).split(sizes, 1)
        v = torch.cat([_thin(g, _like(x, B)) for B, g in zip(Bs, gs)], 1).mul_(ctx.scaling)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(v, a)
            for g, W in zip(gs, Ws):
                dx = _plus(dx, g, W)
            dx = dx.view(x.shape)
        dAs = [_like(A, dA) for A, dA in zip(As, torch.mm(v.t(), rows).split(sizes))]
        dBs = [_like(B, _thin(g.t(), u)) for B, u, g in zip(Bs, us, gs)]
        return dx, None, *[None] * (2 * n), *dAs, *dBs


def _forward(x, W, bias, A, B, scaling):
    """y (..., d) and u (n, r)."""
    u = F.linear(_rows(x), _like(x, A)).mul_(scaling)
    return _expand(x, W, bias, _like(x, B), u), u


def _expand(x, W, bias, B, u):
    """y (..., d): memory of its own and no view, since what follows may work in place (a ReLU)."""
    y = None if x.ndim == 2 else x.new_empty(*x.shape[:-1], len(W))
    rows = None if y is None else _rows(y)
    rows = torch.mm(u, B.t(), out=rows) if bias is None else torch.addmm(bias, u, B.t(), out=rows)
    torch.addmm(rows, _rows(x), W.t(), out=rows)
    return rows if y is None else y


def _plus(total, a, b):
    """total + a b, in place unless that is differentiated (addmm_, but FLOP counters see it)."""
    return torch.addmm(total, a, b, out=None if torch.is_grad_enabled() else total)


def _thin(M, t):
    """M t, whose result has r columns, as the transpose of t^T M^T where that is faster.

    Measured (chapter 13): up to five times, on a CPU in float32, for a rank of 2 to 15 and many
    rows. In 16 bits, for other ranks, or few rows, it is slower.
    """
    if (1 < t.shape[1] < 16 and min(M.shape) >= 64 and t.dtype.itemsize >= 4
            and t.device.type == "cpu"):
        return torch.mm(t.t(), M.t()).t()
    return torch.mm(M, t)


def _rows(x):
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _like(x, t):
    """t in x's dtype; t.to(x) would take half a microsecond to find that there is nothing to do."""
    return t if t.dtype == x.dtype else t.to(x.dtype)


def _fours(tensors):
    n = len(tensors) // 4
    return tensors[:n], tensors[n:2 * n], tensors[2 * n:3 * n], tensors[3 * n:]


def _autocast(*tensors):
    """What F.linear does to its arguments under autocast."""
    x = tensors[0]
    if x.dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(x.device.type)
    return [t if t is None else t.to(dtype) for t in tensors]


def fast_parts(linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """W (d, k) and the bias, if the frozen layer's own forward may be left out; None if not.

    Not if it is quantized or another subclass, has hooks (FSDP's, offloading's, yours), or is
    trained; nor while torch.compile, torch.jit.trace, torch.func or forward-mode differentiation
    look on, or if x is no ordinary tensor. Then the formula itself is what runs.
    """
    conv1d = is_conv1d(linear)
    if not (conv1d or type(linear) is nn.Linear) or not is_plain(linear):
        return None
    W, bias = linear.weight, linear.bias
    if (W.requires_grad or (bias is not None and bias.requires_grad)
            or type(x) not in ORDINARY or type(W) not in ORDINARY
            or x.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing()
            or forward_ad._current_level >= 0
            or torch._C._are_functorch_transforms_active()):
        return None
    return W.t() if conv1d else W, bias


ORDINARY = (Tensor, nn.Parameter)


def is_plain(module: nn.Module) -> bool:
    """Whether calling `module` does what its class's forward does, and nothing beside it."""
    own = vars(module)
    return not ("forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]
                or own["_backward_hooks"] or own["_backward_pre_hooks"])
