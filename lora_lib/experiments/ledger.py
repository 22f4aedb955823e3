"""What is said of LoRA: beside our own verdicts, what papers found, and why the two may differ.

A source is here for what it says in words, at its address; no figure of it is repeated. `agrees` is
about the claim as it is worded. "Why" is a guess, unless a chapter measures it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from lora_lib.experiments import (assistant, batches, enough, filled, foundations,
                                  minilm_rates, mistakes, rates, real, small_rates, smol_facts,
                                  smol_rates, smol_studies, smol_updates, targets)
from lora_lib.experiments.claims import Verdict

MODULES = (foundations, targets, small_rates, minilm_rates, smol_rates, smol_studies, batches,
           enough, filled, smol_facts, smol_updates, mistakes, assistant, real)
AGREES, DISAGREES, PARTLY = "agrees", "disagrees", "partly"


@dataclass(frozen=True)
class Source:
    """A paper or a manual: its short name, its address, the models that it looked at."""

    name: str
    url: str
    models: str


PAPER = Source("Hu et al. 2021", "https://arxiv.org/abs/2106.09685", "up to GPT-3, 175B")
INTRINSIC = Source("Aghajanyan et al. 2020", "https://arxiv.org/abs/2012.13255", "RoBERTa, BERT")
RSLORA = Source("Kalajdzievski 2023", "https://arxiv.org/abs/2312.03732", "language models")
BIDERMAN = Source("Biderman et al. 2024", "https://arxiv.org/abs/2405.09673", "Llama 2 7B")
START = Source("Hayou et al. 2024", "https://arxiv.org/abs/2406.08447", "RoBERTa, Llama")
NONZERO = Source("Li et al. 2025", "https://arxiv.org/abs/2505.23194", "several")
INTRUDERS = Source("Shuttleworth et al. 2024", "https://arxiv.org/abs/2410.21228", "several")
REGRET = Source("LoRA Without Regret, 2025", "https://thinkingmachines.ai/blog/lora/",
                "Llama 3, Qwen3")
PRIMER = Source("Tinker's primer on LoRA",
                "https://tinker-docs.thinkingmachines.ai/tinker/lora-primer/", "Llama 3, Qwen3")
TABLE = Source("Tinker's table of rates",
               "https://github.com/thinking-machines-lab/tinker-cookbook/blob/"
               "02face348b50f74bd3afbe4254ab520b03690946/tinker_cookbook/hyperparam_utils.py",
               "28 models")
MU_A = Source("Chen et al. 2026", "https://arxiv.org/abs/2602.06204", "several")
QLORA = Source("Dettmers et al. 2023", "https://arxiv.org/abs/2305.14314", "Llama 7B")
BITS = Source("Allen-Zhu and Li 2024", "https://arxiv.org/abs/2404.05405",
              "whole models, from scratch")
TIES = Source("Yadav et al. 2023", "https://arxiv.org/abs/2306.01708", "T5, ViT")


@dataclass(frozen=True)
class Entry:
    """A claim's text, what each source makes of it, and why our models may say otherwise."""

    claim: str
    sources: tuple[tuple[Source, str], ...]
    why: str


