"""Bind the pages of the book into one file to keep: a PDF or an EPUB.

    python scripts/bind.py pdf|epub [PATH]        default: _build/bound/lora-course.pdf or .epub

The pages are those of _toc.yml but for the API reference and the guide for instructors, which the
website has. What is seen of a notebook is what its tags let the book show: no set-up, no asserts,
no folded code. A figure that moves is its still picture; solutions, and the answers to questions,
stand at the end. Pandoc reads the Markdown and writes the EPUB, and for the PDF the pages that
Typst sets.
"""

import base64
import json
import re
import sys
import tempfile
from dataclasses import dataclass, field
from html import unescape
from pathlib import Path

import nbformat
import pypandoc
import typst
import yaml

ROOT = Path(__file__).parents[1]
PARTS = ROOT / "scripts" / "bound"
READER = ("commonmark-raw_html+smart+attributes+bracketed_spans+implicit_figures+pipe_tables"
          "+tex_math_dollars")
LEFT_OUT = ("book/index", "book/api", "book/instructors")


def pages(root: Path = ROOT) -> list[Path]:
    """The pages of the volume, in the order of _toc.yml."""
    toc = yaml.safe_load((root / "_toc.yml").read_text("utf8"))
    names = [page["file"] for part in toc["parts"] for page in part["chapters"]]
    return [path for name in names if name not in LEFT_OUT
            for path in (root / f"{name}.ipynb", root / f"{name}.md") if path.exists()]


@dataclass
class Volume:
    """The Markdown of the whole, of pages in one folder, with its pictures in another."""

    pages: list[Path]
    pictures: Path
    site: str = "https://example.org"
    text: list[str] = field(default_factory=list)
    solutions: list[str] = field(default_factory=list)
    words: dict[str, str] = field(default_factory=dict)       # of each picture, by its path
    count: int = 0

    def markdown(self) -> str:
        """All pages, then the solutions."""
        for page in self.pages:
            self._page(page)
        return "\n\n".join([*self.text, "# Solutions {#solutions}", *self.solutions])

    def _page(self, path):
        self.page, self.name = path, f"page-{path.stem}"
        self.slugs, self.exercise = set(), "A question"
        if path.suffix != ".ipynb":
            self.text.append(self._prose(path.read_text("utf8")))
            return
        kept = len(self.solutions)
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                self.text.append(self._prose(cell.source))
                if named := re.findall(r"^\*\*(Exercise \d+)", cell.source, re.MULTILINE):
                    self.exercise = named[-1]
            elif cell.cell_type == "code":
                self._code(cell)
        if len(self.solutions) > kept:
            title = next(line[2:] for line in notebook.cells[0].source.splitlines()
                         if line.startswith("# "))
            self.solutions.insert(kept, f"## {title} {{#solutions--{self.name}}}")

    def _prose(self, text):
        """A page's Markdown with its headings named and its links turned to this volume's names."""
        text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
        text = re.sub(r"\\cr\b", r"\\\\", text)                 # which pandoc does not read
        text = re.sub(r"\\tag\{([\d.]+)\}", r"\\qquad \\text{(\1)}", text)
        parts = re.split(r"(^(?:```|~~~).*?^(?:```|~~~)\s*$)", text, flags=re.MULTILINE | re.DOTALL)
        for i in range(0, len(parts), 2):                      # what is no fenced code
            parts[i] = re.sub(r"^(#+) (.+?)[ \t]*$", self._heading, parts[i], flags=re.MULTILINE)
            parts[i] = re.sub(r"\]\((?![a-z]+:)([^)\s]*)\)", self._link, parts[i])
        return "".join(parts)

    def _heading(self, found):
        marks, words = found.groups()
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"[`*$]", "", words).lower().replace(" ", "-"))
        while slug in self.slugs:
            slug += "-1"
        self.slugs.add(slug)
        name = self.name if len(marks) == 1 else f"{self.name}--{slug}"
        return f"{marks} {words} {{#{name}}}"

    def _link(self, found):
        file, _, anchor = found[1].partition("#")
        path = Path(file or self.page.name)
        if path.suffix in (".png", ".svg"):
            return f"]({self.page.parent / path})"
        if path.stem in {page.stem for page in self.pages}:
            return f"](#page-{path.stem}{f'--{anchor}' if anchor else ''})"
        return f"]({self.site}/book/{path.with_suffix('.html')}{f'#{anchor}' if anchor else ''})"

    def _code(self, cell):
        tags, mystnb = set(cell.metadata.get("tags", [])), cell.metadata.get("mystnb", {})
        if "remove-cell" in tags:
            return
        if mystnb.get("code_prompt_show") == "Solution":
            self._at_the_end("Solution", self.exercise, [_fenced(cell.source, "python"),
                                                         *self._outputs(cell, mystnb)])
            return
        if not tags & {"hide-input", "hide-cell", "remove-input"}:
            self.text.append(_fenced(cell.source, "python"))
        self.text += self._outputs(cell, mystnb)

    def _outputs(self, cell, mystnb):
        found = []
        for output in cell.outputs:
            data = output.get("data", {})
            if output.output_type == "stream":
                found.append(_fenced(output.text))
            elif "text/markdown" in data:
                found.append(self._prose(data["text/markdown"]))
            elif "image/png" in data:
                found.append(self._picture(base64.b64decode(data["image/png"]), "png", mystnb))
            elif "text/html" in data:
                found.append(self._moving(data["text/html"]))
        return found

    def _picture(self, content, kind, mystnb):
        self.count += 1
        path = self.pictures / f"{self.name}-{self.count}.{kind}"
        path.write_bytes(content)
        figure, alt = mystnb.get("figure", {}), mystnb.get("image", {}).get("alt", "")
        name = f"#{self.name}--{figure['name']} " if figure else ""
        alt = alt.replace("\\", "").replace('"', "'")
        self.words[str(path)] = alt
        return f"![{figure.get('caption', '')}]({path}){{{name}alt=\"{alt}\"}}"

    def _moving(self, html):
        """The still picture of a figure that moves; of a question its words, answers at the end."""
        still = r'<img src="data:image/svg\+xml;base64,([^"]+)" alt="([^"]*)"'
        for content, alt in re.findall(still, html):
            words = {"image": {"alt": unescape(alt)}}
            return self._picture(base64.b64decode(content), "svg", words)
        data = json.loads(re.findall(r"^mount\(made, (.*)\);$", html, re.MULTILINE)[0])
        answers = data["answers"]
        self.text.append(f"**{data['question']}**")
        self.text.append("\n".join(f"- {answer['text']}" for answer in answers))
        self._at_the_end("Answer", data["question"], ["\n".join(
            f"- *{answer['text']}*{' (right)' * answer['right']}: {answer['why']}"
            for answer in answers)])
        return ""

    def _at_the_end(self, what, heading, parts):
        self.count += 1
        there, back = f"end-{self.count}", f"{self.name}-{self.count}"
        self.text.append(f"[[{what}](#{there})]{{#{back}}}")
        self.solutions += [f"### {heading} {{#{there} .unlisted}}", *parts,
                           f"[Back to the {'exercise' if what == 'Solution' else 'question'}]"
                           f"(#{back})"]


