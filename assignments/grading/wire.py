"""Values as bytes, between the grader and the sandbox: JSON for the tree, safetensors for arrays.

Nothing here can run code on arrival, as unpickling could. What is known: None, bool, int, float,
str, bytes, list, tuple, dict, NumPy arrays and scalars, torch tensors, functions (by a number that
the sender keeps), and folders (a pathlib.Path, with the small files directly in it).
"""

import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import numpy as numpy_format

LARGEST = 256 * 2**20    # bytes in one message, and in one folder


def pack(value, keep: Callable | None = None) -> bytes:
    """`value` as bytes. `keep(function)` gives the number for a function, if they may be sent.

    Raises TypeError, which names the type, for anything else.
    """
    arrays, tensors = {}, {}

    def tree(value):
        if isinstance(value, np.ndarray | np.generic):
            if value.dtype.kind not in "biuf" or value.dtype.itemsize > 8:
                raise TypeError(f"an array of dtype {value.dtype}")
            arrays[str(len(arrays))] = np.ascontiguousarray(value).reshape(value.shape)
            return {"array": len(arrays) - 1}
        if value is None or isinstance(value, bool | int | float | str):
            return {"plain": value}
        if isinstance(value, bytes):
            return {"bytes": tree(np.frombuffer(value, np.uint8))}
        if isinstance(value, list | tuple):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [tree(v) for v in value]}
        if isinstance(value, dict):
            return {"dict": [[tree(k), tree(v)] for k, v in value.items()]}
        if isinstance(value, Path):
            return {"folder": tree(read_folder(value))}
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor):
            tensors[str(len(tensors))] = value.detach().cpu().contiguous().clone()
            return {"tensor": len(tensors) - 1}
        if keep is not None and callable(value) and not isinstance(value, type):
            return {"function": keep(value), "name": getattr(value, "__name__", "the function")}
        raise TypeError(f"{type(value).__name__}")

    top = json.dumps(tree(value)).encode()
    parts = [top, numpy_format.save(arrays) if arrays else b"", b""]
    if tensors:
        from safetensors import torch as torch_format
        parts[2] = torch_format.save(tensors)
    sizes = b"".join(len(part).to_bytes(8, "big") for part in parts)
    return sizes + b"".join(parts)


def unpack(data: bytes, function: Callable | None = None, folder: Callable | None = None):
    """The value that `pack` made into `data`.

    `function(number, name)` and `folder(files)` make what stands for a function and for a folder;
    a folder is the dictionary of its files unless given. Raises ValueError for bytes that are none.
    """
    try:
        sizes = [int.from_bytes(data[i:i + 8], "big") for i in (0, 8, 16)]
        ends = np.cumsum([24, *sizes]).tolist()
        if ends[-1] != len(data):
            raise ValueError("the sizes do not fit")
        top, arrays, tensors = (data[a:b] for a, b in zip(ends, ends[1:]))
        arrays = numpy_format.load(arrays) if arrays else {}
        if tensors:
            from safetensors import torch as torch_format
            tensors = torch_format.load(tensors)

        def value(node):
            (kind, content), *rest = node.items()
            match kind:
                case "plain":
                    return content
                case "array":
                    return arrays[str(content)]
                case "tensor":
                    return tensors[str(content)]
                case "bytes":
                    return value(content).tobytes()
                case "list":
                    return [value(v) for v in content]
                case "tuple":
                    return tuple(value(v) for v in content)
                case "dict":
                    return {value(k): value(v) for k, v in content}
                case "folder":
                    return (folder or dict)(value(content))
                case "function" if function is not None:
                    return function(int(content), str(node["name"]))
            raise ValueError(f"unknown kind {kind!r}")

        return value(json.loads(top))
    except Exception as error:                       # the bytes come from the learner's process
        raise ValueError(f"not a message: {type(error).__name__}: {error}") from None


def read_folder(folder: Path) -> dict[str, bytes]:
    """The regular files directly in `folder`, by name; links and subfolders are left out."""
    files, total = {}, 0
    for name in sorted(os.listdir(folder)):
        handle = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) \
            if stat.S_ISREG(os.lstat(folder / name).st_mode) else None
        if handle is not None:
            with open(handle, "rb") as file:
                files[name] = file.read(LARGEST + 1)
            total += len(files[name])
            if total > LARGEST:
                raise TypeError(f"a folder with more than {LARGEST >> 20} MB in it")
    return files


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Make the regular files in `folder` be `files`. Raises ValueError for a name with a path."""
    for name in files:
        if not isinstance(name, str) or Path(name).name != name or name in ("", "..") \
                or "\0" in name:
            raise ValueError(f"not a file's name: {name!r}")
    for name in read_folder(folder).keys() - files.keys():
        (folder / name).unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def write_back(before, after) -> None:
    """Give what a call was handed the content that it has after the call, in place."""
    if isinstance(before, Path):
        if isinstance(after, dict):
            write_folder(before, after)
    elif isinstance(before, np.ndarray):
        if np.shape(after) == before.shape and before.flags.writeable:
            before[...] = after
    elif isinstance(before, list):
        if isinstance(after, list):
            _items(before, after)
            before[len(after):] = after[len(before):]
    elif isinstance(before, tuple):
        _items(before, after)
    elif isinstance(before, dict):
        if isinstance(after, dict):
            for key in before.keys() - after.keys():
                del before[key]
            for key, value in after.items():
                if key in before and _holds(before[key]):
                    write_back(before[key], value)
                else:
                    before[key] = value
    elif hasattr(before, "detach") and hasattr(after, "detach"):
        if before.shape == after.shape:
            before.data.copy_(after)


def _items(before, after):
    for i, (old, new) in enumerate(zip(before, after)):
        if _holds(old):
            write_back(old, new)
        elif isinstance(before, list):
            before[i] = new


def _holds(value):
    return isinstance(value, Path | np.ndarray | list | tuple | dict) or hasattr(value, "detach")