LEDGER = (
    Entry("a low-rank update is enough for a new task", ((INTRINSIC, AGREES), (PAPER, AGREES)),
          "Our digits ask for one turn of the input; nothing here shows where it ends."),
    Entry("the update that full fine-tuning makes is of low rank", ((BIDERMAN, DISAGREES),),
          "Low rank is enough for the task, and still not what full fine-tuning makes: it has no "
          "reason to save directions."),
    Entry("B, not A, must start at zero", ((START, PARTLY), (NONZERO, DISAGREES)),
          "Either start reaches the task when each has its own rate; the papers differ on average "
          "quality and on the range of rates that serves."),
    Entry("adapters stack: train several, merge what you need", ((TIES, DISAGREES),),
          "Updates that were trained apart were never asked to leave each other's inputs alone."),
    Entry(smol_studies.QV.text, ((PAPER, AGREES), (QLORA, DISAGREES), (PRIMER, DISAGREES)),
          "The paper compared parts of attention only; and most of our tasks copy from the "
          "context, which attention does."),
    Entry(targets.ALL.text, ((PRIMER, AGREES), (QLORA, AGREES)),
          "Nothing was shown to beat them here; where the seeds differ much, little is decided."),
    Entry(smol_studies.FEED_FORWARD.text, ((BIDERMAN, AGREES), (PRIMER, AGREES)),
          "Two of our three tasks copy from the context; the sources' tasks ask for more."),
    Entry(rates.NORMAL.text, ((RSLORA, DISAGREES), (MU_A, PARTLY)),
          "The limit of high ranks and wide layers is a statement about rates far from our "
          "ranks of 4 to 64."),
    Entry(rates.NORMAL_ROOT.text, ((RSLORA, AGREES), (MU_A, PARTLY)),
          "As above."),
    Entry(rates.ROOT_LEARNS.text, ((RSLORA, AGREES),),
          "Each scheme has its own best rate here; at one rate for all, the factor is most of the "
          "difference."),
    Entry(rates.HIGHER.text, ((REGRET, AGREES),),
          "Chapter 7 has a reason that holds for every layer wider than its rank is high; how much "
          "higher depends on the width, the rank and alpha."),
    Entry(rates.TENFOLD.text, ((REGRET, AGREES), (TABLE, AGREES)),
          "If the ratio grows as the root of the width, the small model must fall short of ten, "
          "and models of billions come near it."),
    Entry(rates.USUAL.text, ((TABLE, AGREES),),
          "Best rates fall with the width; at width 96 they lie above the range."),
    Entry(rates.MORE_RANK.text, ((PRIMER, PARTLY),),
          "Rank pays until the data fit; how much data that is depends on the model."),
    Entry(batches.BATCH.text, ((REGRET, AGREES),),
          "They speak of batches beyond some size, larger than ours."),
    Entry(smol_studies.AS_GOOD.text, ((PAPER, AGREES), (BIDERMAN, DISAGREES), (REGRET, PARTLY)),
          "LoRA is behind where a small model, which knows nothing but tales, has much to change; "
          "a large one has met most formats before."),
    Entry(filled.GROWS.text, ((BITS, AGREES),),
          "They train whole models, on every fact far longer than we do. We fill three matrices of "
          "one layer, and what has room for more people has fewer looks at each."),
    Entry(smol_facts.MORE.text, ((REGRET, AGREES),),
          "How much is new decides: a few hundred facts fit where thousands do not."),
    Entry(smol_updates.FORGETS.text, ((BIDERMAN, AGREES), (INTRUDERS, AGREES)),
          "What counts is where on the front of learning and forgetting two runs are compared; and "
          "theirs train far longer."),
    Entry(smol_updates.INTRUDES.text, ((INTRUDERS, AGREES),),
          "Sixty-four steps may be too few to make any."),
)


def all_verdicts() -> list[Verdict]:
    """The verdicts of every experiment on LoRA itself, in the chapters' order."""
    return [v for module in MODULES for v in module.verdicts()]


def table(verdicts: Iterable[Verdict], ledger: Iterable[Entry] = LEDGER) -> str:
    """The ledger as a Markdown table: for each claim the verdict on every model with its effect,
    what sources say, and why they may differ. A model that did not test a claim has a dash.

    Raises ValueError for a claim of the ledger that no verdict is about.
    """
    by_claim: dict[str, dict[str, Verdict]] = {}
    for verdict in verdicts:
        by_claim.setdefault(verdict.claim, {})[verdict.model] = verdict
    lines = ["| claim | small model | SmolLM2 | elsewhere | why they may differ |",
             "|---|---|---|---|---|"]
    for entry in ledger:
        if entry.claim not in by_claim:
            raise ValueError(f"no verdict on the ledger's claim {entry.claim!r}")
        own = by_claim[entry.claim]
        cells = [f"**{own[model].verdict}**: {own[model].effect}" if model in own else "–"
                 for model in ("small", "SmolLM2")]
        elsewhere = "; ".join(f"[{source.name}]({source.url}) ({source.models}) {says}"
                              for source, says in entry.sources)
        lines.append(f"| {entry.claim} | {' | '.join(cells)} | {elsewhere} | {entry.why} |")
    return "\n".join(lines)
