"""A Sphinx extension for the pages in book/api: docstrings as they are, and links from chapters.

A page names what it shows, and where that is explained:

    ### inject

    Explained in [chapter 5](../05_training.ipynb#step-3-inject).

    ```{eval-rst}
    .. autofunction:: lora_lib.torch.inject
    ```

autodoc brings the docstring, which is plain text and not reStructuredText: paragraphs, `code`,
lists whose columns are aligned, formulas. `as_rst` keeps them. `link_back` puts a link to the name
at the end of the section that explains it, so that a chapter need not know of these pages.
"""

import re
from collections import defaultdict
from itertools import groupby
from pathlib import Path
from textwrap import dedent

from docutils import nodes
from sphinx.application import Sphinx

FOLDER = "book/api"
ENTRY = re.compile(r"""
    ^\#\#\#\ (?P<name>\w+)\n+
    Explained\ in\ \[[^]]*\]\(\.\./(?P<page>\w+)\.(?:ipynb|md)\#(?P<section>[\w-]+)\)[^\n]*\n+
    ```\{eval-rst\}\n
    \.\.\ auto\w+::\ (?P<full>[\w.]+)\n
    """, re.MULTILINE | re.VERBOSE)


def entries(folder: Path) -> dict[str, list[re.Match]]:
    """The entries of every page in `folder`, by the page's name."""
    return {path.stem: [*ENTRY.finditer(path.read_text("utf8"))]
            for path in sorted(folder.glob("*.md"))}


def as_rst(docstring: list[str]) -> list[str]:
    """The lines of a docstring as reStructuredText that shows what they show."""
    shown = []
    for kind, group in groupby(docstring, _kind):
        lines = dedent("\n".join(group)).split("\n")
        if kind == "aligned":
            as_it_is = [".. code-block:: text", "", *(f"    {line}" for line in lines)]
            shown += _list(lines) or as_it_is
        elif kind == "text":
            shown.append(_text(" ".join(lines)))
        shown.append("")
    return shown


def _kind(line):
    if not line.strip():
        return "blank"
    return "aligned" if line.startswith(" ") or re.search(r"\S {2,}\S", line) else "text"


def _list(lines):
    """A definition list, if every line is a term, spaces and words, or goes on with the words."""
    items = []
    for line in lines:
        if term := re.fullmatch(r"(\S.*?) {2,}(\S.*)", line):
            items.append([*term.groups()])
        elif line.startswith(" ") and items:
            items[-1].append(line.strip())
        else:
            return None
    return [line for term, *words in items
            for line in (f"``{term}``", f"    {_text(' '.join(words))}")]


def _text(text):
    """Words with `code`, and "strings" as code too, in which no sign means anything else."""
    parts = re.split(r"""`([^`]+)`|("[^"\s]+")""", text)
    spans = [span or string for span, string in zip(parts[1::3], parts[2::3])]
    shown = [rf"\ {_plain(parts[0])}"]
    for span, words in zip(spans, parts[3::3]):
        shown.append(rf"\ ``{span}``\ {_plain(words)}")
    return "".join(shown)


def _plain(words):
    return re.sub(r"([\\*_|`]|:$)", r"\\\1", words)


def process_docstring(app, what, name, obj, options, lines) -> None:
    lines[:] = as_rst(lines)


def link_back(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """At the end of each section that explains names: "Reference:" and links to them."""
    here = defaultdict(list)
    for page, found in app.api_entries.items():
        for entry in found:
            if f"book/{entry['page']}" == docname:
                uri = app.builder.get_relative_uri(docname, f"{FOLDER}/{page}")
                here[entry["section"]].append((entry["name"], f"{uri}#{entry['full']}"))
    sections = {section.get("slug"): section for section in doctree.findall(nodes.section)}
    for slug, names in here.items():
        line = nodes.paragraph("", "Reference: ", classes=["reference-line"])
        for i, (name, uri) in enumerate(names):
            line += nodes.Text(", " if i else "")
            line += nodes.reference("", "", nodes.literal(text=name), internal=True, refuri=uri)
        section = sections[slug]
        inner = section.first_child_matching_class(nodes.section)
        section.insert(len(section) if inner is None else inner, line)


def leave_unlinked(app, env, node, contnode):
    """Types of other libraries are named and not linked: the book is built offline."""
    return contnode if node.get("refdomain") == "py" else None


def setup(app: Sphinx) -> dict:
    app.setup_extension("sphinx.ext.autodoc")
    app.api_entries = entries(Path(app.srcdir) / FOLDER)
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("doctree-resolved", link_back)
    app.connect("missing-reference", leave_unlinked)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
