"""Instruction tuning of a causal model of transformers': pairs to batches, adapters, answers."""

import json
import os
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lora_lib.torch.inject import inject
from lora_lib.tuning.loop import fine_tune, warmup_cosine

PLAIN = "### Instruction:\n{}\n\n### Response:\n"            # for a tokenizer without a template

Pair = tuple[str, str]                                       # a prompt and its answer


def read_pairs(path: str | os.PathLike, *, longest: int = 400) -> list[Pair]:
    """(instruction, response) of each line of a JSON Lines file in the format of Dolly 15k.

    Lines with a `context`, and those of more than `longest` characters, are left out.
    """
    with open(path, encoding="utf8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    pairs = [(row["instruction"].strip(), row["response"].strip()) for row in rows
             if not row.get("context")]
    return [pair for pair in pairs if all(pair) and sum(map(len, pair)) <= longest]


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """What stands before the answer, as tokens: in the model's chat template if it has one."""
    template = getattr(tokenizer, "chat_template", None)
    text = PLAIN.format(prompt) if not template else tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=not template)["input_ids"]


def encode(tokenizer, pairs: Iterable[Pair], *, length: int = 256) -> tuple[Tensor, Tensor]:
    """Inputs and labels (n, at most `length`) for `fine_tune`; the label is the next token.

    The prompt's and the padding's labels are -100: only the answer is learned, and the end mark
    behind it. Padding stands on the right, where a causal model never looks, so no mask is needed.
    An answer is cut at `length`. Raises ValueError for a prompt that leaves no room for one, for no
    pairs at all, or for a tokenizer without an end mark.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token: the model could not learn where to stop")
    rows = []
    for prompt, answer in pairs:
        before = prompt_ids(tokenizer, prompt)
        if len(before) >= length:
            raise ValueError(f"length = {length} leaves no room behind a prompt of {len(before)} "
                             f"tokens: {prompt[:40]!r}")
        after = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids = (before + after)[:length + 1]
        rows.append((ids[:-1], [-100] * (len(before) - 1) + ids[len(before):]))
    if not rows:
        raise ValueError("expected at least one pair, got none")
    pad = lambda lists, value: nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in lists], batch_first=True, padding_value=value)
    inputs, labels = zip(*rows)
    return pad(inputs, tokenizer.eos_token_id), pad(labels, -100)


def instruction_tune(model: nn.Module, data: tuple[Tensor, Tensor], *, rank: int = 16,
                     alpha: float = 32, targets: str | list[str] = "all-linear",
                     lr: float = 5e-4, steps: int = 200, batch_size: int = 8, seed: int = 0,
                     **options) -> list[float]:
    """Put adapters into a causal model and train them on what `encode` gave; every step's loss.

    `options` are `fine_tune`'s. Its precision "auto" is bfloat16 on a GPU that has it and float16
    with a scaled loss on one that has not, such as a T4. Load the base in float32 for either: its
    weights are cast as they are used, and sums between the layers stay exact.
    """
    inject(model, targets, rank, alpha, seed=seed)
    schedule = warmup_cosine(steps, warmup=steps // 20)
    return fine_tune(model, data, steps=steps, batch_size=batch_size, lr=lr, schedule=schedule,
                     seed=seed, **options)
