"""The folder of a run: what it holds while the run lasts, and what stands in its way."""

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from lora_lib.files import atomic

RUNNING, DONE, CHECKPOINT = "unfinished.json", "tune.json", "checkpoint.safetensors"


def opened(folder: Path, settings: dict, force: bool) -> tuple[dict, str]:
    """The record of the run with these settings, and "new", "unfinished", or "finished".

    A folder that holds another run, or anything else, is refused unless `force`, by a ValueError
    that names what differs. Nothing is written here.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; name a folder that is new or empty")
    for name, state in ((RUNNING, "unfinished"), (DONE, "finished")):
        if not (folder / name).exists():
            continue
        record = read_record(folder / name)
        differences = [_difference(key, record["settings"].get(key), value)
                       for key, value in settings.items() if record["settings"].get(key) != value]
        if not differences and (state == "unfinished" or not force):
            return record, state
        if force:
            return {"settings": settings}, "new"
        raise ValueError(f"--out {folder} holds another run, {state} ({'; '.join(differences)}); "
                         "give its settings, another --out, or --force to start over")
    ours = (f".{RUNNING}.", f".{DONE}.")                         # what a kill has left half
    if not force and folder.exists() and any(
            not file.name.startswith(ours) for file in folder.iterdir()):
        raise ValueError(f"--out {folder} is not empty; name another folder, or give --force to "
                         "write into it")
    return {"settings": settings}, "new"


def _difference(key, there, now):
    if key == "data":
        return "the data was another"
    return f"--{key.replace('_', '-')} was {there} there, is {now} now"


def read_record(file: Path) -> dict:
    """What `write_record` wrote, or ValueError."""
    try:
        record = json.loads(file.read_text("utf8"))
        if isinstance(record["settings"], dict):
            return record
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{file} is damaged; delete it to start over")


def write_record(file: Path, record: dict) -> None:
    """A record as JSON, atomically; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic(file) as fresh:
        fresh.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf8")


def finished(folder: Path, record: dict) -> None:
    """Keep the record, and take away what only an unfinished run needs."""
    write_record(folder / DONE, record)
    for name in (CHECKPOINT, RUNNING):          # in this order: a checkpoint has its record
        for file in (folder / name, *folder.glob(f".{name}.*")):     # and what a kill left half
            file.unlink(missing_ok=True)


def steps_done(folder: Path) -> int:
    """How many steps the checkpoint holds; 0 without one, or one that `fine_tune` will refuse."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(folder / CHECKPOINT, "numpy") as file:
            return file.get_slice("losses").get_shape()[0]
    except (SafetensorError, OSError):
        return 0


def how_to_go_on(folder: str, command: str) -> str:
    """What to tell who has pressed Ctrl-C."""
    steps = steps_done(Path(folder))
    there = f"{steps} steps are kept" if steps else "no checkpoint was written yet"
    return f"Stopped; {there}. The same command goes on{'' if steps else ' from the start'}: " \
           f"{command}"


@contextmanager
def whole(path: Path, force: bool):
    """Give a temporary folder beside `path`; when the block ends without an error, it is `path`.

    Raises ValueError if something is there already, unless `force`.
    """
    free(path, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield fresh
        umask = os.umask(0)
        os.umask(umask)
        fresh.chmod(0o777 & ~umask)                 # what is temporary shuts everyone else out
        for file in fresh.iterdir():
            file.chmod(0o666 & ~umask)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        fresh.rename(path)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def free(path: Path, force: bool) -> None:
    """Raise ValueError if `path` holds anything that must not be written over."""
    there = any(path.iterdir()) if path.is_dir() else path.exists()
    if there and not force:
        raise ValueError(f"--out {path} is there already; name another, or give --force to write "
                         "over it")

