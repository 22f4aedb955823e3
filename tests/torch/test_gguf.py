"""GGUF files: llama.cpp itself (package xllamacpp) answers with them as PyTorch does."""

import math
import os

import pytest
import torch
from torch import nn

from lora_lib.torch import (gguf_format, inject, lora_modules, lora_parameters, merge, quantize,
                            save_gguf, unmerge)
from lora_lib.torch.inject import inject_each

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")
REGEX = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s|"
         r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
TEXT = ("In 1905 he wrote 4 papers; they're read in 2024, aren't they?\n  x = 10\n    y = 3.5\n"
        "The rain in Spain stays mainly in the plain. Café, naïve, straße, 北京, привет!\n\n\n")
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}


def tokenizer_of(cut="gpt-2", bos=False):
    """A byte-level BPE tokenizer, trained on TEXT, that cuts a text as one of four models does."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    split = {"llama-bpe": "{1,3}", "qwen2": ""}
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut not in split)
    first = {"smollm": [pre_tokenizers.Digits(True)], "gpt-2": []}.get(cut)
    if first is None:
        first = [pre_tokenizers.Split(Regex(REGEX % split[cut]), "isolated")]
    tokenizer = Tokenizer(models.BPE(ignore_merges=cut == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, level]) if first else level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def tiny(name="Llama", cut="gpt-2", bos=False, seed=0, **changes):
    """A model of transformers with random weights and its tokenizer, the same on every call."""
    import transformers
    tokenizer = tokenizer_of(cut, bos)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(tokenizer) + 3, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        **SIZES | changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        for key, p in model.named_parameters():
            nn.init.normal_(p, mean=float("norm" in key), std=0.15)
    model.tokenizer = tokenizer
    return model


def randomize(model, std=0.15, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lora_parameters(model):
            p.copy_(torch.randn(p.shape, generator=generator) * std)
    return model


IDS = [0, *range(20, 320, 5)]                          # 61 tokens: far enough for rope to matter


@torch.no_grad()
def ours(model, ids=IDS):
    """PyTorch's log probabilities of every token after `ids`."""
    return model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


def theirs(file, lora=None, ids=IDS):
    """llama.cpp's. It is made to say a "3" (20): of an end, or half a character, it tells none."""
    pytest.importorskip("xllamacpp")
    from lora_lib.experiments.llama_cpp import connect
    reply = connect(file, lora)("/completion", prompt=ids, n_predict=1, n_probs=1000,
                                logit_bias=[[20, 1000]])
    found = reply["completion_probabilities"][0]["top_logprobs"]
    out = torch.full((max(f["id"] for f in found) + 1,), -math.inf, dtype=torch.float64)
    for f in found:
        out[f["id"]] = f["logprob"]
    return out


def distance(a, b):
    return float((a - b).abs().max())


SAME, OTHER = 1e-3, 0.05          # in log probability: what float32 costs, what a mistake makes


