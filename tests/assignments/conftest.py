"""A small course to grade, and the means to hand things in."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parents[2]
ASSIGNMENTS = ROOT / "assignments"
MADE = ["submitted", "autograded", "feedback", "gradebook.db", "marks.csv", "graded.json"]


def cell(name, source, **kind):
    meta = {"grade": False, "solution": False, "locked": False, "task": False, "schema_version": 3}
    new = new_code_cell(source, metadata={"nbgrader": {**meta, "grade_id": name, **kind}})
    new.id = name
    return new


def tiny():
    """A source notebook with two exercises: 1 + 2 points, and 3."""
    numbers = cell("numbers", "import numpy as np\nfrom lora_lib.exercises import call, same, Wrong\n\n"
                              "size = 3", locked=True)
    numbers.metadata["variant"] = {"size": [2, 3, 4]}
    test = {"grade": True, "locked": True}
    notebook = new_notebook(cells=[
        new_markdown_cell("# Tiny"),
        numbers,
        cell("solution-1", 'def double(x):\n    """Twice x."""\n    ### BEGIN SOLUTION\n'
                           "    return 2 * x\n    ### END SOLUTION", solution=True),
        cell("test-1", "same(call(double, np.ones(size)), 2 * np.ones(size))", points=1, **test),
        cell("hidden-1", "# Hidden tests: random x.\n### BEGIN HIDDEN TESTS\n"
                         "x = np.random.default_rng(5).normal(size=(size, 2))\n"
                         "same(call(double, x), 2 * x)\n### END HIDDEN TESTS", points=2, **test),
        cell("solution-2", "### BEGIN SOLUTION\ncount = size * 7\n### END SOLUTION", solution=True),
        cell("test-2", "if count != size * 7:\n    raise Wrong(f'count is {count}')", points=3, **test),
    ])
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python",
                                        "name": "python3"}, "language_info": {"name": "python"}}
    return notebook


def copy_course(folder, *, with_source):
    """The course's folder somewhere else, without what grading has left in it."""
    without = [*MADE, "__pycache__", *([] if with_source else ["source", "release"])]
    shutil.copytree(ASSIGNMENTS, folder, ignore=shutil.ignore_patterns(*without))
    return folder


@pytest.fixture
def course(tmp_path):
    """A course with one assignment, 01_tiny."""
    folder = copy_course(tmp_path / "course", with_source=False)
    path = folder / "source" / "01_tiny" / "01_tiny.ipynb"
    path.parent.mkdir(parents=True)
    nbformat.write(tiny(), path)
    return folder


def hand_in(path, notebook, changes=()):
    """Write `notebook` to `path` with the sources of the named cells changed."""
    notebook, changes = nbformat.from_dict(notebook), dict(changes)
    for one in notebook.cells:
        one.source = changes.pop(one.metadata.get("nbgrader", {}).get("grade_id"), one.source)
    assert not changes, f"no such cells: {list(changes)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


def run(course, script, *arguments, **environment):
    """Run one of the course's scripts; what it printed."""
    return subprocess.run([sys.executable, str(course / script), *map(str, arguments)],
                          capture_output=True, text=True, env=os.environ | environment)


def marks(course):
    """{(learner, assignment): the row of marks.csv}"""
    with open(course / "marks.csv", newline="") as file:
        return {(row["learner"], row["assignment"]): row for row in csv.DictReader(file)}
