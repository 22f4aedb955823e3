"""Ways to damage an adapter folder, for `tests.torch.fuzz`: each changes a `Folder` in place."""

import json
import random

import torch

from lora_lib.torch.peft_format import CONFIG, WEIGHTS
from tests.torch.folder import DTYPES, entry_of, joined, split, tensor_of

# Out of range, of another type, or both. json writes inf and nan as Infinity and NaN.
VALUES = (None, True, False, -1, 0, 1, 2, 3, 2.0, 2.5, -0.0, 1e-320, 1e308, float("inf"),
          float("nan"), 10**400, -2**63, 2**31, "8", "2", "", "true", "NONE", "\0", "\ud800", "..",
          "x" * 10_000, [], [""], [1], [[]], [None], ["query", 1], ["query"], ["\0"], ["."], {},
          {"query": 1}, {"": 3}, {"query": "3"}, {"query": None}, {"query": [2]}, {"query": True},
          {"query": 1e400}, {"query": 10**400}, {"(": 2}, {".*": 2}, {".*": -1}, {"a": {"b": []}})

# Each needs time exponential in a path's length, or a high power of it, before it fails.
EXPLODING = (r"(.*)*!", r"(\w+\.?)+!", r"(.|\w)*#", r"(.?){60}!", r"([a-z]+)*([a-z.]+)*(.+)*!",
             r".*.*.*.*.*.*.*.*.*.*.*.*!", "(e|en|enc|.)*!", "(?=(.+)+!)", "(" * 400 + ")" * 400,
             "a{1000}{1000}", r"(?:(?:.{0,9}){9}){9}!")

NAMES = ("", ".", "..", "...", "../../etc/passwd", "/", "\0", "encoder", "encoder.layers",
         "training", "forward", "__class__", "_modules", "weight", "backbone.0", "head", "embed",
         "head.0", "twin", "encoder.layers.0.self_attention.query_projection.linear", "é", "x" * 999,
         "encoder.layers.9.self_attention.query_projection", "encoder.layers.-1", "(", ".*", "\n")


# --- the tensors ------------------------------------------------------------------------------------

def _any(rng, folder):
    """The place of one entry, more often an A or B than another."""
    places = range(len(folder.entries))
    halves = [i for i in places if ".lora_" in folder.entries[i][0]]
    return rng.choice(halves if halves and rng.random() < 0.8 else places)


def drop_keys(rng, folder):
    for _ in range(rng.randint(1, 3)):
        folder.entries.pop(_any(rng, folder))


def drop_a_layer(rng, folder):
    key = folder.entries[_any(rng, folder)][0].rpartition(".lora_")[0]
    folder.entries = [e for e in folder.entries if not (key and e[0].startswith(f"{key}.lora_"))]


def duplicate_key(rng, folder):
    key, dtype, shape, content = folder.entries[_any(rng, folder)]
    folder.entries.insert(rng.randrange(len(folder.entries)), (key, dtype, shape, bytes(len(content))))


def rename_key(rng, folder):
    i = _any(rng, folder)
    key, *rest = folder.entries[i]
    path = key.removeprefix("base_model.model.").rpartition(".lora_")[0] or "head"
    other = rng.choice(folder.entries)[0]
    new = rng.choice([
        key.replace("base_model.model.", ""), f"base_model.model.{key}", key.upper(), f" {key}",
        key.replace(path, rng.choice(NAMES)), key.replace(".weight", rng.choice(["", ".bias", "s"])),
        key.replace(".weight", ".default.weight"), key.replace("lora_", "lora_embedding_"),
        key.replace("lora_A", "lora_B"), key.replace("lora_", "lora__"), f"{key}\n", other,
        other.replace("lora_A", "lora_B"), key.replace("lora_A", "base_layer"),
        key.replace("encoder.layers", "backbone"), key.replace("pooler", "twin"), rng.choice(NAMES)])
    folder.entries[i] = (new, *rest)


def rename_a_path(rng, folder):
    """All keys of one layer get another path: one that wrappers give, an alias, another layer's."""
    path = folder.entries[_any(rng, folder)][0].rpartition(".lora_")[0]
    path = path.removeprefix("base_model.model.") or "head"
    first, _, rest = path.partition(".")
    paths = [f"_orig_mod.{path}", f"{first}._fsdp_wrapped_module.{rest}", "twin", "pooler",
             f"{first}._checkpoint_wrapped_module.{rest}", f"module.{path}",
             path.replace("encoder.layers", "backbone"), path.replace("query", "value"),
             path.replace("layers.0", "layers.1"), path.replace("layers.0", "layers.00")]
    new = rng.choice(paths if rng.random() < 0.7 else NAMES)
    both = rng.random() < 0.4                    # the old keys stay, with other numbers
    for i, (key, *about) in enumerate(list(folder.entries)):
        if path in key:
            renamed = (key.replace(path, new, 1), *about)
            if both:
                folder.entries.append((*renamed[:3], bytes(len(about[2]))))
            else:
                folder.entries[i] = renamed