class TestSmallModels:
    """Random models against llama.cpp: the log probability of every token."""

    @pytest.mark.parametrize("name, changes", [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Llama", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}),
        ("Llama", {"rope_parameters": LLAMA_3}),
        ("Llama", {"rope_parameters": LINEAR}),
        ("Mistral", {"sliding_window": None}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    ], ids=str)
    def test_whole_and_adapter(self, name, changes, tmp_path, unchanged):
        model = tiny(name, **changes)
        base, whole, lora = (tmp_path / f for f in ("base", "whole", "lora"))
        assert save_gguf(model, base) == base
        before = ours(model)
        assert distance(theirs(base), before) < SAME
        randomize(inject(model, "all-linear", rank=3, alpha=6.0))
        with unchanged(model):
            save_gguf(model, lora)
        want = ours(model)
        assert distance(want, before) > OTHER          # the adapter does something
        assert distance(theirs(base, lora), want) < SAME
        save_gguf(merge(model, keep_adapters=True), whole)
        assert distance(theirs(whole), want) < SAME
        save_gguf(merge(model), whole)                 # it writes over the older file
        assert distance(theirs(whole), want) < SAME
        assert {f.name for f in tmp_path.iterdir()} == {"base", "whole", "lora"}

    @pytest.mark.parametrize("fault", [
        lambda rows, heads: rows,                                              # forgotten
        lambda rows, heads: rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2),
        lambda rows, heads: rows.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1),
    ], ids=["forgotten", "inverse", "without heads"])
    def test_a_wrong_order_of_rows_shows(self, fault, tmp_path, monkeypatch):
        model = tiny()
        save_gguf(model, tmp_path / "base")
        randomize(inject(model, ["q_proj", "k_proj"], rank=3, alpha=6.0))
        with monkeypatch.context() as patch:
            patch.setattr(gguf_format, "pair", fault)
            save_gguf(model, tmp_path / "lora")
            save_gguf(merge(model), tmp_path / "whole")
        assert distance(theirs(tmp_path / "base", tmp_path / "lora"), ours(model)) > OTHER
        assert distance(theirs(tmp_path / "whole"), ours(model)) > OTHER

    @pytest.mark.parametrize("rslora", [False, True])
    @pytest.mark.parametrize("plan", [
        {"q_proj": (1, 3.0), "k_proj": (2, -5.0), "v_proj": (5, 1.5), "o_proj": (5, 0.0)},
        {"q_proj": (2, 0.0), "v_proj": (3, 0.0)},
        {"k_proj": (4, 8.0), "o_proj": (4, 8.0)},
    ], ids=str)
    def test_every_rank_and_alpha(self, plan, rslora, tmp_path):
        model = tiny()
        save_gguf(model, tmp_path / "base")
        plan = {f"model.layers.{i}.self_attn.{n}": pair for i in (0, 1) for n, pair in plan.items()}
        model = randomize(inject_each(model, plan, use_rslora=rslora), 0.3)
        save_gguf(model, tmp_path / "lora")
        assert distance(theirs(tmp_path / "base", tmp_path / "lora"), ours(model)) < SAME
        alpha = gguf.GGUFReader(tmp_path / "lora").get_field("adapter.lora.alpha").contents()
        scalings = {layer.scaling * layer.rank for layer in lora_modules(model).values()}
        assert alpha in {*scalings, 1.0} and alpha != 0

    def test_an_adapter_of_the_head(self, tmp_path):
        model = tiny()
        save_gguf(model, tmp_path / "base")
        randomize(inject(model, ["lm_head", "down_proj"], rank=2))
        save_gguf(model, tmp_path / "lora")
        assert distance(theirs(tmp_path / "base", tmp_path / "lora"), ours(model)) < SAME

    def test_a_module_trained_whole_is_in_the_merged_file(self, tmp_path):
        model = randomize(inject(tiny(), ["q_proj"], modules_to_save=["lm_head"]))
        want = ours(model)
        save_gguf(merge(model), tmp_path / "whole")
        assert distance(theirs(tmp_path / "whole"), want) < SAME

    def test_float16(self, tmp_path):
        model = tiny()
        save_gguf(model, tmp_path / "half", dtype=torch.float16)
        save_gguf(model, tmp_path / "full")
        small, large = ((tmp_path / f).stat().st_size for f in ("half", "full"))
        kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "half").tensors}
        assert kinds["blk.0.attn_q.weight"] == "F16" and kinds["blk.0.attn_norm.weight"] == "F32"
        assert small < 0.8 * large
        assert distance(theirs(tmp_path / "half"), ours(model)) < 20 * SAME

    def test_a_model_in_float16_is_written_in_float32(self, tmp_path):
        model = tiny().half()
        save_gguf(model, tmp_path / "file")
        assert distance(theirs(tmp_path / "file"), ours(model.float())) < SAME

    def test_an_adapter_beside_a_quantized_base_of_ours(self, tmp_path):
        """The file holds A and B alone; what the base is made of does not matter to it."""
        model = randomize(inject(tiny(hidden_size=64), "all-linear", rank=2))
        other = quantize(tiny(hidden_size=64), "all-linear")
        randomize(inject(other, "all-linear", rank=2))
        for m, name in ((model, "one"), (other, "two")):
            save_gguf(m, tmp_path / name)
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()

    def test_transformers_reads_it_back(self, tmp_path):
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model = tiny()
        save_gguf(model, tmp_path / "model.gguf")
        back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
        assert distance(ours(back.eval()), ours(model)) < 1e-6
        tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
        assert tokenizer(TEXT).input_ids == model.tokenizer(TEXT).input_ids


