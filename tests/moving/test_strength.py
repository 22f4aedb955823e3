"""The figure of an adapter's strength shows the runs of the comparison at its two ends."""

import pytest

from lora_lib.experiments import assistant, strength
from lora_lib.experiments.sweep import read
from tests.moving.node import call
from tests.moving.stored import data

CHAPTER = "10_real_model"


@pytest.fixture(scope="module")
def figure():
    return data(CHAPTER, "real-25")


def test_the_figure_has_the_rows(figure):
    assert figure == strength.data(read("strength"))
    assert [each["strength"] for each in figure["strengths"]] == list(strength.STRENGTHS)


def test_the_page_says_the_loss_of_its_table(figure):
    said = call("strength", "(strengths, tested) => strengths.map((at) => sentence(at, tested))",
                figure["strengths"], figure["tested"])
    ends = {0: "base", 1: "LoRA"}
    for each, text in zip(figure["strengths"], said):
        if method := ends.get(each["strength"]):
            loss = assistant.compared("calls", method, "loss")[0]
            assert f"a loss of {loss:.2f} nats" in text and "of the 64 calls" in text