def swap_keys(rng, folder):
    i, j = (_any(rng, folder) for _ in range(2))
    a, b = folder.entries[i], folder.entries[j]
    folder.entries[i], folder.entries[j] = (b[0], *a[1:]), (a[0], *b[1:])


def change_dtype(rng, folder):
    dtype = DTYPES[rng.choice(list(DTYPES))]
    for i in {_any(rng, folder) for _ in range(rng.choice([1, 1, 9]))}:
        t = tensor_of(folder.entries[i])
        folder.entries[i] = entry_of(folder.entries[i][0], t.to(dtype))


def relabel_dtype(rng, folder):
    """The same bytes under another name; of another size, the header lies about their number."""
    i = _any(rng, folder)
    key, _, shape, content = folder.entries[i]
    dtype = rng.choice([*DTYPES, "F4", "F6_E2M3", "U16", "U64", "X", "", 7, None])
    folder.entries[i] = (key, dtype, shape, content)


def change_shape(rng, folder):
    i = _any(rng, folder)
    key, dtype, shape, content = folder.entries[i]
    t = tensor_of(folder.entries[i])
    if rng.random() < 0.5:                       # a true shape, but another
        fits = [lambda: t.flatten(), lambda: t[None], lambda: t[..., :1], lambda: t[:0], lambda: t.mT,
                lambda: t.repeat(2, *[1] * (t.ndim - 1)), lambda: t.flatten()[0]]
        folder.entries[i] = entry_of(key, rng.choice(fits)() if t.ndim > 1 else t.reshape(1, -1))
    else:
        shape = rng.choice([shape[::-1], [], [0], [-1, *shape[1:]], [2**62, 2**62], [2**63, 0], [1.5],
                            ["2"], None, [*shape, 1], [1] * 200, [len(content)], [[2]]])
        folder.entries[i] = (key, dtype, shape, content)


def poison(rng, folder):
    i = _any(rng, folder)
    t = tensor_of(folder.entries[i])
    if t.numel() and t.is_floating_point():
        wide = rng.random() < 0.5                # finite in the file, and infinite in float32
        t = t.to(torch.float64 if wide else t.dtype).clone()
        value = rng.choice([1e300, -1e39, 1e-300] if wide else
                           [float("nan"), float("inf"), -float("inf"), 3e38, 1e-45])
        t.view(-1)[rng.randrange(t.numel())] = value
        folder.entries[i] = entry_of(folder.entries[i][0], t)


# --- the note on the base -----------------------------------------------------------------------------

def change_the_note(rng, folder):
    note = json.loads(folder.metadata.get("lora_lib_base", "{}"))
    name = rng.choice([*note, "encoder.layers.0.self_attention.query_projection"])
    value = rng.choice([*VALUES, [0.0] * 8, [0.0] * 7, ["0"] * 8, [float("nan")] * 8, [[0.0] * 8] * 8,
                        [10**400] * 8, [None] * 8, [True] * 8, {"0": 0.0}])
    text = rng.choice([lambda: json.dumps(note | {name: value}), lambda: json.dumps(value),
                       lambda: "[" * 100_000, lambda: '{"a":' * 50_000, lambda: "", lambda: "{",
                       lambda: "NaN", lambda: '{"x":[' + "0," * 1_000_000 + "0]}"])()
    folder.metadata["lora_lib_base"] = text


def another_base(rng, folder):
    """The folder is whole; the model is not the one that it was trained on."""
    folder.base_seed = 1


# --- the settings -----------------------------------------------------------------------------------

SETTINGS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules",
            "modules_to_save", "rank_pattern", "alpha_pattern", "bias", "fan_in_fan_out",
            "init_lora_weights", "layers_to_transform", "layers_pattern", "peft_type", "task_type",
            "target_parameters", "use_dora", "lora_bias", "trainable_token_indices", "new_setting")


def drop_setting(rng, folder):
    for _ in range(rng.randint(1, 4)):
        folder.config.pop(rng.choice([*folder.config, None]), None)


def change_setting(rng, folder):
    for _ in range(rng.choice([1, 1, 1, 3])):
        folder.config[rng.choice(SETTINGS)] = rng.choice(VALUES)


def change_a_number(rng, folder):
    key = rng.choice(["r", "lora_alpha", "rank_pattern", "alpha_pattern", "lora_dropout"])
    value = rng.choice([v for v in VALUES if not isinstance(v, (list, dict))])
    pattern = rng.choice(["query_projection", "pooler", r".*layers\.0.*", "nothing", ".", "^pooler",
                          "pooler)|(x", "(?i)POOLER", "pooler$", "", r"layers\.\d+\..*query.*"])
    folder.config[key] = {pattern: value} if key.endswith("pattern") else value


