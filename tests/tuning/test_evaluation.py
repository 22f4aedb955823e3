"""Losses and right answers against the model's own logits and its own greedy writing."""

import pytest
import torch
import torch.nn.functional as F

from lora_lib.models import load_pretrained
from lora_lib.tuning.data import encode, prompt_ids
from lora_lib.tuning.evaluation import exact_match, mean_loss, replies, reply
from lora_lib.tuning.recipe import instruction_tune
from tests.tuning.tiny import CHAT, PAIRS, byte_tokenizer, causal

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"},
         {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Name a colour"}]
QUESTIONS = ["Hi", "Name three colours of the rainbow.", "What is 2 + 2?", TURNS]


@pytest.fixture(scope="module")
def smol():
    return load_pretrained("smollm2")


@pytest.fixture(scope="module")
def taught():
    """A random model that has learned three of four answers by heart."""
    model = causal()
    rows = encode(byte_tokenizer(), PAIRS[:3])
    instruction_tune(model, rows, lr=1e-2, steps=100, batch_size=3, progress=False)
    return model


def greedy(model, ids, most=60):
    """The likeliest token each time, one row and one token at a time, all logits, no cache."""
    ids, start = list(ids), len(ids)
    with torch.no_grad():
        while len(ids) < start + most and (len(ids) == start or ids[-1] != model.end):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[start:]


@pytest.mark.parametrize("batch_size", [1, 3, 256])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "cohere"])
def test_the_loss_is_the_mean_over_tokens_of_all_rows(kind, batch_size):
    """Not the mean over rows or batches: answers of many lengths, several turns, a text."""
    model, tokenizer = causal(kind, torch.float64), byte_tokenizer()
    examples = [*PAIRS, [*TURNS, {"role": "assistant", "content": "Red"}], "A whole tale."]
    rows, total, count = encode(tokenizer, examples), 0.0, 0
    with torch.no_grad():
        for inputs, labels in zip(rows.inputs, rows.labels):
            log = F.log_softmax(model(inputs[None]).logits[0], -1)
            for position, label in enumerate(labels.tolist()):
                if label != -100:
                    total, count = total - log[position, label].item(), count + 1
    assert mean_loss(model, tokenizer, examples, batch_size) == pytest.approx(total / count,
                                                                              rel=1e-9)
    assert mean_loss(model, None, rows, batch_size) == pytest.approx(total / count, rel=1e-9)


def test_exact_match_is_what_greedy_writing_would_give(taught):
    tokenizer = byte_tokenizer()
    taught.end = tokenizer.eos_token_id
    right = [greedy(taught, prompt_ids(tokenizer, prompt)) == [*tokenizer(answer)["input_ids"], 0]
             for prompt, answer in PAIRS]
    assert right == [True, True, True, False]
    assert exact_match(taught, tokenizer, PAIRS) == exact_match(taught, tokenizer, PAIRS, 1) == 0.75
    assert exact_match(taught, tokenizer, PAIRS[:3]) == 1 and exact_match(taught, tokenizer,
                                                                          PAIRS[3:]) == 0


def test_an_answer_that_goes_on_is_no_match(taught):
    """The end mark belongs to the answer: "A ros" is only the beginning of what is written."""
    tokenizer = byte_tokenizer()
    assert exact_match(taught, tokenizer, [("Say red", "A rose.")]) == 1
    assert exact_match(taught, tokenizer, [("Say red", "A ros")]) == 0


def test_a_real_models_replies_are_its_greedy_writing(smol):
    tokenizer = smol.tokenizer
    smol.end = tokenizer.eos_token_id
    expected = [tokenizer.decode(greedy(smol, prompt_ids(tokenizer, q), 12),
                                 skip_special_tokens=True).strip() for q in QUESTIONS]
    together = replies(smol, tokenizer, QUESTIONS, max_new_tokens=12)
    assert together == expected and len(set(together)) == 4
    assert [reply(smol, tokenizer, q, max_new_tokens=12) for q in QUESTIONS] == expected


def test_padding_on_the_left_is_not_seen(taught):
    """Prompts of very different lengths, in any order and any batches, as each alone."""
    tokenizer = byte_tokenizer()
    prompts = ["Say green" * 9, "Say red", "S", "Say green", TURNS, "Say blue"]
    alone = [reply(taught, tokenizer, prompt, max_new_tokens=20) for prompt in prompts]
    assert alone[1] == "A rose." and alone[5] == "The sky is."
    for size in (2, 4, 16):
        assert replies(taught, tokenizer, prompts, max_new_tokens=20, batch_size=size) == alone


def test_a_reply_ends_at_its_mark(taught):
    """"Grass" ends before the longer answers beside it do, and is not filled up."""
    tokenizer = byte_tokenizer()
    said = replies(taught, tokenizer, ["Say green", "Say blue"], skip_special_tokens=False)
    assert said == ["Grass<end>", "The sky is.<end>"]
    assert reply(taught, tokenizer, "Say blue", max_new_tokens=3) == "The"


def test_a_mark_of_the_models_own_ends_a_reply_too(taught):
    """As with Gemma, whose turns end in <end_of_turn> and whose tokenizer says <eos>."""
    tokenizer = byte_tokenizer()
    stop = tokenizer(".")["input_ids"]
    taught.generation_config.eos_token_id = stop
    try:
        assert reply(taught, tokenizer, "Say red", skip_special_tokens=False) == "A rose."
    finally:
        taught.generation_config.eos_token_id = 0


def test_modes_are_put_back(taught):
    taught.train()
    taught.lm_head.eval()
    mean_loss(taught, byte_tokenizer(), PAIRS)
    reply(taught, byte_tokenizer(), "Say red", max_new_tokens=1)
    assert taught.training and not taught.lm_head.training
    taught.eval()


def test_nothing_is_measured_on_a_part_in_silence(taught):
    tokenizer, long = byte_tokenizer(CHAT), [*PAIRS, ("Say red", "rose " * 300)]
    for measure in (mean_loss, exact_match):
        with pytest.raises(ValueError, match="example 4 is longer than 1024 tokens"):
            measure(taught, tokenizer, long)
        with pytest.raises(ValueError, match="at least one example, got none"):
            measure(taught, tokenizer, [])
    assert exact_match(taught, tokenizer, encode(tokenizer, long, length=2000)) == 0.6
