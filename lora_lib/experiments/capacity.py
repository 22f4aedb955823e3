"""How many made-up facts an adapter holds: bits known against bits offered, by its size.

`python -m lora_lib.experiments.capacity` takes about half an hour on one core, in float32.
"""

import math

import torch

from lora_lib.experiments.sweep import main
from lora_lib.experiments.trial import TARGETS, base
from lora_lib.tasks import BIOGRAPHY, BITS_PER_PERSON, biographies
from lora_lib.torch import cross_entropy, fine_tune, inject, lora_parameters, warmup_cosine

# (targets, rank): the sizes of adapters, in numbers, are computed by `trial`.
ADAPTERS = (("q,v", 1), ("q,v", 4), ("mlp", 1), ("all", 1), ("all", 4))
PEOPLE = (25, 50, 100, 200, 400)
RATES = {("q,v", 1): 1e-2, ("q,v", 4): 1e-2, ("mlp", 1): 1e-2, ("all", 1): 1e-2, ("all", 4): 1e-2,
         ("full", 0): 2e-3}
SEEDS = (0, 1, 2)


def bits_known(model, pairs) -> float:
    """What the model knows of the answers, in bits: the sum over facts of log2(answers there are)
    + log2 p(answer). Chance among the right kind of answers gives 0; a wrong certainty less.
    """
    tokenizer = model.tokenizer
    offered = [math.log2(len(answers)) for _, answers in BIOGRAPHY.values()]
    inputs, labels = map(torch.from_numpy, tokenizer.batch(pairs))
    first = (labels != -100).int().argmax(dim=1)                 # where the answer's word stands
    rows = torch.arange(len(labels))
    with torch.no_grad():
        logits = torch.cat([model(part) for part in inputs.split(512)])[rows, first]
    surprise = torch.nn.functional.cross_entropy(logits, labels[rows, first], reduction="sum")
    return sum(offered) * len(pairs) / len(offered) - surprise.item() / math.log(2)


def trial(people: int, targets: str, rank: int, lr: float, steps: int = 1500,
          batch_size: int = 64, seed: int = 0, dtype: str = "float32") -> dict[str, float]:
    """Learn `people` biographies by heart; the bits known, offered, and the numbers trained."""
    model = base(dtype)
    if targets != "full":
        inject(model, TARGETS[targets], rank, 2 * rank, seed=seed)
    pairs = biographies(people, seed)
    data = tuple(map(torch.from_numpy, model.tokenizer.batch(pairs)))
    fine_tune(model, data, steps=steps, batch_size=min(batch_size, len(pairs)), lr=lr, seed=seed,
              loss=cross_entropy, schedule=warmup_cosine(steps, warmup=steps // 20),
              progress=False)
    trained = lora_parameters(model) or list(model.parameters())
    return {"known": bits_known(model, pairs), "offered": people * BITS_PER_PERSON,
            "parameters": sum(p.numel() for p in trained)}
