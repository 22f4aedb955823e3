"""What the stored chapters have in their cells: the data of a figure that moves, printed text."""

import json
import re
from pathlib import Path

import nbformat

BOOK = Path(__file__).parents[2] / "book"


def outputs(chapter: str, cell: str) -> list:
    """The outputs of the cell with this id."""
    notebook = nbformat.read(BOOK / f"{chapter}.ipynb", as_version=4)
    (found,) = (one for one in notebook.cells if one.id == cell)
    return found.outputs


def data(chapter: str, cell: str):
    """The data of the cell's figure that moves."""
    (html,) = (one.data["text/html"] for one in outputs(chapter, cell) if "data" in one)
    (text,) = re.findall(r"^mount\(made, (.*)\);$", html, re.MULTILINE)
    return json.loads(text)


def printed(chapter: str, cell: str) -> str:
    """What the cell has printed."""
    return "".join(one.text for one in outputs(chapter, cell) if one.output_type == "stream")


def table(chapter: str, cell: str) -> list[list[str]]:
    """The rows of the Markdown table that the cell shows, its headings first."""
    (text,) = (one.data["text/markdown"] for one in outputs(chapter, cell) if "data" in one)
    rows = [line.strip("|").split("|") for line in text.splitlines()]
    return [[part.strip() for part in row] for i, row in enumerate(rows) if i != 1]
