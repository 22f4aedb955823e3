"""Try every case of tests/torch/architectures.py; write the answers to book/compatibility.md."""

import re
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))                                       # for tests

from tests.torch import architectures as cases  # noqa: E402  (after the path)

PAGE = ROOT / "book" / "compatibility.md"

TEXT = """\
# Compatibility

Which models of [transformers](https://huggingface.co/docs/transformers) take adapters from
`lora_lib`, and do the adapters move to [PEFT](https://huggingface.co/docs/peft) and back? Each
answer below is one run: a tiny model with random weights, of the class in the first column, is
trained a few steps, saved, and loaded into a fresh copy of the base. "yes" means that the outputs
are the same, up to rounding, and not the base's. `scripts/compatibility.py` writes this page, from
the cases that the tests check. It ran with peft {peft} and transformers {transformers}.

## Architectures

- **to PEFT**: trained here, saved by `save_adapter`, loaded by `PeftModel.from_pretrained`.
- **from PEFT**: trained in PEFT, saved by `save_pretrained`, loaded by `load_adapter`.
- **whole module, to** and **from PEFT**: the same, with one module trained whole beside the
  adapters. It is the classifier's head, the output head, or a norm, named in `modules_to_save`.
- **merged**: `merge`, then `save_pretrained`. The folder has the files, names and configuration of
  the base's own, and the Auto class of transformers loads it with the adapted outputs.
- **in shards**: the same, with the weights spread over several files.

{architectures}

Qwen3, GPT-2 and T5 tie the output head to the embedding. A tied weight cannot have an adapter, nor
be trained whole, since merging it would change both; the rest of the model can.

## Options of PEFT

A `LoraConfig` with this option was trained in PEFT and loaded here. What is not supported is
refused before the model is touched, with the words in the last column.

{options}

## Another base

An adapter works on the base that it was trained on. `load_adapter` refuses another one where the
files let it see the difference, for each of the architectures above. The words are Llama's.

{bases}

PEFT's file says nothing of the base's weights, so another one of the same shapes goes unnoticed, in
PEFT too. `save_adapter` notes a few values of each adapted weight, of the embeddings and of the
heads; they stand in the file's metadata, which PEFT ignores.
"""

COLUMNS = {"to_peft": "to PEFT", "from_peft": "from PEFT",
           "whole_to_peft": "whole module, to PEFT", "whole_from_peft": "whole module, from PEFT",
           "merged": "merged", "sharded": "in shards"}
BASES = {"wider": "wider", "shallower": "with fewer layers",
         "deeper": "with more layers, the first ones the same",
         "other_architecture": "another architecture",
         "other_weights": "the same shapes, other weights"}


def tables() -> dict[str, str]:
    """Every case, run: the three tables of the page."""
    architectures = [[name, f"`{type(a.base()).__name__}`",
                      *(cases.direction(column, name) for column in COLUMNS)]
                     for name, a in cases.ARCHITECTURES.items()]
    options = [[re.sub("^[^,]+", r"`\g<0>`", name), *answer(cases.option(name))]
               for name in cases.OPTIONS]
    bases = [[words, *(verdict(name, saved_by) for saved_by in ("lora_lib", "PEFT")),
              f"`{cases.other_base(name, 'Llama', 'lora_lib')}`"] for name, words in BASES.items()]
    return {"architectures": table("", "class", *COLUMNS.values(), rows=architectures),
            "options": table("option", "loads here", "how it is refused", rows=options),
            "bases": table("another base", "`lora_lib`'s file", "PEFT's file", "how it is refused",
                           rows=bases)}


def answer(words):
    return ("yes", "") if words == "yes" else ("no", f"`{words}`")


def verdict(base, saved_by):
    refused = [cases.other_base(base, name, saved_by) is not None for name in cases.ARCHITECTURES]
    return "refused" if all(refused) else "loads" if not any(refused) else "sometimes refused"


def table(*head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


if __name__ == "__main__":
    PAGE.write_text(TEXT.format(peft=version("peft"), transformers=version("transformers"),
                                **tables()), "utf8")
