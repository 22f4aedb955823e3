"""Files that are either the old one or the new one, never half of each; and where some are kept."""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path


def cache() -> Path:
    """The folder for what is made once and kept: LORA_LIB_CACHE, else ~/.cache/lora_lib."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_lib"
    return Path(os.environ.get("LORA_LIB_CACHE") or default)


@contextmanager
def atomic(path: str | os.PathLike):
    """Give a temporary path beside `path`; when the block ends without an error, it becomes `path`.

    A crash or an error inside the block leaves what was at `path` as it was.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)                # mkstemp's own mode shuts everyone else out
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
