"""The exercises of the course with instant feedback: `check("2.3", my_function)`.

Exercise 2.3 is the third of the second assignment. `check` runs the exercise's visible tests and
either prints that they pass or says what is wrong and by how much. The same line stands in the
assignments' notebooks, so a learner sees the same with an instructor, in Colab, or alone.
"""

import importlib
from collections.abc import Callable

from lora_lib.exercises.feedback import Wrong, call, is_like, raises, same

__all__ = ["Wrong", "call", "check", "exercises", "is_like", "raises", "same"]

ASSIGNMENTS = {1: "idea", 2: "math", 3: "initialization", 4: "merging", 5: "training"}


def check(number: str, answer, **given) -> None:
    """Run the visible tests of exercise `number`, such as "2.3", on `answer`.

    `given` are the numbers of the question, where it has some: check("1.2", count, d=64, k=32).
    Prints one line when the tests pass. Raises Wrong, whose message says what is wrong and by how
    much, when one does not; ValueError when there is no such exercise.
    """
    exercise = exercises(number.partition(".")[0]).get(number)
    if exercise is None:
        raise ValueError(f"there is no exercise {number!r}; the exercises are: "
                         f"{', '.join(n for a in ASSIGNMENTS for n in exercises(a))}")
    if answer is None or answer is ...:
        raise Wrong(f"Exercise {number} has no answer yet.")
    try:
        exercise(answer, **given)
    except Wrong as wrong:
        raise Wrong(f"Exercise {number}: {wrong}") from None
    print(f"Exercise {number}: the visible tests pass.")


def exercises(assignment: int | str) -> dict[str, Callable]:
    """The visible tests of one assignment by number; an unknown assignment has none."""
    topic = ASSIGNMENTS.get(int(assignment)) if str(assignment).isdecimal() else None
    if topic is None:
        return {}
    return importlib.import_module(f"lora_lib.exercises.{topic}").EXERCISES
