"""Instruction tuning: batches against transformers' own loss, adapters against PEFT, no hub."""

import json

import pytest
import torch

from lora_lib.torch import lora_modules, merge, save_adapter
from lora_lib.tuning.data import PLAIN, encode, instruction_tune, prompt_ids, read_pairs
from lora_lib.tuning.evaluation import answer_loss, reply

PAIRS = [("Say red", "A rose."), ("Say blue", "The sky is."), ("Say green", "Grass"),
         ("Say white", "Snow in May.")]
CHAT = ("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")


def byte_tokenizer(template=None):
    """One token for each byte, and an end mark."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(["<end>", *alphabet])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    tokenizer.chat_template = template
    return tokenizer


def causal(kind, std=0.4):
    import transformers as t
    sizes = {"vocab_size": 257, "bos_token_id": 0, "eos_token_id": 0}
    wide = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = {"llama": lambda: t.LlamaConfig(**sizes, **wide),
              "qwen2": lambda: t.Qwen2Config(**sizes, **wide),
              "gpt2": lambda: t.GPT2Config(**sizes, n_embd=32, n_layer=2, n_head=4)}[kind]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = t.AutoModelForCausalLM.from_config(config).eval()
        for p in model.parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=std)
    return model


each_kind = pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])


# --- pairs and batches --------------------------------------------------------------------------

def test_pairs_are_read_and_what_has_a_context_or_is_long_is_left_out(tmp_path):
    rows = [{"instruction": " Why? ", "context": "", "response": "So.\n", "category": "open_qa"},
            {"instruction": "Why?", "context": "Since.", "response": "So."},
            {"instruction": "Why?", "context": "", "response": "So." * 9},
            {"instruction": "Why?", "context": "", "response": ""}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert read_pairs(path, longest=20) == [("Why?", "So.")]


@pytest.mark.parametrize("template, text", [
    (None, PLAIN.format("Say red")), (CHAT, "<user>Say red<assistant>")])
def test_the_prompt_is_in_the_models_template(template, text):
    tokenizer = byte_tokenizer(template)
    assert tokenizer.decode(prompt_ids(tokenizer, "Say red")) == text


def test_only_the_answer_and_its_end_are_learned():
    tokenizer = byte_tokenizer(CHAT)
    inputs, labels = encode(tokenizer, PAIRS)
    for row, (prompt, answer), x in zip(labels, PAIRS, inputs):
        learned = row[row != -100]
        assert tokenizer.decode(learned) == answer + "<end>"
        seen = x[:int((row != -100).nonzero().max()) + 1]
        assert tokenizer.decode(seen) == f"<user>{prompt}<assistant>{answer}"
    assert inputs.shape == labels.shape == (4, max(
        len(f"<user>{p}<assistant>{a}") for p, a in PAIRS))


def test_an_answer_is_cut_at_the_length():
    tokenizer = byte_tokenizer(CHAT)
    inputs, labels = encode(tokenizer, [("Say red", "A rose.")], length=26)
    assert inputs.shape == (1, 26) and tokenizer.decode(labels[labels != -100]) == "A r"


@each_kind
def test_the_loss_is_that_of_transformers(kind):
    model, tokenizer = causal(kind), byte_tokenizer(CHAT)
    inputs, labels = encode(tokenizer, PAIRS)
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
    assert answer_loss(model, (inputs, labels), batch_size=3) == pytest.approx(total / count,
                                                                               rel=1e-5)


def test_what_cannot_be_encoded():
    tokenizer = byte_tokenizer(CHAT)
    with pytest.raises(ValueError, match="length = 10 leaves no room behind a prompt of 24 tokens"):
        encode(tokenizer, PAIRS, length=10)
    with pytest.raises(ValueError, match="at least one pair"):
        encode(tokenizer, [])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        encode(tokenizer, PAIRS)


# --- training -----------------------------------------------------------------------------------

@each_kind
def test_a_model_learns_its_answers_and_peft_gives_the_same(kind, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    model, tokenizer = causal(kind), byte_tokenizer(CHAT)
    data = encode(tokenizer, PAIRS)
    before = answer_loss(model, data)
    instruction_tune(model, data, lr=1e-2, steps=100, batch_size=4, progress=False)
    assert answer_loss(model, data) < 0.2 * before
    assert [reply(model, tokenizer, prompt) for prompt, _ in PAIRS] == [a for _, a in PAIRS]
    assert not any(name.endswith("lm_head") for name in lora_modules(model))

    with torch.no_grad():
        ours = model(data[0]).logits
        save_adapter(model, tmp_path / "adapter", task_type="CAUSAL_LM")
        theirs = PeftModel.from_pretrained(causal(kind), tmp_path / "adapter").eval()
        torch.testing.assert_close(theirs(data[0]).logits, ours, rtol=1e-4, atol=1e-4)
        merge(model).save_pretrained(tmp_path / "merged")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(plain(data[0]).logits, ours, rtol=1e-4, atol=1e-4)


def test_training_in_bfloat16_keeps_the_base_and_the_adapters_in_float32():
    model, data = causal("llama"), encode(byte_tokenizer(CHAT), PAIRS)
    before = answer_loss(model, data)
    instruction_tune(model, data, lr=1e-2, steps=30, batch_size=4, precision="bfloat16",
                     progress=False)
    assert answer_loss(model, data) < 0.8 * before
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("precision", ["float16", "auto"])
@each_kind
def test_training_on_a_gpu(kind, precision):
    model, data = causal(kind).cuda(), encode(byte_tokenizer(CHAT), PAIRS)
    before = answer_loss(model, data)
    instruction_tune(model, data, lr=1e-2, steps=60, batch_size=4, precision=precision,
                     progress=False)
    assert answer_loss(model, data) < 0.8 * before
    assert reply(model, byte_tokenizer(CHAT), "Say red", max_new_tokens=4) is not None
