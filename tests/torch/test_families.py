"""Every tenth family of the compatibility page, run again; and what its cells say of a fault."""

from importlib.metadata import version

import pytest
import torch
from torch import nn

import compatibility

from lora_lib.torch import NF4Linear, quantize, remove
from tests.torch import families, tiny

PAGE = compatibility.PAGE.read_text("utf8").partition(compatibility.HEADING)[2]
LINES = compatibility.family_lines(compatibility.HEADING + PAGE)
TRIED = [name for name, line in LINES.items() if compatibility.was_tried(line)]

same_versions = pytest.mark.skipif(
    f"peft {version('peft')} and transformers {version('transformers')}" not in PAGE,
    reason="the page was written with other versions of PEFT or transformers")


@same_versions
@pytest.mark.parametrize("family", TRIED[::10])
def test_a_row_of_the_page_is_what_its_family_gives(family):
    assert compatibility.family_line(family) == LINES[family]


@same_versions
def test_no_family_is_dropped():
    assert sorted(LINES) == tiny.families()
    assert compatibility.family_line("rag") == LINES["rag"] == \
        "| `rag` | `no Auto class has a model of it` |"


def test_the_page_holds_many_families_of_each_kind():
    kinds = [LINES[name].split(" | ")[2] for name in TRIED]
    assert all(kinds.count(kind) >= 15 for kind in ("text", "vision", "audio", "multimodal"))


def test_a_line_that_is_another_is_shown():
    line = "| `llama` | `LlamaForCausalLM` | yes |"
    lines = compatibility.family_lines(f"{compatibility.HEADING}\n{line}\n")
    assert lines == {"llama": line} and compatibility.changed(lines, lines) == []
    other = {"llama": line.replace("yes", "no")}
    assert compatibility.changed(lines, other) == [other["llama"], line]


# --- what the cells say of a fault ----------------------------------------------------------------

class Toy(nn.Module):
    """Two layers that follow each other, and one that nothing calls."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.unused = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        return torch.tanh(self.second(torch.tanh(self.first(x))))


class InPlace(Toy):
    def forward(self, x):
        y = self.first(x)
        z = y.exp()
        return z.add_(self.second(y))                   # exp's backward needs what it gave


@pytest.fixture
def answers():
    def give(model):
        torch.manual_seed(0)
        return families.Trial(model, {"x": torch.randn(3, 6)}).answers()
    return give


def test_an_adapter_without_a_gradient_is_named(answers):
    assert answers(Toy()) == dict.fromkeys(families.COLUMNS, "yes") | {
        "gradient": "all but 1 of 3: unused"}


def test_a_step_that_fails_without_an_adapter_too_says_so(answers):
    words = answers(InPlace())["training step"]
    assert words.startswith("without an adapter too: one of the variables needed for gradient")


@pytest.mark.parametrize("name, function, column, words", [
    ("merge", remove, "merge", "the outputs differ"),
    ("merge", lambda model: nn.Sequential(), "merge", "forward() got an unexpected keyword"),
    ("load_adapter", lambda model, folder: model, "reload", "the outputs differ"),
    ("save_adapter", lambda model, folder: None, "to PEFT", "PEFT: Can't find"),
    ("quantize", lambda model, targets: model.half(), "NF4", "mat2 must have the same dtype"),
])
def test_a_fault_shows_in_its_column(answers, monkeypatch, name, function, column, words):
    monkeypatch.setattr(families, name, function)
    assert words in answers(Toy())[column]
    other = set(families.COLUMNS) - {column, "gradient", "reload", "merge", "from PEFT"}
    assert all(answers(Toy())[c] == "yes" for c in other)


class Reads(Toy):
    """The first layer's weight is read, and by no backward pass: what PEFT puts there is lost."""

    def forward(self, x):
        with torch.no_grad():
            y = nn.functional.linear(x, self.first.weight, self.first.bias)
        return torch.tanh(self.second(y)) + self.first.bias


def test_adapters_that_peft_does_not_read_are_named(answers):
    found = answers(Reads())
    assert found["to PEFT"] == found["from PEFT"] == \
        "all-linear: PEFT: nothing reads its adapters at first"
    assert found["reload"] == found["merge"] == "yes" and "first" in found["gradient"]


def test_what_peft_reads_otherwise_from_its_own_file_is_its_fault(answers, monkeypatch):
    class Forgets(families.PeftModel):
        @classmethod
        def from_pretrained(cls, *arguments):
            model = super().from_pretrained(*arguments)
            model.base_model.model.first.lora_B["default"].weight.data.zero_()
            return model

    monkeypatch.setattr(families, "PeftModel", Forgets)
    found = answers(Toy())
    assert found["to PEFT"] == "PEFT: it reads its own file otherwise"
    assert found["from PEFT"] == found["reload"] == "yes"


def test_the_words_of_an_error_fit_a_cell():
    assert families.words(ValueError("bad | `x` at 0x7f\nhere. And more")) == "bad / 'x' at  here"
    assert families.words(KeyError()) == "KeyError"
    assert families.words(ValueError("['b', 'a']")) == "['a', 'b']"
    assert len(families.words(ValueError("long " * 100))) == families.WIDTH


def test_all_linear_quantizes_what_can_have_an_adapter_and_says_what_not():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 8)})
    with pytest.warns(UserWarning, match="leaves out attention.out_proj: .*MultiheadAttention"):
        quantize(model)
    assert type(model["out"]) is NF4Linear and type(model["attention"].out_proj) is not NF4Linear


# --- how a configuration becomes tiny -------------------------------------------------------------

def test_settings_shrink_by_name_and_small_ones_stay():
    rules = tiny.sizes(hidden=32, kv=2, image=64)
    assert tiny.shrink({"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
                        "head_dim": 128, "intermediate_size": 11008, "num_hidden_layers": 1,
                        "n_routed_experts": 64, "hidden_sizes": [96, 192, 384], "depths": [3, 9],
                        "hidden_act": "silu", "tie_word_embeddings": True}, rules) == {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "intermediate_size": 64, "n_routed_experts": 4, "hidden_sizes": [16, 32, 64],
        "depths": [1, 1]}
    inner = {"text_config": {"model_type": "llama", "hidden_size": 4096, "eos_token_id": 50256}}
    assert tiny.shrink(inner, rules) == {
        "text_config": {"model_type": "llama", "hidden_size": 32, "eos_token_id": 2}}


def test_what_is_not_tiny_is_refused(monkeypatch):
    monkeypatch.setattr(tiny, "MOST", 1000)
    with pytest.raises(tiny.NotBuilt, match="its smallest configuration here has"):
        tiny.make("llama")
    assert "not tried" in families.row("llama")
