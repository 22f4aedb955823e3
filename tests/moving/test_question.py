import nbformat
import pytest

from lora_lib import moving
from tests.moving.node import call
from tests.moving.stored import BOOK, data

STORED = [(path.stem, cell.id) for path in sorted(BOOK.glob("*.ipynb"))
          for cell in nbformat.read(path, as_version=4).cells
          if 'data-figure="question"' in str(cell.get("outputs"))]


def test_questions_are_found():
    assert len(STORED) > 9


def test_nothing_is_said_before_a_choice():
    assert call("question", "() => verdict(undefined)") == "Choose one first."


@pytest.mark.parametrize("chapter, cell", STORED)
def test_every_answer_is_explained(chapter, cell):
    answers = data(chapter, cell)["answers"]
    said = call("question", "(answers) => answers.map(verdict)", answers)
    assert [text.startswith("Right. ") for text in said] == [one["right"] for one in answers]
    assert sum(one["right"] for one in answers) == 1
    (right,) = (one["text"] for one in answers if one["right"])
    for one, text in zip(answers, said):
        assert len(one["why"].split()) > 4 and text.endswith(one["why"])
        assert one["right"] or right not in text             # which one is right is not given away


def test_the_right_answer_is_one_of_them():
    with pytest.raises(ValueError, match="'c' is not among"):
        moving.ask("?", {"a": "", "b": ""}, right="c")