def explode(rng, folder):
    """A regular expression that takes for ever, in each place that holds one."""
    key = rng.choice(["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
    pattern = rng.choice(EXPLODING)
    folder.config[key] = {pattern: 2} if key.endswith("pattern") else pattern


def rename_targets(rng, folder):
    key = rng.choice(["target_modules", "modules_to_save", "exclude_modules"])
    names = folder.config.get(key) or []
    more = rng.choice([["value_projection"], ["pooler"], ["embed"], ["d"], [""], list(NAMES), names[1:],
                       "all-linear", ".*", ".*query.*", "(", names * 3])
    folder.config[key] = more if isinstance(more, str) else [*more, *names][:rng.randint(0, 9)]


# --- the files' bytes -------------------------------------------------------------------------------

def _late(file):
    """A mutation of one file's bytes; `change(rng, content)` gives the new ones."""
    def wrap(change):
        def mutation(rng, folder):
            name, seed = file or rng.choice([CONFIG, WEIGHTS]), rng.getrandbits(32)
            folder.late.append((name, lambda content: change(random.Random(seed), content)))
        mutation.__name__ = change.__name__
        return mutation
    return wrap


@_late(None)
def truncate(rng, content):
    return content[:rng.choice([0, 1, 7, 8, 9, rng.randrange(len(content) + 1)])]


@_late(None)
def flip_bits(rng, content):
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 20])):
        if content:
            content[rng.randrange(min(len(content), rng.choice([16, 10**9])))] ^= 1 << rng.randrange(8)
    return bytes(content)


@_late(None)
def insert_bytes(rng, content):
    at, more = rng.randrange(len(content) + 1), rng.choice([b"\0", b"\xff" * 8, b"{", b"[" * 9, b" "])
    return content[:at] + more * rng.choice([1, 1, 1000]) + content[at:]


@_late(None)
def take_away(rng, content):
    return None


@_late(WEIGHTS)
def lie_about_the_length(rng, content):
    n = len(content)
    length = rng.choice([0, 1, n, n - 8, n - 7, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 100_000_000,
                         rng.randrange(2**64), rng.randrange(n + 1)])
    return length.to_bytes(8, "little") + content[8:]


@_late(WEIGHTS)
def huge_header(rng, content):
    header, data = split(content)
    n = rng.choice([10**4, 10**5, 10**6, 12 * 10**6, 16 * 10**6, 9 * 10**7])
    prefix = rng.choice([b"", b"base_model.model."])
    more = rng.choice([lambda: b" " * n, lambda: b',"x":' + b"[" * n,
                       lambda: b',"x":"' + b"x" * n + b'"',
                       lambda: b"".join(b',"%s%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
                                        % (prefix, i)
                                        for i in range(n // 90))])()
    at = header.rindex(b"}")
    return joined(header[:at] + more + header[at:], data)


@_late(WEIGHTS)
def lie_in_the_header(rng, content):
    header, data = split(content)
    header = json.loads(header)
    key = rng.choice(list(header))
    if key == "__metadata__" or rng.random() < 0.1:
        header[key] = rng.choice([None, [], {"a": 1}, {"a": None}, {"a": "b"}, "x", {"a": {}}])
    else:
        header[key]["data_offsets"] = rng.choice([[0, 0], [-1, 8], [8, 0], [0, 2**63], [2**64, 2**65],
                                                  [0, len(data)], [0], None, "x", [0.0, 8.0]])
    return joined(json.dumps(header).encode(), data)


@_late(CONFIG)
def deep_or_enormous_json(rng, content):
    n = rng.choice([900, 10**5, 10**6, 8 * 10**6, 10**7])
    pairs = b",".join(b'"%d":1' % i for i in range(n // 10))
    value = rng.choice([lambda: b"[" * n + b"]" * n, lambda: b'{"a":' * n + b"1" + b"}" * n,
                        lambda: b"[" + b"[]," * n + b"[]]", lambda: b'"' + b"x" * n + b'"',
                        lambda: b"1" * n, lambda: b"[" * n,
                        lambda: b"{" + pairs + b"}"])()
    key = rng.choice(["r", "rank_pattern", "target_modules", "task_type", "eva_config", "new_setting"])
    return rng.choice([content[:-1] + f', "{key}": '.encode() + value + b"}", value])


@_late(CONFIG)
def other_text(rng, content):
    text = content.decode()
    return rng.choice([text.encode("utf-16"), b"\xef\xbb\xbf" + content, content + b"x", content * 2,
                       b"[" + content + b"]", text.replace("LORA", "lora").encode(), b"null", b"7",
                       text.replace('"r": ', '"r": 5, "r": ').encode(),
                       text.replace('"r": ', '"R": ').encode(), text.replace('"', "'").encode(),
                       text.replace(": true", ": True").encode(), b"NaN", b'"LORA"'])


# --- what means the same: this must load --------------------------------------------------------------

def reorder(rng, folder):
    """The same folder in another order, with settings that say nothing."""
    rng.shuffle(folder.entries)
    config = list((folder.config | {"new_setting": None, "eva_config": None}).items())
    rng.shuffle(config)
    folder.config = dict(config)


MUTATIONS = {f.__name__: f for f in (
    drop_keys, drop_a_layer, duplicate_key, rename_key, rename_a_path, swap_keys, change_dtype,
    relabel_dtype, change_shape, poison, change_the_note, another_base, drop_setting, change_setting,
    change_a_number, explode, rename_targets, truncate, flip_bits, insert_bytes, take_away,
    lie_about_the_length, huge_header, lie_in_the_header, deep_or_enormous_json, other_text, reorder)}
