"""The checks of links, markup, wording and figures see each planted fault."""

import pytest
from nbformat.v4 import new_markdown_cell

import notebooks

from . import pages
from .sample import PROSE, chapter


@pytest.fixture
def folder(tmp_path):
    notebooks.write(chapter(), tmp_path / "01_idea.ipynb")
    (tmp_path / "glossary.md").write_text("# Glossary\n\n## Rank $r$, the `width`\n", "utf8")
    return tmp_path


def written(folder, text):
    path = folder / "page.md"
    path.write_text(text, "utf8")
    return path


@pytest.mark.parametrize(
    "text",
    [
        "[one](01_idea.ipynb), [two](01_idea.ipynb#what-it-costs), [three](#here)\n\n## Here",
        "[four](glossary.md#rank--the-width), [web](https://example.org/#x), <https://example.org>",
        "`[code](missing.md)`",
    ],
)
def test_sound_links_pass(folder, text):
    assert pages.link_faults(written(folder, text)) == []


@pytest.mark.parametrize(
    "text",
    [
        "[gone](02_math.ipynb)",
        "[renamed](01_idea.ipynb#what-it-cost)",
        "[nowhere](#here)",
        "| a |\n|---|\n| [gone](gone.md) |",
        "![a picture of nothing at all](gone.png)",
        "[folder](.)",
    ],
)
def test_broken_links_are_caught(folder, text):
    assert len(pages.link_faults(written(folder, text))) == 1


@pytest.mark.parametrize("text, caption, faults", [
    ("[a](#fig-loss)", "The loss.", 0), ("[a](#fig-gain)", "The loss.", 1),
    ("No link.", "See [it](#nothing).", 1)])
def test_a_figure_with_a_name_can_be_linked_and_its_caption_is_prose(folder, text, caption, faults):
    notebook = chapter()
    notebook.cells[4].metadata.mystnb.figure = {"name": "fig-loss", "caption": caption}
    notebook.cells[0].source += f"\n\n{text}"
    notebooks.write(notebook, folder / "02_math.ipynb")
    assert len(pages.link_faults(folder / "02_math.ipynb")) == faults
    elsewhere = written(folder, "[a](02_math.ipynb#fig-loss)")     # which the book cannot follow
    assert len(pages.link_faults(elsewhere)) == 1


def test_repeated_headings_get_different_anchors():
    assert pages.anchors(["## One\n\n## One", "## One"]) == {"one", "one-1", "one-1-1"}


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        "```python\nx = {}\n:::\n```",
        "a set $\\{x\\}$, `{key}` and `:::`, $$\\left(x\\right)$$",
        "text and <https://example.org>\n<!-- given: 8 -->\nmore text <!-- a note -->",
        "![the loss against the step, falling](loss.png)",
        "\\begin{align}\nx &= 1 \\\\[4pt]\n\\end{align}",
    ],
)
def test_ordinary_markdown_passes(text):
    assert pages.markup_faults(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "```{note}\nhello\n```",
        ":::note\nhello\n:::",
        "see {ref}`rank`",
        "see {doc}`01_idea`",
        "(target)=\n# Heading",
        "+++",
        "a {{ substitution }}",
        "about 93\n% of the directions",
        "<details>\nhidden\n</details>",
        "a line<br>break",
        "<!-- given: 8 --> text that would be taken for HTML",
        "\\(x\\)",
        "![](loss.png)",
    ],
)
def test_markup_of_one_renderer_is_caught(text):
    assert pages.markup_faults(text) != []


def test_praise_is_caught():
    assert pages.wording_faults("An elegant update, merged by Magic.") != []
    assert pages.wording_faults("An update of rank one, merged by addition.") == []


def test_a_figure_needs_words():
    notebook = chapter()
    assert pages.figure_faults(notebook) == []
    figure = notebook.cells[4]
    figure.metadata = {"mystnb": {"image": {"alt": "a plot"}}}
    assert len(pages.figure_faults(notebook)) == 1
    figure.metadata = {}
    assert len(pages.figure_faults(notebook)) == 1


def test_a_figure_with_a_name_is_alone_in_its_cell():
    notebook = chapter()
    cell = notebook.cells[4]
    cell.metadata.mystnb.figure = {"name": "fig-loss", "caption": "The loss."}
    assert pages.figure_faults(notebook) == []
    cell.outputs.append(cell.outputs[0])
    assert len(pages.figure_faults(notebook)) == 1


def test_a_page_is_read_cell_by_cell(folder):
    notebook = chapter()
    notebook.cells.append(new_markdown_cell("the end"))
    notebooks.write(notebook, folder / "02_math.ipynb")
    assert pages.read(folder / "02_math.ipynb")[-1] == "the end"
    assert pages.read(folder / "glossary.md")[0].startswith("# Glossary")
