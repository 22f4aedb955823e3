"""One command points every link at a fork."""

import pytest

import set_repository

CONFIG = """\
repository:
  url: https://github.com/YOUR_NAME/lora-course
html:
  baseurl: https://YOUR_NAME.github.io/lora-course
"""
README = """\
[Book](https://YOUR_NAME.github.io/lora-course), see github.com/YOUR_NAME/lora-course.
git+https://github.com/YOUR_NAME/lora-course and YOUR_NAME/lora-course.git
https://github.com/YOUR_NAME/lora-course/blob/main/book/01_idea.ipynb
not YOUR_NAME/lora-course-2, not MY_YOUR_NAME/lora-course
"""


@pytest.fixture
def course(tmp_path):
    (tmp_path / "_config.yml").write_text(CONFIG, "utf8")
    (tmp_path / "README.md").write_text(README, "utf8")
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "01_idea.ipynb").write_text('"YOUR_NAME/lora-course"', "utf8")
    (tmp_path / "book" / "02_math.ipynb").write_text('"nothing"', "utf8")
    return tmp_path


def test_every_link_is_rewritten(course):
    changed = set_repository.set_repository(course, "Ada-L/my.course")
    assert [path.name for path in changed] == ["README.md", "_config.yml", "01_idea.ipynb"]
    assert set_repository.present(course) == "Ada-L/my.course"
    assert (course / "README.md").read_text("utf8") == (
        "[Book](https://ada-l.github.io/my.course), see github.com/Ada-L/my.course.\n"
        "git+https://github.com/Ada-L/my.course and Ada-L/my.course.git\n"
        "https://github.com/Ada-L/my.course/blob/main/book/01_idea.ipynb\n"
        "not YOUR_NAME/lora-course-2, not MY_YOUR_NAME/lora-course\n"
    )
    assert "baseurl: https://ada-l.github.io/my.course\n" in (course / "_config.yml").read_text()


def test_a_second_run_changes_nothing(course):
    assert set_repository.set_repository(course, "ada/course") != []
    assert set_repository.set_repository(course, "ada/course") == []


def test_a_fork_of_a_fork_can_be_repointed(course):
    before = {path: path.read_text("utf8") for path in course.rglob("*.*")}
    set_repository.set_repository(course, "ada/course")
    set_repository.set_repository(course, "ada/ada.github.io")
    assert "https://ada.github.io)" in (course / "README.md").read_text("utf8")
    set_repository.set_repository(course, "grace/lora-course")
    for path, text in before.items():
        assert path.read_text("utf8") == text.replace("not YOUR_NAME", "not @").replace(
            "MY_YOUR_NAME", "MY_@"
        ).replace("YOUR_NAME", "grace").replace("@", "YOUR_NAME")


@pytest.mark.parametrize(
    "address",
    ["", "ada", "ada/", "/course", "YOUR_NAME/lora-course", "-ada/course", "ada-/course"]
    + ["ada/my course", "ada/course.git", "ada/..", "ada/a/b", "a" * 40 + "/course"]
    + ["https://github.com/ada/course", "ada/course\n"],
)
def test_a_wrong_address_changes_nothing(course, address):
    with pytest.raises(ValueError, match="expected owner/name"):
        set_repository.set_repository(course, address)
    assert set_repository.present(course) == "YOUR_NAME/lora-course"


def test_every_file_of_the_course_that_names_the_repository_is_rewritten():
    root = set_repository.ROOT
    address = set_repository.present(root)
    covered = {path for pattern in set_repository.FILES for path in root.glob(pattern)}
    tests = root / "tests"
    for pattern in ("*.*", "book/**/*.*", "assignments/**/*.*", "scripts/*", "lora_lib/**/*.py"):
        for path in root.glob(pattern):
            if path.is_file() and path not in covered and tests not in path.parents:
                text = path.read_bytes()
                assert address.encode() not in text, f"{path} is missing in FILES"
