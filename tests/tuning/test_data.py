"""Rows against transformers' own templates, masks and losses; adapters against PEFT."""

import pytest
import torch

from lora_lib.models import smollm2
from lora_lib.torch import lora_modules, merge, save_adapter
from lora_lib.tuning.data import PLAIN, encode, prompt_ids
from lora_lib.tuning.evaluation import mean_loss, replies
from lora_lib.tuning.recipe import instruction_tune
from tests.tuning.tiny import CHAT, PAIRS, byte_tokenizer, causal

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."},
         {"role": "user", "content": "Name a colour"}, {"role": "assistant", "content": " Red "}]
EXAMPLES = {"a pair": PAIRS[0], "several turns": TURNS, "a system prompt": [SYSTEM, *TURNS],
            "line breaks": ("\n\nWhy?\n", "\n\nSo.\n")}
each_kind = pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])


@pytest.fixture(scope="module")
def smol():
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(smollm2.folder())


def row(tokenizer, example, **options):
    """The tokens of an example's only row, and which of them are learned."""
    rows = encode(tokenizer, [example], **options)
    inputs, labels = rows.inputs[0], rows.labels[0]
    ids = torch.cat([inputs, labels[-1:]])
    ids[1:] = labels.where(labels != -100, ids[1:])
    assert torch.equal(ids[:-1], inputs)                     # labels are the tokens that come next
    return ids.tolist(), [False, *(labels != -100).tolist()]


def learned(tokenizer, example, **options):
    """The learned stretches of an example, as text."""
    ids, mask = row(tokenizer, example, **options)
    parts, before = [], False
    for token, yes in zip(ids, mask):
        if yes:
            parts.append([*(parts.pop() if before else []), token])
        before = yes
    return [tokenizer.decode(part) for part in parts]


# --- against transformers' own template ---------------------------------------------------------

@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_tokens_and_mask_are_those_of_transformers(smol, example):
    """SmolLM2's template, with the stretches marked that transformers is to call answers."""
    messages = example if isinstance(example, list) else [
        {"role": "user", "content": example[0]}, {"role": "assistant", "content": example[1]}]
    before, content, after = smol.chat_template.partition("{{'<|im_start|>' + message['role']")
    marked = (before + "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
              "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
              "{{ '\n' }}{% else %}" + content
              + after.replace("}}{% endfor %}", "}}{% endif %}{% endfor %}", 1))
    whole = smol.apply_chat_template(messages, tokenize=False)
    assert smol.apply_chat_template(messages, tokenize=False, chat_template=marked) == whole
    theirs = smol.apply_chat_template(messages, chat_template=marked, return_dict=True,
                                      return_assistant_tokens_mask=True)
    ids, mask = row(smol, example)
    if example is EXAMPLES["line breaks"]:     # one token would reach from the prompt to the answer
        start = len(prompt_ids(smol, example[0]))
        assert smol.decode(ids) + "\n" == whole and ids[:start] == prompt_ids(smol, example[0])
        assert mask == [False] * start + [True] * (len(ids) - start)
    else:
        assert theirs["input_ids"] == [*ids, *smol("\n")["input_ids"]]
        assert [bool(yes) for yes in theirs["assistant_masks"]] == [*mask, False]


@pytest.mark.parametrize("template", [None, CHAT, "smollm2"])
def test_what_stands_before_every_answer_is_what_the_model_is_asked(smol, template):
    tokenizer = smol if template == "smollm2" else byte_tokenizer(template)
    ids, mask = row(tokenizer, [SYSTEM, *TURNS])
    starts = [i for i in range(1, len(ids)) if mask[i] and not mask[i - 1]]
    assert [ids[:i] for i in starts] == [prompt_ids(tokenizer, [SYSTEM, *TURNS[:n]])
                                         for n in (1, 3)]


def test_a_prompt_without_a_template_is_in_the_plain_one():
    tokenizer = byte_tokenizer(None)
    text = "### Instruction:\nSay red\n\n### Response:\n"
    assert tokenizer.decode(prompt_ids(tokenizer, "Say red")) == text
    assert learned(tokenizer, PAIRS[0]) == ["A rose.<end>"]
    assert learned(tokenizer, [SYSTEM, *TURNS]) == ["Hi.<end>", " Red <end>"]
    ids, _ = row(tokenizer, [SYSTEM, *TURNS[:2]])
    assert tokenizer.decode(ids) == ("Be brief.\n\n### Instruction:\nHello\n\n### Response:\n"
                                     "Hi.<end>")


