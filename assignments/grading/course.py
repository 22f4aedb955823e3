"""The course's folder, its assignments, and nbgrader on them."""

import functools
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent


def assignments() -> list[str]:
    """The names of the assignments, in order: the folders in source/."""
    return sorted(path.parent.name for path in (HERE / "source").glob("*/*.ipynb")
                  if path.stem == path.parent.name)


def source(name: str) -> Path:
    return HERE / "source" / name / f"{name}.ipynb"


def released(name: str) -> Path:
    return HERE / "release" / name / f"{name}.ipynb"


def generate(name: str) -> None:
    """Make the release of one assignment from its source and tell nbgrader's gradebook of it.

    Raises ValueError with nbgrader's own words when it cannot.
    """
    done = subprocess.run([sys.executable, "-m", "nbgrader", "generate_assignment", name,
                           "--force", "--create"], cwd=HERE, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{name}: {done.stdout}{done.stderr}")


def one(learner: str, assignment: str) -> str | None:
    """Grade one submission in submitted/ and write its feedback; what went wrong, or None."""
    api = _api()
    answer = api.autograde(assignment, learner, force=True)
    if answer["success"]:
        answer = api.generate_feedback(assignment, learner, force=True)
    return None if answer["success"] else f"not graded: {answer.get('error', '')[-500:]}"


@functools.cache
def _api():
    import warnings

    from nbgrader.apps import NbGraderAPI
    from traitlets.config.loader import PyFileConfigLoader

    warnings.simplefilter("ignore")                  # SQLAlchemy's, about nbgrader
    return NbGraderAPI(config=PyFileConfigLoader("nbgrader_config.py", str(HERE)).load_config())
