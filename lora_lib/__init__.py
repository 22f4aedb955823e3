"""LoRA, small and exact: the library behind the course.

`lora_lib.numpy` is the equations as code and imports no torch; `lora_lib.torch` has the same names
on tensors, for real work. A name that exists in both means the same thing.
"""

__version__ = "0.1.0"
