"""Adapters of unmodified transformers models: to PEFT, from PEFT, merged, and on another base."""

import pytest

import compatibility

from tests.torch import architectures as cases

each_architecture = pytest.mark.parametrize("architecture", cases.ARCHITECTURES)

# A part of the words by which load_adapter refuses an option; None where the adapter loads.
REFUSED = {
    "lora_dropout": None, "use_rslora": None, "rank_pattern": None, "alpha_pattern": None,
    'target_modules="all-linear"': None, "target_modules, a regular expression": None,
    "exclude_modules": None, "layers_to_transform": None, "fan_in_fan_out": None,
    "modules_to_save": None, 'task_type="SEQ_CLS", which trains the head': None,
    'init_lora_weights="gaussian"': None, 'init_lora_weights="orthogonal"': None,
    'init_lora_weights="pissa"': "init_lora_weights = 'pissa' changed the base",
    'init_lora_weights="olora"': "init_lora_weights = 'olora' changed the base",
    'bias="lora_only"': "bias = 'lora_only' is not supported",
    'bias="all"': "bias = 'all' is not supported",
    "use_dora": "use_dora = True",
    "target_modules, an embedding": "target_modules names model.embed_tokens, an nn.Embedding",
    "target_modules, a convolution": "projection.lora_A.weight (2, 3, 4, 4) is not the A or B",
    "target_parameters": None, "trainable_token_indices": None, "lora_bias": None,
    "layer_replication": "layer_replication = [[0, 2], [1, 2]]",
    "modules_to_save, a tied weight": "lm_head shares its weight with another module",
}

DIFFERENCES = {
    "wider": "A and B have shapes", "shallower": "the model has no",
    "deeper": "names", "other_architecture": "the model has no",
    "other_weights": "the weight is not the one that the adapter was trained on",
}


@each_architecture
@pytest.mark.parametrize("direction", cases.DIRECTIONS)
def test_the_outputs_are_the_same(direction, architecture):
    assert cases.direction(direction, architecture) == "yes"


@pytest.mark.parametrize("option", cases.OPTIONS)
def test_an_option_of_peft_loads_or_is_named_in_the_error(option):
    words = cases.option(option)
    assert REFUSED[option] in words if REFUSED[option] else words == "yes"


@each_architecture
@pytest.mark.parametrize("saved_by", ["lora_lib", "PEFT"])
@pytest.mark.parametrize("other", cases.OTHERS)
def test_another_base_is_refused(other, saved_by, architecture):
    words = cases.other_base(other, architecture, saved_by)
    if (other, saved_by) == ("other_weights", "PEFT"):
        assert words is None                    # PEFT's file says nothing of the base's weights
    else:
        assert DIFFERENCES[other] in words


def test_the_comparison_sees_a_missing_and_a_wrong_adapter():
    llama = cases.ARCHITECTURES["Llama"]
    model = cases.trained_here(llama)
    assert cases.compare(llama.base(), llama.base(), llama).startswith("no: the adapter changes")
    assert cases.compare(model, llama.base(), llama).startswith("no: the outputs differ")
    assert cases.compare(model, model, llama) == "yes"


@pytest.mark.filterwarnings("ignore:PiSSA changes", "ignore:.*is_gradient_checkpointing")
def test_pissa_loads_once_peft_has_converted_it(tmp_path):
    llama = cases.ARCHITECTURES["Llama"]
    theirs = cases.trained_in_peft(llama, steps=0, init_lora_weights="pissa")
    theirs.peft_config["default"].init_lora_weights = True        # as PEFT's guide does it
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    cases.train(theirs, llama)
    theirs.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=(
        str(tmp_path / "start")))
    loaded = cases.load_adapter(llama.base(), tmp_path / "end")
    assert cases.compare(loaded, theirs, llama) == "yes"


def test_the_page_shows_what_the_cases_give():
    page = compatibility.PAGE.read_text("utf8")
    for name, table in compatibility.tables().items():
        assert table in page, f"run scripts/compatibility.py: the table of {name} is another"
