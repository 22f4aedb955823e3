"""Every mistake in token rows is planted and found, alone; clean rows of many kinds give none."""

import copy

import pytest
import torch

from lora_lib.models import load_pretrained, smollm2
from lora_lib.torch import check, inject, remove
from lora_lib.torch.check import DATA
from lora_lib.tuning.data import Rows, encode
from tests.tuning.tiny import CHAT, PAIRS, byte_tokenizer, causal

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"},
         {"role": "assistant", "content": "Hi there."}, {"role": "user", "content": "A colour?"},
         {"role": "assistant", "content": "Red, if I may choose."}]
ALPACA = ("{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
          "### Response:\n{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")
LLAMA2 = ("{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
          " {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}")
GEMMA = ("{{ bos_token }}{% for m in messages %}<start_of_turn>"
         "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n"
         "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")


@pytest.fixture(scope="module")
def smol():
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(smollm2.folder())


@pytest.fixture(scope="module")
def model():
    return inject(causal(vocab_size=49152, tie_word_embeddings=True), ["q_proj"], rank=2, seed=0)


def codes(model, data, tokenizer, **options):
    return [f.code for f in check(model, data=data, tokenizer=tokenizer, **options)]


def by_hand(tokenizer, examples=PAIRS, side="right", pad=None, mask="answers", add=False):
    """Tokens and labels (rows, length) as a collator of transformers makes them, not yet shifted.

    `mask` says what is learned: the answers, the answers with all that follows, everything, or
    what is not the padding token.
    """
    pad = tokenizer.pad_token_id if pad is None else pad
    ids, labels = [], []
    for example in examples:
        messages = example if isinstance(example, list) else [
            {"role": "user", "content": example[0]}, {"role": "assistant", "content": example[1]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        before = tokenizer.apply_chat_template(messages[:-1], tokenize=False,
                                               add_generation_prompt=True)
        row = tokenizer(text, add_special_tokens=add)["input_ids"]
        start = len(tokenizer(before, add_special_tokens=add)["input_ids"])
        learned = row if mask in ("everything", "padding too") else [-100] * start + row[start:]
        ids.append(row)
        labels.append(learned)
    longest = max(map(len, ids))
    place = lambda row, fill: (row + fill if side == "right" else fill + row)  # noqa: E731
    fill = pad if mask == "padding too" else -100
    labels = [place(row, [fill] * (longest - len(row))) for row in labels]
    ids = [place(row, [pad] * (longest - len(row))) for row in ids]
    return torch.tensor(ids), torch.tensor(labels)


def shifted(ids, labels):
    return ids[:, :-1], labels[:, 1:]


# --- no false alarm -----------------------------------------------------------------------------

EXAMPLES = {"pairs": PAIRS, "several turns": [TURNS, *PAIRS], "texts": ["A tale.", "Another one."],
            "mixed": [TURNS, "A tale.", *PAIRS], "one word": [("Yes or no?", "no")],
            "line breaks": [("\nWhy?\n", "\nSo.\n\nThat is it.\n")],
            "marks in the words": [*PAIRS, ("What is [/INST]?", "A mark: ### Response:")]}


@pytest.mark.parametrize("examples", EXAMPLES.values(), ids=EXAMPLES)
@pytest.mark.parametrize("template", ["smollm2", None, CHAT, LLAMA2, GEMMA, ALPACA])
def test_what_encode_gives_is_clean(model, smol, template, examples):
    tokenizer = smol if template == "smollm2" else byte_tokenizer(
        template, marks=("<end>", "<begin>"), bos_token="<begin>")
    assert check(model, data=encode(tokenizer, examples), tokenizer=tokenizer) == []
    assert check(model, data=encode(tokenizer, examples).tensors(), tokenizer=tokenizer) == []


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("examples", [PAIRS, [TURNS, *PAIRS]])
def test_rows_made_by_hand_are_clean(model, smol, side, examples):
    """Answers learned with the line break that the template puts behind their end mark."""
    assert check(model, data=shifted(*by_hand(smol, examples, side)), tokenizer=smol) == []
    other = by_hand(smol, examples, side, pad=smol.convert_tokens_to_ids("<|endoftext|>"))
    assert check(model, data=shifted(*other), tokenizer=smol) == []
    ids, labels = other
    last = (labels != -100).int().cumsum(1).argmax(1)        # the line break not learned
    labels[torch.arange(len(ids)), last] = -100
    assert check(model, data=shifted(ids, labels), tokenizer=smol) == []


def test_texts_padded_by_hand_are_clean(model, smol):
    texts = [smol(t)["input_ids"] + [2] for t in ("A tale.", "Another tale, longer.", "No")]
    longest = max(map(len, texts))
    for side in (0, 1):
        fill = lambda row, x: (row + [x] * (longest - len(row)) if side  # noqa: E731
                               else [x] * (longest - len(row)) + row)
        ids = torch.tensor([fill(row, 2) for row in texts])
        labels = torch.tensor([fill(row, -100) for row in texts])
        assert check(model, data=shifted(ids, labels), tokenizer=smol) == []


def test_a_mark_that_ends_a_turn_counts_as_an_end(model, smol):
    """Gemma's template by hand: no <eos>, and the model's own settings name <end_of_turn>."""
    tokenizer = byte_tokenizer(GEMMA, marks=("<end>", "<begin>", "<end_of_turn>", "<pad>"),
                               bos_token="<begin>", pad_token="<pad>")
    data = shifted(*by_hand(tokenizer))
    assert codes(model, data, tokenizer) == ["no end mark"]
    gemma = copy.copy(model)
    gemma.generation_config = copy.copy(model.generation_config)
    gemma.generation_config.eos_token_id = [0, 2]
    assert codes(gemma, data, tokenizer) == []


# --- planted mistakes ---------------------------------------------------------------------------

def masked_with_the_padding(smol):
    ids, labels = by_hand(smol)
    labels[ids == smol.pad_token_id] = -100
    return shifted(ids, labels), ["end masked"]


def masked_with_the_padding_in_every_turn(smol):
    ids, labels = by_hand(smol, [TURNS])
    hi = smol("Hi there.<|im_end|>")["input_ids"]
    at = next(i for i in range(ids.shape[1]) if ids[0, i:i + len(hi)].tolist() == hi)
    labels[0, at:at + len(hi) - 1] = ids[0, at:at + len(hi) - 1]
    return shifted(ids, labels), ["end masked"]


def masked_at_the_very_end(smol):
    """No line break behind the mark, and the longest row has no padding."""
    rows = encode(smol, PAIRS)
    labels = [torch.cat([row[:-1], torch.tensor([-100])]) for row in rows.labels]
    return Rows(rows.inputs, labels, rows.pad), ["end masked"]


def never_added(smol):
    rows = encode(smol, PAIRS)
    return Rows([x[:-1] for x in rows.inputs], [y[:-1] for y in rows.labels], 2), ["no end mark"]


def cut_by_hand(smol):
    ids, labels = by_hand(smol, [(prompt, 20 * answer) for prompt, answer in PAIRS])
    return shifted(ids[:, :60], labels[:, :60]), ["no end mark"]


def all_behind_the_first_answer(smol):
    ids, labels = by_hand(smol, [TURNS])
    hi = smol("Hi")["input_ids"][0]
    at = ids[0].tolist().index(hi)
    labels[0, at:] = ids[0, at:]
    return shifted(ids, labels), ["goes on"]


def the_next_example_behind_the_answer(smol):
    ids, labels = by_hand(smol, PAIRS[:1])
    return shifted(ids.repeat(1, 2), torch.cat([labels, ids], 1)), ["goes on"]


def another_template(template):
    def plant(smol):
        other = copy.deepcopy(smol)
        other.chat_template = template
        return encode(other, PAIRS), ["template"]
    return plant


def no_template(smol):
    pairs = [(smol(p)["input_ids"], smol(a)["input_ids"] + [2]) for p, a in PAIRS]
    return Rows([torch.tensor((p + a)[:-1]) for p, a in pairs],
                [torch.tensor(([-100] * len(p) + a)[1:]) for p, a in pairs], 2), ["template"]


def a_template_within_the_template(smol):
    return encode(smol, [(f"### Instruction:\n{p}\n\n### Response:\n", a)
                         for p, a in PAIRS]), ["template"]


def another_template_as_texts(smol):
    return encode(smol, [f"### Instruction:\n{p}\n\n### Response:\n{a}"
                         for p, a in PAIRS]), ["template"]


def all_masked_in_some(smol):
    ids, labels = by_hand(smol)
    labels[1:3] = -100
    return shifted(ids, labels), ["nothing learned"]


def all_masked_in_all(smol):
    ids, labels = by_hand(smol)
    return shifted(ids, torch.full_like(labels, -100)), ["nothing learned"]


def cut_off(smol):
    return encode(smol, [*PAIRS, ("Say red", "rose " * 50)], length=60), ["cut off"]


def left_out(smol):
    return encode(smol, [("Say red " * 60, "A rose."), *PAIRS], length=60), ["left out"]


def cut_off_behind_one_left_out(smol):
    return encode(smol, [("Say red " * 60, "A rose."), ("Say red", "rose " * 50), *PAIRS],
                  length=60), ["cut off", "left out"]


def not_shifted(smol):
    return by_hand(smol), ["not shifted"]


def not_shifted_and_short(smol):
    """Where the only label is the last, a row looks right by itself."""
    ids, labels = by_hand(smol, [("Say 7", "A seven"), ("Say 5", "B")])
    return (ids, labels), ["not shifted"]


def shifted_twice(smol):
    ids, labels = by_hand(smol)
    return (ids[:, :-2], labels[:, 2:]), ["shifted twice"]


def only_the_prompt_in_the_inputs(smol):
    ids = smol(["Say red to me", "Say blue to me"], return_tensors="pt")["input_ids"]
    labels = smol(["A rose is a", "A sky is the"], return_tensors="pt")["input_ids"]
    return (ids, labels[:, :ids.shape[1]]), ["not next"]


def the_prompt_learned(smol):
    return shifted(*by_hand(smol, mask="everything")), ["prompt learned"]


def the_prompts_of_several_turns_learned(smol):
    return shifted(*by_hand(smol, [TURNS, *PAIRS], mask="everything")), ["prompt learned"]


def a_part_of_the_prompt_learned(smol):
    ids, labels = by_hand(smol)
    labels[:, 10:35] = ids[:, 10:35]
    labels[ids == 2] = torch.where(labels[ids == 2] == 2, 2, -100)
    return shifted(ids, labels), ["prompt learned"]


def beyond_the_vocabulary(smol):
    rows = encode(smol, PAIRS)
    rows.inputs[2][5] = 49152
    return rows, ["vocabulary"]


def another_mask(smol):
    ids, labels = by_hand(smol)
    labels[labels == -100] = -1
    return shifted(ids, labels), ["vocabulary"]


def padding_learned(side, pad):
    def plant(smol):
        ids, labels = by_hand(smol, side=side, pad=smol.convert_tokens_to_ids(pad))
        padding = ids == smol.convert_tokens_to_ids(pad)
        edge = padding.cumprod(1) if side == "left" else padding.flip(1).cumprod(1).flip(1)
        labels = ids.where(edge.bool(), labels)
        smol = copy.deepcopy(smol)
        smol.pad_token = pad
        return shifted(ids, labels), ["padding learned"], smol
    return plant


PLANTED = [
    masked_with_the_padding, masked_with_the_padding_in_every_turn, masked_at_the_very_end,
    never_added, cut_by_hand, all_behind_the_first_answer, the_next_example_behind_the_answer,
    another_template(ALPACA), another_template(LLAMA2), another_template(CHAT), no_template,
    a_template_within_the_template, another_template_as_texts, all_masked_in_some,
    all_masked_in_all, cut_off, left_out, cut_off_behind_one_left_out, not_shifted,
    not_shifted_and_short, shifted_twice, only_the_prompt_in_the_inputs, the_prompt_learned,
    the_prompts_of_several_turns_learned, a_part_of_the_prompt_learned, beyond_the_vocabulary,
    another_mask, padding_learned("right", "<|endoftext|>"), padding_learned("right", "<|im_end|>"),
    padding_learned("left", "<|endoftext|>"), padding_learned("left", "<|im_end|>")]


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__qualname__)
def test_a_planted_mistake_is_found_and_nothing_else(model, smol, plant):
    data, expected, *tokenizer = plant(smol)
    findings = check(model, data=data, tokenizer=tokenizer[0] if tokenizer else smol)
    assert [f.code for f in findings] == expected
    assert all(f.message == DATA[f.code] and f.where for f in findings)
    assert codes(model, data, smol, allow=DATA) == []


@pytest.mark.parametrize("mean_resizing", [True, False])
def test_frozen_rows_of_new_tokens_are_found_until_they_are_trained(smol, mean_resizing):
    """As transformers draws them, in both of its ways, beside SmolLM2's own rows."""
    model, tokenizer = load_pretrained("smollm2"), copy.deepcopy(smol)
    tokenizer.add_tokens(["<glad>", "<sad>", "<never>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=mean_resizing)
    data = encode(tokenizer, [*PAIRS, ("Is Mira <glad>?", "She is <sad>.")])
    inject(model, ["q_proj"], rank=2, seed=0)
    found = check(model, data=data, tokenizer=tokenizer)
    assert [f.code for f in found] == ["new token"]
    assert found[0].where == ("token 49152, '<glad>'", "token 49153, '<sad>'")
    model.model.embed_tokens.weight.requires_grad_(True)
    assert codes(model, data, tokenizer, also_trained=["model.embed_tokens.weight"]) == []
    model.model.embed_tokens.weight.requires_grad_(False)
    remove(model)
    inject(model, ["q_proj"], rank=2, seed=0, trainable_token_indices=[49152, 49153])
    assert codes(model, data, tokenizer) == []


def test_the_tokens_of_pretrained_models_are_not_new(smol):
    model = inject(load_pretrained("smollm2"), ["q_proj"], rank=2, seed=0)
    numbers = torch.arange(49152)[None]
    assert "new token" not in codes(model, (numbers, numbers), smol)


@pytest.mark.parametrize("template", [None, "{{ bos_token }}" + CHAT])
def test_two_begin_marks(model, template):
    from tokenizers.processors import TemplateProcessing
    tokenizer = byte_tokenizer(template, marks=("<end>", "<begin>"), bos_token="<begin>")
    rows = encode(tokenizer, PAIRS)
    one = torch.tensor([1])
    begun = rows if template else Rows([torch.cat([one, x]) for x in rows.inputs],
                                       [torch.cat([-100 * one, y]) for y in rows.labels], 0)
    assert codes(model, begun, tokenizer) == []
    twice = Rows([torch.cat([one, x]) for x in begun.inputs],
                 [torch.cat([-100 * one, y]) for y in begun.labels], 0)
    assert codes(model, twice, tokenizer) == ["two begins"]
    if template:                          # as it comes about: the template's text, tokenized again
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<begin> $A", special_tokens=[("<begin>", 1)])
        tokenizer.pad_token = "<end>"
        for side in ("right", "left"):
            again = by_hand(tokenizer, side=side, add=True)
            assert codes(model, shifted(*again), tokenizer) == ["two begins"]
            assert codes(model, shifted(*by_hand(tokenizer, side=side)), tokenizer) == []


def test_what_transformers_own_collator_masks(model, smol):
    """Its collator for language models masks padding by the token: the end mark, with SmolLM2."""
    from transformers import DataCollatorForLanguageModeling
    collate = DataCollatorForLanguageModeling(smol, mlm=False)
    texts = collate([smol(text + "<|im_end|>") for text in ("A tale.", "Another tale, longer.")])
    assert codes(model, shifted(texts["input_ids"], texts["labels"]), smol) == ["end masked"]
    assert codes(model, (texts["input_ids"], texts["labels"]), smol) == ["not shifted",
                                                                         "end masked"]
    chats = collate([{"input_ids": by_hand(smol, [pair])[0][0]} for pair in PAIRS])
    assert codes(model, shifted(chats["input_ids"], chats["labels"]), smol) == [
        "prompt learned", "end masked"]


def test_every_code_is_planted(smol):
    planted = {code for plant in PLANTED for code in plant(smol)[1]}
    assert planted | {"two begins", "new token"} == set(DATA)       # these two have their own tests


def test_the_rows_are_named(model, smol):
    data, _ = all_masked_in_some(smol)
    assert check(model, data=data, tokenizer=smol)[0].where == ("row 1", "row 2")
    data, _ = cut_off_behind_one_left_out(smol)
    found = check(model, data=data, tokenizer=smol)
    assert [f.where for f in found] == [("example 1",), ("example 0",)]
    assert str(found[0]).startswith("[cut off] example 1: its answer is cut off")


def test_a_mistake_in_one_row_among_many_is_named(model, smol):
    rows = encode(smol, [*PAIRS, ("Say red " * 60, "A rose."), *PAIRS], length=60)
    rows.labels[5][-1] = -100
    found = check(model, data=rows, tokenizer=smol, allow={"left out"})
    assert [(f.code, f.where) for f in found] == [("end masked", ("example 6",))]


def test_the_models_own_tokenizer_is_taken(model, smol):
    model.tokenizer = smol
    try:
        assert [f.code for f in check(model, data=not_shifted(smol)[0])] == ["not shifted"]
    finally:
        del model.tokenizer
    only_padding = torch.full((1, 9), 2), torch.full((1, 9), 2)
    assert codes(model, only_padding, smol) == ["padding learned"]
    with pytest.raises(ValueError, match="tokenizer must be one of transformers' with an eos_tok"):
        check(model, data=encode(smol, PAIRS))


@pytest.mark.parametrize("data", [
    torch.ones(3, 4), (torch.ones(3, 4), torch.ones(3, 4)),
    (torch.ones(3, 4, dtype=torch.long), torch.ones(3, dtype=torch.long)), [[1, 2], [2, 3]]])
def test_what_is_no_data(model, smol, data):
    with pytest.raises(ValueError, match="data must be Rows, or token numbers"):
        check(model, data=data, tokenizer=smol)