TEXTS = ["", "a", " a", "<s>x</s>", "<s>user\nhi</s>\n", "  12 x", "x = 3.14159\n    y = 10\n",
         "def f(x):\n        return  2", "2024-05-06 at 07:30", "naïve café ☕ 北京 🙂 привет", TEXT,
         "  leading and trailing  ", "\t\ttabs\r\n\n\n", "Don't I'LL we've they'RE", "٣٤ ½ ²",
         "price: $1,234.50!!!", "\u00a0x\u3000y", "1234567890", "a\n\n b"]


class TestTokens:
    @pytest.mark.parametrize("cut", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
    @pytest.mark.parametrize("bos", [False, True])
    def test_llama_cpp_cuts_a_text_as_transformers_does(self, cut, bos, tmp_path):
        pytest.importorskip("xllamacpp")
        from lora_lib.experiments.llama_cpp import connect
        model = tiny(cut=cut, bos=bos)
        model.tokenizer.add_tokens(["<tool>"])         # not special, and no part of the merges
        save_gguf(model, tmp_path / "file")
        reader = gguf.GGUFReader(tmp_path / "file")
        assert reader.get_field("tokenizer.ggml.pre").contents() == cut
        ask = connect(tmp_path / "file")
        for text in [*TEXTS, "a<tool>b"]:
            found = ask("/tokenize", content=text, add_special=True)["tokens"]
            assert found == model.tokenizer(text).input_ids, text
            assert ask("/tokenize", content=text)["tokens"] == \
                model.tokenizer(text, add_special_tokens=False).input_ids, text

    def test_the_cuts_differ_on_these_texts(self):
        """A wrong name for the cut would be seen above."""
        cuts = [tokenizer_of(cut) for cut in ("gpt-2", "smollm", "llama-bpe", "qwen2")]
        pieces = [[[p for p, _ in t.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
                   for text in TEXTS] for t in cuts]
        assert all(a != b for i, a in enumerate(pieces) for b in pieces[:i])

    def test_fields(self, tmp_path):
        model = tiny(bos=True)
        model.tokenizer.chat_template = "{{ messages[0]['content'] }}</s>"
        model.tokenizer.pad_token = "</s>"
        save_gguf(model, tmp_path / "file")
        fields = {key: f.contents() for key, f in gguf.GGUFReader(tmp_path / "file").fields.items()}
        expected = {"tokenizer.chat_template": "{{ messages[0]['content'] }}</s>",
                    "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1,
                    "tokenizer.ggml.padding_token_id": 1, "tokenizer.ggml.add_bos_token": True,
                    "tokenizer.ggml.add_eos_token": False, "general.architecture": "llama",
                    "llama.vocab_size": model.config.vocab_size, "llama.context_length": 256}
        assert expected.items() <= fields.items()
        types = fields["tokenizer.ggml.token_type"]
        assert types[:3] == [3, 3, 1] and types[-3:] == [5, 5, 5]  # marks, a token, unused rows


def with_tokenizer(change):
    def make():
        model = tiny()
        model.tokenizer = change(model.tokenizer)
        return model
    return make


def edited(**parts):
    def change(tokenizer):
        for name, part in parts.items():
            setattr(tokenizer.backend_tokenizer, name, part)
        return tokenizer
    return change


def with_mark(tokenizer):
    from tokenizers import AddedToken
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    return tokenizer


def half_merged():
    model = inject(tiny(), ["q_proj", "v_proj"])
    model.model.layers[0].self_attn.q_proj.merge()
    return model


def with_more():
    model = tiny()
    model.extra = nn.Linear(4, 4)
    return model


def with_value(value):
    def make():
        model = tiny()
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 3] = value
        return model
    return make


def untied():
    model = tiny(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return inject(model, ["lm_head"])


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2))


def lowercase():
    from tokenizers import normalizers
    return normalizers.Lowercase()


def words():
    from tokenizers import pre_tokenizers
    return pre_tokenizers.Whitespace()


