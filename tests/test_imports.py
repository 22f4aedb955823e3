"""What imports what: the NumPy half needs NumPy alone."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WITHOUT_TORCH = [name for name in ("lora_lib", "lora_lib.rules", "lora_lib.files", "lora_lib.data",
                                   "lora_lib.costs", "lora_lib.text", "lora_lib.words",
                                   "lora_lib.plots", "lora_lib.numpy", "lora_lib.calls",
                                   "lora_lib.docstrings", "lora_lib.presets")
                 if importlib.util.find_spec(name)]
TRAIN = """
import numpy as np
from lora_lib import numpy as lora
network = lora.inject(lora.mlp(64, 16, 10, seed=0), rank=2)
losses = lora.train(network, data.x_train, data.y_train, steps=3)
assert np.isfinite(losses).all()
lora.merge(network)
print("trained")
"""


def python(code):
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def block(*packages):
    """Code after which these packages are not there. (None in sys.modules would mislead SciPy.)"""
    return f"""
import sys
class Nowhere:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)
sys.meta_path.insert(0, Nowhere())
"""


def test_blocking_works():
    with pytest.raises(AssertionError, match="torch is blocked"):
        python(block("torch") + "import lora_lib.torch")


def test_without_torch_the_numpy_half_trains_on_the_digits():
    imports = f"import {', '.join(WITHOUT_TORCH)}\n"
    data = "data = lora_lib.data.digits(90)\n"
    assert python(block("torch") + imports + data + TRAIN) == ["trained"]


def test_numpy_alone_is_enough():
    others = ("torch", "scipy", "sklearn", "tqdm", "matplotlib", "safetensors", "peft",
              "transformers", "hypothesis", "pytest")
    data = """
import types, numpy
rng = numpy.random.default_rng(0)
data = types.SimpleNamespace(x_train=rng.normal(size=(100, 64)), y_train=rng.integers(0, 10, 100))
"""
    assert python(block(*others) + "import lora_lib.data, lora_lib.costs\n" + data + TRAIN) == [
        "trained"]


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_importing_it_loads_no_torch(name):
    code = f"import sys, {name}; print(*[m for m in sys.modules if m.split('.')[0] == 'torch'])"
    assert python(code) == []


def test_lora_lib_torch_needs_no_peft():
    code = block("peft", "transformers", "sklearn", "matplotlib") + "import lora_lib.torch as t\n"
    assert python(code + "print(len(t.__all__))")[0].isdigit()


def test_every_public_name_exists():
    import lora_lib.numpy
    import lora_lib.torch

    for module in (lora_lib.numpy, lora_lib.torch):
        assert sorted(module.__all__) == sorted(set(module.__all__))
        assert all(hasattr(module, name) for name in module.__all__)
