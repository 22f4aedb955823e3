"""PEFT's adapter folder: its two files, read and checked, and its rules for the names in them."""

import hashlib
import json
import re
import reprlib
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# PEFT's settings that change nothing in a trained adapter, or that are read here.
KNOWN = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path",
         "revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha",
         "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save",
         "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern",
         "alpha_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config",
         "corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "runtime_config",
         "ensure_weight_tying", "target_parameters", "lora_bias", "trainable_token_indices"}

# Those that change what the adapter computes and that this library has no code for.
UNSUPPORTED = ("use_dora", "use_qalora", "use_bdlora", "layer_replication",
               "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config")

# Initializations of PEFT's that change the base's weights too: the adapter alone is not enough.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

PREFIX = "base_model.model."

# The ends of PEFT's keys: an adapter's parts by their names here, and the trained rows of an
# embedding, which are called a delta and are the rows themselves.
HALVES = {"A": "lora_A.weight", "B": "lora_B.weight", "B_bias": "lora_B.bias"}
ROWS = "token_adapter.trainable_tokens_delta"

# The names under which wrappers hold what they wrap: torch.compile, checkpoint_wrapper, FSDP 1,
# Lightning's Fabric.
INNER = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module")

# Names that PEFT takes for those of experts' parameters when it loads, whatever they name, by what
# transformers says a family's weights are converted like.
EXPERTS = {"qwen2_moe": {"gate_proj", "up_proj", "down_proj"}, "mixtral": {"w1", "w2", "w3"}}

# Bytes of settings, and of a header beyond its tensors' own: a hundred times what adapters have.
# A file made to harm could else fill the memory.
LARGEST = {CONFIG: 2**23, WEIGHTS: 12 * 2**20}

# Seconds that the regular expressions of a file may take.
PATIENCE = 10

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 200


def read_config(file: Path) -> dict:
    """The settings in `file`, or ValueError for what is damaged, or not supported here."""
    if file.stat().st_size > LARGEST[CONFIG]:
        raise ValueError(f"{file} has more than {LARGEST[CONFIG]} bytes: no adapter's settings do")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{file}: expected peft_type 'LORA'")
    for key in ("r", "lora_alpha"):
        if key not in config:
            raise ValueError(f"{file}: {key!r} is missing")
    for key in (*UNSUPPORTED, *config.keys() - KNOWN):
        if config.get(key):
            raise ValueError(f"{file}: {key} = {_brief.repr(config[key])} is not " + (
                "supported here" if key in UNSUPPORTED else
                "known here, and may change what the adapter computes"))
    if config.get("bias", "none") != "none":
        raise ValueError(f"{file}: bias = {_brief.repr(config['bias'])} is not supported, expected "
                         "'none'")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
        raise ValueError(f"{file}: init_lora_weights = {_brief.repr(init)} changed the base's "
                         "weights too; let PEFT convert the adapter "
                         "(path_initial_model_for_weight_conversion)")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise ValueError(f"{file}: {key} must be an object, got {_brief.repr(config[key])}")
    for key, pattern, fits, what in (
            ("r", "rank_pattern", lambda v: type(v) is int and v > 0, "an integer of at least 1"),
            ("lora_alpha", "alpha_pattern",
             lambda v: type(v) in (int, float) and abs(v) < 1e38, "a finite number, below 1e38")):
        for value in (config[key], *(config.get(pattern) or {}).values()):
            if not fits(value):
                raise ValueError(f"{file}: {key} and the values of {pattern} must be {what}, got "
                                 f"{_brief.repr(value)}")
    for key, kinds in {"modules_to_save": list, "target_parameters": list,
                       "target_modules": (list, str),
                       "exclude_modules": (list, str)}.items():
        value = config.get(key) or []
        if not isinstance(value, kinds) or not all(isinstance(v, str) for v in value):
            raise ValueError(f"{file}: {key} must be a list of names, got {_brief.repr(value)}")
    return config