class TestRefused:
    @pytest.mark.parametrize("make, message", [
        (gpt2, "cannot write a GPT2LMHeadModel; it writes LlamaForCausalLM, Mistral"),
        (lambda: inject(gpt2(), "all-linear"), "cannot write a GPT2LMHeadModel"),
        (lambda: tiny().model, "cannot write a LlamaModel"),
        (lambda: nn.Linear(4, 4), "cannot write a Linear"),
        (lambda: tiny(hidden_act="gelu"), "hidden_act = 'gelu'"),
        (lambda: tiny(rope_parameters={"rope_type": "yarn", "rope_theta": 5.0, "factor": 2.0}),
         "rope_type = 'yarn'"),
        (lambda: tiny("Qwen2", rope_parameters=LLAMA_3), "Qwen2Config with rope_type = 'llama3'"),
        (lambda: tiny("Mistral"), "MistralConfig with sliding_window = 4096"),
        (lambda: tiny("Qwen2", use_sliding_window=True, sliding_window=8), "sliding_window = 8"),
        (half_merged, "some adapters are merged and some are not"),
        (with_more, "no name for extra.weight"),
        (lambda: inject(with_more(), ["extra"], rank=2), "no name for extra.weight"),
        (lambda: inject(tiny(), ["q_proj"], modules_to_save=["lm_head"]),
         r"no place for modules trained whole, or rows of them, \['lm_head'\]"),
        (untied, "lm_head: GGUF's base has no head"),
        (lambda: quantize(tiny(hidden_size=64), "all-linear"), "q_proj is a NF4Linear"),
        (lambda: merge(inject(quantize(tiny(hidden_size=64), "all-linear"), ["q_proj"]),
                       keep_adapters=True), "is a NF4Linear, whose weight is quantized"),
        (with_value(math.nan), "blk.1.ffn_up.weight holds NaN"),
        (with_tokenizer(lambda t: None), "needs its tokenizer"),
        (with_tokenizer(lambda t: "bpe"), "a str is no fast tokenizer"),
        (with_tokenizer(edited(pre_tokenizer=words())), "Whitespace"),
        (with_tokenizer(edited(normalizer=lowercase())), "Lowercase"),
        (with_tokenizer(with_mark), "mask.*takes its surroundings"),
        (with_tokenizer(lambda t: (t.add_tokens([f"t{i}" for i in range(9)]), t)[1]),
         "the tokenizer knows token .* rows"),
    ], ids=lambda v: v if isinstance(v, str) else "")
    def test_by_name_and_nothing_is_written(self, make, message, tmp_path, unchanged):
        model = make()
        (tmp_path / "file").write_text("mine")
        with unchanged(model), pytest.raises(ValueError, match=message):
            save_gguf(model, tmp_path / "file")
        assert [f.name for f in tmp_path.iterdir()] == ["file"]
        assert (tmp_path / "file").read_text() == "mine"

    def test_a_value_too_large_for_float16(self, tmp_path):
        model = with_value(1e5)()
        with pytest.raises(ValueError, match="blk.1.ffn_up.weight .* too large for torch.float16"):
            save_gguf(model, tmp_path / "file", dtype=torch.float16)
        save_gguf(model, tmp_path / "file")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, "f16", None])
    def test_a_dtype(self, dtype, tmp_path):
        with pytest.raises(TypeError, match="dtype must be one of"):
            save_gguf(tiny(), tmp_path / "file", dtype=dtype)

    def test_places(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
            save_gguf(tiny(), tmp_path / "nowhere" / "file")
        with pytest.raises(IsADirectoryError, match="is a folder"):
            save_gguf(tiny(), tmp_path)

    def test_without_the_package(self, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "gguf", None)
        with pytest.raises(ModuleNotFoundError, match="pip install gguf"):
            save_gguf(tiny(), tmp_path / "file")

    def test_an_error_inside_the_write(self, tmp_path, monkeypatch):
        save_gguf(tiny(), tmp_path / "file")
        before = (tmp_path / "file").read_bytes()
        monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data",
                            lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            save_gguf(tiny(seed=1), tmp_path / "file")
        assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == before

    def test_unmerged_again_it_is_an_adapter_again(self, tmp_path):
        model = randomize(inject(tiny(), ["q_proj"], rank=2))
        save_gguf(model, tmp_path / "one")
        save_gguf(unmerge(merge(model, keep_adapters=True)), tmp_path / "two")
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
