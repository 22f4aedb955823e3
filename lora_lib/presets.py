"""The dimensions of models that people adapt, each with the configuration that it was read in.

`PRESETS` is {name: Preset}, smaller ones first. Only dense models that `ModelShape` counts whole
are here: Llama's layout, Qwen2's with its biases, Qwen3's with its norms of heads. `GPUS` is
{gigabytes: a GPU that has so many}.
"""

from dataclasses import asdict, dataclass

from lora_lib.costs import LLAMA_7B, ModelShape

GITHUB = "https://github.com/"
# The published config.json files of nine models, copied whole.
COPIES = (GITHUB + "citsjtu2020/LLM-Prof/blob/8434c8d19c396b2f95d92a67845a7c0a0e0dd512/"
          "sglang/Model_Config.md")
TRANSFORMERS = GITHUB + "huggingface/transformers/blob/main/src/transformers/models/"
LITGPT = (GITHUB + "Lightning-AI/litgpt/blob/293089e26877cfe9f49bc0d7d79b71d35f67fa65/"
          "litgpt/config.py")


@dataclass(frozen=True)
class Preset:
    """A model's shape, and the address of the configuration that it was read in."""
    shape: ModelShape
    source: str


def _llama3(hidden_size, intermediate_size, num_layers, num_heads, **options):
    return ModelShape(128_256, hidden_size, intermediate_size, num_layers, num_heads, 8, **options)


def _qwen3(hidden_size, intermediate_size, num_layers, num_heads, **options):
    return ModelShape(151_936, hidden_size, intermediate_size, num_layers, num_heads, 8,
                      head_dim=128, qk_norm=True, **options)


PRESETS = {
    "SmolLM2 135M": Preset(
        ModelShape(49_152, 576, 1536, 30, 9, 3, tied_embeddings=True),
        GITHUB + "satyasundar/erav3-s13/blob/HEAD/README.md"),
    "Llama 3.2 1B": Preset(
        _llama3(2048, 8192, 16, 32, tied_embeddings=True),
        GITHUB + "kevinstephano/thunder_model_blocks/blob/HEAD/hf_llama/llama_config.py"),
    "SmolLM3 3B": Preset(
        ModelShape(128_256, 2048, 11_008, 36, 16, 4, tied_embeddings=True),
        TRANSFORMERS + "smollm3/configuration_smollm3.py"),
    "Llama 3.2 3B": Preset(_llama3(3072, 8192, 28, 24, tied_embeddings=True), COPIES),
    "Qwen3 4B": Preset(_qwen3(2560, 9728, 36, 32, tied_embeddings=True), COPIES),
    "Llama 7B": Preset(LLAMA_7B, TRANSFORMERS + "llama/configuration_llama.py"),
    "Qwen2.5 7B": Preset(
        ModelShape(152_064, 3584, 18_944, 28, 28, 4, qkv_bias=True), COPIES),
    "Llama 3.1 8B": Preset(_llama3(4096, 14_336, 32, 32), COPIES),
    "Qwen3 8B": Preset(_qwen3(4096, 12_288, 36, 32), COPIES),
    "Qwen3 14B": Preset(_qwen3(5120, 17_408, 40, 40), COPIES),
    "Qwen2.5 32B": Preset(
        ModelShape(152_064, 5120, 27_648, 64, 40, 8, qkv_bias=True), COPIES),
    "Qwen3 32B": Preset(_qwen3(5120, 25_600, 64, 64), COPIES),
    "Llama 3.1 70B": Preset(_llama3(8192, 28_672, 80, 64), LITGPT),
}

GPUS = {8: "RTX 4060", 16: "T4", 24: "L4, RTX 4090", 40: "A100 (40 GB)", 48: "L40S", 80: "H100",
        141: "H200"}


def choices(model: str = "Llama 7B") -> dict:
    """What the figure `fits` of `lora_lib.moving` is given: presets, GPUs, a model to begin with.

    Raises ValueError for a model that is not among the presets.
    """
    if model not in PRESETS:
        raise ValueError(f"no preset is called {model!r}; there are {list(PRESETS)}")
    return {"presets": {name: asdict(preset) for name, preset in PRESETS.items()},
            "gpus": [{"gb": gb, "name": name} for gb, name in GPUS.items()],
            "at": {"model": model}}
