"""Every family of transformers that can be made tiny: adapters here, in PEFT, merged, in NF4.

`row` takes one family through all of it and says "yes", or what went wrong, for each column of the
table in book/compatibility.md. `scripts/compatibility.py --families` runs them all.
"""

import copy
import re
import signal
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_lib.torch import inject, load_adapter, lora_modules, merge, quantize, save_adapter
from lora_lib.torch.linear import is_linear
from tests.torch.tiny import NotBuilt, floats, make, modality, outputs

TOLERANCE, EFFECT = 1e-4, 3e-5          # of the largest number: what is the same, what is not
SECONDS = 60                            # for one family
WIDTH = 220                             # of an error's words
COLUMNS = ("training step", "gradient", "to PEFT", "from PEFT", "reload", "merge", "NF4")


def row(family: str) -> dict[str, str]:
    """The family's class, modality, inputs, and an answer for each of COLUMNS; or "not tried"."""
    with warnings.catch_warnings(), _limit(SECONDS):
        warnings.simplefilter("ignore")
        try:
            base, given = make(family)
            answers = Trial(base, given).answers()
        except NotBuilt as error:
            return {"not tried": words(error)}
        except TimeoutError:
            return {"not tried": f"it takes more than {SECONDS} seconds"}
    return {"class": type(base).__name__, "modality": modality(base), "inputs": ", ".join(given),
            **answers}


@contextmanager
def _limit(seconds):
    def stop(*_):
        raise TimeoutError
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def words(error: Exception | str) -> str:
    """The first sentence of an error, fit for one cell of a table."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"Class validation error for validator '\w+': ", "", text)
    text = re.sub(r"0x[0-9a-f]+|/[\w./-]+/(?=[\w.]+)", "", text).replace("|", "/").replace("`", "'")
    text = re.sub(r"\['[^]]*'\]",                      # what was a set has another order each time
                  lambda found: f"[{', '.join(sorted(found[0][1:-1].split(', ')))}]", text)
    first = re.split(r"(?<=[a-z)'\]])\. ", text)[0]
    return first if len(first) <= WIDTH else f"{first[:WIDTH - 3]}..."


class Trial:
    """One tiny model, and what becomes of adapters for it."""

    def __init__(self, base: nn.Module, given: dict[str, Tensor]):
        self.base, self.given = base, given
        self.plain = outputs(base, given)

    def answers(self) -> dict[str, str]:
        """{column: "yes" if both choices of targets pass, else the words of what failed}."""
        linear = [n for n, m in self.base.named_modules() if is_linear(m)]
        if not linear:
            raise NotBuilt("it has no linear layer")
        self.adapted, self.idle = linear, []
        both = {"all-linear": self._answers("all-linear")}
        both["named"] = self._answers(self._names())
        answers = {}
        for column in COLUMNS:
            said = {name: cells.get(column, "-") for name, cells in both.items()}
            if len(set(said.values())) == 1 or column == "gradient" and said["named"] == "yes":
                answers[column] = said["all-linear"]
            else:
                answers[column] = "; ".join(f"{name}: {cell}" for name, cell in said.items()
                                            if cell != "yes")
        return answers

    def _names(self):
        """The commonest names, three at most, of layers that learn and of nothing else; or paths."""
        learn = [n for n in self.adapted if n not in self.idle]
        every = Counter(n.rpartition(".")[2] for n, _ in self.base.named_modules())
        found = Counter(n.rpartition(".")[2] for n in learn)
        good = [leaf for leaf, count in found.most_common()
                if count == every[leaf] and not leaf.isdigit()]
        return good[:3] or learn[:3]

    def _answers(self, targets):
        """The cells of one choice of targets; after a failure, those that need what failed lack."""
        cells, folder = {}, tempfile.TemporaryDirectory()

        def attempt(column: str, function: Callable, *arguments) -> None:
            try:
                cells[column] = function(*arguments) or "yes"
            except TimeoutError:
                raise
            except Exception as error:
                cells[column] = words(error)

        with folder as name:
            here, there = Path(name) / "here", Path(name) / "there"
            attempt("training step", self._step, targets)
            if cells["training step"] == "yes":
                cells["gradient"] = _all_but(self.idle, self.adapted)
                attempt("NF4", self._nf4, targets)
            attempt("to PEFT", self._to_peft, targets, here)
            if (here / "adapter_config.json").exists():
                attempt("reload", self._reload, here)
                attempt("merge", self._merge, here)
            attempt("from PEFT", self._from_peft, targets, there)
        return cells

    def _fresh(self) -> nn.Module:
        return copy.deepcopy(self.base)

    def _adapted(self, model, targets):
        return inject(model, targets, rank=2, alpha=4, seed=0)

    def _step(self, targets):
        model = self._adapted(self._fresh(), targets)
        try:
            self.called = self._train(model)
        except TimeoutError:
            raise
        except Exception as error:
            try:
                self._train(self._fresh().requires_grad_(True))
            except Exception as without:
                if words(without) == words(error):
                    return f"without an adapter too: {words(error)}"
            raise
        self.adapted = lora_modules(model)
        self.idle = [name for name, layer in self.adapted.items() if _still(layer.B)]

    def _train(self, model):
        """One step on a sum of all outputs with random signs, which reaches what they depend on.

        Returns the paths of the adapters that were called.
        """
        called = set()
        for name, layer in lora_modules(model).items():
            layer.register_forward_hook(lambda *_, name=name: called.add(name))
        torch.manual_seed(0)
        trained = [p for p in model.parameters() if p.requires_grad]
        found = [t for t in floats(model.train()(**self.given)) if t.requires_grad]
        if not found:
            raise ValueError("no output has a gradient")
        sum((t * torch.randn_like(t)).sum() for t in found).backward()
        torch.optim.SGD(trained, lr=1e-3).step()
        return called

    def _nf4(self, targets):
        """An expert that no token chooses once the router is rounded is none without a gradient."""
        model = self._adapted(quantize(self._fresh(), targets), targets)
        unchosen = self.called - self._train(model)
        layers = lora_modules(model)
        return _all_but([n for n, layer in layers.items() if _still(layer.B)
                         and n not in self.idle and n not in unchosen], layers)

    def _to_peft(self, targets, folder):
        model = self._adapted(self._fresh(), targets)
        for layer in lora_modules(model).values():
            _draw(layer.A, layer.B, layer.scaling)
        self.model, self.ours = model, outputs(model, self.given)
        save_adapter(model, folder)
        theirs = _peft(PeftModel.from_pretrained, self._fresh(), folder)
        found = _peft(outputs, theirs, self.given)
        return self._differ(self.ours, found, model, theirs)

    def _differ(self, here, there, model, theirs):
        """`_compare`; where the outputs differ, what PEFT does otherwise, if it does."""
        answer = self._compare(here, there)
        if answer != "the outputs differ":
            return answer
        if other := theirs.peft_config["default"].target_parameters:
            return f"PEFT: it takes names of layers for those of experts, {sorted(other)}"
        if lost := self._lost(model, theirs):
            return f"PEFT: nothing reads its adapters at {lost}"
        return "PEFT: it reads its own file otherwise" if self._read_otherwise(theirs) else answer

    def _lost(self, model, theirs):
        """Patterns of the adapters that act here, and in PEFT on nothing."""
        found = []
        for name, layer in lora_modules(model).items():
            try:
                other = theirs.base_model.model.get_submodule(name).lora_B["default"].weight
            except AttributeError:                           # PEFT has no adapter there
                continue
            if other.any() and not self._acts(theirs, other) and self._acts(model, layer.B):
                found.append(name)
        return _patterns(found)

    @torch.no_grad()
    def _acts(self, model, B):
        """Whether the outputs change if B is zero."""
        before, kept = outputs(model, self.given), B.clone()
        B.zero_()
        after = outputs(model, self.given)
        B.copy_(kept)
        return any(_distance(before, after))

    def _read_otherwise(self, theirs):
        """Whether PEFT, given what PEFT wrote, gives other outputs."""
        _draw_all(theirs)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            again = PeftModel.from_pretrained(self._fresh(), folder)
        return self._compare(outputs(theirs, self.given), outputs(again, self.given)) != "yes"

    def _reload(self, folder):
        return self._compare(self.ours, outputs(load_adapter(self._fresh(), folder), self.given))

    def _merge(self, folder):
        """In float64 where float32's rounding grows too large in the model."""
        answer = self._compare(self.ours, outputs(merge(self.model), self.given))
        if answer != "the outputs differ":
            return answer
        given = {name: t.double() if t.is_floating_point() else t for name, t in self.given.items()}
        model = load_adapter(self._fresh(), folder).double()
        return self._compare(outputs(model, given), outputs(merge(model), given))

    def _from_peft(self, targets, folder):
        config = LoraConfig(r=2, lora_alpha=4, target_modules=targets)
        theirs = _peft(get_peft_model, self._fresh(), config)
        _draw_all(theirs)
        found = _peft(outputs, theirs, self.given)
        _peft(theirs.save_pretrained, folder)
        model = load_adapter(self._fresh(), folder)
        return self._differ(outputs(model, self.given), found, model, theirs)

    def _compare(self, one, other):
        """ "yes" if the outputs are the same, and not the base's."""
        each = [float(t.abs().max()) for t in self.plain]
        effects = _distance(one, self.plain)
        if all(d <= EFFECT * most for d, most in zip(effects, each)):
            return "the adapter does not change the outputs"
        most = max(*each, *(float(t.abs().max()) for t in one))
        same = max(_distance(one, other)) <= min(TOLERANCE * most, max(effects) / 10)
        return "yes" if same else "the outputs differ"


