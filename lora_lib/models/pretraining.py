"""Pretrain the small language model on generated tales, from nothing, at any width."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from lora_lib.files import atomic
from lora_lib.models.tales import LanguageModel, LanguageModelConfig
from lora_lib.text import Tokenizer, tales
from lora_lib.torch import fine_tune, mean_loss, warmup_cosine

ROW, BATCH, WEIGHT_DECAY = 80, 32, 0.1
LR, WIDTH = 3e-3, 96                    # the course's model; another width takes LR * WIDTH / width
HELD_OUT = 1000


def config(width: int, vocab_size: int) -> LanguageModelConfig:
    """Four layers of this width, heads of 24 numbers, MLPs 8/3 times as wide.

    Raises ValueError for a width that is no multiple of 24.
    """
    if width < 24 or width % 24:
        raise ValueError(f"width must be a multiple of 24, got {width}")
    return LanguageModelConfig(vocab_size, width, width * 8 // 3, num_heads=width // 24)


def pack(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels (rows, ROW), each row with as many whole texts as fit, end between them.

    Several texts in a row waste less padding than one, and train the later positions as well.
    A text too long for a row is left out.
    """
    rows, row = [], [tokenizer.end]
    for text in texts:
        ids = [*tokenizer.encode(text), tokenizer.end]
        if len(ids) > ROW:
            continue
        if len(row) + len(ids) > ROW + 1:
            rows.append(row)
            row = [tokenizer.end]
        row = row + ids
    rows.append(row)
    tokens = torch.full((len(rows), ROW + 1), -100)
    for i, row in enumerate(rows):
        tokens[i, :len(row)] = torch.tensor(row)
    inputs = tokens[:, :-1].clone()
    inputs[inputs == -100] = tokenizer.pad
    return inputs, tokens[:, 1:].contiguous()


def pretrain(out: Path, *, width: int = WIDTH, steps: int = 5000, texts: int = 200_000,
             seed: int = 0, checkpoint: Path | None = None) -> dict:
    """Train a model of this width and write it to `out`, as `lora_lib.models.tales.load` reads it.

    `texts` tales are trained on; `seed` draws them and the weights; `checkpoint` is a file to
    resume from, if it exists. Returns the record that the file keeps, with the held-out loss.
    """
    tokenizer = Tokenizer()
    model = LanguageModel(config(width, len(tokenizer)), seed=seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{len(tokenizer)} tokens, {texts:,} tales")
    losses = fine_tune(model, pack(tokenizer, tales(texts, seed)), steps=steps, batch_size=BATCH,
                       lr=LR * WIDTH / width, weight_decay=WEIGHT_DECAY, seed=seed,
                       checkpoint=checkpoint, checkpoint_every=500,
                       schedule=warmup_cosine(steps, warmup=steps // 25, final=0.02))
    print(f"training loss {losses[-1]:.4f}")

    model.to(torch.bfloat16).float()         # judge the weights that will be stored
    loss = mean_loss(model, tokenizer, tales(HELD_OUT, seed + 1))
    print(f"held-out loss {loss:.4f} nats a token")
    record = {"config": asdict(model.config), "tokens": tokenizer.tokens, "seed": seed,
              "steps": steps, "tales": texts, "held_out_loss": loss,
              "held_out_tales": HELD_OUT, "held_out_seed": seed + 1}
    weights = {name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters()}
    with atomic(out) as path:
        save_file(weights, path, {key: json.dumps(value) for key, value in record.items()})
    print(f"wrote {out}")
    return record
