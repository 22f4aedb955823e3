"""What pages say of themselves."""

import matplotlib.pyplot as plt
import numpy as np
import page_finish
import page_pictures
import pytest
from bs4 import BeautifulSoup
from PIL import Image


def test_a_description_is_the_first_words_without_equations():
    body = "<h1>T</h1><p>Why <em>so</em> small &amp; good?</p>\n<p>It is \\(x\\).</p><p>Then this.</p>"
    assert page_finish.description(body) == "Why so small & good? Then this."
    long = "<p>" + "word " * 100 + "</p>"
    assert len(page_finish.description(long)) <= page_finish.LONGEST + 2
    assert page_finish.description(long).endswith("word …")


def panels_of(path, count):
    """A picture of so many panels, stored as the chapters' pictures are."""
    _, axes = plt.subplots(1, count, figsize=(3 * count, 2.5), layout="constrained")
    for ax in np.atleast_1d(axes):
        ax.imshow(np.arange(6).reshape(2, 3))
        ax.set_ylabel("rank")
    plt.savefig(path, dpi=150)
    plt.close()
    return path


@pytest.mark.parametrize("count", [2, 3])
def test_panels_are_parted_where_nothing_is_drawn(tmp_path, count):
    path = panels_of(tmp_path / "a.png", count)
    with Image.open(path) as picture:
        found = page_pictures.panels(picture)
        width, pixels = picture.width, np.asarray(picture.convert("L"))
    assert [first for first, _ in found] == [0, *(last for _, last in found[:-1])]
    assert len(found) == count and found[-1][1] == width
    for first, last in found:
        assert last - first == pytest.approx(width / count, rel=0.12)
        assert (pixels[:, first] == 255).all()


def test_a_picture_of_panels_is_in_the_page_whole_and_by_panels(tmp_path):
    path = panels_of(tmp_path / "a.png", 2)
    body = '<p><img alt="two" class="panels" src="../_images/a.png" /><img alt="b" src="b.png" /></p>'
    page = BeautifulSoup(page_pictures.stacked(body, {"a.png": path}), "html.parser")
    whole, left, right, other = page.find_all("img")
    assert whole["data-panels"] == "whole" and other["src"] == "b.png"
    assert left["src"] == right["src"] == whole["src"] == "../_images/a.png"
    assert (whole["alt"], left["alt"], right["alt"]) == ("two", "two", "")
    assert "object-position: 0.00% 0" in left["style"]
    assert "object-position: 100.00% 0" in right["style"]
    with Image.open(path) as picture:
        width = round(0.75 * picture.width)
    sized = page_pictures.sized(body, {"a.png": path})
    assert f'<img width="{width}" alt="two"' in sized and '<img alt="b" src="b.png"' in sized
    one = panels_of(tmp_path / "c.png", 1)
    with pytest.raises(ValueError, match="no panels are found in c.png"):
        page_pictures.stacked('<img alt="" class="panels" src="c.png" />', {"c.png": one})