def _distance(one, other):
    return [float((a - b).abs().max()) for a, b in zip(one, other, strict=True)]


def _still(B):
    """Whether no gradient came: with B = 0 it is what the outputs say of the layer's own."""
    return B.grad is None or not B.grad.any()


@torch.no_grad()
def _draw(A, B, scaling):
    """Random values: those of the product are 0.15 in the mean square."""
    B.copy_(torch.randn(B.shape, generator=torch.Generator().manual_seed(B.numel())))
    product = scaling * B @ A
    B.mul_(0.15 / float(product.square().mean().sqrt()))


def _draw_all(theirs):
    """The same for every adapter of a PEFT model."""
    for layer in theirs.modules():
        if isinstance(layer, LoraLayer) and layer.lora_A:
            _draw(layer.lora_A["default"].weight, layer.lora_B["default"].weight,
                  layer.scaling["default"])


def _peft(function, *arguments, **options):
    try:
        return function(*arguments, **options)
    except TimeoutError:
        raise
    except Exception as error:
        raise RuntimeError(f"PEFT: {error}") from error


def _all_but(idle: Collection[str], layers: Collection[str]) -> str:
    return f"all but {len(idle)} of {len(layers)}: {_patterns(idle)}" if idle else "yes"


def _patterns(paths) -> str:
    """The paths with * for each number; two of them, and how many more."""
    found = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path) for path in paths))
    return ", ".join(found[:2]) + (f" and {len(found) - 2} more" if len(found) > 2 else "")
