"""Grading a folder: honest marks whatever is handed in, and nothing lost on the way."""

import hashlib
import json
import time
from pathlib import Path

import nbformat
import pytest

from grading.sandbox import problem
from tests.assignments.conftest import ROOT, hand_in, marks, run, tiny

pytestmark = pytest.mark.skipif(problem() is not None, reason=f"no isolation here: {problem()}")

RIGHT = "def double(x):\n    return 2 * x"
FORGE = """
import builtins, sys, numpy as np, lora_lib.exercises as e, lora_lib.exercises.feedback as f
for module in (e, f):
    module.same = module.call = module.check = lambda *a, **k: None
np.allclose = np.array_equal = lambda *a, **k: True
builtins.AssertionError = builtins.print = lambda *a, **k: 1
class Always:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __sub__(self, other): return 0
get_ipython().run_cell = lambda *a, **k: None
get_ipython().input_transformers_cleanup.append(lambda lines: ["pass\\n"])
sys.settrace(lambda *a: None)
count = Always()
def double(x):
    frame = sys._getframe()
    while frame:
        for name in ("code", "answers", "cell", "notebook"):
            frame.f_locals.pop(name, None) if hasattr(frame.f_locals, "pop") else None
        frame = frame.f_back
    return Always()
"""
DELETE = f"""
import os, shutil, pathlib
def double(x):
    return 2 * x
for path in ("..", "/etc", "/tmp", os.path.expanduser("~"), {str(ROOT)!r} + "/lora_lib"):
    shutil.rmtree(path, ignore_errors=True)
for root, folders, files in os.walk({str(ROOT)!r} + "/lora_lib"):
    for name in files:
        try: pathlib.Path(root, name).write_text("gone")
        except OSError: pass
"""
# what is changed in a right submission, and the points that are left of 6
HOSTILE = {
    "endless loop in a cell": ({"solution-1": "while True: pass"}, 3),
    "endless loop in a call": ({"solution-1": "def double(x):\n    while True: pass"}, 3),
    "a loop that cannot be interrupted": ({"solution-1": (
        "def double(x):\n    while True:\n        try:\n            while True: pass\n"
        "        except BaseException: pass")}, 3),
    "100 GB": ({"solution-1": "x = bytearray(100 * 2**30)\n" + RIGHT}, 3),
    "100 GB in a call": ({"solution-1": "def double(x):\n    return [bytearray(2**30) for _ in range(100)]"}, 3),
    "a huge answer": ({"solution-1": "import numpy as np\ndef double(x):\n    return np.zeros(2**28)"}, 3),
    "deletes files": ({"solution-1": DELETE}, 6),
    "edits its tests": ({"solution-1": "pass", "test-1": "pass", "hidden-1": "pass",
                         "solution-2": "count = 0", "test-2": "count == 0"}, 0),
    "forges its tests": ({"solution-1": FORGE, "solution-2": ""}, 0),
    "leaves": ({"solution-1": "import os\nos._exit(0)"}, 3),
    "leaves in a call": ({"solution-1": "import os\ndef double(x): os._exit(0)"}, 3),
    "exits": ({"solution-1": "import sys\nsys.exit()"}, 3),
    "crashes the interpreter": ({"solution-1": "import ctypes\nctypes.string_at(0)"}, 3),
    "replaces what it is given": ({"solution-1": "def double(x):\n    x[...] = 0\n    return x"}, 3),
    "redefines the locked names": ({"solution-1": "size = 0\ndef same(*a): pass\ndef call(*a): pass",
                                    "solution-2": "count = size * 7"}, 0),
    "prints without end": ({"solution-1": "while True: print('x' * 1000)"}, 3),
}


def slug(title):
    return title.replace(" ", "_")


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """Everything in HOSTILE, a right and an empty submission, and files that are none."""
    from tests.assignments import conftest

    folder = tmp_path_factory.mktemp("hostile")
    course = conftest.copy_course(folder / "course", with_source=False)
    source = course / "source" / "01_tiny" / "01_tiny.ipynb"
    source.parent.mkdir(parents=True)
    nbformat.write(tiny(), source)
    with open(course / "nbgrader_config.py", "a") as config:
        config.write("c.IsolatedExecute.seconds = 8\n")   # a busy machine deletes slowly
    right = {"solution-1": RIGHT, "solution-2": "count = 21"}
    hand_in(folder / "in" / "right" / "01_tiny.ipynb", tiny(), right)
    for title, (changes, _) in HOSTILE.items():
        hand_in(folder / "in" / slug(title) / "01_tiny.ipynb", tiny(), right | changes)
    (folder / "in" / "broken").mkdir()
    (folder / "in" / "broken" / "01_tiny.ipynb").write_text("not a notebook")
    before = digest(ROOT / "lora_lib"), digest(course / "source")
    start = time.monotonic()
    done = run(course, "grade.py", folder / "in")
    assert done.returncode == 0, done.stderr
    return course, folder / "in", done, time.monotonic() - start, before


def digest(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts}


