"""Make another version of an assignment: other shapes, other seeds, other targets, its own key.

    python assignments/variant.py 02_math 7        source/02_math_7 and release/02_math_7

The same number gives the same version. Its solutions run against its tests before it is written.
"""

import argparse
import random
import re
import sys

import nbformat

from grading import course
from grading.execute import IsolatedExecute
from lora_lib.files import atomic


def variant(notebook: nbformat.NotebookNode, number: int) -> nbformat.NotebookNode:
    """A copy of a source notebook with other numbers.

    A locked cell's metadata may hold {"variant": {"rank": [2, 3, 4]}}: its line `rank = ...` gets
    one of these values, another than it has where there is one. The seeds in the hidden tests are
    drawn anew. Raises ValueError if there is nothing to vary, or no such line.
    """
    draw, new = random.Random(number), nbformat.from_dict(notebook)
    choices = [cell for cell in new.cells if "variant" in cell.metadata]
    if not choices:
        raise ValueError("no cell of the notebook says what may vary (its metadata's `variant`)")
    for cell in choices:
        for name, values in cell.metadata.variant.items():
            line = re.search(rf"(?m)^{re.escape(name)} = (.+?)(\s*#.*)?$", cell.source)
            if line is None:
                raise ValueError(f"no line `{name} = ...` in the cell that varies it")
            others = [v for v in values if repr(v) != line[1]] or values
            cell.source = (cell.source[:line.start(1)] + repr(draw.choice(others))
                           + cell.source[line.end(1):])
    for cell in new.cells:
        if cell.metadata.get("nbgrader", {}).get("grade"):
            cell.source = re.sub(r"default_rng\(\d+\)",
                                 lambda _: f"default_rng({draw.randrange(10**6)})", cell.source)
    title = new.cells[0]
    title.source = re.sub(r"(?m)^# .+$", lambda m: f"{m[0]} (version {number})", title.source,
                          count=1)
    return new


def failures(notebook: nbformat.NotebookNode) -> list[str]:
    """What the notebook's own tests say of its own solutions: nothing, if all is well."""
    run, _ = IsolatedExecute(isolated=False).preprocess(nbformat.from_dict(notebook), {})
    return [f"{cell.metadata.get('nbgrader', {}).get('grade_id', cell.id)}: {output.evalue}"
            for cell in run.cells for output in cell.get("outputs", [])
            if output.output_type == "error"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("assignment", choices=course.assignments())
    parser.add_argument("number", type=int, help="any integer from 1 on: the version's name")
    options = parser.parse_args(arguments)
    if options.number < 1:
        parser.error(f"the version's number must be 1 or more, got {options.number}")
    name = f"{options.assignment}_{options.number}"
    try:
        notebook = variant(nbformat.read(course.source(options.assignment), 4), options.number)
        if said := failures(notebook):
            raise ValueError("its solutions fail its tests; nothing was written:\n"
                             + "\n".join(said))
        course.source(name).parent.mkdir(exist_ok=True)
        with atomic(course.source(name)) as path:
            nbformat.write(notebook, path)
        course.generate(name)
    except ValueError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    root = course.HERE.parent
    print(f"to hand out: {course.released(name).relative_to(root)}\n"
          f"its key:     {course.source(name).relative_to(root)}   (keep it private)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
