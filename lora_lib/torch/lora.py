"""LoRA on tensors: the names of `lora_lib.numpy`, on any device, in any floating dtype."""

import numbers

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lib.rules import check_dropout, check_rank, init_std_of, scaling_of
from lora_lib.torch.fused import fast_parts, is_plain, lora_linear, lora_linears
from lora_lib.torch.linear import (check_adaptable, check_writable, is_conv1d, place_of, shape_of,
                                   weight_of, write_weight)


class LoRALayer(nn.Module):
    """A low-rank update `scaling * B @ A` of a weight that lives elsewhere (Hu et al. 2021).

    Shapes, with k = in_features, d = out_features, r = rank:
        A (r, k)  projects down; drawn from N(0, init_std^2), init_std = 1 / sqrt(k) by default
        B (d, r)  projects up; zeros, so that the update starts at zero
        W (d, k)  the frozen weight, an argument of every method that needs it
        x (..., k) and the output (..., d), with any number of leading dimensions

    `scaling` is alpha / r, or alpha / sqrt(r) with `use_rslora`. `seed` is an integer or a CPU
    torch.Generator; None draws from torch's global one. `any_rank` lets the rank be above
    min(d, k), which adds numbers and no matrix: PEFT's files may hold such. Raises ValueError or
    TypeError for a rank, alpha, dtype, or shape that cannot be.
    """

    def __init__(self, in_features: int, out_features: int, rank: int = 8, alpha: float = 16.0, *,
                 seed: int | torch.Generator | None = None, dtype=None, device=None,
                 init_std: float | None = None, use_rslora: bool = False, any_rank: bool = False):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        most = (rank, rank) if any_rank else (in_features, out_features)
        self.rank, self.alpha = check_rank(rank, *most), alpha
        self.scaling = scaling_of(self.rank, alpha, use_rslora)
        self.use_rslora = use_rslora
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating torch.dtype, got {dtype!r}")
        # Drawn in float32 on the CPU, so that a seed means the same A on every device.
        A = torch.randn(self.rank, in_features, generator=generator_of(seed), dtype=torch.float32,
                        device="cpu") * init_std_of(init_std, in_features)
        B = torch.zeros(out_features, self.rank, device=device, dtype=dtype)
        self.A, self.B = nn.Parameter(A.to(B)), nn.Parameter(B)

    def forward(self, x: Tensor, W: Tensor) -> Tensor:
        """h = W x + scaling * B (A x), for each row x. B A is never formed."""
        self._check(W)
        return F.linear(x, W) + self.update(x)

    def update(self, x: Tensor) -> Tensor:
        """The adapter's own path, scaling * B (A x), (..., k) -> (..., d), in x's dtype.

        Casting A and B to x's dtype, and scaling between the two products, touches r numbers a
        row; casting x, or scaling the output, would touch k or d of them.
        """
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        return F.linear(F.linear(x, A) * self.scaling, B)

    def delta_weight(self) -> Tensor:
        """The update itself, scaling * B @ A, (d, k); a product in float32 or better."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        return self.scaling * (self.B.to(dtype) @ self.A.to(dtype))

    @torch.no_grad()
    def merge_weights(self, W: Tensor) -> Tensor:
        """A new tensor W + scaling * B A, rounded once, to W's dtype; W is left alone.

        Raises ValueError if the sum holds NaN or infinity.
        """
        return self._plus(W, 1)

    @torch.no_grad()
    def unmerge_weights(self, W: Tensor) -> Tensor:
        """A new tensor W - scaling * B A: undoes `merge_weights`, up to rounding."""
        return self._plus(W, -1)

    def num_parameters(self) -> int:
        """r (d + k): how many numbers are trained."""
        return self.A.numel() + self.B.numel()

    def compression_ratio(self) -> float:
        """d k / (r (d + k)): how many times fewer than the full weight holds."""
        return self.in_features * self.out_features / self.num_parameters()

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, "
                f"rank={self.rank}, alpha={self.alpha}")

    def _plus(self, W, sign):
        self._check(W)
        delta = self.delta_weight()
        total = (W.to(torch.promote_types(W.dtype, delta.dtype)) + sign * delta).to(W.dtype)
        if not torch.isfinite(total).all():
            raise ValueError("W and scaling * B A add up to NaN or infinity; W is left alone")
        return total

    def _check(self, W):
        shape = (self.out_features, self.in_features)
        if tuple(W.shape) != shape:
            raise ValueError(f"W must have shape (out_features, in_features) = {shape}, "
                             f"got {tuple(W.shape)}")


def generator_of(seed: int | torch.Generator | None) -> torch.Generator | None:
    """A generator of its own for an integer `seed`; a generator, or None, as it is."""
    if isinstance(seed, (int, numbers.Integral)):
        return torch.Generator().manual_seed(int(seed))
    return seed


class LoRALinear(LoRALayer):
    """A frozen linear layer, y = W x + b, with a trainable low-rank update beside it.

    `linear` is an nn.Linear, transformers' Conv1D, or a quantized layer (lora_lib.torch.linear).
    It is kept as it is (its weight is shared, not copied) and frozen. A and B live on its device,
    in `dtype`: by default the weight's, or float32 beside a 16-bit or quantized weight, where small
    steps would round to nothing. `dropout` acts on the adapter's input, while training.
    `lora_bias` gives B a bias `B_bias` (d,), zeros at first: scaling * B_bias is added to the
    output, and to the layer's own bias by `merge`, which raises ValueError where there is none.
    Raises TypeError if `linear` is none of these, computes its weight (a parametrization,
    weight_norm: merging could not write there), stores it as float8 or as another library's
    tensor, or is sharded already (inject, then fully_shard).
    The rest is LoRALayer's.
    """

    def __init__(self, linear: nn.Module, rank: int = 8, alpha: float = 16.0,
                 dropout: float = 0.0, *, dtype=None, lora_bias: bool = False, **options):
        check_adaptable(linear)
        dropout = check_dropout(dropout)
        W = weight_of(linear)
        dtype = dtype or torch.promote_types(W.dtype, torch.float32)
        out_features, in_features = shape_of(linear)
        super().__init__(in_features, out_features, rank, alpha, dtype=dtype,
                         device=place_of(linear), **options)
        self.B_bias: nn.Parameter | None
        self.register_parameter("B_bias", nn.Parameter(torch.zeros_like(self.B[:, 0]))
                                if lora_bias else None)
        self.linear = linear.requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        self.merged = False
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(..., k) -> (..., d)."""
        if self.merged:                          # the update is in the weight already
            return self.linear(x)
        parts = self._fast_parts(x)
        if parts:                                # the same numbers as below, sooner
            return lora_linear(x, *parts)
        return self.linear(x) + self.update(self.dropout(x))

    def update(self, x: Tensor) -> Tensor:
        """The adapter's own path, scaling * (B (A x) + B_bias), in x's dtype."""
        y = super().update(x)
        return y if self.B_bias is None else y + (self.scaling * self.B_bias).to(y.dtype)

    def num_parameters(self) -> int:
        """r (d + k), and d with `lora_bias`: how many numbers are trained."""
        return super().num_parameters() + (0 if self.B_bias is None else len(self.B_bias))

    def _fast_parts(self, x):
        """lora_linear's arguments, or None where it would not do what forward must."""
        if self.training and self.dropout.p > 0 or self.B_bias is not None:
            return None
        parts = fast_parts(self.linear, x)
        return parts and (*parts, self.A, self.B, self.scaling)

    def merge(self) -> "LoRALinear":
        """Fold the update into the weight, in place. Merging a merged layer changes nothing."""
        if not self.merged:
            self.write(1)
            self.merged = True
        return self

    def unmerge(self) -> "LoRALinear":
        """Take the update out of the weight again, exact up to rounding in its dtype."""
        if self.merged:
            self.write(-1)
            self.merged = False
        return self

    def write(self, sign: int) -> None:
        """Add the update to the linear layer's weight and bias (1), or take it out of them (-1)."""
        W, bias = self.sums(sign)
        write_weight(self.linear, W)
        if bias is not None:
            self.linear.bias.data.copy_(bias)  # type: ignore[union-attr,operator]

    @torch.no_grad()
    def sums(self, sign: int) -> tuple[Tensor, Tensor | None]:
        """What `write` would write; None for a bias that stays. ValueError where it would fail."""
        check_writable(self.linear)
        W = self._plus(weight_of(self.linear), sign)
        if self.B_bias is None:
            return W, None
        bias: Tensor | None = self.linear.bias  # type: ignore[assignment]
        if bias is None:
            raise ValueError("the adapter has a bias (lora_bias), and the layer none into which it "
                             "could be merged")
        total = (bias + sign * self.scaling * self.B_bias).to(bias.dtype)
        if not torch.isfinite(total).all():
            raise ValueError("the bias and scaling * B_bias add up to NaN or infinity")
        return W, total

    @property
    def weight(self) -> Tensor:
        """The weight that the layer acts with, W + scaling * B A, in the linear layer's own layout.

        Some models read it and call no layer (Mamba's dt_proj, Swin's qkv, nn.TransformerEncoder
        in eval); this gives them the update, and A and B the gradient, at the price of forming
        B A. The frozen weight itself is `linear.weight`, and once `merged` this is it.
        """
        W = weight_of(self.linear)
        if not self.merged and W.is_floating_point():    # another library's codes are no numbers
            W = W + self.delta_weight().to(W.dtype)
        return W.T if is_conv1d(self.linear) else W

    @property
    def bias(self) -> Tensor | None:
        """The bias that the layer acts with (d,): the linear layer's own, or None, and B's."""
        bias: Tensor | None = self.linear.bias  # type: ignore[assignment]
        if self.B_bias is None or self.merged:
            return bias
        more = self.scaling * self.B_bias
        return more.to(self.B.dtype) if bias is None else bias + more.to(bias.dtype)


def shared_input(x: Tensor, *modules: nn.Module) -> tuple[Tensor, ...]:
    """Every module's output for the same x, (..., k) -> (..., d_i): q, k and v; gate and up.

    Those that are LoRALinears go over x together (lora_lib.torch.fused); the result is that of
    calling each.
    """
    together = {}
    for i, m in enumerate(modules):
        if type(m) is LoRALinear and not m.merged and is_plain(m):
            parts = m._fast_parts(x)
            if parts:
                together[i] = parts
    if len(together) < 2:
        return tuple(m(x) for m in modules)
    done = dict(zip(together, lora_linears(x, list(together.values()))))
    return tuple(done[i] if i in done else m(x) for i, m in enumerate(modules))
