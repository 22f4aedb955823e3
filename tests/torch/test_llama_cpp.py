"""SmolLM2 with a random adapter on all linear layers: llama.cpp's greedy answers and PyTorch's."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lora_lib.models import load_pretrained, smollm2
from lora_lib.torch import gguf_format, inject, lora_modules, merge, save_gguf
from tests.torch.test_gguf import TEXTS

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
QUESTIONS = ["Wake me up at 7 am", "What is the capital of France?", "Write a haiku about rain.",
             "How do I boil an egg?", "Translate 'good morning' to Spanish.", "Name three colors.",
             "Who wrote Hamlet?", "What is 12 + 30?", "Why is the sky blue?", "Say hello.",
             "A title for a story about a dog, please.", "Define gravity.", "List two fruits.",
             "What do bees make?", "Explain a loop in Python.", "How many days are in a week?",
             "Tell me a joke.", "What is a noun?", "Where do penguins live?", "I'm bored."]
NEW = 16


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The folder with base.gguf, lora.gguf and whole.gguf; the prompts; PyTorch's answers."""
    folder = tmp_path_factory.mktemp("gguf")
    model = load_pretrained("smollm2")
    tokenizer = model.tokenizer
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False,
                                             add_generation_prompt=True) for q in QUESTIONS]
    save_gguf(model, folder / "base.gguf")
    inject(model, "all-linear", rank=8, alpha=16, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in lora_modules(model).values():
            layer.B.copy_(torch.randn(layer.B.shape, generator=generator) * 0.02)
    save_gguf(model, folder / "lora.gguf")
    with pytest.MonkeyPatch.context() as patch:          # a planted fault
        patch.setattr(gguf_format, "pair", lambda rows, heads: rows)
        save_gguf(model, folder / "wrong-lora.gguf")
        merge(model)
        save_gguf(model, folder / "wrong.gguf")
    save_gguf(model, folder / "whole.gguf")
    save_gguf(model, folder / "half.gguf", dtype=torch.float16)
    return folder, prompts, greedy(model, prompts)


@torch.no_grad()
def greedy(model, prompts):
    """The ids of `NEW` new tokens for every prompt, up to the end mark."""
    tokenizer = model.tokenizer
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    rows = out[:, batch.input_ids.shape[1]:].tolist()
    end = tokenizer.eos_token_id
    return [row[:row.index(end) + 1] if end in row else row for row in rows]


def said(file, prompts, lora=None, new=NEW):
    from lora_lib.experiments.llama_cpp import connect
    ask = connect(file, lora)
    return [ask("/completion", prompt=prompt, n_predict=new, temperature=0,
                return_tokens=True, cache_prompt=True)["tokens"] for prompt in prompts]


def equal(some, others, new=NEW):
    return sum(a[:new] == b[:new] for a, b in zip(some, others, strict=True))


def test_the_merged_file_answers_as_pytorch(files):
    folder, prompts, want = files
    assert equal(said(folder / "whole.gguf", prompts), want) == len(want) == 20


def test_the_adapter_beside_the_base_answers_as_pytorch(files):
    folder, prompts, want = files
    assert equal(said(folder / "base.gguf", prompts, folder / "lora.gguf"), want) == 20


def test_without_the_adapter_or_with_wrong_rows_the_answers_are_others(files):
    """What the two tests above would see."""
    folder, prompts, want = files
    few = prompts[:5]
    for file, lora in (("base.gguf", None), ("wrong.gguf", None), ("base.gguf", "wrong-lora.gguf")):
        found = said(folder / file, few, lora and folder / lora, new=8)
        assert equal(found, want[:5], new=8) <= 2, (file, lora)


def test_in_float16_most_answers_are_the_same(files):
    folder, prompts, want = files
    assert equal(said(folder / "half.gguf", prompts[:10], new=8), want[:10], new=8) >= 8


def test_beside_the_packaged_base(files):
    """The weights of both bases are the same numbers. llama.cpp leaves the packaged ones in four
    bits and multiplies them by activations in eight: answers differ where two words are close."""
    folder, prompts, want = files
    packaged, base = (gguf.GGUFReader(f) for f in (smollm2.gguf_path(), folder / "base.gguf"))
    floats = {t.name: t.data for t in base.tensors}
    for t in packaged.tensors[1:20]:
        assert np.array_equal(gguf.dequantize(t.data, t.tensor_type), floats[t.name]), t.name
    assert {t.name for t in packaged.tensors} == floats.keys()
    few, new = prompts[:10], 8
    alone, adapted = (said(smollm2.gguf_path(), few, lora, new)
                      for lora in (None, folder / "lora.gguf"))
    assert equal(adapted, want[:10], new) >= 5 > equal(alone, want[:10], new)


@pytest.mark.parametrize("packaged", [False, True], ids=["saved", "packaged"])
def test_a_text_is_cut_into_the_tokenizer_s_own_tokens(files, packaged):
    from lora_lib.experiments.llama_cpp import connect
    folder, prompts, _ = files
    tokenizer = load_pretrained("smollm2").tokenizer
    ask = connect(smollm2.gguf_path() if packaged else folder / "base.gguf")
    for text in [*TEXTS, *prompts, "<|im_start|><|im_end|> <|endoftext|>", "if x:  12  ½ ③"]:
        assert ask("/tokenize", content=text)["tokens"] == tokenizer(text).input_ids, text


def test_answers(files):
    from lora_lib.experiments.llama_cpp import answers
    folder, prompts, want = files
    tokenizer = load_pretrained("smollm2").tokenizer
    expected = [tokenizer.decode(ids, skip_special_tokens=True) for ids in want[:2]]
    for lora in (None, folder / "lora.gguf"):
        file = folder / ("base.gguf" if lora else "whole.gguf")
        assert answers(file, prompts[:1], lora=lora, max_new_tokens=NEW) == expected[:1]
        ids = tokenizer(prompts[1]).input_ids
        assert answers(file, [ids], lora=lora, max_new_tokens=NEW) == expected[1:]


def test_activations_rounded_to_eight_bits():
    from lora_lib.experiments.llama_cpp import rounded_activations
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 5)).requires_grad_(False)
    x = torch.randn(3, 64, generator=generator)
    x[0, :32] = 0
    exact = model(x)
    with rounded_activations(model):
        rounded = model(x)
    step = (x.view(3, 2, 32).abs().amax(-1, keepdim=True) / 127).expand(3, 2, 32).reshape(3, 64)
    whole = (x / step.clamp(min=1e-20)).round() * step           # the scale itself in float32
    torch.testing.assert_close(rounded, model(whole), rtol=0, atol=2e-3)
    assert 1e-4 < (rounded - exact).abs().max() < 0.05 and torch.equal(model(x), exact)


def test_the_page_on_engines_has_the_run_s_figures():
    from lora_lib.experiments.sweep import read
    text = (Path(__file__).parents[2] / "book" / "engines.md").read_text("utf8")
    rows = [line for line in text.splitlines() if line.endswith("` |") and " of " in line]
    assert rows == [f"| {row['file']} | `{row['same']:g}` of `{row['requests']:g}` |"
                    for row in read("llama_cpp")]
