"""LoRA on NumPy arrays: h = W x + scaling * B A x, its gradients, and merging (Hu et al. 2021)."""

import numpy as np

from lora_lib.rules import check_rank, init_std_of, scaling_of


class LoRALayer:
    """A low-rank update `scaling * B @ A` of a weight that lives elsewhere.

    Shapes, with k = in_features, d = out_features, r = rank:
        A (r, k)  projects down; drawn from N(0, init_std^2), init_std = 1 / sqrt(k) by default
        B (d, r)  projects up; zeros, so that the update starts at zero
        W (d, k)  the frozen weight, an argument of every method that needs it
        x (..., k) and the output (..., d), with any number of leading dimensions

    `scaling` is alpha / r, or alpha / sqrt(r) with `use_rslora`. `seed` is an integer, a NumPy
    Generator, or None. Raises ValueError or TypeError for a rank, alpha, dtype, or shape that
    cannot be.
    """

    trainable = ("A", "B")

    def __init__(self, in_features: int, out_features: int, rank: int = 8, alpha: float = 16.0, *,
                 seed=None, dtype=np.float64, init_std: float | None = None,
                 use_rslora: bool = False):
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.alpha = check_rank(rank, in_features, out_features), alpha
        self.scaling = scaling_of(self.rank, alpha, use_rslora)
        if not np.issubdtype(dtype, np.floating):
            raise TypeError(f"dtype must be a floating type, got {np.dtype(dtype)}")
        std = init_std_of(init_std, in_features)
        self.A = np.random.default_rng(seed).normal(0, std, (self.rank, in_features)).astype(dtype)
        self.B = np.zeros((out_features, self.rank), dtype)
        self.A_grad = self.B_grad = None

    def forward(self, x: np.ndarray, W: np.ndarray) -> np.ndarray:
        """h = W x + scaling * B (A x), for each row x. B A is never formed."""
        self._check(W, x)
        h = x @ W.T
        h += (self.scaling * (x @ self.A.T)) @ self.B.T      # scaled on the narrow side, in place
        return h

    def backward(self, grad_output: np.ndarray, x: np.ndarray, W: np.ndarray) -> np.ndarray:
        """Set A_grad (r, k) and B_grad (d, r); return the gradient with respect to x, (..., k).

        With g = grad_output, summed over the rows of the batch:
            dL/dB = scaling * g^T (x A^T)
            dL/dA = scaling * (g B)^T x
            dL/dx = g W + scaling * (g B) A      both paths: the frozen one and the adapter's
        """
        self._check(W, x)
        if grad_output.shape != (*x.shape[:-1], self.out_features):
            raise ValueError(f"grad_output must have the output's shape "
                             f"{(*x.shape[:-1], self.out_features)}, got {grad_output.shape}")
        g, rows = grad_output.reshape(-1, self.out_features), x.reshape(-1, self.in_features)
        gB = self.scaling * (g @ self.B)                     # (n, r): the narrow side, once for two
        self.B_grad = g.T @ (self.scaling * (rows @ self.A.T))
        self.A_grad = gB.T @ rows
        grad_x = g @ W
        grad_x += gB @ self.A
        return grad_x.reshape(x.shape)

    def delta_weight(self) -> np.ndarray:
        """The update itself, scaling * B @ A, (d, k)."""
        return self.scaling * (self.B @ self.A)

    def merge_weights(self, W: np.ndarray) -> np.ndarray:
        """A new array W + scaling * B A, in W's dtype; W is left alone.

        Raises ValueError if the sum holds NaN or infinity.
        """
        return self._plus(W, 1)

    def unmerge_weights(self, W: np.ndarray) -> np.ndarray:
        """A new array W - scaling * B A: undoes `merge_weights`, up to rounding."""
        return self._plus(W, -1)

    def num_parameters(self) -> int:
        """r (d + k): how many numbers are trained."""
        return self.A.size + self.B.size

    def compression_ratio(self) -> float:
        """d k / (r (d + k)): how many times fewer than the full weight holds."""
        return self.in_features * self.out_features / self.num_parameters()

    def _plus(self, W, sign):
        self._check(W)
        with np.errstate(over="ignore", invalid="ignore"):   # the check below says it better
            total = (W + sign * self.delta_weight()).astype(W.dtype)
        if not np.isfinite(total).all():
            raise ValueError("W and scaling * B A add up to NaN or infinity; W is left alone")
        return total

    def _check(self, W, x=None):
        shape = (self.out_features, self.in_features)
        if np.shape(W) != shape:
            raise ValueError(f"W must have shape (out_features, in_features) = {shape}, "
                             f"got {np.shape(W)}")
        if x is not None and (np.ndim(x) == 0 or x.shape[-1] != self.in_features):
            raise ValueError(f"x must have shape (..., {self.in_features}), got {np.shape(x)}")


class LoRALinear(LoRALayer):
    """A frozen linear layer, y = W x + b, with a trainable low-rank update beside it.

    `weight` (d, k) and `bias` (d,) are kept as they are, not copied, and never written to:
    `merge` puts a new array in their place. The remaining arguments are LoRALayer's.
    """

    def __init__(self, weight: np.ndarray, bias: np.ndarray | None = None, rank: int = 8,
                 alpha: float = 16.0, **options):
        if np.ndim(weight) != 2:
            raise ValueError(f"weight must have two dimensions (out_features, in_features), "
                             f"got shape {np.shape(weight)}")
        out_features, in_features = weight.shape
        if bias is not None and np.shape(bias) != (out_features,):
            raise ValueError(f"bias must have shape {(out_features,)}, got {np.shape(bias)}")
        super().__init__(in_features, out_features, rank, alpha,
                         **{"dtype": weight.dtype, **options})
        self.weight, self.bias, self.merged = weight, bias, False

    def forward(self, x: np.ndarray) -> np.ndarray:  # type: ignore[override]
        """(..., k) -> (..., d). Remembers x for `backward`."""
        self.x = x
        if self.merged:                        # the update is in the weight already
            self._check(self.weight, x)
            h = x @ self.weight.T
        else:
            h = super().forward(x, self.weight)
        return h if self.bias is None else h + self.bias

    def backward(self, grad_output: np.ndarray) -> np.ndarray:  # type: ignore[override]
        """Set A_grad and B_grad for the last `forward`; return the input's gradient (..., k)."""
        if self.merged:
            raise RuntimeError("the adapter is merged into the weight; call unmerge() to train it")
        return super().backward(grad_output, self.x, self.weight)

    def merge(self) -> "LoRALinear":
        """Fold the update into the weight. Merging a merged layer changes nothing."""
        if not self.merged:
            self.weight, self.merged = self.merge_weights(self.weight), True
        return self

    def unmerge(self) -> "LoRALinear":
        """Take the update out of the weight again, exact up to rounding."""
        if self.merged:
            self.weight, self.merged = self.unmerge_weights(self.weight), False
        return self
