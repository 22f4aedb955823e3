"""Use a wheel of lora_lib as whoever installs it would: with NumPy alone, then with PyTorch.

    python -m build
    python scripts/check_wheel.py dist/*.whl
    python scripts/check_wheel.py dist/*.whl --python python3.13

The environment is new and temporary, and every part runs in an empty folder: what it imports is
what the wheel brought.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

LONGEST_IMPORT = 20  # milliseconds
PARTS = {
    "numpy": """
import sys
from importlib import metadata, resources
import numpy as np
import lora_lib
from lora_lib import numpy as lora

assert metadata.version("lora-lib") == lora_lib.__version__
assert resources.files("lora_lib").joinpath("py.typed").is_file()
x = np.random.default_rng(0).normal(size=(200, 8))
y = (x[:, 0] > x[:, 1]).astype(int)
network = lora.inject(lora.mlp(8, 32, 2, seed=0), rank=2)
lora.train(network, x, y, steps=200, lr=1e-2)
adapted = network(x)
assert lora.accuracy(network, x, y) > 0.9
assert np.allclose(lora.merge(network)(x), adapted)
assert "torch" not in sys.modules
""",
    "torch": """
import torch
from lora_lib.torch import fine_tune, inject, load_adapter, load_pretrained, merge, save_adapter

model = inject(load_pretrained("tales"), ["q_proj", "v_proj"], rank=4, seed=0)
tokens = torch.arange(2, 66).reshape(4, 16)
losses = fine_tune(model, (tokens[:, :-1], tokens[:, 1:]), steps=20, batch_size=4, lr=1e-2,
                   progress=False)
assert losses[-1] < losses[0]
with torch.no_grad():
    adapted = model(tokens)
    again = load_adapter(load_pretrained("tales"), save_adapter(model, "adapter"))
    assert torch.equal(again(tokens), adapted)
    assert torch.allclose(merge(again)(tokens), adapted, atol=1e-3)
""",
}


def ask(python: str | Path, part: str, path: Path | None = None) -> None:
    """Run a part in an empty folder, with `path` to import from first. Raises what it raises."""
    extra = {} if path is None else {"PYTHONPATH": str(path)}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-c", PARTS[part]], cwd=folder, check=True,
                       env=os.environ | extra)


def import_time(python: str | Path) -> float:
    """The milliseconds of `import lora_lib`, without Python's own start: the best of five."""
    times = []
    for _ in range(5):
        done = subprocess.run([python, "-X", "importtime", "-c", "import lora_lib"], check=True,
                              capture_output=True, text=True)
        times.append(int(done.stderr.splitlines()[-1].split("|")[1]) / 1000)
    return min(times)


def packages(python: str | Path) -> set[str]:
    """The names of what is installed, but for the tools that install."""
    done = subprocess.run([python, "-m", "pip", "list", "--format=freeze"], check=True,
                          capture_output=True, text=True)
    return {line.partition("==")[0] for line in done.stdout.split()} - {"pip", "setuptools"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", default=sys.executable, help="which Python to use")
    options = parser.parse_args(arguments)
    wheel = options.wheel.resolve(strict=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([options.python, "-m", "venv", folder], check=True)
        python = Path(folder, "bin", "python")
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, wheel], check=True)
        if packages(python) != {"lora-lib", "numpy"}:
            raise RuntimeError(f"expected lora-lib and numpy alone, got {packages(python)}")
        milliseconds = import_time(python)
        if milliseconds > LONGEST_IMPORT:
            raise RuntimeError(f"import lora_lib takes {milliseconds} ms, expected at most "
                               f"{LONGEST_IMPORT}")
        ask(python, "numpy")
        print(f"with NumPy alone: right; import lora_lib takes {milliseconds} ms", flush=True)
        subprocess.run([*install, f"lora-lib[torch] @ {wheel.as_uri()}"], check=True)
        ask(python, "torch")
        print("with PyTorch: right")


if __name__ == "__main__":
    main()
