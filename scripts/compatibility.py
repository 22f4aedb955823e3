"""Try every case of tests/torch/architectures.py; write the answers to book/compatibility.md.

With --families, each family of transformers too (tests/torch/families.py), or those that are named,
in as many processes as there are cores. Without, their lines stay as they are. With --check nothing
is written: it ends in an error that shows the lines of families which are others now.
"""

import argparse
import os
import re
import sys
import time
from collections import Counter
from multiprocessing import get_context
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))                                       # for tests
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TQDM_DISABLE="1")

from tests.torch import architectures as cases  # noqa: E402  (after the path)
from tests.torch.families import COLUMNS as ANSWERS, row  # noqa: E402
from tests.torch.tiny import families  # noqa: E402

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
be trained whole, since merging it would change both; the rest of the model can. Rows of it can be
trained, as the next section says, and both modules together can be trained whole.

## Options of PEFT

A `LoraConfig` with this option was trained in PEFT and loaded here. What is not supported is
refused before the model is touched, with the words in the last column.

{options}

`trainable_token_indices` trains a few rows of an embedding, such as those of new tokens, and the
file keeps these rows alone. A whole embedding, named in `modules_to_save` or kept by PEFT's
`save_embedding_layers`, is read and written too; of a file of megabytes that is mostly embeddings
`save_adapter` warns, with its size. A tied head keeps to the embedding. PEFT can train a copy of
each of two tied modules apart; such a file is refused, and so is one that trains rows of a tied
head alone. `lora_bias` gives B a bias; a layer that has none of its own is adapted, and not merged.

## Another base

An adapter works on the base that it was trained on. `load_adapter` refuses another one where the
files let it see the difference, for each of the architectures above. The words are Llama's.

{bases}

PEFT's file says nothing of the base's weights, so another one of the same shapes goes unnoticed, in
PEFT too. `save_adapter` notes a few values of each adapted weight, of the embeddings and of the
heads; they stand in the file's metadata, which PEFT ignores.
"""

HEADING = "## Every family"
FAMILIES = HEADING + """

A family is a package of `transformers.models`. Of the `{all}` that hold a model, `{tried}` were
made tiny, with random weights, and taken through what follows; `{whole}` answer "yes" everywhere.
Each answer holds for two choices of targets: "all-linear", and the commonest names of its layers,
three at most. Where only one of the two fails, the cell says which.
`scripts/compatibility.py --families` runs it all;
this is with peft {peft} and transformers {transformers}.
By what they take they are {kinds}.

- **training step**: forward, backward and a step of SGD in training mode, which in-place operations
  after an adapted layer could break.
- **gradient**: it reaches every adapter, or all but those that are named. The loss is a sum of all
  outputs with random signs, and the inputs are those of the fourth column: a gradient cannot come
  to a tower for pictures when there are none, nor to an expert that no token chose.
- **to PEFT**: random adapters, saved by `save_adapter`, give the same outputs in PEFT.
- **from PEFT**: random adapters of PEFT, saved by it, give the same outputs here.
- **reload**: what `save_adapter` wrote, loaded here.
- **merge**: the outputs are the same after `merge`; in float64 where the model lets the rounding
  of float32 grow.
- **NF4**: `quantize`, `inject`, then the training step, in which a gradient reaches the same
  adapters, but for experts that no token chooses once the router is rounded.

"PEFT:" marks what fails in PEFT itself. "Nothing reads its adapters": the model takes a layer's
weight without calling the layer, and PEFT's adapter acts in the call alone. "It reads its own file
otherwise": loaded in PEFT, what PEFT saved gives other outputs. "It takes names of layers for those
of experts": PEFT reads `gate_proj` or `down_proj` in a file as the experts' parameters, and the
layers of that name lose their adapters, with no more than a warning. `save_adapter` names these
layers when it writes such a file.

{table}

### Not tried

No tiny model of these families was made here; the first reason met stands beside each. Some need a
package that is not installed, others sizes or inputs that no general rule finds.

{not_tried}
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
    return "\n".join(map(line_of, [head, ["---"] * len(head), *rows]))


def line_of(cells):
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def run_families(names: list[str], processes: int) -> dict[str, str]:
    """Each family's line in one of the two tables, by name."""
    start, lines = time.perf_counter(), {}
    with get_context("spawn").Pool(processes, _quiet) as pool:
        for line in pool.imap_unordered(family_line, names):
            name = line.split()[1].strip("`")
            lines[name] = line
            print(f"{len(lines)} of {len(names)}: {name}", file=sys.stderr, flush=True)
    print(f"{len(lines)} families in {(time.perf_counter() - start) / 60:.1f} minutes")
    return lines


def family_line(name: str) -> str:
    """One family, run: its line in the table of those tried, or of those not tried."""
    return line_of(family_row(name, row(name)))


def families_part(lines: dict[str, str]) -> str:
    """The page's part on the families."""
    lines = dict(sorted(lines.items()))
    tried = {name: line for name, line in lines.items() if was_tried(line)}
    kinds = Counter(line.split(" | ")[2] for line in tried.values())
    return FAMILIES.format(
        all=len(lines), tried=len(tried),
        kinds=", ".join(f"`{kinds[k]}` {k}" for k in sorted(kinds)),
        whole=sum(line.endswith(" | yes" * len(ANSWERS) + " |") for line in tried.values()),
        peft=version("peft"), transformers=version("transformers"),
        table="\n".join([table("family", "class", "kind", "inputs", *ANSWERS, rows=[]),
                         *tried.values()]),
        not_tried="\n".join([table("family", "reason", rows=[]),
                             *(line for name, line in lines.items() if name not in tried)]))


def family_lines(page: str) -> dict[str, str]:
    """The lines of the page's two tables of families, by name."""
    return {found[1]: found[0] for found in
            re.finditer(r"^\| `(\w+)` \| .*$", page.partition(HEADING)[2], re.MULTILINE)}


def was_tried(line: str) -> bool:
    return line.count(" | ") > 2


def family_row(name: str, answers: dict[str, str]) -> list[str]:
    """One line of the families' tables."""
    if "not tried" in answers:
        return [f"`{name}`", f"`{answers['not tried']}`"]
    inputs = ", ".join(f"`{key}`" for key in answers["inputs"].split(", "))
    return [f"`{name}`", f"`{answers['class']}`", answers["modality"], inputs,
            *(answers[column] if answers[column] in ("yes", "-") else
              f"`{answers[column]}`" if column == "gradient" else f"no: `{answers[column]}`"
              for column in ANSWERS)]


def _quiet():
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def write(part: str) -> None:
    PAGE.write_text(TEXT.format(peft=version("peft"), transformers=version("transformers"),
                                **tables()) + "\n" + part, "utf8")


def changed(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """The lines of `old` that are no more, and those of `new` that were not."""
    return sorted({*old.values()} ^ {*new.values()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="*", metavar="NAME",
                        help="try these families anew, or all of them")
    parser.add_argument("--check", action="store_true", help="compare with the page; write nothing")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    old = family_lines(PAGE.read_text("utf8"))
    new = {}
    if options.families is not None or options.check:
        new = run_families(options.families or families(), options.processes)
    if options.check:
        sys.exit("\n".join(changed({name: old.get(name, "") for name in new}, new)))
    write(families_part({n: line for n, line in (old | new).items() if n in families()}))


if __name__ == "__main__":
    main()