def test_the_tokenizers_own_begin_mark_comes_once():
    from tokenizers.processors import TemplateProcessing
    for template, text in ((None, PLAIN), ("{{ bos_token }}" + CHAT, CHAT)):
        tokenizer = byte_tokenizer(template, marks=("<end>", "<begin>"), bos_token="<begin>")
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<begin> $A", special_tokens=[("<begin>", 1)])
        for example in (PAIRS[0], TURNS, "A tale."):
            ids, _ = row(tokenizer, example)
            assert ids[0] == 1 and ids.count(1) == 1


def test_a_tokenizer_that_puts_a_space_before_every_text():
    """As Llama 2's does: cut into tokens alone, an answer would begin with one space more."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = ["<end>", "▁", "▁Say", "▁red", "▁A", "▁rose", "<unk>"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                             normalizers.Replace(" ", "▁")])
    inner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    tokenizer.chat_template = ("{% for m in messages %}{% if m.role == 'user' %}Say {{ m.content }}"
                               "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")
    assert tokenizer.convert_ids_to_tokens(tokenizer(" A rose")["input_ids"]) == [
        "▁", "▁A", "▁rose"]
    ids, mask = row(tokenizer, ("red", "A rose"))
    assert [words[i] for i, yes in zip(ids, mask) if yes] == ["▁A", "▁rose", "<end>"]


def test_a_template_that_ends_a_turn_with_another_mark():
    """As Gemma's does: the turn's own mark is learned each time, the end mark behind the last."""
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}"
    tokenizer = byte_tokenizer(turns + "{% if add_generation_prompt %}<assistant>{% endif %}")
    assert learned(tokenizer, TURNS) == ["Hi.|", " Red |<end>"]


def test_a_text_is_learned_but_for_its_first_token():
    tokenizer = byte_tokenizer(None)
    assert row(tokenizer, "Tale") == ([*tokenizer("Tale")["input_ids"], 0],
                                      [False, True, True, True, True])


# --- lengths ------------------------------------------------------------------------------------

def test_what_is_cut_and_what_is_left_out_is_counted():
    tokenizer = byte_tokenizer()
    size = lambda prompt: len(prompt_ids(tokenizer, prompt))  # noqa: E731
    examples = [("Say red", "A rose."), ("Say " + "red " * 9, "A rose."), ("Say red", "A"),
                ("Say red", "A long rose.")]
    rows = encode(tokenizer, examples, length=size("Say red") + 7)
    assert rows.cut == (3,) and rows.dropped == (1,) and len(rows) == 3
    assert rows.lengths.tolist() == [size("Say red") + 7, size("Say red") + 1, size("Say red") + 7]
    said = [tokenizer.decode(labels[labels != -100]) for labels in rows.labels]
    assert said == ["A rose.<end>", "A<end>", "A long r"]
    assert str(rows) == (f"3 rows of {size('x') + 7} to {size('x') + 13} tokens, 18 of "
                         f"{int(rows.lengths.sum())} learned; 1 cut off (the first is number 3); "
                         "1 left out, no room for an answer (the first is number 1)")


def test_a_batch_is_filled_up_on_the_right():
    tokenizer = byte_tokenizer()
    rows = encode(tokenizer, PAIRS)
    inputs, labels = rows.batch([2, 0])
    lengths = rows.lengths[[2, 0]]
    assert inputs.shape == labels.shape == (2, lengths.max())
    for i, (number, n) in enumerate(zip((2, 0), lengths)):
        assert torch.equal(inputs[i, :n], rows.inputs[number])
        assert torch.equal(labels[i, :n], rows.labels[number])
        assert bool((inputs[i, n:] == rows.pad).all() and (labels[i, n:] == -100).all())
    assert all(torch.equal(a, b) for a, b in zip(rows.tensors(), rows.batch([0, 1, 2, 3])))


@each_kind
def test_the_loss_is_that_of_transformers(kind):
    model, tokenizer = causal(kind), byte_tokenizer()
    total = count = 0
    for prompt, answer in PAIRS:                             # one at a time, without padding
        before = prompt_ids(tokenizer, prompt)
        ids = torch.tensor([before + tokenizer(answer)["input_ids"] + [0]])
        known = ids.clone()
        known[:, :len(before)] = -100
        n = ids.shape[1] - len(before)
        with torch.no_grad():
            total += model(input_ids=ids, labels=known).loss.item() * n
        count += n
    assert mean_loss(model, tokenizer, PAIRS, batch_size=3) == pytest.approx(total / count,
                                                                             rel=1e-5)


# --- errors -------------------------------------------------------------------------------------

def test_what_cannot_be_encoded():
    tokenizer = byte_tokenizer()
    longest = len(prompt_ids(tokenizer, "Say green"))
    with pytest.raises(ValueError, match="length = 10 leaves no room for an answer in any of the 4 "
                                         f"examples; the longest prompt has {longest} tokens"):
        encode(tokenizer, PAIRS, length=10)
    with pytest.raises(ValueError, match="at least one example, got none"):
        encode(tokenizer, iter([]))
    with pytest.raises(ValueError, match="example 1: there is no answer in it"):
        encode(tokenizer, [PAIRS[0], TURNS[:1]])
    with pytest.raises(ValueError, match="example 0: the text is empty"):
        encode(tokenizer, [" \n"])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        encode(tokenizer, PAIRS)


def test_a_template_that_rewrites_what_was_said_is_refused():
    """As some reasoning models' do: what an earlier turn thought is taken out of it."""
    tokenizer = byte_tokenizer("{% for m in messages %}{% if loop.last %}<last>{% endif %}"
                               "{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match="example 0: the chat template does not write a "
                                         "conversation turn by turn"):
        encode(tokenizer, [TURNS])


