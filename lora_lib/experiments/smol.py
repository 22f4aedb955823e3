"""One fine-tuning run of SmolLM2-135M on short rows, full or LoRA, and what came of it.

The tasks are those of the small model (`lora_lib.tasks`), so that both can stand side by side, in
SmolLM2's tokens and without a chat template: 12 to 37 tokens a row, of which the answer's are
learned. "instructions 6" draws from its context, "facts 40" has 40 people's biographies by heart.
The embedding, which is also the output head, is frozen in both arms. A seed draws the examples, the
adapter's A and the order; the validation examples choose rates and serve for nothing else. All is
in float32, on a GPU if there is one; the random numbers are the CPU's, so a seed means the same.
"""

import math
from functools import lru_cache

import torch
from torch import nn

from lora_lib import docstrings
from lora_lib.experiments.trial import TARGETS
from lora_lib.tasks import Pair, biographies, task
from lora_lib.tuning.data import Rows, encode
from lora_lib.tuning.evaluation import loss_and_match, mean_loss

LENGTH, LETTERS = 40, 100        # tokens of a row; no pair of so few letters has more
VALIDATION, TEST, PASSAGES = 96, 192, 12
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def encoded(tokenizer, pairs: list[Pair]) -> Rows:
    """Rows of prompt and answer, the answer's tokens alone with labels.

    Raises ValueError for a pair of more than `LENGTH` tokens.
    """
    rows = Rows([], [], tokenizer.eos_token_id)
    for prompt, answer in pairs:
        asked = tokenizer.encode(prompt)
        ids = torch.tensor(asked + tokenizer.encode(answer))
        if len(ids) > LENGTH + 1:
            raise ValueError(f"a row has at most {LENGTH} tokens, got {len(ids) - 1}: {prompt!r}")
        labels = ids[1:].clone()
        labels[:len(asked) - 1] = -100
        rows.inputs.append(ids[:-1])
        rows.labels.append(labels)
    return rows


@lru_cache
def parts(name: str, examples: int, seed: int) -> dict[str, list[Pair]]:
    """The pairs of a task to train on, to choose by and to compare on: "train", "validation",
    "test". Of facts there is one part, thrice: what is learned by heart is what is asked."""
    kind, _, dial = name.partition(" ")
    if kind == "facts":
        return dict.fromkeys(("train", "validation", "test"), biographies(int(dial), seed))
    made = task(name, train=2 * examples, test=VALIDATION + 2 * TEST, seed=seed)
    short = lambda pairs, count: [p for p in pairs if len(p[0] + p[1]) <= LETTERS][:count]
    held = short(made.test, VALIDATION + TEST)
    return {"train": short(made.train, examples), "validation": held[:VALIDATION],
            "test": held[VALIDATION:]}


def fresh(targets: str, rank: int, alpha: float, *, seed: int = 0, use_rslora: bool = False,
          start: str = "B = 0") -> nn.Module:
    """SmolLM2 ready for training: with adapters, or all of it but the embedding for "full".

    `start` "A = 0" exchanges the two: A is zero and B drawn (`exchange`).
    """
    from lora_lib.models import load_pretrained
    from lora_lib.torch import inject
    model = load_pretrained("smollm2", device=DEVICE)
    if targets == "full":
        model.model.embed_tokens.weight.requires_grad_(False)
        return model
    inject(model, TARGETS[targets], rank, alpha, seed=seed, use_rslora=use_rslora)
    if start == "A = 0":
        exchange(model, seed)
    return model


def exchange(model: nn.Module, seed: int) -> None:
    """Set every A to zero and draw B: normal, of variance 1 / rank, its inputs' number."""
    from lora_lib.torch import LoRALinear
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRALinear):
                drawn = torch.empty(module.B.shape).normal_(0, module.rank ** -0.5,
                                                            generator=generator)
                module.B.copy_(drawn)
                module.A.zero_()


@lru_cache
def prose() -> tuple[str, ...]:
    """Passages of Python's language reference, which no task has: what may be forgotten."""
    return tuple(docstrings.prose(PASSAGES, seed=0))


def train(model: nn.Module, pairs: list[Pair], *, lr: float, steps: int, batch_size: int = 8,
          seed: int = 0, schedule=None) -> list[float]:
    """Fine-tune what is trainable, with a short warmup and a cosine; every step's loss."""
    from lora_lib.torch import fine_tune, warmup_cosine
    return fine_tune(model, encoded(model.tokenizer, pairs), steps=steps, batch_size=batch_size,
                     lr=lr, seed=seed, precision="model", progress=False,
                     schedule=schedule or warmup_cosine(steps, warmup=steps // 16))


def measure(model: nn.Module, pairs: dict[str, list[Pair]]) -> dict[str, float]:
    """The loss on the validation and the test examples, the share of right answers on the test,
    and the loss on prose, all losses in nats a token."""
    tokenizer = model.tokenizer
    rows = {part: encoded(tokenizer, pairs[part]) for part in ("validation", "test")}
    loss, match = loss_and_match(model, tokenizer, rows["test"], 32)
    valid = loss if pairs["validation"] is pairs["test"] else mean_loss(
        model, tokenizer, rows["validation"], 32)
    return {"valid": valid, "loss": loss, "match": match,
            "prose": mean_loss(model, tokenizer, encode(tokenizer, prose()), 4)}


def trial(name: str, targets: str, rank: int, alpha: float, lr: float, examples: int = 512,
          steps: int = 64, batch_size: int = 8, seed: int = 0, use_rslora: bool = False,
          start: str = "B = 0") -> dict[str, float]:
    """Adapt, train, measure. A run whose loss is no longer finite has no right answer."""
    model = fresh(targets, rank, alpha, seed=seed, use_rslora=use_rslora, start=start)
    pairs = parts(name, examples, seed)
    try:
        losses = train(model, pairs["train"], lr=lr, steps=steps, batch_size=batch_size, seed=seed)
    except FloatingPointError:
        return {"match": 0.0} | dict.fromkeys(("valid", "loss", "prose", "train"), math.inf)
    return measure(model, pairs) | {"train": sum(losses[-8:]) / len(losses[-8:])}
