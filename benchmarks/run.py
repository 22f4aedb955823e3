"""lora_lib beside PEFT, loralib and a plain formula: times and bytes, in one run.

    python -m benchmarks.run            everything, about ten minutes on two cores
    python -m benchmarks.run --quick    the same code on a few small points, to see that it runs
    python -m benchmarks.run shared     one of its parts

Methods are called in turn (lora_lib.experiments.timing), so that they share the machine's moods.
Results go to benchmarks/results/DATE-HARDWARE/ as times.csv, bytes.csv and machine.json, and from
there, by benchmarks/page.py, to the book's page. With a CUDA GPU the same command measures that,
by CUDA events, and once more as captured graphs. Leave the machine alone while it runs.
"""

import argparse
import copy
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import product
from pathlib import Path

import numpy as np
import peft
import torch
from torch import nn
from tqdm import tqdm

import lora_lib.numpy
from benchmarks.methods import layers, threes
from lora_lib.experiments.sweep import Row, write
from lora_lib.experiments.timing import hardware, in_turn
from lora_lib.files import atomic
from lora_lib.torch import (LanguageModel, LanguageModelConfig, cross_entropy, inject, load_adapter,
                            load_pretrained, merge, remove, save_adapter)

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.float16 if DEVICE == "cuda" else torch.bfloat16
BUDGET = 0.4 if DEVICE == "cuda" else 3.0       # seconds for the rounds of one point


def step_of(module: nn.Module, x: torch.Tensor, optimizer: bool = False):
    """A function: forward, backward with a fixed gradient, and AdamW's step if asked for."""
    trained = [p for p in module.parameters() if p.requires_grad]
    adam = adamw(trained, 1e-6) if optimizer and trained else None
    with torch.no_grad():
        outs = module(x)
    gs = [torch.randn_like(y) for y in (outs if isinstance(outs, tuple) else (outs,))]

    def step():
        outs = module(x)
        torch.autograd.backward(outs if isinstance(outs, tuple) else (outs,), gs)
        if adam:
            adam.step()
        x.grad = None
        for p in trained:
            p.grad = None
    return step


def adamw(parameters: list[nn.Parameter], lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=lr, capturable=DEVICE == "cuda")


def compare(what: str, functions: dict, base: str, quick: bool, device: str = DEVICE,
            budget: float = BUDGET, **point) -> Iterator[Row]:
    """One row for each function: its median time, and the median of its ratios to `base`."""
    for graph in [False, True] if device == "cuda" else [False]:
        once = sum(sample(function) for function in functions.values())
        rounds = 3 if quick else int(np.clip(budget / once, 7, 200))
        taken = in_turn(functions, rounds, warmup=2, device=device, graph=graph)
        for name, seconds in taken.items():
            ratio = seconds / taken[base]
            low, high = np.quantile(ratio, [0.25, 0.75])
            yield {"what": what + (" graph" if graph else ""), **point, "method": name,
                   "rounds": rounds, "seconds": np.median(seconds),
                   "low": np.quantile(seconds, 0.25), "high": np.quantile(seconds, 0.75),
                   "ratio": np.median(ratio), "ratio_low": low, "ratio_high": high}


def sample(function) -> float:
    """How long one sample of `in_turn` will take, at least."""
    function()
    start = time.perf_counter()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return max(1.5e-3, time.perf_counter() - start)