def read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """The tensors in `file`, and what `save_adapter` noted of the base, or ValueError."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    with open(file, "rb") as f:
        header, size = int.from_bytes(f.read(8), "little"), file.stat().st_size
    if LARGEST[WEIGHTS] + (size - header) < header < size:
        raise ValueError(f"{file} is damaged: a header of {header} bytes for {size - header} of "
                         "data")
    try:
        with safe_open(file, framework="pt") as f:
            noted = f.metadata() or {}
            if odd := [key for key in f.keys() if not key.startswith(PREFIX)]:
                raise ValueError(f"{file}: {odd[0]} is not the A or B of a linear layer: PEFT's "
                                 f"names begin with {PREFIX}")
            tensors = {key: f.get_tensor(key) for key in f.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {str(error)[:500]}") from error
    samples = noted.get("lora_lib_base", "{}")
    expected = noted.get("lora_lib_sha256")            # PEFT's own files have none
    if expected is not None and expected != digest(tensors, samples):
        raise ValueError(f"{file} is damaged: its checksum does not fit its contents")
    return tensors, _samples(samples, file)


def _samples(text, file):
    """{name: numbers of the base's weight, or None}."""
    try:
        samples = json.loads(text)
    except (ValueError, RecursionError):
        samples = None
    if not isinstance(samples, dict) or not all(
            values is None or isinstance(values, list)
            and all(isinstance(v, (int, float)) and abs(v) < 1e39 for v in values)
            for values in samples.values()):
        raise ValueError(f"{file} is damaged: its note on the base holds no numbers")
    return samples


def digest(tensors: dict[str, Tensor], samples: str) -> str:
    """A checksum of what the file holds; safetensors has none of its own."""
    total = hashlib.sha256(samples.encode())
    for key, t in sorted(tensors.items()):
        total.update(f"{key} {t.dtype} {tuple(t.shape)}".encode())
        total.update(t.flatten().view(torch.uint8).numpy())
    return total.hexdigest()


@dataclass
class Contents:
    """What PEFT's file holds, by the module's path.

    parts    A, B, and B_bias where there is one
    whole    a module to save: its state
    rows     the trained rows of an embedding
    copies   a copy of the base's weight, which PEFT keeps of an adapted head
    """

    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    whole: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)


def sort(tensors: dict[str, Tensor], config: dict, file: Path,
         embeddings: Collection[str] = ()) -> Contents:
    """PEFT's keys, sorted by what they are for.

    The names that wrappers put into paths are left out. A weight of one of the model's
    `embeddings` is a module to save. Raises ValueError for another key, and for NaN or infinity.
    """
    tensors, all_tensors = {}, tensors
    for key, t in all_tensors.items():
        bare = re.sub(rf"(?<=\.)(?:{'|'.join(INNER)})\.", "", key)
        if bare in tensors:
            raise ValueError(f"{file} holds {bare} twice, once as {key}")
        tensors[bare] = _number(t, f"{file}: {key}")
    found = Contents()
    ends = {f".{end}": part for part, end in HALVES.items()}
    for key, t in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)(\.lora_[AB]\.(?:weight|bias))", key)
        part = ends.get(match[2]) if match else None
        if match and part and t.ndim == (1 if part == "B_bias" else 2) and t.is_floating_point():
            found.parts.setdefault(match[1], {})[part] = t
        elif key.endswith(f".{ROWS}") and t.ndim == 2 and t.is_floating_point():
            found.rows[key.removeprefix(PREFIX).removesuffix(f".{ROWS}")] = t
        elif name := _owner(key, config):
            found.whole.setdefault(name, {})[key.removeprefix(f"{PREFIX}{name}.")] = t
        elif key.endswith(".base_layer.weight") and t.ndim == 2 and \
                key.replace("base_layer", "lora_A") in tensors:
            found.copies[key.removeprefix(PREFIX).removesuffix(".base_layer.weight")] = t
        elif (path := key.removeprefix(PREFIX).removesuffix(".weight")) in embeddings:
            found.whole[path] = {"weight": t}
        elif ".lora_embedding_" in key or key.endswith(".base_layer.weight"):
            name = re.split(r"\.lora_embedding_|\.base_layer", key.removeprefix(PREFIX))[0]
            raise ValueError(f"{file}: target_modules names {name}, an nn.Embedding; here only a "
                             "linear layer can have an adapter")
        else:
            raise ValueError(f"{file}: {key} {tuple(t.shape)} is not the A or B of a linear layer, "
                             f"nor of modules_to_save = {config.get('modules_to_save')}")
    expected = [*HALVES][:3 if config.get("lora_bias") else 2]
    for name, half in found.parts.items():
        if lacking := [HALVES[part] for part in expected if part not in half]:
            raise ValueError(f"{file}: {name} has no {lacking[0]}")
        if len(half) > len(expected):
            raise ValueError(f"{file}: {name} has a lora_B.bias, expected none without lora_bias")
        found.parts[name] = {part: half[part] for part in expected}
    if not found.parts:
        raise ValueError(f"{file} holds no adapter")
    return found


