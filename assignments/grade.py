"""Grade a folder of submissions: marks.csv, and a page of feedback for each learner.

    python assignments/grade.py SUBMISSIONS

Writes to assignments/: marks.csv, feedback/LEARNER.html, and nbgrader's own submitted/,
autograded/, feedback/ and gradebook.db. A second run grades only what has changed since.
"""

import argparse
import csv
import hashlib
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import nbformat
from tqdm import tqdm

from grading import collect, course, pages, sandbox
from lora_lib.files import atomic
import lora_lib.exercises

HERE = course.HERE


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("submissions", type=Path, help="the folder that holds the submissions")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="how many at a time")
    options = parser.parse_args(arguments)
    if os.environ.get("ISOLATION") != "off" and (why := sandbox.problem()):
        parser.error(f"submissions cannot be isolated on this machine: {why}\n"
                     "See the instructor's guide. ISOLATION=off grades without isolation: "
                     "only for code that you trust.")
    try:
        found, left_out = collect.find(options.submissions, course.assignments())
    except ValueError as error:
        parser.error(str(error))
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)

    state = _read(HERE / "graded.json")
    for name in sorted({s.assignment for s in found}):
        version = _version(course.source(name))
        if state.get(name) != version or not (HERE / "gradebook.db").exists():
            course.generate(name)
            state[name] = version
    jobs, marks = {}, {}
    for submission in found:
        key, text, remarks = _prepare(submission)
        entry = {"version": _digest(text, state[submission.assignment]), "remarks": remarks,
                 "graded": text is not None}
        if text is None:
            marks[key] = entry
        elif (old := state.get(key, {})).get("version") == entry["version"]:
            marks[key] = old
        else:
            jobs[key] = entry

    print(f"{len(found)} submissions, {len(jobs)} to grade", file=sys.stderr)
    for key, error in tqdm(_graded(jobs, options.workers), total=len(jobs), unit="submission"):
        if error:
            tqdm.write(f"{key}: {error}", file=sys.stderr)
            marks[key] = {"remarks": [*jobs[key]["remarks"], error], "graded": False}
        else:
            marks[key] = state[key] = jobs[key]
            _write(HERE / "graded.json", json.dumps(state, indent=1))
    _write(HERE / "graded.json", json.dumps(state, indent=1))
    rows = pages.write(HERE, marks)
    with atomic(HERE / "marks.csv") as path, open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["learner", "assignment", "points", "of", "remarks"])
        table.writerows(rows)
    lost = sum(not entry["graded"] for entry in marks.values())
    print(f"{len(rows)} marks in {HERE / 'marks.csv'}, a page for each learner in "
          f"{HERE / 'feedback'}; {lost} could not be graded", file=sys.stderr)
    return 0


def _prepare(submission):
    """Put the rebuilt notebook into submitted/; its key, its text or None, and the remarks."""
    key = f"{submission.learner}/{submission.assignment}"
    release = nbformat.read(course.released(submission.assignment), as_version=4)
    try:
        notebook, remarks = collect.rebuild(release, submission.path)
    except (ValueError, OSError) as error:
        return key, None, [*submission.remarks, str(error)]
    text = nbformat.writes(notebook)
    target = HERE / "submitted" / key / f"{submission.assignment}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    _write(target, text)
    return key, text, [*submission.remarks, *remarks]


def _graded(keys, workers):
    """Grade the submissions; yield each key with what went wrong, or None, as they are done.

    Should a worker process die, the rest are graded one by one, so that one cannot stop another.
    """
    groups, alone = [list(keys)], False
    while groups:
        group = groups.pop(0)
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            running = {pool.submit(course.one, *key.split("/")): key for key in group}
            for done in as_completed(running):
                try:
                    yield running[done], done.result()
                except BrokenProcessPool:
                    if alone:
                        yield running[done], "not graded: the grading process died"
                    else:
                        groups.append([running[done]])
                except Exception as error:
                    yield running[done], f"not graded: {type(error).__name__}: {error}"
        alone = True


def _version(source):
    """What a mark depends on beside the submission: the source, the tests, and the grading."""
    code = [*Path(lora_lib.exercises.__file__).parent.glob("*.py"), *HERE.glob("grading/*.py")]
    return _digest(*(path.read_text("utf8") for path in [source, *sorted(code)]))


def _digest(*texts):
    return hashlib.sha256("\0".join(t or "" for t in texts).encode()).hexdigest()


def _read(path):
    return json.loads(path.read_text("utf8")) if path.exists() else {}


def _write(path, text):
    with atomic(path) as temporary:
        temporary.write_text(text, "utf8")


if __name__ == "__main__":
    sys.exit(main())