@pytest.mark.parametrize("title", HOSTILE)
def test_the_mark_is_honest(graded, title):
    row = marks(graded[0])[slug(title), "01_tiny"]
    assert float(row["points"]) == HOSTILE[title][1], row


def test_the_right_one_has_all_and_the_broken_one_none(graded):
    assert marks(graded[0])["right", "01_tiny"]["points"] == "6"
    broken = marks(graded[0])["broken", "01_tiny"]
    assert broken["points"] == "0" and "not a notebook" in broken["remarks"]


def test_it_ends_in_time_and_says_how_it_went(graded):
    course, _, done, seconds, _ = graded
    assert len(marks(course)) == len(HOSTILE) + 2
    assert f"{len(HOSTILE) + 2} submissions" in done.stderr and "1 could not be graded" in done.stderr


def test_nothing_outside_has_changed(graded):
    course, *_, before = graded
    assert (digest(ROOT / "lora_lib"), digest(course / "source")) == before


@pytest.mark.parametrize("title, says", [
    ("endless loop in a cell", "no answer after 8 s (an endless loop?)"),
    ("endless loop in a call", "no answer after 8 s (an endless loop?)"),
    ("100 GB", "MemoryError"), ("leaves", "the process ended itself"),
    ("exits", "double is not defined"), ("edits its tests", "the cell test-1 was changed"),
    ("a huge answer", "answer"),
])
def test_the_report_is_clear(graded, title, says):
    course = graded[0]
    page = (course / "feedback" / f"{slug(title)}.html").read_text()
    whole = (course / "feedback" / slug(title) / "01_tiny" / "01_tiny.html").read_text()
    text = (page + whole).replace("&#x27;", "").replace("&#39;", "").replace("'", "")
    assert says in text


def test_a_second_run_grades_only_what_has_changed(graded):
    course, handed_in, *_ = graded
    first = marks(course)
    again = run(course, "grade.py", handed_in)
    assert "0 to grade" in again.stderr and marks(course) == first
    hand_in(handed_in / "right" / "01_tiny.ipynb", tiny(), {"solution-1": "", "solution-2": "count = 21"})
    again = run(course, "grade.py", handed_in)
    assert "1 to grade" in again.stderr
    assert marks(course)["right", "01_tiny"]["points"] == "3"


def test_one_that_grading_itself_cannot_take_does_not_stop_the_rest(course, tmp_path):
    hand_in(tmp_path / "in" / "ann" / "01_tiny.ipynb", tiny())
    hand_in(tmp_path / "in" / "bob" / "01_tiny.ipynb", tiny())
    assert run(course, "grade.py", tmp_path / "in").returncode == 0
    state = json.loads((course / "graded.json").read_text())
    del state["ann/01_tiny"], state["bob/01_tiny"]
    (course / "graded.json").write_text(json.dumps(state))
    blocked = course / "autograded" / "ann"          # nbgrader cannot write there
    import shutil
    shutil.rmtree(blocked)
    blocked.write_text("")
    done = run(course, "grade.py", tmp_path / "in")
    assert done.returncode == 0 and "1 could not be graded" in done.stderr
    assert marks(course)["ann", "01_tiny"]["points"] == "0"
    assert "not graded" in marks(course)["ann", "01_tiny"]["remarks"]
    assert marks(course)["bob", "01_tiny"]["points"] == "6"


def test_without_isolation_it_refuses_unless_told(course, tmp_path):
    hand_in(tmp_path / "in" / "ann" / "01_tiny.ipynb", tiny())
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho cannot >&2\nexit 1\n")
    broken.chmod(0o755)
    import os
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    refused = run(course, "grade.py", tmp_path / "in", **path)
    assert refused.returncode == 2 and "cannot be isolated" in refused.stderr
    assert not (course / "marks.csv").exists()
    done = run(course, "grade.py", tmp_path / "in", **path, ISOLATION="off")
    assert done.returncode == 0 and marks(course)["ann", "01_tiny"]["points"] == "6"


def test_a_folder_without_submissions_is_said(course, tmp_path):
    (tmp_path / "in").mkdir()
    done = run(course, "grade.py", tmp_path / "in")
    assert done.returncode == 2 and "no submission found" in done.stderr


def test_plain_nbgrader_grades_in_the_sandbox_as_well(course, tmp_path):
    import subprocess
    import sys

    def nbgrader(*command):
        done = subprocess.run([sys.executable, "-m", "nbgrader", *command], cwd=course,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    nbgrader("generate_assignment", "01_tiny")
    hand_in(course / "submitted" / "ann" / "01_tiny" / "01_tiny.ipynb",
            nbformat.read(course / "release" / "01_tiny" / "01_tiny.ipynb", 4),
            {"solution-1": FORGE + "\nimport os\ncount = 21\nseen = os.path.exists('/etc/passwd')",
             "solution-2": "count = 0 if seen else 21"})
    nbgrader("autograde", "01_tiny")
    nbgrader("export")
    assert "ann" in Path(course / "grades.csv").read_text()
    assert ",3.0,0.0,3.0,6.0" in Path(course / "grades.csv").read_text()