def _number(t, what):
    """The tensor; float8 as float32. ValueError for NaN, infinity, or what float32 cannot hold."""
    if not t.is_floating_point():
        return t
    try:
        wide = t.float() if t.element_size() != 2 else t
    except NotImplementedError as error:             # two float4 in a byte
        raise ValueError(f"{what} is stored as {t.dtype}, which torch cannot read") from error
    if not torch.isfinite(wide).all():
        raise ValueError(f"{what} holds NaN or infinity, or a number too large for float32")
    return wide if t.element_size() < 2 else t


def _owner(key, config):
    """The path of the module to save that `key` is in: the first to end in one of the names."""
    path = key.removeprefix(PREFIX).split(".")
    paths = (".".join(path[:i]) for i in range(1, len(path)))
    return next((p for p in paths if p.endswith(tuple(config.get("modules_to_save") or ()))), None)


def taken_for_experts(model_type: str | None, names: Collection[str]) -> list[str]:
    """The paths in `names` whose adapters PEFT loses in this family of transformers' (0.21)."""
    table = getattr(sys.modules.get("transformers.conversion_mapping"),
                    "_MODEL_TO_CONVERSION_PATTERN", {})
    experts = EXPERTS.get(table.get(model_type), set())
    return [name for name in names if name.rpartition(".")[2] in experts]


def settings(config: dict, key: str, pattern_key: str, names: Collection[str]) -> dict:
    """{name: value}. PEFT's rule: the first pattern that matches the end of the path, else the
    common value."""
    found, left = {}, list(names)
    for pattern, value in (config.get(pattern_key) or {}).items():
        matches = _compiled(rf"(.*\.)?({pattern})$", f"{pattern_key}: {_brief.repr(pattern)}").match
        found |= {name: value for name in left if matches(name)}
        left = [name for name in left if name not in found]
    return found | dict.fromkeys(left, config[key])


def names_module(config: dict, key: str, name: str) -> bool:
    """PEFT's rule: a string is a regular expression of whole paths, a list holds their ends."""
    names = config.get(key) or ()
    if isinstance(names, str):
        return bool(_compiled(names, f"{key}: {_brief.repr(names)}").fullmatch(name))
    return any(name == end or name.endswith(f".{end}") for end in names)


def _compiled(pattern, what):
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{what} is no regular expression: {error}") from error


def check_patterns(config: dict, names: Collection[str], file: Path) -> None:
    """Raise ValueError if the regular expressions in `config` take too long on the paths `names`.

    A few characters suffice for a time exponential in a path's length, and Python cannot stop what
    it has begun: where there are more than two repeats or choices, a group is repeated, or there
    are many, another process goes first.
    """
    kinds = [config.get(key) or () for key in ("target_modules", "exclude_modules", "rank_pattern",
                                               "alpha_pattern")]
    patterns = [p for kind in kinds for p in ([kind] if isinstance(kind, str) else
                                              kind if isinstance(kind, dict) else ())]
    plain = [re.sub(r"\\.", "", p) for p in patterns]
    risky = [rf"(.*\.)?({p})" for p, bare in zip(patterns, plain) if len(patterns) > 1000
             or len(re.findall(r"[*+?{|]", bare)) > 2 or re.search(r"\)[*+{]", bare)]
    if not risky or not sys.executable or getattr(sys, "frozen", False):
        return
    script = ("import json, re, sys; patterns, names = json.load(sys.stdin)\n"
              "for p in patterns:\n p = re.compile(p)\n for name in names: p.fullmatch(name)")
    try:
        subprocess.run([sys.executable, "-I", "-S", "-c", script], timeout=PATIENCE, text=True,
                       input=json.dumps([risky, list(names)]), capture_output=True)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{file}: the regular expressions take more than {PATIENCE} s, such as "
                         f"{_brief.repr(patterns[0])}") from error
