"""One fine-tuning run of the small language model, full or LoRA, and what came of it."""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F

from lora_lib.tasks import BIOGRAPHY, Task, task
from lora_lib.text import tales
from lora_lib.torch import (exact_match, fine_tune, inject, load_pretrained, mean_loss,
                            warmup_cosine)

# What `targets` may say, beside "full": which linear layers get an adapter.
TARGETS = {
    "q": ["q_proj"], "k": ["k_proj"], "v": ["v_proj"], "o": ["o_proj"],
    "q,v": ["q_proj", "v_proj"], "q,k": ["q_proj", "k_proj"],
    "q,k,v,o": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"], "all": "all-linear",
}
TEST, VALIDATION = 300, 100                                      # examples
made = lru_cache(task)
held_out_tales = lru_cache(lambda: tales(100, seed=99))          # not from the pretraining


def base(dtype: str = "float64"):
    """The pretrained model, with its tokenizer."""
    return load_pretrained("tales", dtype=getattr(torch, dtype))


def adapted(targets: str, rank: int = 8, alpha: float = 16, *, seed: int = 0,
            use_rslora: bool = False, dtype: str = "float64"):
    """The pretrained model ready for training: with adapters, or all of it for "full"."""
    model = base(dtype)
    if targets != "full":
        inject(model, TARGETS[targets], rank, alpha, seed=seed, use_rslora=use_rslora)
    return model


def train(model, on: Task, *, lr: float, steps: int = 200, batch_size: int = 16,
          seed: int = 0) -> list[float]:
    """Fine-tune on a task with a short warmup and a cosine; the loss of every step."""
    data = tuple(map(torch.from_numpy, model.tokenizer.batch(on.train)))
    return fine_tune(model, data, steps=steps, batch_size=batch_size, lr=lr, seed=seed,
                     schedule=warmup_cosine(steps, warmup=steps // 20), progress=False)


def measure(model, on: Task) -> dict[str, float]:
    """The share of right answers, the loss on the task's test examples, and that on tales."""
    return {"match": exact_match(model, model.tokenizer, on.probes),
            "loss": mean_loss(model, model.tokenizer, on.test),
            "tales": mean_loss(model, model.tokenizer, held_out_tales())}


def bits_known(model, pairs) -> float:
    """What the model knows of `lora_lib.tasks.biographies`, in bits: the sum over the facts of
    log2(number of possible answers) + log2 p(answer). Chance among the possible answers gives 0.
    """
    offered = [math.log2(len(answers)) for _, answers in BIOGRAPHY.values()]
    inputs, labels = map(torch.from_numpy, model.tokenizer.batch(pairs))
    first = (labels != -100).int().argmax(dim=1)                 # where the answer's word stands
    rows = torch.arange(len(labels))
    with torch.no_grad():
        logits = torch.cat([model(part) for part in inputs.split(512)])[rows, first]
    surprise = F.cross_entropy(logits, labels[rows, first], reduction="sum").item() / math.log(2)
    return sum(offered) * len(pairs) / len(offered) - surprise


def trial(name: str, targets: str, rank: int = 8, alpha: float = 16, lr: float = 8e-3,
          steps: int = 200, batch_size: int = 16, seed: int = 0, use_rslora: bool = False,
          dtype: str = "float64") -> dict[str, float]:
    """Adapt, train, measure. A run whose loss is no longer finite has no right answer."""
    model = adapted(targets, rank, alpha, seed=seed, use_rslora=use_rslora, dtype=dtype)
    try:
        losses = train(model, made(name), lr=lr, steps=steps, batch_size=batch_size, seed=seed)
    except FloatingPointError:
        return {"match": 0.0, "loss": math.inf, "tales": math.inf, "train": math.inf}
    return measure(model, made(name)) | {"train": sum(losses[-20:]) / len(losses[-20:])}


def redrawn(name: str, targets: str, rank: int = 8, alpha: float = 16, lr: float = 8e-3,
            steps: int = 200, batch_size: int = 8, seed: int = 0, use_rslora: bool = False,
            dtype: str = "float32") -> dict[str, float]:
    """As `trial`, where the seed also draws the examples, and with the loss "valid" on validation
    examples, by which alone a rate is to be chosen."""
    model = adapted(targets, rank, alpha, seed=seed, use_rslora=use_rslora, dtype=dtype)
    return on_redrawn(model, name, lr=lr, steps=steps, batch_size=batch_size, seed=seed)


def on_redrawn(model, name: str, *, lr: float, steps: int, batch_size: int,
               seed: int) -> dict[str, float]:
    """Train a model that is ready for it on a task as this seed draws it, and measure."""
    on = made(name, test=TEST + VALIDATION, seed=seed)
    compared = Task(name, on.train, on.test[:TEST], on.probes[:TEST])
    try:
        losses = train(model, compared, lr=lr, steps=steps, batch_size=batch_size, seed=seed)
    except FloatingPointError:
        return {"match": 0.0} | dict.fromkeys(("loss", "tales", "train", "valid"), math.inf)
    return measure(model, compared) | {
        "train": sum(losses[-20:]) / len(losses[-20:]),
        "valid": mean_loss(model, model.tokenizer, on.test[TEST:])}
