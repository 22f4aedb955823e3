"""The small assistant's tokens are the small model's own, and each mistake is the one it says."""

import pytest
import torch

from lora_lib.experiments import stopping, sweep
from lora_lib.text import Tokenizer
from lora_lib.torch import check, exact_match
from lora_lib.tuning.data import encode, prompt_ids

ASKED = stopping.pairs(40, seed=3)


@pytest.fixture(autouse=True, scope="module")
def torch_on_one_thread(one_thread):
    pass


def test_the_tokenizer_gives_the_numbers_that_the_model_was_trained_on():
    ours, own = stopping.chat_tokenizer(), Tokenizer()
    assert len(ours) == len(own)
    for prompt, answer in ASKED:
        text = f"{prompt}\nA: {answer}"
        assert ours(text)["input_ids"] == own.encode(text)
        assert ours.decode(own.encode(text)) == text
        assert prompt_ids(ours, prompt) == [own.end, *own.encode(f"{prompt}\nA:")]


def test_rows_are_filled_up_and_their_answers_known():
    tokenizer = stopping.chat_tokenizer()
    ids, real, answer = stopping.padded(tokenizer, ASKED)
    for row, here, said, (prompt, word) in zip(ids, real, answer, ASKED):
        assert tokenizer.decode(row[here]) == f"<end>{prompt}\nA: {word}<end>"
        assert tokenizer.decode(row[said]) == f" {word}<end>"
        assert bool((row[~here] == tokenizer.pad_token_id).all())


@pytest.mark.parametrize("mistake, code", [
    ("none", []), ("end masked", ["end masked"]), ("wrong template", ["template"])])
def test_the_data_hold_the_mistake_and_no_other(monkeypatch, mistake, code):
    monkeypatch.setattr(stopping, "STEPS", 6)
    data, tokenizer = stopping.data(mistake), stopping.chat_tokenizer()
    model = stopping.tuned(data, seed=0)
    assert [f.code for f in check(model, data=data, tokenizer=tokenizer)] == code


def test_the_mask_by_the_paddings_token_is_what_the_trial_trains_on():
    """As the chapter plants it: the end mark lent to the padding."""
    tokenizer, examples = stopping.chat_tokenizer(), stopping.pairs(1000, seed=0)
    tokenizer.pad_token = tokenizer.eos_token
    ids, _, answer = stopping.padded(tokenizer, examples)
    labels = ids.where(answer, -100)
    labels[ids == tokenizer.pad_token_id] = -100
    assert torch.equal(labels[:, 1:], stopping.data("end masked")[1])


def test_an_answer_ends_at_its_mark_or_at_the_limit(monkeypatch):
    monkeypatch.setattr(stopping, "STEPS", 40)
    tokenizer, prompt = stopping.chat_tokenizer(), ASKED[0][0]
    model = stopping.tuned(encode(tokenizer, ASKED[:1] * 8), seed=0)
    assert stopping.said(model, tokenizer, prompt) == f"{ASKED[0][1]}<end>"
    assert exact_match(model, tokenizer, ASKED[:1]) == 1
    monkeypatch.setattr(stopping, "MOST", 1)
    assert stopping.said(model, tokenizer, prompt) == ASKED[0][1]


def test_what_is_kept():
    rows = sweep.read("stopping")
    assert [(row["mistake"], row["seed"]) for row in rows] == [
        (mistake, seed) for mistake in stopping.MISTAKES for seed in stopping.SEEDS]
    assert all(row["right"] == row["as trained"] for row in rows
               if row["mistake"] != "wrong template")
