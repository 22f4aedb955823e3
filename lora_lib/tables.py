"""Tables of the chapters: rows shown as a Markdown table, which every front end sets as one."""

import re
from collections.abc import Iterable, Sequence

NUMBER = re.compile(r"[-+−±<>~]?\s?[\d.,]+(e[-+]?\d+)?\s?(%|x|[kMG]?B|ms|s)?")


def show(rows: Iterable[Sequence], *headings: str) -> None:
    """Display rows of cells under their headings. A cell is text, or what `str` makes of it.

    Raises ValueError for a row that has not one cell for each heading.
    """
    from IPython.display import Markdown, display
    display(Markdown(markdown(rows, *headings)))


def markdown(rows: Iterable[Sequence], *headings: str) -> str:
    """What `show` displays. A column of numbers stands on the right, all else on the left."""
    cells = [[str(cell).strip() for cell in row] for row in rows]
    for row in cells:
        if len(row) != len(headings):
            raise ValueError(f"a row needs {len(headings)} cells, for {headings}, got {row}")
    right = [all(NUMBER.fullmatch(cell) or cell in ("", "–") for cell in column)
             for column in zip(*cells)]
    lines = [headings, ["--:" if side else ":--" for side in right] or ["---"] * len(headings),
             *([cell.replace("|", "\\|") for cell in row] for row in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
