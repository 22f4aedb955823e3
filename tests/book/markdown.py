"""Markdown as the book reads it: CommonMark, tables and dollar math, nothing more."""

from functools import lru_cache

from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.amsmath import amsmath_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin


@lru_cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark").enable("table")
    return parser.use(dollarmath_plugin, double_inline=True).use(amsmath_plugin)


def parse(text: str) -> list[Token]:
    """The block tokens of `text`; the children of an "inline" token are its inline tokens."""
    return _parser().parse(text)


def flat(text: str) -> list[Token]:
    """Every token of `text`, block and inline, in reading order."""
    tokens = []
    for token in parse(text):
        tokens.append(token)
        tokens += token.children or []
    return tokens


def markdown_cells(notebook: dict) -> list[tuple[int, str]]:
    """(index, text) of a notebook's prose: its Markdown cells, and its figures' captions."""
    return [(index, cell["source"] if cell["cell_type"] == "markdown" else figure(cell)["caption"])
            for index, cell in enumerate(notebook["cells"])
            if cell["cell_type"] == "markdown" or figure(cell).get("caption")]


def figure(cell: dict) -> dict[str, str]:
    """The "name" and "caption" of the figure that a cell shows, if it has them."""
    return cell["metadata"].get("mystnb", {}).get("figure", {})
