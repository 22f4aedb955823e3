"""Every page of the book passes every check."""

import nbformat
import pytest
import yaml

import notebooks

from . import markdown, pages, prose

ROOT = notebooks.ROOT
CHAPTERS = notebooks.chapters()
# A bibliography is years and volumes, each beside its link.
BIBLIOGRAPHY = "references.md"
TEXTS = sorted(notebooks.BOOK.glob("*.md"))
PAGES = CHAPTERS + TEXTS

each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


@each_chapter
def test_every_number_in_the_prose_has_a_source(path):
    assert prose.faults(read(path)) == []


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_a_number_on_a_text_page_is_printed_by_some_chapter(path):
    if path.name == BIBLIOGRAPHY:
        pytest.skip("a bibliography is checked by its links")
    shown = [number for chapter in CHAPTERS for number in prose.printed(read(chapter))]
    assert prose.text_faults(path.read_text("utf8"), shown) == []


@each_chapter
def test_every_figure_has_words(path):
    assert pages.figure_faults(read(path)) == []


@each_chapter
def test_the_stored_form_is_clean(path):
    assert notebooks.file_faults(path, notebooks.repository()) == []


@each_page
def test_every_link_leads_somewhere(path):
    assert pages.link_faults(path) == []


def test_no_two_figures_have_one_name():
    names = [name for path in CHAPTERS for cell in read(path).cells
             if (name := markdown.figure(cell).get("name"))]
    assert len(names) == len(set(names)) > 20


@each_page
def test_the_page_reads_the_same_everywhere(path):
    assert [fault for text in pages.read(path) for fault in pages.markup_faults(text)] == []


@each_page
def test_the_page_says_what_was_seen(path):
    assert [fault for text in pages.read(path) for fault in pages.wording_faults(text)] == []


def test_the_table_of_contents_names_every_page():
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text("utf8"))
    named = [contents["root"]]
    named += [entry["file"] for part in contents["parts"] for entry in part["chapters"]]
    assert sorted(named) == sorted(f"book/{path.stem}" for path in PAGES)