def inputs(tokens: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(tokens, size, generator=torch.Generator().manual_seed(1))
    return x.to(DEVICE, dtype).requires_grad_()


def layer(quick: bool) -> Iterator[Row]:
    """One layer over a grid; with rank 8 also forward alone and a step with AdamW."""
    sizes, ranks, tokens = ([256], [1, 8], [1, 128]) if quick else (
        [256, 1024, 4096], [1, 8, 64, 256], [1, 128, 2048])
    points = [(torch.float32, *p) for p in product(sizes, ranks, tokens)]
    points += [(HALF, *p) for p in product(sizes, [8, 64], tokens)]
    for dtype, size, rank, n in points:
        modules, x = layers(size, rank, dtype=dtype, device=DEVICE), inputs(n, size, dtype)
        point = {"dtype": str(dtype)[6:], "size": size, "rank": rank, "tokens": n}
        steps = {name: step_of(module, x) for name, module in modules.items()}
        yield from compare("step", steps, "frozen", quick, **point)
        if rank == 8 and n <= 128:
            calls = {name: lambda module=module: module(x) for name, module in modules.items()}
            yield from compare("forward", calls, "frozen", quick, **point)
            steps = {name: step_of(module, x, optimizer=True) for name, module in modules.items()}
            yield from compare("optimizer", steps, "frozen", quick, **point)


def products(size: int, n: int, rank: int, dtype: torch.dtype, count: int):
    """The matrix products of `count` adapted layers that read one x, forward and backward, alone:
    in tensors made once, with A stacked, no bias, no cast, no autograd."""
    draw = lambda *shape: torch.randn(shape).to(DEVICE, dtype)
    x, W, A, B = draw(n, size), draw(size, size), draw(count * rank, size), draw(size, rank)
    g, wide, u, v = draw(n, size), draw(n, size), draw(n, count * rank), draw(count * rank, n)
    dA, dB, part = draw(count * rank, size), draw(rank, size), v[:rank]

    def run():
        torch.mm(x, A.t(), out=u)
        for _ in range(count):
            torch.mm(u[:, :rank], B.t(), out=wide), torch.addmm(wide, x, W.t(), out=wide)
        for _ in range(count):
            torch.mm(B.t(), g.t(), out=part), torch.mm(u[:, :rank].t(), g, out=dB)
        torch.mm(v, x, out=dA), torch.mm(v.t(), A, out=wide)
        for _ in range(count):
            torch.addmm(wide, g, W, out=wide)
    return run


def shared(quick: bool) -> Iterator[Row]:
    """Adapters on q, k and v of one x."""
    points = [(torch.float32, 256, 1), (torch.float32, 256, 256), (torch.float32, 512, 256),
              (torch.float32, 2048, 256), (HALF, 256, 256), (HALF, 512, 256), (HALF, 2048, 256)]
    for dtype, size, n in points[:2] if quick else points:
        modules, x = threes(size, 8, dtype=dtype, device=DEVICE), inputs(n, size, dtype)
        steps = {name: step_of(module, x) for name, module in modules.items()}
        steps["products"] = products(size, n, 8, dtype, 3)
        yield from compare("shared", steps, "frozen", quick, dtype=str(dtype)[6:], size=size,
                           rank=8, tokens=n)


def thin(quick: bool) -> Iterator[Row]:
    """dB = g^T u, (1024, rank): the product itself, and the transpose of u^T g, made contiguous."""
    ranks, tokens = ([8], [16]) if quick else ([1, 4, 8, 16, 64], [1, 16, 128, 1024])
    for dtype, rank, n in product([torch.float32, HALF], ranks, tokens):
        g, u = (torch.randn(n, width).to(DEVICE, dtype) for width in (1024, rank))
        pair = {"g^T u": lambda: torch.mm(g.t(), u),
                "(u^T g)^T": lambda: torch.mm(u.t(), g).t().contiguous()}
        yield from compare("thin", pair, "g^T u", quick, dtype=str(dtype)[6:], rank=rank, tokens=n,
                           budget=BUDGET / 6)


def inference(quick: bool) -> Iterator[Row]:
    """Without gradients: the plain layer, ours merged and not, PEFT's and loralib's not merged."""
    for size, n in product([256] if quick else [256, 1024, 4096], [1, 128]):
        modules, x = layers(size, 8, device=DEVICE), inputs(n, size, torch.float32).detach()
        modules["merged"] = copy.deepcopy(modules["lora_lib"]).merge()
        modules["merged and replaced"] = merge(nn.Sequential(copy.deepcopy(modules["lora_lib"])))[0]
        del modules["full"]

        def call(module):
            def run():
                with torch.no_grad():
                    module(x)
            return run
        for module in modules.values():
            module.eval()                        # loralib's returns None
        yield from compare("inference", {name: call(m) for name, m in modules.items()}, "frozen",
                           quick, dtype="float32", size=size, rank=8, tokens=n)


def model(quick: bool) -> Iterator[Row]:
    """A step of the small language model with AdamW, 16 rows of 64 tokens: the adapters' place is
    q and v, or all linear layers. "frozen" has none, and passes gradients on to its embeddings."""
    tokens = torch.randint(50, (16, 65), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    targets = {"q, v": ["q_proj", "v_proj"],
               "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
    for dtype, (name, target) in product([torch.float32, HALF], targets.items()):
        base = lambda: load_pretrained(dtype=dtype, device=DEVICE).train()
        networks = {"lora_lib": inject(base(), target, 8, 16, seed=0),
                    "PEFT": peft.get_peft_model(base(), peft.LoraConfig(
                        r=8, lora_alpha=16, target_modules=target)),
                    "full": base(), "frozen": base().requires_grad_(False)}
        networks["frozen"].model.embed_tokens.register_forward_hook(
            lambda module, arguments, out: out.requires_grad_())

        def step_of(network):
            trained = [p for p in network.parameters() if p.requires_grad]
            optimizer = adamw(trained, 1e-4) if trained else None

            def step():
                cross_entropy(network(tokens[:, :-1]), tokens[:, 1:]).backward()
                if optimizer:
                    optimizer.step()
                    optimizer.zero_grad()
            return step
        yield from compare("model", {key: step_of(net) for key, net in networks.items()}, "PEFT",
                           quick, dtype=str(dtype)[6:], targets=name, rank=8, tokens=16 * 64)


def files(quick: bool) -> Iterator[Row]:
    """Inject into, save from and load into a model of many layers, beside PEFT."""
    count = 4 if quick else 48
    config = LanguageModelConfig(64, 64, 128, count, 4)
    settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules=[
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    model = LanguageModel(config, seed=0)
    fresh = lambda: copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = inject(fresh(), "all-linear"), peft.get_peft_model(fresh(), settings)
        save_adapter(ours, f"{folder}/ours"), theirs.save_pretrained(f"{folder}/theirs")
        bare, plain = fresh(), fresh()

        def load_ours():
            remove(load_adapter(bare, f"{folder}/ours"))

        def load_theirs():
            peft.PeftModel.from_pretrained(plain, f"{folder}/theirs").unload()

        for what, pair in {
            "inject": (lambda: remove(inject(bare, "all-linear")),
                       lambda: peft.get_peft_model(plain, settings).unload()),
            "save": (lambda: save_adapter(ours, f"{folder}/ours"),
                     lambda: theirs.save_pretrained(f"{folder}/theirs")),
            "load": (load_ours, load_theirs),
        }.items():
            yield from compare("files", dict(zip(("lora_lib", "PEFT"), pair)), "PEFT", quick,
                               "cpu", action=what, rank=8, layers=7 * count)


def numpy(quick: bool) -> Iterator[Row]:
    """The NumPy layer's forward and backward beside its BLAS products alone, in arrays made once."""
    for size, n in [(256, 128)] if quick else [(256, 128), (1024, 256), (2048, 512)]:
        random = np.random.default_rng(0)
        draw = lambda *shape: random.normal(size=shape).astype(np.float32) / shape[-1] ** 0.5
        W, x, g = draw(size, size), draw(n, size), draw(n, size)
        layer = lora_lib.numpy.LoRALayer(size, size, 8, seed=0, dtype=np.float32)
        layer.B[:] = draw(size, 8)
        wide, narrow, small = np.empty((n, size), np.float32), np.empty((n, 8), np.float32), {}
        small["A"], small["B"] = np.empty_like(layer.A), np.empty_like(layer.B)

        def products():
            np.matmul(x, W.T, out=wide), np.matmul(x, layer.A.T, out=narrow)
            np.matmul(narrow, layer.B.T, out=wide)
            np.matmul(g, W, out=wide), np.matmul(x, layer.A.T, out=narrow)
            np.matmul(g.T, narrow, out=small["B"]), np.matmul(g, layer.B, out=narrow)
            np.matmul(narrow.T, x, out=small["A"]), np.matmul(narrow, layer.A, out=wide)

        def step():
            layer.forward(x, W)
            layer.backward(g, x, W)
        yield from compare("numpy", {"products": products, "lora_lib.numpy": step}, "products",
                           quick, "cpu", dtype="float32", size=size, rank=8, tokens=n)


def imports(quick: bool) -> Iterator[Row]:
    """A new process that imports, beside one that does not."""
    command = lambda code: lambda: subprocess.run([sys.executable, "-c", code], check=True)
    functions = {"python": command("pass"), "lora_lib": command("import lora_lib"),
                 "numpy": command("import numpy"),
                 "lora_lib.numpy": command("import lora_lib.numpy"),
                 "torch": command("import torch"),
                 "lora_lib.torch": command("import lora_lib.torch")}
    if quick:
        del functions["torch"], functions["lora_lib.torch"]
    yield from compare("import", functions, "python", quick, "cpu")


def kept_bytes() -> Iterator[Row]:
    """What autograd keeps for backward, tensor by tensor, without the parameters; q, k, v of one x
    of 256 tokens. It depends on the shapes alone."""
    for dtype, size in product([torch.float32, HALF], [512, 2048]):
        x = inputs(256, size, dtype)
        for name, module in threes(size, 8, dtype=dtype, device=DEVICE).items():
            own = {p.untyped_storage().data_ptr() for p in module.parameters()}
            saved = {}

            def pack(t):
                saved.setdefault(t.untyped_storage().data_ptr(), t)
                return t
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                outs = module(x)
            for address, t in saved.items():
                if address not in own:
                    yield {"dtype": str(dtype)[6:], "size": size, "tokens": 256, "method": name,
                           "x": int(address == x.untyped_storage().data_ptr()),
                           "kept": str(t.dtype)[6:], "shape": "x".join(map(str, t.shape)),
                           "bytes": t.untyped_storage().nbytes()}
            del outs


def machine() -> dict[str, object]:
    """What the figures belong to."""
    return {"date": datetime.date.today().isoformat(), "hardware": hardware(DEVICE), "device": DEVICE,
            "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "peft", "loralib")},
            "cuda": torch.version.cuda}


PARTS = {part.__name__: part for part in (imports, numpy, files, model, shared, thin, inference, layer)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="few small points, few rounds")
    parser.add_argument("--out", type=Path, help="where the results go")
    args = parser.parse_args()
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"part must be of {', '.join(PARTS)}, got {unknown[0]!r}")
    about = machine()
    slug = re.sub("[^a-z0-9]+", "-", about["hardware"].lower()).strip("-")
    out = args.out or RESULTS / f"{about['date']}-{slug}"
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for part in args.parts or PARTS:
        for row in tqdm(PARTS[part](args.quick), desc=part, unit="row"):
            rows.append(row)
        write(out / "times.csv", rows)
    write(out / "bytes.csv", list(kept_bytes()))
    with atomic(out / "machine.json") as file:
        file.write_text(json.dumps(about, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
