"""The built pages, when `make book` has built them."""

import pytest
from bs4 import BeautifulSoup

import notebooks

HTML = notebooks.ROOT / "_build" / "html"
PAGES = sorted(path.stem for path in notebooks.BOOK.glob("*.*") if path.suffix in (".md", ".ipynb"))

pytestmark = pytest.mark.skipif(not HTML.is_dir(), reason="the book is not built: make book")
each_page = pytest.mark.parametrize("name", PAGES)


def page(name: str) -> BeautifulSoup:
    path = HTML / "book" / f"{name}.html"
    assert path.is_file(), f"{name} is not among the built pages: run make book"
    return BeautifulSoup(path.read_text("utf8"), "html.parser")


@each_page
def test_math_is_handed_to_mathjax(name):
    article = page(name).find("article")
    for code in article.find_all(["pre", "code"]):
        code.decompose()
    assert "$" not in article.get_text()


@each_page
def test_every_image_has_words(name):
    """Of a picture shown panel by panel the first panel has them for all."""
    for image in page(name).find_all("img"):
        before = image.find_previous_sibling("img")
        further = image.get("data-panels") == "one" and before.get("data-panels") == "one"
        assert image.get("alt") or further and before["src"] == image["src"], image


@each_page
def test_a_page_loads_nothing_from_elsewhere(name):
    soup = page(name)
    loaded = [tag["src"] for tag in soup.find_all(["script", "img", "iframe"], src=True)]
    sheets = {"stylesheet", "preload", "icon"}
    loaded += [link["href"] for link in soup.find_all("link") if sheets & set(link["rel"])]
    assert [a for a in loaded if "//" in a and not a.startswith("data:image/")] == []


@each_page
def test_a_page_has_nothing_of_thebe(name):
    assert "thebe" not in str(page(name).find_all(["script", "link"])).lower()


def test_the_book_opens_at_its_first_page():
    assert "book/index.html" in (HTML / "index.html").read_text("utf8")
    assert (HTML / "_static" / "mathjax" / "startup.js").is_file()
    assert "mathjax/startup.js" in (HTML / "book" / "02_math.html").read_text("utf8")
    assert (HTML / "_static" / "scripts" / "fontawesome.js").stat().st_size == 0


@each_page
def test_a_page_tells_what_it_is_about(name):
    metas = {tag.get("name") or tag.get("property"): tag.get("content")
             for tag in page(name).find_all("meta")}
    assert 40 <= len(metas["description"]) <= 202 and metas["og:description"] == metas["description"]
    assert metas["og:title"] and metas["og:url"].endswith(f"/book/{name}.html")


@each_page
def test_a_fold_is_named_by_its_own_words(name):
    folds = page(name).find("article").find_all("summary")
    assert [fold for fold in folds if fold.get("aria-label") or not fold.get_text(strip=True)] == []
