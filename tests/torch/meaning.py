"""What an adapter folder says by PEFT's rules, read another way than `load_adapter` does."""

import collections
import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from lora_lib.torch.peft_format import CONFIG, INNER, WEIGHTS

PREFIX = "base_model.model."


class Nonsense(Exception):
    """The folder has no meaning by PEFT's rules, so nothing may be loaded from it."""


def need(condition, what):
    if not condition:
        raise Nonsense(what)


def meaning(path: Path, base: nn.Module) -> tuple[dict, dict]:
    """{path: scaling B A, in float64} and {path of a module to save: its state}, or Nonsense."""
    config = json.loads((path / CONFIG).read_bytes().decode())
    paths = {id(m): name for name, m in base.named_modules()}
    saved = config.get("modules_to_save") or []
    halves, whole = collections.defaultdict(dict), collections.defaultdict(dict)
    for key, t in load_file(path / WEIGHTS).items():
        key = ".".join(part for part in key.split(".") if part not in INNER)
        need(key.startswith(PREFIX), key)
        key = key.removeprefix(PREFIX)
        half = re.fullmatch(r"(.*)\.lora_([AB])\.weight", key)
        owner = next((name for name in paths.values() if key.startswith(f"{name}.")
                      and (name.endswith(tuple(saved)) or base.get_submodule(name) is base.embed)),
                     None)
        into, name, leaf = (halves, *half.groups()) if half else (
            whole, owner, key.removeprefix(f"{owner}."))
        try:
            name = paths[id(base.get_submodule(name))]
        except (AttributeError, KeyError):
            raise Nonsense(f"{name} is no module") from None
        need(leaf not in into[name] or torch.equal(into[name][leaf], t), f"two of {key}")
        into[name][leaf] = t
    updates = {}
    for name, half in halves.items():
        need(half.keys() == {"A", "B"} and isinstance(base.get_submodule(name), nn.Linear), name)
        need(not any(name.startswith(f"{w}.") for w in whole), f"{name} is in a module to save")
        A, B = (half[part].to(torch.float32).double() for part in "AB")
        need(half["A"].is_floating_point() and half["B"].is_floating_point(), "codes")
        r, alpha = (_by_pattern(config, *keys, name) for keys in (("r", "rank_pattern"),
                                                                  ("lora_alpha", "alpha_pattern")))
        need(not isinstance(r, bool) and not isinstance(alpha, bool), "a truth value")
        need(isinstance(r, (int, float)) and r == A.shape[0] == B.shape[1] > 0, f"rank {r!r}")
        need(isinstance(alpha, (int, float)) and abs(alpha) < float("inf"), f"alpha {alpha!r}")
        need(A.isfinite().all() and B.isfinite().all(), f"{name} is not finite")
        updates[name] = (B @ A) * (alpha / (r**0.5 if config.get("use_rslora") else r))
    for name, values in whole.items():
        there = base.get_submodule(name).state_dict()
        need(values.keys() == there.keys(), f"{name} is not whole")
        for leaf, t in there.items():
            need(values[leaf].shape == t.shape, f"{name}.{leaf} has another shape")
            need(values[leaf].dtype == t.dtype or values[leaf].is_floating_point()
                 and t.is_floating_point(), f"{name}.{leaf} is {values[leaf].dtype}")
            values[leaf] = values[leaf].to(t.dtype)
            need(values[leaf].isfinite().all(), f"{name}.{leaf} is not finite")
    need(updates, "no adapter")
    return updates, dict(whole)


def _by_pattern(config, key, patterns, name):
    """As in PEFT's get_pattern_key."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return config[key]


def compare(model: nn.Module, path: Path, base: nn.Module) -> None:
    """Raise Nonsense or AssertionError unless each layer of `model` computes what `path` says."""
    updates, whole = meaning(path, base)
    model.eval().double()
    for name, module in base.named_modules():
        here = model.get_submodule(name)
        owner = next((w for w in whole if name == w or name.startswith(f"{w}.")), None)
        expected = {leaf: t.double() for leaf, t in module.state_dict().items()}
        if owner is not None:
            inside = f"{name.removeprefix(owner).removeprefix('.')}.".removeprefix(".")
            expected = {leaf: whole[owner][inside + leaf].double() for leaf in expected}
        if isinstance(module, nn.Linear):
            W = expected["weight"] + updates.get(name, 0)
            x = torch.eye(module.in_features, dtype=torch.float64)
            size = float(W.abs().max())
            torch.testing.assert_close(here(x), x @ W.T + expected["bias"], rtol=1e-9,
                                       atol=1e-9 * (1 + size), equal_nan=True, msg=name)
        elif not list(module.children()):
            for leaf, t in expected.items():
                assert torch.equal(here.state_dict()[leaf].double(), t), f"{name}.{leaf}"
