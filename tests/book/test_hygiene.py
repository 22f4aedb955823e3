"""The check of a chapter's stored form sees each planted fault."""

import base64
import io

import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_output
from PIL import Image

import notebooks

from .sample import REPOSITORY, chapter, stdout


def test_a_clean_chapter_passes():
    assert notebooks.faults(chapter(), REPOSITORY) == []


def never_run(notebook):
    notebook.cells[3].execution_count = None


def run_twice(notebook):
    notebook.cells[3].execution_count = 7


def no_colab_cell(notebook):
    notebook.cells[1].source = "import sys"


def another_repository(notebook):
    notebook.cells[1].source = notebooks.COLAB_CELL.format(repository="other/other")


def colab_cell_in_the_book(notebook):
    notebook.cells[1].metadata = {}


def warning(notebook):
    notebook.cells[3].outputs.append(new_output("stream", name="stderr", text="Warning: x"))


def failure(notebook):
    notebook.cells[3].outputs.append(new_output("error", ename="ValueError", evalue="x"))


def printed_path(notebook):
    notebook.cells[3].outputs.append(stdout("saved to /home/someone/adapter"))


def displayed_path(notebook):
    output = new_output("execute_result", data={"text/plain": "PosixPath('/var/data/x')"})
    notebook.cells[3].outputs.append(output)


def path_in_source(notebook):
    notebook.cells[3].source += "\nopen('/root/x')"


def editor_metadata(notebook):
    notebook.cells[3].metadata["execution"] = {"iopub.execute_input": "2026-01-01"}


def python_version(notebook):
    notebook.metadata["language_info"] = {"name": "python", "version": "3.11.7"}


def empty_cell(notebook):
    notebook.cells.append(new_code_cell("", execution_count=4))


def same_id(notebook):
    notebook.cells[3]["id"] = notebook.cells[4]["id"]


def old_format(notebook):
    notebook.nbformat_minor = 4


@pytest.mark.parametrize(
    "plant",
    [
        never_run,
        run_twice,
        no_colab_cell,
        another_repository,
        colab_cell_in_the_book,
        warning,
        failure,
        printed_path,
        displayed_path,
        path_in_source,
        editor_metadata,
        python_version,
        empty_cell,
        same_id,
        old_format,
    ],
)
def test_a_planted_fault_is_caught(plant):
    notebook = chapter()
    plant(notebook)
    assert len(notebooks.faults(notebook, REPOSITORY)) == 1


def test_an_expected_failure_passes():
    notebook = chapter()
    failure(notebook)
    notebook.cells[3].metadata["tags"] = ["raises-exception"]
    assert notebooks.faults(notebook, REPOSITORY) == []


def test_a_large_file_is_caught(tmp_path):
    notebook = chapter()
    notebooks.write(notebook, tmp_path / "01_idea.ipynb")
    assert notebooks.file_faults(tmp_path / "01_idea.ipynb", REPOSITORY) == []
    notebook.cells[4].outputs[0].data["image/png"] = "A" * notebooks.LARGEST_FILE
    notebooks.write(notebook, tmp_path / "01_idea.ipynb")
    assert len(notebooks.file_faults(tmp_path / "01_idea.ipynb", REPOSITORY)) == 1


def test_fractions_and_addresses_are_no_paths():
    for text in ("d/r/k", "https://example.org/home/x", "</td></tr>", "bytes/step", "~/work/x"):
        assert notebooks.ABSOLUTE_PATH.search(text) is None


def test_a_picture_is_stored_with_a_palette_and_looks_the_same():
    x = np.linspace(0, 1, 300)
    pixels = np.stack([x[:, None] * x, np.outer(x, 1 - x), np.outer(1 - x, x), np.ones((300, 300))], 2)
    plain = Image.fromarray((255 * pixels).astype(np.uint8), "RGBA")
    file = io.BytesIO()
    plain.save(file, "PNG")
    notebook = chapter()
    notebook.cells[4].outputs[0].data["image/png"] = base64.b64encode(file.getvalue()).decode()
    notebooks.normalise(notebook)
    stored = notebook.cells[4].outputs[0].data["image/png"]
    small = Image.open(io.BytesIO(base64.b64decode(stored)))
    assert small.mode == "P" and len(stored) < len(file.getvalue())
    apart = np.asarray(small.convert("RGBA")).astype(int) - np.asarray(plain)
    assert 0 < np.abs(apart).max() < 40
    notebooks.normalise(notebook)
    assert notebook.cells[4].outputs[0].data["image/png"] == stored
