import pytest

from lora_lib import moving
from tests.moving.node import call
from tests.moving.stored import data

STORED = [("01_idea", "c31a"), ("01_idea", "c39a"), ("02_math", "code-39a"), ("02_math", "code-53a")]


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
        assert len(one["why"]) > 40 and text.endswith(one["why"])
        assert one["right"] or right not in text             # which one is right is not given away


def test_the_right_answer_is_one_of_them():
    with pytest.raises(ValueError, match="'c' is not among"):
        moving.ask("?", {"a": "", "b": ""}, right="c")