def _fenced(text, language=""):
    """A text as a block of code, whatever backticks are in it."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`{3,}", text))])
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def spoken(source: str, words: dict[str, str]) -> str:
    """Typst's source with the words of each picture, which Pandoc leaves out."""
    return re.sub(r'image\("([^"]+)"', lambda found: found[0] + (
        f", alt: {json.dumps(words[found[1]], ensure_ascii=False)}" if found[1] in words else ""),
        source)


def bind(kind: str, path: Path, root: Path = ROOT) -> Path:
    """Write the volume to a file, "pdf" or "epub".

    Raises ValueError for another kind.
    """
    if kind not in ("pdf", "epub"):
        raise ValueError(f'the kind must be "pdf" or "epub", got {kind!r}')
    config = yaml.safe_load((root / "_config.yml").read_text("utf8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder)
        volume = Volume(pages(root), pictures, config["html"]["baseurl"])
        text = volume.markdown()
        options = [f"--metadata=title:{config['title']}", f"--metadata=author:{config['author']}",
                   "--metadata=lang:en", f"--metadata=rights:{config['copyright']}"]
        if kind == "epub":
            pypandoc.convert_text(text, "epub3", READER, outputfile=str(path), extra_args=[
                *options, "--mathml", "--toc", "--toc-depth=2", "--split-level=1",
                f"--css={PARTS / 'epub.css'}"])
            return path
        source = pypandoc.convert_text(text, "typst", READER, extra_args=[
            *options, "--standalone", f"--template={PARTS / 'volume.typ'}"])
        source = source.replace("dot.circle", "dot.o")   # what Typst calls it by now
        typst.compile(spoken(source, volume.words).encode(), output=path, root="/")
    return path


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    kind = sys.argv[1]
    default = ROOT / "_build" / "bound" / f"lora-course.{kind}"
    print(bind(kind, Path(sys.argv[2]) if len(sys.argv) == 3 else default))
