"""Does every number in a chapter's prose come from somewhere?

A number in a Markdown cell must be printed by a code cell of the same chapter (rounding allowed),
or stand in a sentence or table row with a link to another page, or be named in a mark of its own
cell that a reader never sees:

    <!-- given: 8, 16, 4096 -->

which says that the number is a definition or a choice and not a result.
"""

import html
import re
from collections.abc import Iterable

from . import numbers
from .markdown import markdown_cells, parse
from .numbers import Number

_MARK = re.compile(r"<!--\s*given:(.*?)-->", re.DOTALL)
_UNSEEN = re.compile(r"<(style|script)\b.*?</\1>|<[^>]*>", re.DOTALL)  # of what HTML says
_LINK = "\ue000"  # stands for a link to another page in a flattened sentence
_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|al|vs|cf|approx|Fig|Eq|Sec|Ch|No|pp?)\.$")
_ORDINAL = re.compile(
    r"^\s*(?:(?:Chapter|Part|Section|Step|Exercise)\s+[0-9]+|[0-9]+(?:\.[0-9]+)*[.:)])"
)
_EXERCISE = re.compile(r"\bExercises? [0-9]+")


def faults(notebook: dict) -> list[str]:
    """One sentence for each number of the prose that nothing supports, and each idle mark."""
    shown = printed(notebook)
    cells = markdown_cells(notebook)
    return [f"cell {index}: {fault}" for index, text in cells for fault in text_faults(text, shown)]


def printed(notebook: dict) -> list[Number]:
    """The numbers that a notebook's stored outputs show, on stdout or as a displayed result."""
    shown = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            if output["output_type"] == "stream" and output["name"] == "stdout":
                shown += numbers.find("".join(output["text"]))
            for mime, data in output.get("data", {}).items():
                if mime == "text/html":
                    data = re.sub(_UNSEEN, " ", "".join(data))
                    data = html.unescape(data)
                if mime.startswith("text/"):
                    shown += numbers.find("".join(data))
    return shown


def text_faults(text: str, shown: list[Number]) -> list[str]:
    """As `faults`, for one Markdown text and the numbers that its page shows."""
    found = []
    given: list[Number] = []
    for mark in _MARK.findall(text):
        listed = numbers.find(mark)
        if re.sub(r"[\s,]", "", mark) != re.sub(r"[\s,]", "", "".join(n.text for n in listed)):
            found.append(f"the mark is no list of numbers: given:{mark.rstrip()}")
        given += listed
    used = set()
    for sentence in sentences(text):
        if _LINK in sentence:
            continue
        for number in numbers.find(sentence):
            reasons = [mark for mark in given if number.agrees(mark)]
            used.update(reasons)
            if not reasons and not any(number.agrees(other) for other in shown):
                where = " ".join(sentence.split())
                found.append(f"no cell prints {number.text.strip()}, no link or mark: {where!r}")
    found += [f"{mark.text} is marked as given and not used" for mark in given if mark not in used]
    return found


def sentences(text: str) -> Iterable[str]:
    """The sentences of `text`; each heading, table row and display equation is one as well.

    Code is left out, and so is the text of a link. Math is spelled in plain characters.
    """
    row: list[str] | None = None
    heading = False
    for token in parse(text):
        if token.type == "heading_open":
            heading = True
        elif token.type == "tr_open":
            row = []
        elif token.type == "tr_close" and row is not None:
            yield " ; ".join(row)
            row = None
        elif token.type.startswith(("math_block", "amsmath")):
            yield plain_math(token.content)
        elif token.type == "inline":
            flat = _flatten(token.children or [])
            if row is not None:
                row.append(flat)
            elif heading:
                yield _ORDINAL.sub("", flat)
                heading = False
            else:
                yield from _split(flat)


def _flatten(tokens: list) -> str:
    parts, depth = [], 0
    for token in tokens:
        if token.type == "link_open":
            depth += 1
            if not str(token.attrGet("href")).startswith("#"):
                parts.append(_LINK)
        elif token.type == "link_close":
            depth -= 1
        elif depth:
            continue
        elif token.type == "text":
            parts.append(token.content)
        elif token.type.startswith("math_inline"):
            parts.append(f" {plain_math(token.content)} ")
        elif token.type in ("softbreak", "hardbreak", "code_inline"):
            parts.append(" ")
    return _EXERCISE.sub("", "".join(parts))


def _split(text: str) -> Iterable[str]:
    start = 0
    for match in re.finditer(r"[.!?][\"')\]”’]*\s+", text):
        if not _ABBREVIATION.search(text[: match.start() + 1]):
            yield text[start : match.end()]
            start = match.end()
    if text[start:].strip():
        yield text[start:]


def plain_math(latex: str) -> str:
    r"""The numbers of a formula in plain text: 3 \times 10^{-4} becomes 3e-4.

    Sub- and superscripts go, and so do the bare literals 0, 1 and 2: they are notation.
    """
    text = re.sub(r"(?<=[0-9])(?:\{,\}|\\,)(?=[0-9]{3}(?![0-9]))", ",", latex)
    text = re.sub(r"(?:\\[,;:! ]|~|\s)*\\(?:text|mathrm)\{\s*([KMBT])\s*\}", r"@\1", text)
    text = re.sub(r"\\(?:tag|label|[hv]space|color|phantom)\*?\{[^{}]*\}", " ", text)
    text = re.sub(r"\\begin\{array\}\{[^{}]*\}|\\\\\[[^\]]*\]|\\sqrt\[[^\]]*\]", " ", text)
    text = re.sub(r"\\[dt]?frac\s*([0-9])\s*([0-9])", r" \1 / \2 ", text)
    power = r"10\s*\^\s*(?:\{\s*([-+]?[0-9]+)\s*\}|([0-9]))"
    text = re.sub(rf"([0-9.]+)\s*(?:\\times|\\cdot)\s*{power}", r"\1e\2\3", text)
    text = re.sub(rf"(?<![0-9.]){power}", r"1e\1\2", text)
    text = _without_scripts(text)
    text = re.sub(r"\\%", "%", text)
    text = re.sub(r"\\[a-zA-Z]+\*?|\\.|[{}&~]", " ", text)
    text = re.sub(r"(?<=[0-9])(?=[A-Za-df-z])", " ", text)  # 8B is 8 times B ...
    text = text.replace("@", "")  # ... unless the B is upright
    literal = r"(?<![\w.,])[012](?![.,]?[0-9])(?!e[-+0-9])(?!\s*%)(?![KMBT])"
    return re.sub(literal, " ", text)


def _without_scripts(latex: str) -> str:
    out, i = [], 0
    while i < len(latex):
        if latex[i] in "_^" and (i == 0 or latex[i - 1] != "\\"):
            i = _argument_end(latex, i + 1)
            out.append(" ")
        else:
            out.append(latex[i])
            i += 1
    return "".join(out)


def _argument_end(latex: str, i: int) -> int:
    """The index after the argument that begins at or after `i`: a group, a command, a character."""
    while i < len(latex) and latex[i].isspace():
        i += 1
    if i < len(latex) and latex[i] == "{":
        depth = 0
        for j in range(i, len(latex)):
            depth += {"{": 1, "}": -1}.get(latex[j], 0)
            if depth == 0:
                return j + 1
        return len(latex)
    if command := re.compile(r"\\(?:[a-zA-Z]+|.)").match(latex, i):
        return command.end()
    return i + 1
