"""Finding the submissions in a folder, and making each one whole again.

Learners hand in files of many shapes: a folder each, one flat folder of downloads, clones of
repositories. What counts is which learner and which assignment a notebook belongs to, and the cells
of the learner's in it; all else comes from the release.
"""

import copy
import re
from pathlib import Path
from typing import NamedTuple

import nbformat
from nbgrader.utils import is_locked

LARGEST = 20 * 2**20     # bytes of a notebook
SKIPPED = {".ipynb_checkpoints", "source", "autograded", "feedback", ".git", ".venv"}


class Submission(NamedTuple):
    learner: str
    assignment: str
    path: Path
    remarks: list[str]


def find(folder: Path, assignments: list[str]) -> tuple[list[Submission], list[str]]:
    """The submissions in `folder`, one for each learner and assignment, and what was left out.

    FOLDER/alice/.../02_math.ipynb is alice's, whatever lies between; FOLDER/alice_02_math.ipynb is
    too. Of several notebooks of one learner for one assignment the newest counts. Raises ValueError
    if there is no such folder, or nothing in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the one that holds the submissions")
    found, left_out = {}, []
    for path in sorted(folder.rglob("*.ipynb")):
        parts = path.relative_to(folder).parts
        if SKIPPED & set(parts):
            continue
        name = _assignment(path, assignments)
        whose = parts[0] if len(parts) > 1 else _without(path.stem, name or "")
        learner = re.sub(r"[^\w.@-]+", "_", whose).strip("_.-")
        if path.is_symlink() or not path.is_file():
            left_out.append(f"{path}: not a regular file")
        elif name is None:
            left_out.append(f"{path}: its name fits none of the assignments "
                            f"({', '.join(assignments)})")
        elif not learner:
            left_out.append(f"{path}: no learner's name; expected LEARNER/{name}.ipynb or "
                            f"LEARNER_{name}.ipynb")
        else:
            found.setdefault((learner, name), []).append(path)
    if not found:
        raise ValueError("\n".join([f"no submission found in {folder}", *left_out]))
    return [_newest(learner, name, paths) for (learner, name), paths in found.items()], left_out


def rebuild(release: nbformat.NotebookNode, path: Path):
    """The notebook to grade: the release, with the learner's answers and extra cells in it.

    Returns it with remarks on what the learner had changed. Raises ValueError if the file is no
    notebook.
    """
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"the file has {size >> 20} MB; the limit is {LARGEST >> 20} MB")
    try:
        submitted = nbformat.reads(path.read_text("utf8"), as_version=4)
        nbformat.validate(submitted)
    except Exception as error:
        raise ValueError(f"not a notebook: {type(error).__name__}: {str(error)[:300]}") from None

    ids = [cell.metadata.get("nbgrader", {}).get("grade_id") or f"cell {i}"
           for i, cell in enumerate(release.cells)]
    whole = {i: [copy.deepcopy(cell)] for i, cell in zip(ids, release.cells)}
    remarks, seen, place = [], set(), ids[0]
    released = {cell.source.strip() for cell in release.cells}
    for cell in submitted.cells:
        name = cell.metadata.get("nbgrader", {}).get("grade_id")
        if name in whole and name not in seen:
            seen.add(name)
            place, original = name, whole[name][0]
            if not is_locked(original):
                original.source = cell.source
            elif original.source.strip() != cell.source.strip():
                remarks.append(f"the cell {name} was changed; the original was used")
        elif cell.source.strip() and cell.source.strip() not in released:
            new = nbformat.v4.new_code_cell if cell.cell_type == "code" \
                else nbformat.v4.new_markdown_cell
            whole[place].append(new(cell.source))
    if missing := [i for i in ids if not i.startswith("cell ") and i not in seen]:
        remarks.append(f"cells that the notebook lacks: {', '.join(missing)}")
    notebook = copy.deepcopy(release)
    notebook.cells = [cell for i in ids for cell in whole[i]]
    for number, cell in enumerate(notebook.cells):
        cell.id = f"c{number}"
    return notebook, remarks


def _assignment(path, assignments):
    for name in (path.stem, path.parent.name):
        fits = [a for a in assignments
                if re.search(rf"(?<![A-Za-z0-9]){re.escape(a)}(?![A-Za-z0-9])", name)]
        if fits:
            return max(fits, key=len)
    return None


def _without(stem, name):
    rest = stem.replace(name, " ")
    return re.sub(r"(?i)\bcopy of\b|\(\d+\)", " ", rest).strip(" _-")


def _newest(learner, name, paths):
    paths = sorted(paths, key=lambda path: path.stat().st_mtime)
    remarks = [f"{len(paths)} notebooks; the newest was graded"] if len(paths) > 1 else []
    return Submission(learner, name, paths[-1], remarks)
