"""Run the chapters from top to bottom and store their outputs.

    python scripts/notebooks.py            every chapter
    python scripts/notebooks.py 03 05      those two
    python scripts/notebooks.py --check    run nothing, list what is wrong with the stored files
    python scripts/notebooks.py --figures  run nothing, give figures that move today's JavaScript

A chapter is written only after all of its cells ran, and never half.
"""

import argparse
import base64
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import yaml
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from PIL import Image

from lora_lib import moving

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"

CELL_TIMEOUT = 300  # seconds
SLOW_CHAPTER = 60  # seconds
LARGEST_FILE = 2_000_000  # bytes

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
CELL_METADATA = {"tags", "mystnb", "jupyter", "nbgrader"}

COLAB_CELL = """\
import sys
if "google.colab" in sys.modules:  # elsewhere: `make book` has installed everything
    %pip install -q --no-deps git+https://github.com/{repository}"""

ABSOLUTE_PATH = re.compile(
    r"(?<![\w.:/~<)}\]])"
    r"/(?:home|root|Users|usr|opt|var|tmp|mnt|srv|work|workspace|content|private)/\w"
    r"|\b[A-Z]:\\\\?(?:Users|Program)"
)


def chapters(names: list[str] | None = None) -> list[Path]:
    """The chapters' files in order; `names` are beginnings of file names, such as "03".

    Raises ValueError when a name fits no chapter.
    """
    paths = sorted(BOOK.glob("*.ipynb"))
    for name in names or []:
        if not any(path.name.startswith(name) for path in paths):
            known = ", ".join(path.stem for path in paths) or "none"
            raise ValueError(f"no chapter begins with {name!r}; the chapters are: {known}")
    return [p for p in paths if not names or any(p.name.startswith(name) for name in names)]


def repository() -> str:
    """The repository's present address, "owner/name", as _config.yml gives it."""
    url = yaml.safe_load((ROOT / "_config.yml").read_text("utf8"))["repository"]["url"]
    return url.removeprefix("https://github.com/")


