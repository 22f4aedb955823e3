"""Every usual way of handing in is found, and what a learner may not change is put back."""

import nbformat
import pytest

from grading.collect import find, rebuild
from tests.assignments.conftest import tiny

NAMES = ["01_idea", "02_math", "02_math_7"]


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


@pytest.mark.parametrize("name, learner, assignment", [
    ("alice/02_math/02_math.ipynb", "alice", "02_math"),                     # nbgrader
    ("alice/02_math.ipynb", "alice", "02_math"),
    ("alice_02_math.ipynb", "alice", "02_math"),                             # one flat folder
    ("02_math-alice.ipynb", "alice", "02_math"),
    ("Ann Lee/Copy of 02_math.ipynb", "Ann_Lee", "02_math"),                 # Colab
    ("a@x.org/02_math (2).ipynb", "a@x.org", "02_math"),
    ("lora-alice/assignments/release/01_idea/01_idea.ipynb", "lora-alice", "01_idea"),   # a clone
    ("alice/02_math_7.ipynb", "alice", "02_math_7"),                         # a variant
    ("alice/02_math/notebook.ipynb", "alice", "02_math"),
])
def test_whose_and_which(tmp_path, name, learner, assignment):
    put(tmp_path, name)
    (one,), left_out = find(tmp_path, NAMES)
    assert (one.learner, one.assignment, left_out) == (learner, assignment, [])


def test_solutions_and_checkpoints_in_a_clone_are_no_submissions(tmp_path):
    put(tmp_path, "al/source/01_idea/01_idea.ipynb", "al/.ipynb_checkpoints/01_idea.ipynb",
        "al/release/01_idea/01_idea.ipynb")
    (one,), _ = find(tmp_path, NAMES)
    assert "release" in one.path.parts


def test_the_newest_counts_and_it_is_said(tmp_path):
    import os
    put(tmp_path, "al/01_idea.ipynb", "al/01_idea (1).ipynb")
    os.utime(tmp_path / "al/01_idea.ipynb", (1, 1))
    (one,), _ = find(tmp_path, NAMES)
    assert one.path.name == "01_idea (1).ipynb" and "newest" in one.remarks[0]


def test_what_fits_nothing_is_named(tmp_path):
    put(tmp_path, "al/01_idea.ipynb", "al/other.ipynb", "01_idea.ipynb")
    (tmp_path / "al/02_math.ipynb").symlink_to(tmp_path / "al/01_idea.ipynb")
    found, left_out = find(tmp_path, NAMES)
    assert len(found) == 1
    assert [any(word in line for line in left_out)
            for word in ("other.ipynb", "no learner's name", "regular file")] == [True] * 3


def test_nothing_to_grade_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no submission found"):
        find(tmp_path, NAMES)
    with pytest.raises(ValueError, match="not a folder"):
        find(tmp_path / "nowhere", NAMES)


def submitted(tmp_path, change):
    notebook = tiny()
    change(notebook.cells)
    nbformat.write(notebook, tmp_path / "x.ipynb")
    return rebuild(tiny(), tmp_path / "x.ipynb")


def sources(notebook):
    return {c.metadata.get("nbgrader", {}).get("grade_id", c.id): c.source for c in notebook.cells}


def test_the_learners_answers_are_taken_and_locked_cells_put_back(tmp_path):
    def change(cells):
        cells[2].source, cells[3].source = "def double(x): return x", "pass"
        cells[3].metadata.nbgrader.points = 100
        cells[4].metadata.nbgrader.update(grade=False, locked=False)

    notebook, remarks = submitted(tmp_path, change)
    assert sources(notebook)["solution-1"] == "def double(x): return x"
    assert [c.metadata for c in notebook.cells] == [c.metadata for c in tiny().cells]
    assert sources(notebook)["test-1"] == tiny().cells[3].source
    assert remarks == ["the cell test-1 was changed; the original was used"]


def test_cells_that_are_gone_come_back_in_their_place(tmp_path):
    notebook, remarks = submitted(tmp_path, lambda cells: cells.__delitem__(slice(3, 5)))
    assert list(sources(notebook)) == list(sources(submitted(tmp_path, lambda cells: None)[0]))
    assert remarks == ["cells that the notebook lacks: test-1, hidden-1"]


def test_extra_cells_keep_their_place_without_their_metadata(tmp_path):
    def change(cells):
        extra = nbformat.v4.new_code_cell("helper = 1", metadata={"nbgrader": {
            "grade": True, "grade_id": "mine", "points": 50, "solution": False, "locked": True,
            "schema_version": 3, "task": False}})
        cells.insert(2, extra)
        cells.append(nbformat.from_dict(cells[3]))             # test-1 a second time
        cells[-1].id, cells[-1].source = "again", "print('again')"

    notebook, _ = submitted(tmp_path, change)
    assert notebook.cells[2].source == "helper = 1" and "nbgrader" not in notebook.cells[2].metadata
    assert notebook.cells[-1].source == "print('again')"
    points = [c.metadata.nbgrader.get("points", 0) for c in notebook.cells if c.metadata]
    assert sum(points) == 6


@pytest.mark.parametrize("text", ["", "{}", "[]", "not json", '{"cells": 3, "nbformat": 4}',
                                  "[" * 10**5, "\x00"])
def test_what_is_no_notebook_is_a_value_error(tmp_path, text):
    (tmp_path / "x.ipynb").write_text(text)
    with pytest.raises(ValueError, match="not a notebook"):
        rebuild(tiny(), tmp_path / "x.ipynb")


def test_a_huge_file_is_not_read(tmp_path):
    with open(tmp_path / "x.ipynb", "wb") as file:
        file.truncate(2**30)
    with pytest.raises(ValueError, match="limit"):
        rebuild(tiny(), tmp_path / "x.ipynb")
