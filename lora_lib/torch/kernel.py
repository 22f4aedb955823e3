"""LoRA's linear layer as one Triton kernel, for NVIDIA GPUs: optional, needs `pip install triton`.

`lora_lib.torch.fused` computes the same with torch's own products: x is read for x W^T and again
for x A^T, and y is written by one product and updated by the next. Here each program of the kernel
makes one tile of y (Hu et al. 2021, eq. 3), loads x's rows once for both, and stores y once:

    x tile --+--> x W^T   summed over k in registers --+
             +--> u = x A^T    in the same loop -------+--> + scaling * u B^T + bias --> one store

The backward pass is the same kernel with other arguments, since dx = g W + scaling * (g B) A has
the shape of y = x W^T + scaling * (x A^T) B^T: g stands for x, W for its transpose, B and A for A^T
and B^T. What it costs: every block of BLOCK_N columns computes u again, which adds about
rank / BLOCK_N of the large product's work. Sharing u would take a second launch.

We checked the numbers through Triton's interpreter (TRITON_INTERPRET=1, on a CPU) and compiled, on
an H200. There it is slower than torch's products at all but a few of the sizes that we measured
(the book's page on speed): their blocks are tuned for each shape, and these are guesses; and in
float32 it keeps all digits, without tensor cores. It is here to be read, and as a place to start
from; use `lora_lib.torch.fused`.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("lora_lib.torch.kernel needs Triton: pip install triton") from error

BLOCK_M, BLOCK_N, BLOCK_K = 64, 128, 32      # rows, columns, and terms of the sum per step
GROUP = 8                                    # row blocks that go over W's columns together
NUM_WARPS, NUM_STAGES = 8, 3                 # with 4 warps, the compiler runs out of registers
MIN_RANK_BLOCK, MAX_RANK = 16, 64            # tensor cores need 16; u must fit beside y's tile

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def _kernel(x_ptr, W_ptr, down_ptr, up_ptr, bias_ptr, y_ptr, u_ptr, m, n, k, rank, scaling,
            x_row, x_col, W_row, W_col, down_row, down_col, up_row, up_col, bias_col,
            OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
            GROUP: tl.constexpr):
    """One tile of y = x W + bias + scaling * u up, (m, n), with u = x down, (m, rank).

    x (m, k), W (k, n), down (k, rank), up (rank, n) and bias (n,) or None have any strides (*_row,
    *_col), so that a transpose costs no copy; y and u are contiguous.
    """
    # Programs that run at the same time share x's rows and W's columns in the L2 cache: GROUP row
    # blocks take the first column block, then the second, and so on.
    program, col_blocks = tl.program_id(0), (n + BLOCK_N - 1) // BLOCK_N
    first = program // (GROUP * col_blocks) * GROUP
    size = tl.minimum((m + BLOCK_M - 1) // BLOCK_M - first, GROUP)
    within = program % (GROUP * col_blocks)
    row_block, col_block = first + within % size, within // size

    # 64 bits: rows * stride passes 2^31 in a batch of 2^19 tokens of width 4096.
    rows = row_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner, ranks = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    is_row, is_col, is_rank = (rows < m)[:, None], (cols < n)[None, :], (ranks < rank)[None, :]

    x_ptrs = x_ptr + rows[:, None] * x_row + inner[None, :] * x_col
    W_ptrs = W_ptr + inner[:, None] * W_row + cols[None, :] * W_col
    down_ptrs = down_ptr + inner[:, None] * down_row + ranks[None, :] * down_col
    y = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    u = tl.full((BLOCK_M, BLOCK_R), 0.0, tl.float32)
    for start in range(0, k, BLOCK_K):
        left = inner < k - start             # beyond k, rows and rank: zeros, which add nothing
        x = tl.load(x_ptrs, mask=is_row & left[None, :], other=0.0).to(OPERAND)
        W = tl.load(W_ptrs, mask=left[:, None] & is_col, other=0.0).to(OPERAND)
        # A float32 A is rounded here, tile by tile: no 16-bit copy of it is ever in memory.
        down = tl.load(down_ptrs, mask=left[:, None] & is_rank, other=0.0).to(OPERAND)
        y = tl.dot(x, W, y, input_precision=PRECISION)
        u = tl.dot(x, down, u, input_precision=PRECISION)
        x_ptrs += BLOCK_K * x_col
        W_ptrs += BLOCK_K * W_row
        down_ptrs += BLOCK_K * down_row

    if col_block == 0:                       # the others have the same u
        tl.store(u_ptr + rows[:, None] * rank + ranks[None, :], u, mask=is_row & is_rank)
    up = tl.load(up_ptr + ranks[:, None] * up_row + cols[None, :] * up_col,
                 mask=(ranks < rank)[:, None] & is_col, other=0.0)
    # u, a sum of k terms, is not rounded to 16 bits before B multiplies it.
    y += scaling * tl.dot(u, up.to(tl.float32), input_precision=PRECISION)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols[None, :] * bias_col, mask=is_col, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows[:, None] * n + cols[None, :], y, mask=is_row & is_col)


INTERPRETED = not isinstance(_kernel, triton.JITFunction)    # settled by TRITON_INTERPRET on import


def lora_linear(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor,
                scaling: float) -> Tensor:
    """x W^T + bias + scaling * (x A^T) B^T, (..., k) -> (..., d), in x's dtype.

    x (..., k), W (d, k) and bias (d,) or None share one dtype: float16, bfloat16 or float32. A
    (r, k) and B (d, r) have that dtype or float32; r is at most 64. All may be strided. x, A and B
    get a gradient, each in its own dtype, once: there is no second derivative. Only x and x A^T (in
    x's dtype) are kept for it. Sums are float32, of products without TF32 where x is float32.
    Autocast casts nothing here.

    Raises RuntimeError without a CUDA device (unless TRITON_INTERPRET=1 was set before the import),
    TypeError for a dtype, and ValueError for a shape, a device, or a W or bias that requires grad.
    """
    _check(x, W, bias, A, B)
    return _LoRALinear.apply(x, W, bias, A, B, float(scaling))


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, bias, A, B, scaling):
        y, u = _launch(_rows(x), W.t(), A.t(), B.t(), bias, scaling)
        _, _, _, A_needs, B_needs, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if A_needs else None, u if B_needs else None, W, A, B)
        ctx.scaling = scaling
        return y.view(*x.shape[:-1], len(W))

    @staticmethod
    def backward(ctx, g):
        # once_differentiable would let a g without a graph, such as sum's, pass in silence.
        if torch.is_grad_enabled():
            raise RuntimeError("the kernel is differentiable once: no create_graph=True; "
                               "lora_lib.torch.fused.lora_linear is differentiable twice")
        x, u, W, A, B = ctx.saved_tensors
        x_needs, _, _, A_needs, B_needs, _ = ctx.needs_input_grad
        lead, g = g.shape[:-1], _rows(g)
        dx = dA = dB = None
        # dA = scaling (g B)^T x and dB = scaling g^T u are r numbers wide and sum over all rows:
        # too few tiles to fill a GPU unless the sum itself is split, which cuBLAS does. The
        # scaling comes last, in A's dtype, on r (k + d) numbers.
        with torch.autocast(g.device.type, enabled=False):
            if x_needs:
                dx, v = _launch(g, W, B, A, None, ctx.scaling)
                dx = dx.view(*lead, W.shape[1])
            elif A_needs:                    # the first adapted layer: no dx, so only the small v
                v = torch.mm(g, B.to(g.dtype))
            if A_needs:
                dA = torch.mm(v.t(), _rows(x)).to(A.dtype) * ctx.scaling
            if B_needs:
                dB = torch.mm(g.t(), u).to(B.dtype) * ctx.scaling
        return dx, None, None, dA, dB, None


def _launch(x, W, down, up, bias, scaling):
    """y (m, n) and u = x down (m, rank), of x (m, k), W (k, n), down (k, rank), up (rank, n)."""
    (m, k), (rank, n) = x.shape, up.shape
    y, u = x.new_empty(m, n), x.new_empty(m, rank)
    if y.numel():
        # The interpreter computes with NumPy, which has no bfloat16: it would multiply the bits.
        wide = INTERPRETED and x.dtype == torch.bfloat16
        grid = (triton.cdiv(m, BLOCK_M) * triton.cdiv(n, BLOCK_N),)
        with torch.cuda.device_of(x):        # Triton launches on the current device, not on x's
            _kernel[grid](
                x, W, down, up, bias, y, u, m, n, k, rank, scaling,
                *x.stride(), *W.stride(), *down.stride(), *up.stride(),
                0 if bias is None else bias.stride(0),
                OPERAND=tl.float32 if wide else DTYPES[x.dtype],
                # For u B^T beside a 16-bit x: TF32 has float16's digits, and float32's range.
                PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
                BLOCK_R=max(MIN_RANK_BLOCK, triton.next_power_of_2(rank)),
                BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, GROUP=GROUP,
                num_warps=NUM_WARPS, num_stages=NUM_STAGES)
    return y, u


def _rows(x):
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _check(x, W, bias, A, B):
    if not INTERPRETED and not torch.cuda.is_available():
        raise RuntimeError("the kernel needs a CUDA device, and there is none; to try it on a CPU, "
                           "set TRITON_INTERPRET=1 before importing lora_lib.torch.kernel")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float16, bfloat16 or float32, got {x.dtype}")
    if x.ndim == 0 or W.ndim != 2 or A.ndim != 2:
        raise ValueError("expected x (..., k), W (d, k) and A (r, k), got "
                         f"{tuple(x.shape)}, {tuple(W.shape)} and {tuple(A.shape)}")
    (d, k), rank = W.shape, len(A)
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"rank, the number of A's rows, must be 1 to {MAX_RANK}, got {rank}")
    for name, t, shape, dtypes in [("x", x, (*x.shape[:-1], k), (x.dtype,)),
                                   ("W", W, (d, k), (x.dtype,)),
                                   ("bias", bias, (d,), (x.dtype,)),
                                   ("A", A, (rank, k), (x.dtype, torch.float32)),
                                   ("B", B, (d, rank), (x.dtype, torch.float32))]:
        if t is None and name == "bias":
            continue
        if tuple(t.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")
        if t.dtype not in dtypes:
            raise TypeError(f"{name} must be {' or '.join(map(str, dict.fromkeys(dtypes)))} beside "
                            f"an x of {x.dtype}, got {t.dtype}")
        if t.device != x.device or not (INTERPRETED or t.is_cuda):
            wanted = x.device if x.is_cuda or INTERPRETED else "a CUDA device"
            raise ValueError(f"{name} must be on {wanted}, got {t.device}")
        if name in ("W", "bias") and t.requires_grad:
            raise ValueError(f"{name} is frozen and gets no gradient, but it requires grad: call "
                             f"{name}.requires_grad_(False)")
