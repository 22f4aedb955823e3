"""An adapter folder in memory, in pieces that can be damaged one by one; and written out again."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lora_lib.torch.peft_format import CONFIG, WEIGHTS

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
          "I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64,
          "BOOL": torch.bool, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
          "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}


@dataclass
class Folder:
    """An adapter folder in memory: settings, (key, dtype, shape, bytes) of each tensor, metadata.

    `late` holds (file name, function from bytes to bytes) for damage done to the files themselves;
    None for bytes takes the file away.
    """

    config: dict
    entries: list[tuple[str, str, list[int], bytes]]
    metadata: dict[str, str]
    late: list[tuple[str, Callable]] = field(default_factory=list)
    base_seed: int = 0

    @classmethod
    def read(cls, path: Path) -> "Folder":
        header, data = split((path / WEIGHTS).read_bytes())
        header = json.loads(header)
        metadata = header.pop("__metadata__", {})
        entries = [(key, h["dtype"], h["shape"], data[slice(*h["data_offsets"])])
                   for key, h in header.items()]
        return cls(json.loads((path / CONFIG).read_text()), entries, metadata)

    def copy(self) -> "Folder":
        return Folder(json.loads(json.dumps(self.config)), list(self.entries), dict(self.metadata))

    def write(self, path: Path) -> None:
        files = {CONFIG: json.dumps(self.config).encode(), WEIGHTS: self.packed()}
        for i, (name, change) in enumerate(self.late):
            if files[name] is not None:
                with suppress(Exception if i else ()):   # what is damaged may be past more damage
                    files[name] = change(files[name])
        for name, content in files.items():
            (path / name).unlink(missing_ok=True)
            if content is not None:
                (path / name).write_bytes(content)

    def packed(self) -> bytes:
        header, start = [f'"__metadata__":{json.dumps(self.metadata)}'], 0
        for key, dtype, shape, content in self.entries:
            about = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + len(content)]}
            header.append(f"{json.dumps(key)}:{json.dumps(about)}")
            start += len(content)
        return joined(("{" + ",".join(header) + "}").encode(), b"".join(e[3] for e in self.entries))


def split(content: bytes) -> tuple[bytes, bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end], content[end:]


def joined(header: bytes, data: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


def tensor_of(entry):
    return torch.frombuffer(bytearray(entry[3]), dtype=DTYPES[entry[1]]).reshape(entry[2])


def entry_of(key, tensor):
    dtype = next(name for name, d in DTYPES.items() if d == tensor.dtype)
    content = bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())
    return key, dtype, list(tensor.shape), content
