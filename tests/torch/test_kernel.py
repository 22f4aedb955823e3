"""The Triton kernel against the formula in float64: interpreted on the CPU, compiled on a GPU."""

import importlib.util
import subprocess
import sys

import pytest
import torch

# Imported before TRITON_INTERPRET is set, so that Triton's own functions, which other tests may
# use, are not the interpreter's.
triton = pytest.importorskip("triton", reason="needs Triton: pip install triton")

NAME = "lora_lib.torch.kernel"
SHAPES = [((), 5, 7, 1), ((1,), 1, 1, 1), ((3,), 33, 129, 2), ((2, 35), 50, 140, 5),
          ((65,), 31, 130, 17), ((64,), 64, 128, 16), ((4,), 100, 90, 64), ((2, 1, 3), 40, 30, 33),
          ((0,), 6, 5, 2), ((2, 0), 6, 5, 2), ((550,), 34, 135, 8)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def load(interpret):
    """The module, not in sys.modules, with its kernel interpreted or compiled: settled on import"""
    spec = importlib.util.find_spec(NAME)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", str(int(interpret)))
        spec.loader.exec_module(module)
    assert module.INTERPRETED == interpret
    return module


kernel = load(interpret=True)


def randn(*shape, dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def arguments(lead=(5,), k=6, d=7, rank=2, bias=True, dtype=torch.float32, wide=torch.float32):
    """x, W, bias, A, B, scaling, of which x, A and B require grad."""
    x, W, b = (randn(*shape, dtype=dtype, seed=i) for i, shape in
               enumerate([(*lead, k), (d, k), (d,)]))
    A, B = randn(rank, k, dtype=wide, seed=3), randn(d, rank, dtype=wide, seed=4)
    return [x.requires_grad_(), W, b if bias else None, A.requires_grad_(), B.requires_grad_(), 1.5]


def formula(x, W, bias, A, B, scaling):
    y = x @ W.T + scaling * (x @ A.T) @ B.T
    return y if bias is None else y + bias


def results(function, args, g):
    """y and the gradients of those of x, A and B that require grad."""
    inputs = [t for t in args[:5] if t is not None and t.requires_grad]
    y = function(*args)
    return [y, *torch.autograd.grad(y, inputs, g.to(y))], [y, *inputs]


def check(args, module=kernel, g=None, units=2):
    """Values and gradients, to a few units in the last place of the largest number: 8 in float32,
    else 2, since the interpreter truncates to bfloat16."""
    x, W = args[:2]
    exact = [t.detach().double().requires_grad_(t.requires_grad) if torch.is_tensor(t) else t
             for t in args]
    g = randn(*x.shape[:-1], len(W), dtype=x.dtype, seed=9) if g is None else g
    ours, like = results(module.lora_linear, args, g)
    expected, _ = results(formula, exact, g)
    units = 8 if x.dtype == torch.float32 else units
    for one, other, t in zip(ours, expected, like, strict=True):
        assert one.dtype == t.dtype and one.shape == other.shape
        if one.numel():
            atol = units * torch.finfo(x.dtype).eps * other.abs().max().item()
            torch.testing.assert_close(one.double(), other, rtol=0, atol=atol)
    assert ours[0].dtype == x.dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, bias, dtype):
    check(arguments(*shape, bias=bias, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_A_and_B(dtype):
    check(arguments((70,), 50, 140, 5, dtype=dtype, wide=dtype))


def test_strided_arguments():
    for lead in [(70,), (2, 3), (2, 4, 3)]:
        x, W, b, A, B, s = arguments(lead, 33, 130, 3)
        x, W, A, B = (t.detach().mT.contiguous().mT for t in (x, W, A, B))
        b = torch.stack([b, b], 1)[:, 0]
        assert not any(t.is_contiguous() for t in (x, W, b, A, B))
        check([x.requires_grad_(), W, b, A.requires_grad_(), B.requires_grad_(), s])
    x, *rest = arguments((4, 3), 33, 130, 3)
    check([x.detach()[::2, 1:, :].requires_grad_(), *rest])
    check([x.detach()[:, :1].expand(4, 3, 33).requires_grad_(), *rest])


def test_an_expanded_gradient():
    args = arguments((70,), 33, 130, 3)
    check(args, g=torch.ones(()).expand(70, 130))


@pytest.mark.parametrize("needs", range(1, 8))
def test_only_what_requires_grad_gets_one(needs):
    args = arguments((66,), 33, 130, 3)
    for bit, i in enumerate([0, 3, 4]):
        args[i].requires_grad_(bool(needs >> bit & 1))
    check(args)


def test_nothing_requires_grad():
    args = arguments()
    expected = formula(*args).detach()
    with torch.no_grad():
        y = kernel.lora_linear(*args)
    assert not y.requires_grad
    torch.testing.assert_close(y, expected)


def test_the_frozen_weight_gets_no_gradient():
    args = arguments()
    kernel.lora_linear(*args).sum().backward()
    assert args[1].grad is None and args[2].grad is None
    assert all(args[i].grad is not None for i in (0, 3, 4))


def test_the_sum_over_k_is_not_rounded_before_B_multiplies_it():
    one = torch.ones(1, 2, dtype=torch.bfloat16)
    A, B = torch.tensor([[256.0, 1.0], [256.0, 0.0]]), torch.tensor([[1.0, -1.0]])
    y = kernel.lora_linear(one, torch.zeros(1, 2, dtype=one.dtype), None, A, B, 1.0)
    assert y.item() == 1 and torch.tensor(257.0).to(one.dtype) == 256


def test_autocast_does_not_lower_the_gradients_precision():
    args = arguments((70,), 33, 130, 3)
    with torch.autocast("cpu", torch.bfloat16):
        ours, _ = results(kernel.lora_linear, args, g := randn(70, 130))
    expected, _ = results(kernel.lora_linear, args, g)
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("A_needs", [True, False])
@pytest.mark.parametrize("B_needs", [True, False])
def test_x_and_u_are_all_that_is_kept_beside_the_parameters(A_needs, B_needs):
    args = arguments((2, 35), 50, 140, 5, dtype=torch.bfloat16)
    x, W, _, A, B, _ = args
    A.requires_grad_(A_needs), B.requires_grad_(B_needs)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernel.lora_linear(*args)
    known = {t.data_ptr(): t for t in (x, W, A, B)}
    others = [t for t in kept if t.data_ptr() not in known]
    assert [(t.shape, t.dtype) for t in others] == [((70, 5), torch.bfloat16)] * B_needs
    assert any(t.data_ptr() == x.data_ptr() for t in kept) == A_needs


def test_it_is_differentiable_once():
    args = arguments()
    with pytest.raises(RuntimeError, match="differentiable once: no create_graph=True"):
        torch.autograd.grad(kernel.lora_linear(*args).sum(), args[0], create_graph=True)


class TestErrors:
    @pytest.mark.parametrize("i, value, error, message", [
        (0, torch.zeros(()), ValueError, r"x \(\.\.\., k\).*got \(\), \(7, 6\)"),
        (0, torch.zeros(5, 4), ValueError, r"x must have shape \(5, 6\), got \(5, 4\)"),
        (0, torch.zeros(5, 6).double(), TypeError, "x must be float16, .* got torch.float64"),
        (0, torch.zeros(5, 6).long(), TypeError, "x must be float16, .* got torch.int64"),
        (1, torch.zeros(6), ValueError, r"W \(d, k\).*got \(5, 6\), \(6,\)"),
        (1, torch.zeros(7, 6).half(), TypeError, "W must be torch.float32 .*got torch.float16"),
        (2, torch.zeros(6), ValueError, r"bias must have shape \(7,\), got \(6,\)"),
        (2, torch.zeros(7).half(), TypeError, "bias must be torch.float32 .*got torch.float16"),
        (3, torch.zeros(6), ValueError, r"A \(r, k\)"),
        (3, torch.zeros(2, 5), ValueError, r"A must have shape \(2, 6\), got \(2, 5\)"),
        (3, torch.zeros(0, 6), ValueError, "rank.*must be 1 to 64, got 0"),
        (3, torch.zeros(65, 6), ValueError, "rank.*must be 1 to 64, got 65"),
        (3, torch.zeros(2, 6).half(), TypeError, "A must be torch.float32 .*got torch.float16"),
        (4, torch.zeros(6, 2), ValueError, r"B must have shape \(7, 2\), got \(6, 2\)"),
        (4, torch.zeros(7, 2).double(), TypeError, "B must be torch.float32 .*got torch.float64"),
        (4, torch.zeros(7, 2, device="meta"), ValueError, "B must be on cpu, got meta"),
        (1, torch.zeros(7, 6, requires_grad=True), ValueError, "W is frozen.*requires_grad_"),
        (2, torch.zeros(7, requires_grad=True), ValueError, "bias is frozen.*requires_grad_"),
    ])
    def test_arguments(self, i, value, error, message):
        args = arguments()
        args[i] = value
        with pytest.raises(error, match=message):
            kernel.lora_linear(*args)

    def test_a_16_bit_x_takes_A_in_either_dtype_only(self):
        args = arguments(dtype=torch.bfloat16)
        args[3] = args[3].half()
        with pytest.raises(TypeError, match="A must be torch.bfloat16 or torch.float32 beside"):
            kernel.lora_linear(*args)

    def test_no_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 before importing"):
            load(interpret=False).lora_linear(*arguments())

    def test_a_gpu_and_tensors_elsewhere(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(ValueError, match="x must be on a CUDA device, got cpu"):
            load(interpret=False).lora_linear(*arguments())

    def test_no_triton(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "triton", None)
        with pytest.raises(ImportError, match="pip install triton"):
            load(interpret=True)


def test_the_library_imports_neither_triton_nor_the_kernel():
    code = f"import sys, lora_lib.torch; print({{'triton', {NAME!r}}} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "set()\n", run.stderr


class Launches:
    """Stands for a kernel, and notes what each launch of it is given."""

    def __init__(self):
        self.options = []

    def __getitem__(self, grid):
        return lambda *_, **options: self.options.append(options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interpreted", [True, False])
def test_how_it_is_launched(dtype, interpreted, monkeypatch):
    """The interpreter ignores the precision, and has no bfloat16."""
    monkeypatch.setattr(kernel, "_kernel", launches := Launches())
    x, W, bias, A, B, s = arguments(rank=17, dtype=dtype)
    kernel._check(x, W, bias, A, B)
    monkeypatch.setattr(kernel, "INTERPRETED", interpreted)
    kernel._launch(x, W.t(), A.t(), B.t(), bias, s)
    options, = launches.options
    assert options["PRECISION"] == ("ieee" if dtype == torch.float32 else "tf32")
    wide = interpreted and dtype == torch.bfloat16
    assert options["OPERAND"] == kernel.DTYPES[torch.float32 if wide else dtype]
    assert options["BLOCK_R"] == 32
    kernel._launch(x[:0], W.t(), A.t(), B.t(), bias, s)
    assert len(launches.options) == 1                  # nothing to launch for no rows


FORWARD = {"x_col": 1, "W_row": 1, "down_row": 1, "up_row": 1}
BACKWARD = {"x_col": 1, "W_col": 1, "down_col": 1, "up_col": 1, "bias_ptr": None}


@pytest.mark.parametrize("capability, dtype, rank_block, fixed", [
    (80, "fp16", 16, FORWARD), (80, "bf16", 64, BACKWARD), (80, "fp32", 16, FORWARD),
    (90, "bf16", 16, FORWARD)], ids=str)
def test_it_compiles_for_ampere_and_hopper(capability, dtype, rank_block, fixed, monkeypatch,
                                           tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module = load(interpret=False)
    precision = "ieee" if dtype == "fp32" else "tf32"
    constants = {"OPERAND": triton.language.dtype(dtype), "PRECISION": precision,
                 "BLOCK_R": rank_block, **fixed}
    constants |= {name: getattr(module, name)
                  for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP")}
    types = {"down_ptr": "*fp32", "up_ptr": "*fp32", "scaling": "fp32"}
    signature = {name: "constexpr" if name in constants else types.get(name) or
                 (f"*{dtype}" if name.endswith("_ptr") else "i32")
                 for name in module._kernel.arg_names}
    compiled = triton.compile(ASTSource(module._kernel, signature, constants),
                              target=GPUTarget("cuda", capability, 32),
                              options={"num_warps": module.NUM_WARPS,
                                       "num_stages": module.NUM_STAGES})
    assert compiled.metadata.shared < 99 * 1024        # what a block may have on any GPU since
    assert ("mma" in compiled.asm["ptx"]) == (dtype != "fp32")         # tensor cores


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, ((3, 700), 513, 1001, 24)], ids=str)
def test_compiled(shape, dtype):
    args = [t.detach().cuda().requires_grad_(t.requires_grad) if torch.is_tensor(t) else t
            for t in arguments(*shape, dtype=dtype)]
    g = randn(*shape[0], shape[2], dtype=dtype, seed=9).cuda()
    # tf32 cuts u and B to float16's 10 bits, a unit each, and y is rounded: 2.5.
    check(args, load(interpret=False), g, units=3)
