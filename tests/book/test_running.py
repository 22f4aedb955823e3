"""Notebooks really run: stored by scripts/notebooks.py, compared by nbval."""

import os
import subprocess
import sys

import nbformat
import pytest

import notebooks

from .sample import runnable

BAR = "from tqdm import tqdm\nfor step in tqdm(range(3)):\n    pass\nprint(step)"


def test_a_run_stores_what_a_reader_needs_and_nothing_else(tmp_path):
    before = runnable("print('a')\nprint('b')", BAR, "1 / 4")
    before.cells[0].metadata["execution"] = {"old": "time"}
    before.cells[1].metadata["tags"] = ["hide-cell"]
    after = notebooks.run(before, tmp_path)
    assert after.metadata == notebooks.METADATA
    assert [dict(cell.metadata) for cell in after.cells] == [{}, {"tags": ["hide-cell"]}, {}]
    assert [cell.execution_count for cell in after.cells] == [1, 2, 3]
    assert [len(cell.outputs) for cell in after.cells] == [1, 1, 1]
    assert after.cells[0].outputs[0].text == "a\nb\n"
    assert after.cells[1].outputs[0].text == "2\n"  # the progress bar is for people
    assert after.cells[2].outputs[0].data["text/plain"] == "0.25"


@pytest.mark.parametrize(
    ("source", "reason"),
    [("1 / 0", "ZeroDivisionError"), ("import warnings; warnings.warn('careful')", "careful")],
)
def test_a_chapter_that_fails_or_warns_is_left_alone(tmp_path, monkeypatch, capsys, source, reason):
    monkeypatch.setattr(notebooks, "BOOK", tmp_path)
    path = tmp_path / "01_idea.ipynb"
    notebooks.write(runnable("print('a')", source), path)
    before = path.read_bytes()
    assert notebooks.main(["01"]) == 1
    assert path.read_bytes() == before
    assert reason in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_an_unknown_chapter_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(notebooks, "BOOK", tmp_path)
    with pytest.raises(SystemExit):
        notebooks.main(["99"])
    assert "no chapter begins with '99'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def nbval(tmp_path_factory):
    """Outcomes of nbval on four notebooks: as stored, and with one thing changed."""
    folder = tmp_path_factory.mktemp("nbval")
    stored = notebooks.run(runnable("x = 0.5", BAR, "print(x)"), folder)
    notebooks.write(stored, folder / "unedited.ipynb")

    stored.cells[2].outputs[0].text = "0.6\n"
    notebooks.write(stored, folder / "edited.ipynb")

    stored.cells[2].metadata["tags"] = ["nbval-ignore-output"]
    notebooks.write(stored, folder / "ignored.ipynb")

    stored.cells[2].outputs[0].text = "0.5\n"
    stored.cells[2].metadata["tags"] = []
    stored.cells[2].source = "import warnings\nwarnings.warn('careful')\nprint(x)"
    notebooks.write(stored, folder / "warning.ipynb")

    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-rA", "-q"]
    command += ["-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, cwd=folder)
    lines = done.stdout.splitlines()
    failed = {line.split("::")[0].removeprefix("FAILED ") for line in lines if "FAILED" in line}
    passed = {line.split("::")[0].removeprefix("PASSED ") for line in lines if "PASSED" in line}
    return passed, failed


def test_nbval_passes_an_unedited_notebook_with_a_progress_bar(nbval):
    passed, failed = nbval
    assert "unedited.ipynb" in passed - failed


def test_nbval_fails_an_edited_output(nbval):
    assert "edited.ipynb" in nbval[1]


def test_nbval_ignores_the_output_of_a_tagged_cell(nbval):
    passed, failed = nbval
    assert "ignored.ipynb" in passed - failed


def test_nbval_fails_a_warning_that_was_not_there(nbval):
    assert "warning.ipynb" in nbval[1]


def test_the_chapters_run_without_progress_bars_or_network():
    assert os.environ["TQDM_DISABLE"] == os.environ["HF_HUB_OFFLINE"] == "1"


def test_stored_files_end_in_a_newline_and_can_be_read(tmp_path):
    notebooks.write(runnable("1"), tmp_path / "a.ipynb")
    assert (tmp_path / "a.ipynb").read_text("utf8").endswith("}\n")
    assert nbformat.read(tmp_path / "a.ipynb", as_version=4).cells[0].source == "1"