def run(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Execute `notebook` in a fresh kernel with `folder` as its working directory.

    Returns a new, normalised notebook. Raises ValueError when a cell fails or writes to stderr:
    stored outputs hold neither errors, warnings nor progress bars.
    """
    done = nbformat.from_dict(notebook)
    client = NotebookClient(
        done,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        coalesce_streams=True,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    try:
        client.execute(stderr=subprocess.DEVNULL)  # the kernel process's own notices
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise ValueError(str(error)) from None
    for index, cell in enumerate(done.cells):
        if text := _stderr(cell):
            raise ValueError(
                f"cell {index} wrote to stderr, which the book does not show: {text[-300:]!r}\n"
                "Remove the cause of a warning; a progress bar obeys TQDM_DISABLE=1 when tqdm is "
                "called without `disable`."
            )
    normalise(done)
    return done


def normalise(notebook: NotebookNode) -> None:
    """Leave only what a reader needs: no timings, editor state, Python version or old counts, and
    pictures of as few bytes as they need."""
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    count = 0
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict(
            {key: value for key, value in cell.metadata.items() if key in CELL_METADATA}
        )
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = count
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = _of_few_colours(output.data["image/png"])


def _of_few_colours(encoded: str) -> str:
    """A PNG (base64) with a palette of 256 colours, a quarter of the bytes of a plot; one that has
    a palette stays as it is."""
    picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
    if picture.mode == "P":
        return encoded
    out = io.BytesIO()
    few = picture.convert("RGBA").quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def renew(notebook: NotebookNode) -> None:
    """Give the stored figures that move the JavaScript and the style of `lora_lib.moving` as they
    are now; their data stay."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            html = output.get("data", {}).get("text/html", "")
            if 'class="moving"' in html:
                output.data["text/html"] = moving.renewed(html)


def write(notebook: NotebookNode, path: Path) -> None:
    """Write `notebook` to `path` in one step: a reader sees the old file or the new one."""
    text = nbformat.writes(notebook, version=nbformat.NO_CONVERT).rstrip("\n") + "\n"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf8") as file:
            file.write(text)
        os.chmod(temporary, path.stat().st_mode if path.exists() else 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def faults(notebook: NotebookNode, repository: str) -> list[str]:
    """What is wrong with the stored form of a chapter: one sentence each, none when it is clean."""
    found = []
    if (notebook.nbformat, notebook.nbformat_minor) != (4, 5):
        found.append(f"the format is {notebook.nbformat}.{notebook.nbformat_minor}, expected 4.5")
    if notebook.metadata != METADATA:
        found.append("the notebook's metadata is not the normal one")
    ids = [cell.get("id") for cell in notebook.cells]
    if len(set(ids)) != len(ids):
        found.append("two cells share an id")

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code]
    if counts != list(range(1, len(code) + 1)):
        found.append(f"the cells were not run once from top to bottom: their counts are {counts}")
    first = code[0] if code else None
    if first is None or first.source != COLAB_CELL.format(repository=repository):
        found.append("the first code cell is not the Colab cell of CONTRIBUTING.md")
    elif "remove-cell" not in first.metadata.get("tags", []):
        found.append("the Colab cell lacks the tag remove-cell")

    for index, cell in enumerate(notebook.cells):
        found += [f"cell {index}: {fault}" for fault in _cell_faults(cell)]
    return found


def _cell_faults(cell: NotebookNode) -> list[str]:
    found = []
    if not cell.source.strip():
        found.append("is empty")
    if extra := set(cell.metadata) - CELL_METADATA:
        found.append(f"has metadata that an editor left: {', '.join(sorted(extra))}")
    if match := ABSOLUTE_PATH.search(cell.source):
        found.append(f"names a path of one machine: {match.group()}")
    if cell.cell_type != "code":
        return found
    if _stderr(cell):
        found.append("has stderr among its outputs")
    for output in cell.outputs:
        meant = "raises-exception" in cell.metadata.get("tags", [])
        if output.output_type == "error" and not meant:
            found.append(f"failed: {output.ename}: {output.evalue}")
        texts = [output.get("text", "")]
        texts += [t for mime, t in output.get("data", {}).items() if mime.startswith("text/")]
        if match := ABSOLUTE_PATH.search("\n".join(texts)):
            found.append(f"prints a path of one machine: {match.group()}")
    return found


def _stderr(cell: NotebookNode) -> str:
    outputs = cell.get("outputs", [])
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stderr")


def file_faults(path: Path, repository: str) -> list[str]:
    """`faults` of the chapter stored at `path`, and whether the file is too large."""
    found = faults(nbformat.read(path, as_version=nbformat.NO_CONVERT), repository)
    if (size := path.stat().st_size) > LARGEST_FILE:
        found.append(f"the file has {size:,} bytes; the limit is {LARGEST_FILE:,}")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapter", nargs="*", help="the beginning of a file name, such as 03")
    parser.add_argument("--check", action="store_true", help="run nothing, list faults")
    parser.add_argument("--figures", action="store_true", help="run nothing, renew figures' code")
    options = parser.parse_args(arguments)
    try:
        paths = chapters(options.chapter)
    except ValueError as error:
        parser.error(str(error))

    failed = 0
    for path in paths:
        if options.check:
            found = file_faults(path, repository())
            print("\n".join(f"{path.name}: {fault}" for fault in found) or f"{path.name}: clean")
            failed += bool(found)
            continue
        if options.figures:
            notebook = nbformat.read(path, as_version=4)
            renew(notebook)
            write(notebook, path)
            continue
        start = time.perf_counter()
        try:
            notebook = run(nbformat.read(path, as_version=4), path.parent)
        except ValueError as error:
            print(f"{path.name}: not written.\n{error}", file=sys.stderr, flush=True)
            failed += 1
            continue
        seconds = time.perf_counter() - start
        write(notebook, path)
        slow = f"  SLOW: a chapter has {SLOW_CHAPTER} s" if seconds > SLOW_CHAPTER else ""
        print(f"{path.name:32}{seconds:6.1f} s{slow}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
