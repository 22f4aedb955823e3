"""A small chapter with nothing wrong in it, for the tests that plant a fault and look for it."""

import notebooks
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

REPOSITORY = "someone/somewhere"

PROSE = r"""## What it costs

A $4096 \times 4096$ matrix holds 16.8M numbers; an adapter of rank 8 holds 65,536, or 0.4 %.

<!-- given: 4096, 8 -->

The [paper](https://arxiv.org/abs/2106.09685) reports 0.01 % for its largest model.

| layer | share |
|---|---|
| query | 0.391 % |
"""

ALT = "Bars: the frozen matrix holds 256 times as many numbers as the adapter."


def chapter() -> NotebookNode:
    """A clean chapter, its outputs stored, made new at each call."""
    notebook = new_notebook(
        metadata=notebooks.METADATA,
        cells=[
            new_markdown_cell("# 1. The idea\n\nWhy is so little enough?"),
            new_code_cell(
                notebooks.COLAB_CELL.format(repository=REPOSITORY),
                metadata={"tags": ["remove-cell"]},
                execution_count=1,
            ),
            new_markdown_cell(PROSE),
            new_code_cell(
                "full, adapter = 4096 * 4096, 8 * (4096 + 4096)\n"
                'print(f"{full:,} and {adapter:,}: {adapter / full:.5f}")',
                execution_count=2,
                outputs=[stdout("16,777,216 and 65,536: 0.00391\n")],
            ),
            new_code_cell(
                "plot()",
                metadata={"mystnb": {"image": {"alt": ALT}}},
                execution_count=3,
                outputs=[new_output("display_data", data={"image/png": "iVBORw0KGgo="})],
            ),
        ],
    )
    notebook.nbformat_minor = 5
    return notebook


def stdout(text: str) -> NotebookNode:
    """A stored output of print."""
    return new_output("stream", name="stdout", text=text)


def runnable(*sources: str) -> NotebookNode:
    """A notebook of code cells that has not been run."""
    cells = [new_code_cell(source) for source in sources]
    notebook = new_notebook(metadata=notebooks.METADATA, cells=cells)
    notebook.nbformat_minor = 5
    return notebook
