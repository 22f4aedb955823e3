"""One page of feedback for each learner, and the marks, from nbgrader's gradebook."""

from html import escape
from pathlib import Path
from typing import NamedTuple

import nbformat
from nbgrader.api import Gradebook, MissingEntry

from lora_lib.files import atomic

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{learner}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; }}
table {{ border-collapse: collapse; width: 100%; }}
td, th {{ border-bottom: 1px solid #ccc; padding: .4rem .6rem; }}
td, th {{ text-align: left; vertical-align: top; }}
td:nth-child(2) {{ white-space: nowrap; }}
</style></head><body>
<h1>Feedback for {learner}</h1>
{body}
</body></html>
"""


class Test(NamedTuple):
    """One test cell: its name, the points it gave, those it could give, and what it said."""

    name: str
    points: float
    of: float
    says: str


def write(course: Path, entries: dict[str, dict]) -> list[tuple]:
    """Write feedback/LEARNER.html for each learner; return the rows of the table of marks.

    `entries` has for each "learner/assignment" the remarks on it, and whether it was graded.
    """
    rows, bodies = [], {}
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}", "lora") as gradebook:
        for key, entry in sorted(entries.items()):
            learner, assignment = key.split("/")
            said = entry["remarks"]
            tests = _tests(course, gradebook, learner, assignment) if entry["graded"] else []
            of = sum(cell.max_score for notebook in gradebook.find_assignment(assignment).notebooks
                     for cell in notebook.grade_cells)
            points = sum(test.points for test in tests)
            rows.append((learner, assignment, f"{points:g}", f"{of:g}", "; ".join(said)))
            bodies.setdefault(learner, []).append(_section(learner, assignment, points, of, said,
                                                           tests))
    for learner, sections in bodies.items():
        path = course / "feedback" / f"{learner}.html"
        path.parent.mkdir(exist_ok=True)
        with atomic(path) as temporary:
            temporary.write_text(PAGE.format(learner=escape(learner), body="\n".join(sections)))
    return rows


def _tests(course, gradebook, learner, assignment):
    """The test cells of a graded submission, in the notebook's order."""
    path = course / "autograded" / learner / assignment / f"{assignment}.ipynb"
    said = {}
    for cell in nbformat.read(path, as_version=4).cells:
        errors = [o.evalue for o in cell.get("outputs", []) if o.output_type == "error"]
        said[cell.metadata.get("nbgrader", {}).get("grade_id")] = " ".join(errors)
    try:
        notebook = gradebook.find_submission_notebook(assignment, assignment, learner)
    except MissingEntry:
        return []
    grades = {grade.name: grade for grade in notebook.grades}
    return [Test(name, grades[name].score, grades[name].max_score, says)
            for name, says in said.items() if name in grades]


def _section(learner, assignment, points, of, remarks, tests):
    lines = [f"<h2>{escape(assignment)}: {points:g} of {of:g} points</h2>"]
    lines += [f"<p>Note: {escape(remark)}.</p>" for remark in remarks]
    if tests:
        lines += ["<table><tr><th>test</th><th>points</th><th>what it says</th></tr>"]
        for test in tests:
            lines.append(f"<tr><td>{escape(test.name)}</td><td>{test.points:g} of {test.of:g}</td>"
                         f"<td>{escape(test.says) or 'passed'}</td></tr>")
        lines += ["</table>", f'<p><a href="{escape(learner)}/{escape(assignment)}/'
                  f'{escape(assignment)}.html">The whole notebook, with its tests</a></p>']
    return "\n".join(lines)
