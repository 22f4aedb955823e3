"""The pages of the library: every public name, links both ways, examples that run."""

import doctest
import importlib
import inspect
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from docutils.core import publish_doctree

import api_pages
import check_wheel
import notebooks
from api_pages import as_rst

from .book import pages

FOLDER = notebooks.BOOK / "api"
PAGES = sorted(FOLDER.glob("*.md"))
ENTRIES = api_pages.entries(FOLDER)
ALL = [entry for entries in ENTRIES.values() for entry in entries]
BLOCK = re.compile(r"^```pycon\n(.*?)^```", re.MULTILINE | re.DOTALL)

each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)


def named(full):
    module, _, name = full.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("room", ["numpy", "torch"])
def test_every_public_name_has_an_entry(room):
    module = f"lora_lib.{room}"
    shown = [entry["name"] for entry in ALL if entry["full"].rpartition(".")[0] == module]
    assert sorted(shown) == sorted(importlib.import_module(module).__all__)


def test_an_entry_is_a_heading_and_its_docstring():
    for path in PAGES:
        text = path.read_text("utf8")
        headings = re.findall(r"^### (.*)$", text, re.MULTILINE)
        assert headings == [entry["name"] for entry in ENTRIES[path.stem]]
        assert len(headings) == text.count("```{eval-rst}")
    for entry in ALL:
        assert entry["full"].endswith(f".{entry['name']}") and named(entry["full"]).__doc__


@pytest.mark.parametrize("path", [*PAGES, notebooks.BOOK / "api.md"], ids=lambda path: path.stem)
def test_every_link_leads_somewhere(path):
    assert pages.link_faults(path) == []


def test_a_missing_entry_is_seen(tmp_path):
    text = (FOLDER / "torch.md").read_text("utf8")
    for broken in (text.replace("Explained in [chapter 11]", "See [chapter 11]"),
                   text.replace("### Adapters", "## Adapters"),
                   text.replace(".. autoclass:: lora_lib.torch.Adapters", "")):
        (tmp_path / "torch.md").write_text(broken, "utf8")
        names = [entry["name"] for entry in api_pages.entries(tmp_path)["torch"]]
        assert names == [e["name"] for e in ENTRIES["torch"] if e["name"] != "Adapters"]


@each_page
def test_the_examples_run(path, tmp_path, monkeypatch, one_thread):
    blocks = BLOCK.findall(path.read_text("utf8"))
    assert blocks, "there is no example"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    example = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, path.name, None, 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    failures = []
    runner.run(example, out=failures.append)
    assert not failures, "".join(failures)


# --- docstrings -----------------------------------------------------------------------------------

def shown(docstring):
    """The text of a docstring's rendering; docutils raises for whatever it does not like."""
    rst = "\n".join(as_rst(docstring.split("\n")))
    return publish_doctree(rst, settings_overrides={"report_level": 1, "halt_level": 1}).astext()


def characters(text):
    return re.sub(r"[\s`]+", "", text)


def docstrings():
    for entry in ALL:
        found = named(entry["full"])
        yield entry["full"], found
        if isinstance(found, type):
            for name, member in vars(found).items():
                if not name.startswith("_") and (callable(member) or isinstance(member, property)) \
                        and inspect.getdoc(member):
                    yield f"{entry['full']}.{name}", member


def test_a_docstring_loses_nothing():
    found = list(docstrings())
    assert len(found) > len(ALL)                     # the methods too
    for name, what in found:
        text = inspect.getdoc(what)
        assert characters(shown(text)) == characters(text), name


@pytest.mark.parametrize("text", [
    "W * x, **options, _private_, |x|, a_, `code`s and s`code`, \\d, [1]_, ends with a colon:",
    "- no list\n1. nor this",
    "Words:\n    A (r, k)  projects down, and\n              goes on\n    B (d, r)  up\n\nMore.",
    "A formula:\n    y = W x  +  b\n      not a list\nMore.",
    'stage  "serve" is a string\nother  is `code`',
])
def test_plain_text_means_itself(text):
    assert characters(shown(text)) == characters(text)


def test_columns_become_a_list():
    rst = as_rst(["Words:", "    A (r, k)  projects", "              down", "    B         `up`"])
    kinds = [node.tagname for node in publish_doctree("\n".join(rst)).findall()]
    assert kinds.count("definition_list_item") == 2 and kinds.count("literal") == 3
    assert "literal_block" not in kinds
    kinds = [node.tagname for node in publish_doctree("\n".join(as_rst(["  a = b"]))).findall()]
    assert "literal_block" in kinds


# --- the built book -------------------------------------------------------------------------------

def test_the_built_pages_are_linked_both_ways():
    html = notebooks.ROOT / "_build" / "html" / "book"
    if not (html / "api").is_dir():
        pytest.skip("the book is not built: make book")
    for page, entries in ENTRIES.items():
        text = (html / "api" / f"{page}.html").read_text("utf8")
        for entry in entries:
            assert f'id="{entry["full"]}"' in text
            chapter = (html / f"{entry['page']}.html").read_text("utf8")
            assert f'href="api/{page}.html#{entry["full"]}"' in chapter


# --- the package ----------------------------------------------------------------------------------

def test_importing_the_package_imports_nothing_else():
    code = """
import sys
before = set(sys.modules)
import lora_lib
print(*set(sys.modules) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["lora_lib"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy, since building leaves folders behind."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(notebooks.ROOT / name, source)
    shutil.copytree(notebooks.ROOT / "lora_lib", source / "lora_lib",
                    ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps",
                    "--no-build-isolation", "--no-index", "--wheel-dir", source, source],
                   check=True)
    (path,) = source.glob("*.whl")
    return path


def test_the_wheel_holds_every_file_of_the_package(wheel):
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("lora_lib/")}
    package = notebooks.ROOT / "lora_lib"
    tracked = subprocess.run(["git", "ls-files", "lora_lib"], cwd=notebooks.ROOT, text=True,
                             capture_output=True).stdout.split()
    assert {"lora_lib/py.typed", "lora_lib/weights/tales.safetensors"} <= inside
    assert {name for name in tracked if (notebooks.ROOT / name).exists()} <= inside
    assert all((package.parent / name).exists() for name in inside)


@pytest.mark.parametrize("part", check_wheel.PARTS)
def test_what_a_release_is_asked_runs(part, wheel, tmp_path):
    """On the wheel's files, in this environment; that it is enough alone, the workflow sees."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    check_wheel.ask(sys.executable, part, tmp_path)
