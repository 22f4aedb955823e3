import pytest
from markdown_it import MarkdownIt

from lora_lib import tables


def test_numbers_stand_on_the_right_and_words_on_the_left():
    text = tables.markdown([("q | v", "1,024", 3), ("all", "-0.5 %", 12)], "targets", "numbers", "r")
    html = MarkdownIt().enable("table").render(text)
    assert html.count('style="text-align:left"') == 3 and html.count("text-align:right") == 6
    assert "<td style=\"text-align:left\">q | v</td>" in html and "1,024" in html


@pytest.mark.parametrize("cell, number", [("0.47", True), ("+0.02", True), ("3.1 ms", True), ("–", True),
                                          ("2 of 3", False), ("0.5 ± 0.1", False)])
def test_what_is_a_number(cell, number):
    assert ("--:" in tables.markdown([(cell,)], "a")) == number


def test_a_row_has_a_cell_for_each_heading():
    with pytest.raises(ValueError, match="a row needs 2 cells"):
        tables.markdown([(1, 2, 3)], "a", "b")
