"""Pretrained models, each by its name: `load_pretrained("smollm2")`."""

import lora_lib.torch  # noqa: F401  (first: its names come from this room too)
from lora_lib.models.pretrained import NAMES, load_pretrained

__all__ = ["NAMES", "load_pretrained"]
