"""Do a page's links lead somewhere, do its figures have words, does it read the same everywhere?

Each function returns one sentence per fault, and none for a page that is as it should be.
"""

import re
from pathlib import Path
from urllib.parse import unquote

import nbformat

from .markdown import figure, flat, markdown_cells, parse

SHORTEST_ALT = 20  # characters

# A chapter must read the same in the book, Colab, GitHub and VS Code, so it is CommonMark with
# tables and dollar math; these belong to MyST alone.
_MYST = {
    r"^\s*:::": "a colon fence",
    r"^\s*(?:```|~~~)\s*\{": "a directive",
    r"\{[a-z:-]+\}`": "a role",
    r"^\s*\([\w-]+\)=\s*$": "a target",
    r"^\s*\+\+\+": "a block break",
    r"\{\{.*\}\}": "a substitution",
    r"^\s*%": "a comment that hides the rest of its line",
    r"\\[(\[](?!\d)": "math that is not between dollars",
}
# Words that praise instead of saying what was seen.
_HYPE = re.compile(
    r"\b(?:elegant\w*|magic\w*|seamless\w*|effortless\w*|blazing\w*|cutting-edge|game-chang\w+"
    r"|revolutionary|obviously|groundbreaking)\b",
    re.IGNORECASE,
)


def read(path: Path) -> list[str]:
    """The Markdown of a page: the prose of a notebook, or the whole of a text file."""
    if path.suffix == ".ipynb":
        notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
        return [text for _, text in markdown_cells(notebook)]
    return [path.read_text("utf8")]


def anchors(texts: list[str]) -> set[str]:
    """The names by which links reach the headings of a page, spelled as MyST and GitHub do."""
    slugs: set[str] = set()
    for text in texts:
        tokens = parse(text)
        for token, inline in zip(tokens, tokens[1:]):
            if token.type != "heading_open":
                continue
            words = [c.content for c in inline.children or [] if c.type in ("text", "code_inline")]
            slug = re.sub(r"[^\w\- ]", "", "".join(words).lower().replace(" ", "-"))
            while slug in slugs:
                slug += "-1"
            slugs.add(slug)
    return slugs


def targets(path: Path) -> set[str]:
    """The names by which links reach the headings and the figures of a page."""
    cells = nbformat.read(path, nbformat.NO_CONVERT)["cells"] if path.suffix == ".ipynb" else []
    return anchors(read(path)) | {figure(cell).get("name", "") for cell in cells} - {""}


def link_faults(path: Path) -> list[str]:
    """The links and images of a page that lead to no file, no heading and no figure."""
    found, folder = [], path.parent
    for token in (token for text in read(path) for token in flat(text)):
        target = token.attrGet("href") if token.type == "link_open" else None
        target = token.attrGet("src") if token.type == "image" else target
        if target is None or re.match(r"[a-z][a-z+.-]*:", str(target)):
            continue
        name, _, anchor = unquote(str(target)).partition("#")
        if name and not (folder / name).is_file():
            found.append(f"the link to {target} leads to no file")
        elif anchor and anchor not in (anchors(read(folder / name)) if name else targets(path)):
            what = "heading" if name else "heading and no figure"    # a figure, only of this page
            found.append(f"the link to {target} leads to no {what}")
    return found


def markup_faults(text: str) -> list[str]:
    """Markup in a Markdown cell that only one of the chapter's renderers would understand."""
    found = []
    tokens = flat(text)
    for token in tokens:
        if token.type in ("html_inline", "html_block"):
            if rest := re.sub(r"<!--.*?-->", "", token.content, flags=re.DOTALL).strip():
                found.append(f"raw HTML: {rest[:60]}")
        elif token.type == "image" and len(token.content) < SHORTEST_ALT:
            found.append(f"the image {token.attrGet('src')} has no alt text worth the name")
        elif token.type == "fence" and token.info.strip().startswith("{"):
            found.append(f"a directive, which only the book understands: {token.info.strip()}")
    bare = _without_code(text)
    for pattern, name in _MYST.items():
        if match := re.search(pattern, bare, re.MULTILINE):
            found.append(f"{name}, which not every renderer understands: {match.group().strip()}")
    return found


def _without_code(text: str) -> str:
    text = re.sub(r"^(\s*)(```|~~~)(?!\s*\{).*?^\s*\2", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"(?<!\})(`+)(?!`).*?(?<!`)\1(?!`)", "", text)
    return re.sub(r"\$\$.*?\$\$|\$[^$\n]*\$|\\begin\{.*?\\end\{", "", text, flags=re.DOTALL)


def wording_faults(text: str) -> list[str]:
    """Words of praise in a text; names in code, such as a model's, are no praise."""
    words = re.sub("`[^`\n]*`", "", text)
    return [f"says {match.group()!r}: say what was seen instead" for match in _HYPE.finditer(words)]


def figure_faults(notebook: dict) -> list[str]:
    """The code cells of a notebook that show a figure and do not say in words what it shows."""
    found = []
    for index, cell in enumerate(notebook["cells"]):
        mimes = [mime for output in cell.get("outputs", []) for mime in output.get("data", {})]
        if not any(mime.startswith("image/") for mime in mimes):
            continue
        alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
        if len(alt) < SHORTEST_ALT:
            found.append(f"cell {index}: the figure has no alt text (metadata mystnb.image.alt)")
        if figure(cell) and len(cell["outputs"]) > 1:
            found.append(f"cell {index}: a figure with a name must be the cell's only output")
    return found
