"""Another version of an assignment has other numbers, and a key that gets full marks."""

import nbformat
import pytest

from grading import course as real
from tests.assignments.conftest import cell, hand_in, marks, run, tiny
from variant import failures, variant


def test_numbers_and_hidden_seeds_change_and_nothing_else():
    for number in range(1, 9):
        new, old = variant(tiny(), number), tiny()
        assert new.cells[0].source == f"# Tiny (version {number})"
        line = new.cells[1].source.splitlines()[-1]
        assert line in ("size = 2", "size = 4")                  # it was 3
        assert "default_rng(5)" not in new.cells[4].source
        assert [c.source for c in new.cells[2:4]] == [c.source for c in old.cells[2:4]]
    notebook = tiny()
    before = nbformat.from_dict(notebook)
    assert variant(notebook, 3) == variant(notebook, 3) and notebook == before


def test_comments_and_other_lines_stay():
    notebook = tiny()
    notebook.cells[1].source = "size = 3   # rows\nother_size = 3\nname = 'size = 3'"
    lines = variant(notebook, 1).cells[1].source.splitlines()
    assert lines[0] in ("size = 2   # rows", "size = 4   # rows")
    assert lines[1:] == ["other_size = 3", "name = 'size = 3'"]


def test_what_cannot_vary_is_an_error():
    notebook = tiny()
    notebook.cells[1].metadata.variant = {"width": [1, 2]}
    with pytest.raises(ValueError, match="no line `width"):
        variant(notebook, 1)
    del notebook.cells[1].metadata["variant"]
    with pytest.raises(ValueError, match="what may vary"):
        variant(notebook, 1)


def test_a_version_that_its_own_key_fails_is_found():
    notebook = tiny()
    assert failures(notebook) == []
    notebook.cells.append(cell("test-3", "assert size < 3", grade=True, locked=True, points=1))
    assert [line.partition(":")[0] for line in failures(notebook)] == ["test-3"]


def test_the_command_writes_release_and_key_and_they_are_graded(course, tmp_path):
    done = run(course, "variant.py", "01_tiny", 7)
    assert done.returncode == 0, done.stderr
    assert "release/01_tiny_7" in done.stdout and "source/01_tiny_7" in done.stdout
    key = nbformat.read(course / "source" / "01_tiny_7" / "01_tiny_7.ipynb", as_version=4)
    hand_in(tmp_path / "in" / "ann" / "01_tiny_7.ipynb", key)
    hand_in(tmp_path / "in" / "bob" / "01_tiny_7.ipynb", tiny(),
            {"solution-2": "count = 21", "numbers": key.cells[1].source})   # the other version's
    assert run(course, "grade.py", tmp_path / "in").returncode == 0
    assert marks(course)["ann", "01_tiny_7"]["points"] == "6"
    assert marks(course)["bob", "01_tiny_7"]["points"] == "3"


def test_bad_arguments_are_told(course):
    for arguments, says in ((["01_tiny", "0"], "1 or more"), (["02_none", "1"], "01_tiny"),
                            (["01_tiny", "x"], "int")):
        done = run(course, "variant.py", *arguments)
        assert done.returncode == 2 and says in done.stderr
    assert not list(course.glob("source/01_tiny_*"))


@pytest.mark.parametrize("name", real.assignments())
@pytest.mark.parametrize("number", [1, 2])
def test_versions_of_the_real_assignments_can_be_solved(name, number):
    source = nbformat.read(real.source(name), as_version=4)
    new = variant(source, number)
    assert sum(a.source != b.source for a, b in zip(source.cells, new.cells)) >= 3
    assert failures(new) == []
