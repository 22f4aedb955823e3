"""Run the chapters, and the solved assignments, with other versions of the packages.

Colab's, for one:

    python scripts/environment.py colab              make .environments/colab, run every chapter
    python scripts/environment.py oldest 01 04       the oldest versions allowed, two chapters
    python scripts/environment.py colab --python python3.13

environments/NAME.txt has the versions. The library is installed as a chapter's first cell does it
in Colab, without its dependencies; that must be quick and change none of the packages. Outputs are
not compared, since other versions print other last digits: every cell must run, with its asserts.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import notebooks

ROOT = notebooks.ROOT
PIP = re.compile(r"%pip (install -q --no-deps [^\"\\+]+)(?=\\n|\")")   # not lora_lib's own line
RUN = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=600, kernel_name="python3",
               resources={"metadata": {"path": sys.argv[2]}}).execute()
"""


def make(name: str, python: str) -> Path:
    """The Python of the environment `name`, made on first use."""
    folder = ROOT / ".environments" / name
    inside, ready = folder / "bin" / "python", folder / "ready"
    versions = ROOT / "environments" / f"{name}.txt"
    if not ready.exists() or ready.read_text() != versions.read_text():
        subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([inside, "-m", "pip", "install", "--quiet", "-r", str(versions)], check=True)
        ready.write_text(versions.read_text())
    return inside


def install(inside: Path) -> float:
    """Install lora_lib as in Colab; the seconds. Raises RuntimeError if a package has changed."""
    before = packages(inside)
    extra = {line for chapter in notebooks.chapters() for line in PIP.findall(chapter.read_text())}
    start = time.perf_counter()
    # build isolation fetches setuptools, as in Colab
    subprocess.run([inside, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall",
                    str(ROOT)], check=True)
    seconds = time.perf_counter() - start
    for line in sorted(extra):                       # what a chapter needs beside it
        subprocess.run([inside, "-m", "pip", *line.split()], check=True)
    changed = before - packages(inside) - {line for line in before if line.startswith("lora")}
    if changed:
        raise RuntimeError(f"installing lora_lib changed {sorted(changed)}")
    return seconds


def packages(inside: Path) -> set[str]:
    """What is installed, one line for each."""
    done = subprocess.run([inside, "-m", "pip", "list", "--format=freeze"], check=True,
                          capture_output=True, text=True)
    return set(done.stdout.split())


def run(inside: Path, chapter: Path) -> tuple[float, str]:
    """Run a chapter; the seconds, and what went wrong or an empty string."""
    start = time.perf_counter()
    done = subprocess.run([inside, "-c", RUN, str(chapter), str(chapter.parent)],
                          capture_output=True, text=True, cwd=ROOT / ".environments")
    return time.perf_counter() - start, done.stderr if done.returncode else ""


def main(arguments: list[str] | None = None) -> int:
    names = sorted(path.stem for path in (ROOT / "environments").glob("*.txt"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=names)
    parser.add_argument("chapter", nargs="*", help="the beginning of a file name, such as 03")
    parser.add_argument("--python", default=sys.executable, help="which Python to use")
    options = parser.parse_args(arguments)
    try:
        chapters = notebooks.chapters(options.chapter)
    except ValueError as error:
        parser.error(str(error))
    solved = sorted(ROOT.glob("assignments/source/*/*.ipynb"))
    chapters += [path for path in solved if path.name.startswith(tuple(options.chapter) or "")]
    inside = make(options.name, options.python)
    print(f"lora_lib installed in {install(inside):.1f} s; no other package has changed",
          flush=True)
    failed = 0
    for chapter in chapters:
        seconds, error = run(inside, chapter)
        failed += bool(error)
        how = "FAILED" if error else "ran"
        print(f"{str(chapter.relative_to(ROOT)):46}{seconds:6.1f} s  {how}", flush=True)
        if error:
            print(error[-3000:], file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