# --- training -----------------------------------------------------------------------------------

@each_kind
def test_a_model_learns_its_answers_and_peft_gives_the_same(kind, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    model, tokenizer = causal(kind), byte_tokenizer()
    rows = encode(tokenizer, PAIRS)
    before = mean_loss(model, tokenizer, rows)
    instruction_tune(model, rows, lr=1e-2, steps=100, batch_size=4, progress=False)
    assert mean_loss(model, tokenizer, rows) < 0.2 * before
    assert replies(model, tokenizer, [prompt for prompt, _ in PAIRS]) == [a for _, a in PAIRS]
    assert not any(name.endswith("lm_head") for name in lora_modules(model))

    inputs, _ = rows.tensors()
    with torch.no_grad():
        ours = model(inputs).logits
        save_adapter(model, tmp_path / "adapter", task_type="CAUSAL_LM")
        theirs = PeftModel.from_pretrained(causal(kind), tmp_path / "adapter").eval()
        torch.testing.assert_close(theirs(inputs).logits, ours, rtol=1e-4, atol=1e-4)
        merge(model).save_pretrained(tmp_path / "merged")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(plain(inputs).logits, ours, rtol=1e-4, atol=1e-4)


def test_training_in_bfloat16_keeps_the_base_and_the_adapters_in_float32():
    model, tokenizer = causal(), byte_tokenizer()
    rows = encode(tokenizer, PAIRS)
    before = mean_loss(model, tokenizer, rows)
    instruction_tune(model, rows, lr=1e-2, steps=30, batch_size=4, precision="bfloat16",
                     progress=False)
    assert mean_loss(model, tokenizer, rows) < 0.8 * before
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("precision", ["float16", "auto"])
@each_kind
def test_training_on_a_gpu(kind, precision):
    model, tokenizer = causal(kind).cuda(), byte_tokenizer()
    rows = encode(tokenizer, PAIRS)
    before = mean_loss(model, tokenizer, rows)
    instruction_tune(model, rows, lr=1e-2, steps=60, batch_size=4, precision=precision,
                     progress=False)
    assert mean_loss(model, tokenizer, rows) < 0.8 * before
    assert replies(model, tokenizer, ["Say red"], max_new_tokens=4)
