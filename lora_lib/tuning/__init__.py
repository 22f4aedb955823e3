"""From a user's data to a trained adapter: data, the loop, resuming, memory, evaluation."""

import lora_lib.torch  # noqa: F401  (first: its names come from this room too)
