"""Figures that move: plain JavaScript in the page, the same in the book, in Colab and in Jupyter.

`show(name, data)` puts `name`.js to work on the data, with the common parts of common.js and
style.css; the page asks no other address for anything. Where scripts do not run (GitHub), or one
fails, the still picture stays. A file `name`.js has a function `mount(root, data)` that fills the
element `root`; what it computes stands in functions of its own, which the tests run under node.
"""

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
MADE = 'const made = document.createElement("div");\n'                 # after the code


def show(name: str, data, *, label: str, still: Callable[[Any], None] | None = None) -> None:
    """Display the figure `name` of `data`, which JSON can hold.

    `label` says what is seen and what can be moved, for those who do not see it. `still(ax)` draws
    the still picture; without it the label stands there. Raises ValueError for a figure that
    there is not, and for data with nan or infinity, which JSON does not have.
    """
    from IPython.display import HTML, display
    display(HTML(html(name, data, label=label, still=still)))


def html(name: str, data, *, label: str, still: Callable[[Any], None] | None = None) -> str:
    """What `show` displays. Its id is made of what it shows, so a page has the same one again."""
    known = sorted(path.stem for path in HERE.glob("*.js") if path.stem != "common")
    if name not in known:
        raise ValueError(f"no figure is called {name!r}; there are {known}")
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("</", "<\\/")
    key = "moving-" + hashlib.sha256(f"{name} {text}".encode()).hexdigest()[:10]
    picture = (f'<img src="{drawn(still)}" alt="{escape(label)}">' if still
               else f"<p>{escape(label)}</p>")
    return _around(name, f'<div class="moving" id="{key}" data-figure="{name}" role="group" '
                   f'aria-label="{escape(label)}">{picture}</div>\n',
                   f'{MADE}made.id = "{key}-made";\nmount(made, {text});\n'
                   f'document.getElementById("{key}").replaceChildren(made);\n}})();\n</script>')


def renewed(shown: str) -> str:
    """What `show` has displayed some time ago, of the same data, with today's JavaScript and
    style. Raises ValueError for what is no such thing."""
    seen = re.search(r'<div class="moving" id="[^"]*" data-figure="(\w+)".*?</div>\n(?=<script>)',
                     shown, re.DOTALL)
    if not seen or MADE not in shown:
        raise ValueError(f"this is no figure that moves: {shown[:80]!r}")
    return _around(seen[1], seen[0], shown[shown.rindex(MADE):])


def _around(name, seen, end):
    style = (HERE / "style.css").read_text("utf8")
    return f"<style>\n{style}</style>\n{seen}<script>\n(() => {{\n{source(name)}\n{end}"


def source(name: str) -> str:
    """The JavaScript of a figure: the common parts, then its own."""
    return "\n".join((HERE / f"{part}.js").read_text("utf8") for part in ("common", name))


def drawn(draw: Callable[[Any], None]) -> str:
    """What `draw` draws on the axes it is given, as the address of an SVG picture that has all of
    itself in it, on transparent ground."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from lora_lib.plots import HOUSE
    file = io.BytesIO()
    with mpl.rc_context({**HOUSE, "savefig.transparent": True}):
        figure = Figure()
        draw(figure.subplots())
        figure.savefig(file, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def packed(matrix, width: int = 1) -> dict:
    """A matrix (rows, columns) as 255 steps from its largest entry to minus that, in base64: a
    byte a number, or 65,535 steps in a `width` of two. `unpacked` of common.js reads it."""
    matrix = np.asarray(matrix, float)
    unit = np.abs(matrix).max() / np.iinfo(f"i{width}").max or 1.0
    numbers = np.round(matrix / unit).astype(f"<i{width}")
    return {"shape": matrix.shape, "unit": float(f"{unit:.7g}"),
            "bytes": base64.b64encode(numbers.tobytes()).decode()}


def ask(question: str, answers: dict[str, str], right: str) -> None:
    """Display a question to answer before one reads on: {answer: why it is right or not}.

    Where scripts do not run, the question and its answers stand there without the reasons. Raises
    ValueError if the right one is not among the answers.
    """
    if right not in answers:
        raise ValueError(f"the right answer {right!r} is not among {list(answers)}")
    data = {"question": question, "answers": [
        {"text": text, "why": why, "right": text == right} for text, why in answers.items()]}
    show("question", data, label=f"{question} {' / '.join(answers)}")
