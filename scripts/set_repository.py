"""Point every link of the course at a repository on GitHub.

    python scripts/set_repository.py owner/name

The present address is the one in _config.yml; wherever it stands in a file of the course, as
owner/name or as the address of its published book, the new one takes its place.
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

FILES = [
    "_config.yml",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "README.md",
    "pyproject.toml",
    "book/**/*.md",
    "book/**/*.ipynb",
    "assignments/**/*.md",
    "assignments/**/*.ipynb",
]
_OWNER = re.compile(r"[A-Za-z0-9](?:-?[A-Za-z0-9]){0,38}")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")


def check(address: str) -> None:
    """Raise ValueError unless `address` is an owner/name that GitHub would accept."""
    owner, _, name = address.partition("/")
    if not _OWNER.fullmatch(owner):
        raise ValueError(f"{owner!r} is no GitHub login: expected owner/name, got {address!r}")
    if not _NAME.fullmatch(name) or name in (".", "..") or name.endswith(".git"):
        raise ValueError(f"{name!r} is no repository name: expected owner/name, got {address!r}")


def present(root: Path) -> str:
    """The owner/name that _config.yml holds. Raises ValueError when there is none."""
    text = (root / "_config.yml").read_text("utf8")
    match = re.search(r"^\s+url: https://github\.com/([\w.-]+/[\w.-]+)\s*$", text, re.MULTILINE)
    if match is None:
        raise ValueError("_config.yml has no repository.url such as https://github.com/owner/name")
    return match.group(1)


def pages_address(address: str) -> str:
    """Where GitHub Pages publishes a repository: owner.github.io/name."""
    owner, name = address.split("/")
    host = f"{owner}.github.io" if "_" in owner else f"{owner.lower()}.github.io"
    return host if name.lower() == host else f"{host}/{name}"


def rewrite(text: str, old: str, new: str) -> str:
    """`text` with the addresses of the repository `old` replaced by those of `new`."""
    for was, becomes in [(old, new), (pages_address(old), pages_address(new))]:
        whole = rf"(?<![\w.-]){re.escape(was)}(?=\.git\b|(?!\.?[\w-]))"
        text = re.sub(whole, lambda _: becomes, text)
    return text


def set_repository(root: Path, address: str) -> list[Path]:
    """Rewrite the files under `root`; returns those that changed, none when all were right.

    Raises ValueError for an address that GitHub would not accept; then nothing is written.
    """
    check(address)
    old = present(root)
    changed = {}
    for path in sorted({path for pattern in FILES for path in root.glob(pattern)}):
        text = path.read_text("utf8")
        if (new := rewrite(text, old, address)) != text:
            changed[path] = new
    # The file that holds the present address comes last: an interrupted run can be repeated.
    for path in sorted(changed, key=lambda path: path.name == "_config.yml"):
        _write(path, changed[path])
    return sorted(changed)


def _write(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf8", newline="") as file:
            file.write(text)
        os.chmod(temporary, path.stat().st_mode)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repository", help="owner/name on GitHub")
    options = parser.parse_args(arguments)
    try:
        changed = set_repository(ROOT, options.repository)
    except ValueError as error:
        parser.error(str(error))
    for path in changed:
        print(path.relative_to(ROOT))
    print(f"{len(changed)} files changed; every link now points at {options.repository}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
