"""The presets against transformers' own layout, and against counts that others published."""

from dataclasses import replace

import pytest

from lora_lib.costs import ModelShape
from lora_lib.presets import PRESETS
from tests.test_costs import hugging_face

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_makes_a_model_of_these_weights(name):
    """Two layers of it; each further one has as many numbers as the second."""
    shape = PRESETS[name].shape
    one, two = (replace(shape, num_layers=n).parameters() for n in (1, 2))
    assert shape.parameters() == two + (shape.num_layers - 2) * (two - one)
    with torch.device("meta"):
        model = hugging_face(replace(shape, num_layers=2))
    assert sum(p.numel() for p in model.parameters()) == two
    linears = {path.rpartition(".")[2]: (layer.out_features, layer.in_features)
               for path, layer in model.model.layers[1].named_modules()
               if isinstance(layer, torch.nn.Linear)}
    assert linears == shape.linears()


@pytest.mark.parametrize("name, parameters, adapters", [
    # https://github.com/satyasundar/erav3-s13, README.md
    ("SmolLM2 135M", 134_515_008, None),
    # As runs of PEFT print them, at rank 16 on all linear layers. Llama's is also that of
    # https://github.com/thamada/modelQuery, README.md
    ("Qwen3 4B", 4_022_468_096, 33_030_144), ("Qwen3 8B", 8_190_735_360, 43_646_976),
    ("Llama 3.1 8B", 8_030_261_248, 41_943_040), ("Qwen3 14B", 14_768_307_200, 64_225_280)])
def test_counts_that_others_published(name, parameters, adapters):
    shape = PRESETS[name].shape
    assert shape.parameters() == parameters
    assert adapters is None or shape.lora_parameters(16, "all-linear") == adapters


def test_the_defaults_of_transformers_are_these():
    """SmolLM3's and Llama's configurations are their models'."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "SmolLM3Config"):
        pytest.skip("this transformers has no SmolLM3")
    for name, config in (("SmolLM3 3B", transformers.SmolLM3Config()),
                         ("Llama 7B", transformers.LlamaConfig())):
        assert PRESETS[name].shape == ModelShape(
            config.vocab_size, config.hidden_size, config.intermediate_size,
            config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads,
            config.tie_word_embeddings)


def test_names_say_the_size_and_every_preset_has_its_source():
    for name, preset in PRESETS.items():
        size, unit = name.split()[-1][:-1], {"M": 1e6, "B": 1e9}[name[-1]]
        assert preset.shape.parameters() / unit == pytest.approx(float(size), rel=0.26)
        assert preset.source.startswith("https://github.com/")
    sizes = [preset.shape.parameters() for preset in PRESETS.values()]
    assert len(sizes) == 13 and max(sizes) == sizes[-1] and min(sizes) == sizes[0]
