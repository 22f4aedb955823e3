"""The assignments themselves, graded for real: right, untouched, and typically wrong submissions.

Everything is handed in as one folder and graded in one run, as an instructor would.
"""

import importlib
import re

import nbformat
import pytest

from grading import course as real
from grading.sandbox import problem
from lora_lib.exercises import ASSIGNMENTS, Wrong, check, exercises
from tests.assignments.conftest import copy_course, hand_in, marks, run

TOPICS = {path: path.partition("_")[2] for path in real.assignments()}
WRONG = {name: importlib.import_module(f"tests.assignments.wrong.{topic}").WRONG
         for name, topic in TOPICS.items()}
CASES = [(name, title) for name in WRONG for title in WRONG[name]]

isolated = pytest.mark.skipif(problem() is not None, reason=f"no isolation here: {problem()}")


def learner(title):
    return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")


def points_of(notebook):
    return {c.metadata.nbgrader.grade_id: c.metadata.nbgrader.points for c in notebook.cells
            if c.metadata.get("nbgrader", {}).get("grade")}


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("class")
    course = copy_course(folder / "course", with_source=True)
    for name in WRONG:
        source = nbformat.read(real.source(name), as_version=4)
        release = nbformat.read(real.released(name), as_version=4)
        hand_in(folder / "in" / "reference" / f"{name}.ipynb", source)
        hand_in(folder / "in" / "untouched" / f"{name}.ipynb", release)
        for title, (changes, _) in WRONG[name].items():
            hand_in(folder / "in" / f"{learner(title)}_{name}.ipynb", source, changes)
    done = run(course, "grade.py", folder / "in")
    assert done.returncode == 0, done.stderr
    return course


def lost(course, who, name):
    """The names of the test cells that gave no points."""
    from nbgrader.api import Gradebook
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}", "lora") as gradebook:
        notebook = gradebook.find_submission_notebook(name, name, who)
        assert all(grade.score in (0, grade.max_score) for grade in notebook.grades)
        return {grade.name for grade in notebook.grades if grade.score == 0}


@isolated
@pytest.mark.parametrize("name", WRONG)
def test_the_reference_has_all_points_and_the_untouched_release_none(graded, name):
    assert lost(graded, "reference", name) == set()
    everything = set(points_of(nbformat.read(real.source(name), as_version=4)))
    assert lost(graded, "untouched", name) == everything
    assert marks(graded)["untouched", name]["points"] == "0"


@isolated
@pytest.mark.parametrize("name, title", CASES)
def test_a_wrong_submission_loses_what_it_should(graded, name, title):
    points = points_of(nbformat.read(real.source(name), as_version=4))
    expected = WRONG[name][title][1]
    assert expected and lost(graded, learner(title), name) == expected
    row = marks(graded)[learner(title), name]
    left = sum(points.values()) - sum(points[cell] for cell in expected)
    assert float(row["points"]) == left and float(row["of"]) == sum(points.values())


@pytest.mark.parametrize("name", WRONG)
def test_there_are_enough_wrong_submissions_for_every_exercise(name):
    wrong = WRONG[name]
    assert len(wrong) >= 8
    assert len({learner(title) for title in wrong}) == len(wrong)
    losing = set.union(*(loses for _, loses in wrong.values()))
    assert losing == set(points_of(nbformat.read(real.source(name), as_version=4)))


@pytest.mark.parametrize("name", WRONG)
def test_an_assignment_is_in_form(name):
    notebook = nbformat.read(real.source(name), as_version=4)
    points, number = points_of(notebook), name[1]
    assert sum(points.values()) == 20
    numbers = sorted(exercises(number))
    assert numbers == [f"{number}.{i + 1}" for i in range(len(numbers))]
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for exercise in numbers:
        cell = exercise.replace(".", "-")
        assert {f"test-{cell}", f"hidden-{cell}"} <= points.keys()
        assert points[f"hidden-{cell}"] > points[f"test-{cell}"]
        section = text.partition(f"Exercise {exercise}")[2].partition("## Exercise")[0]
        stated = re.search(r"(\d+) points.*?(\d+) minutes", section, re.DOTALL)
        assert int(stated[1]) == points[f"test-{cell}"] + points[f"hidden-{cell}"], exercise
        assert re.search("NumPy|Python|PyTorch|torch", section), "what is allowed?"
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.parametrize("name", WRONG)
def test_the_release_is_what_the_source_makes_and_gives_nothing_away(name):
    source = nbformat.read(real.source(name), as_version=4)
    release = nbformat.read(real.released(name), as_version=4)
    assert len(source.cells) == len(release.cells)
    for there, here in zip(source.cells, release.cells):
        hidden = re.sub(r"\n?### BEGIN HIDDEN TESTS.*### END HIDDEN TESTS", "", there.source,
                        flags=re.DOTALL)
        if there.metadata.get("nbgrader", {}).get("solution"):
            before, _, rest = there.source.partition("### BEGIN SOLUTION")
            assert here.source.startswith(before)
            assert "raise NotImplementedError()" in here.source
            assert here.source.endswith(rest.partition("### END SOLUTION")[2])
        else:
            assert here.source == hidden
    assert "HIDDEN" not in str(release) and "SOLUTION" not in str(release)


@pytest.mark.parametrize("number", [n for a in ASSIGNMENTS for n in exercises(a)])
def test_a_learner_alone_gets_feedback_in_one_line(number, capsys):
    """`check("2.3", my_function)` with nothing else: the solution passes, nonsense is told why."""
    name = next(name for name in TOPICS if name[1] == number[0])
    notebook = nbformat.read(real.source(name), as_version=4)
    names, cell_name = {"__name__": "__main__"}, f"solution-{number.replace('.', '-')}"
    for cell in notebook.cells:
        if cell.cell_type == "code" and "google.colab" not in cell.source \
                and not cell.metadata.get("nbgrader", {}).get("grade"):
            before = set(names)
            exec(cell.source, names)
            if cell.metadata.get("nbgrader", {}).get("grade_id") == cell_name:
                break
    test = next(cell.source for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get(
        "grade_id") == f"test-{number.replace('.', '-')}")
    answer = re.search(r'check\("[\d.]+", (\w+)', test)[1]
    assert answer in set(names) - before
    capsys.readouterr()
    check(number, names[answer])
    assert "pass" in capsys.readouterr().out
    for nonsense in (None, object(), "42", lambda *a, **k: None, lambda *a, **k: 1 / 0):
        with pytest.raises(Wrong, match=number):
            check(number, nonsense)
