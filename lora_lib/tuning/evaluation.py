"""How good is a language model? Losses, right answers, and what it says."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lib.text import Tokenizer
from lora_lib.tuning.data import Example, Message, Rows, encode, prompt_ids
from lora_lib.tuning.head import Causal, logits_at_labels


def complete(model: nn.Module, tokenizer: Tokenizer, prompt: str, max_new_tokens: int = 40,
             **options) -> str:
    """How the course's small model goes on after `prompt`, up to a newline or the text's end.

    `options` are `generate`'s temperature and seed.
    """
    newline = tokenizer.encode("\n")[0]
    start = [tokenizer.end, *tokenizer.encode(prompt)]
    tokens = torch.tensor([start], device=next(model.parameters()).device)
    tokens = model.generate(tokens, max_new_tokens, stop=(tokenizer.end, newline), **options)
    return tokenizer.decode(tokens[0, len(start):].tolist())


def exact_match(model: nn.Module, tokenizer, examples: Sequence[Example] | Rows,
                batch_size: int = 256) -> float:
    """The share of examples, such as pairs (prompt, answer), whose whole answer greedy decoding
    would produce.

    One forward pass over prompt and answer is enough. Greedy decoding writes the answer if and
    only if each of its tokens is the likeliest after the prompt and the answer's tokens before
    it, and these are just the positions that the pass has computed.
    """
    return loss_and_match(model, tokenizer, examples, batch_size)[1]


def mean_loss(model: nn.Module, tokenizer, examples: Sequence[Example] | Rows,
              batch_size: int = 256) -> float:
    """The cross-entropy in nats per token: of whole texts, or of the answers in pairs."""
    return loss_and_match(model, tokenizer, examples, batch_size)[0]


def loss_and_match(model: nn.Module, tokenizer, examples: Sequence[Example] | Rows,
                   batch_size: int = 256) -> tuple[float, float]:
    """`mean_loss` and `exact_match` of the same examples, from one pass through the model."""
    total, count, wrong = 0.0, 0, set()
    rows = _rows(tokenizer, examples)
    for numbers, logits, labels in _passes(model, rows, batch_size):
        wrong |= set(numbers[(logits.argmax(-1) != labels).cpu()].tolist())
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        count += len(labels)
    return total / count, 1 - len(wrong) / len(rows)


def replies(model: nn.Module, tokenizer, prompts: Sequence[str | list[Message]], *,
            max_new_tokens: int = 60, batch_size: int = 16, skip_special_tokens: bool = True
            ) -> list[str]:
    """A causal model's own answers: the likeliest token each time, up to an end mark.

    A prompt is a text or the messages of a conversation so far. Prompts of like length are
    answered together, with padding on the left that the model does not see.
    """
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    said, device, ends = {}, next(model.parameters()).device, _end_marks(model, tokenizer)
    with _evaluating(model):
        for start in range(0, len(order), batch_size):
            some = order[start:start + batch_size]
            longest = max(len(ids[i]) for i in some)
            fill = [[0] * (longest - len(ids[i])) for i in some]
            tokens = torch.tensor([f + ids[i] for f, i in zip(fill, some)], device=device)
            real = torch.tensor([f + [1] * len(ids[i]) for f, i in zip(fill, some)], device=device)
            out = model.generate(input_ids=tokens, attention_mask=real, do_sample=False,
                                 max_new_tokens=max_new_tokens, top_p=None, temperature=None,
                                 eos_token_id=ends, pad_token_id=tokenizer.eos_token_id)
            for i, row in zip(some, out[:, longest:].tolist()):
                row = row[:1 + next((k for k, token in enumerate(row) if token in ends), len(row))]
                text = tokenizer.decode(row, skip_special_tokens=skip_special_tokens)
                said[i] = text.strip()
    return [said[i] for i in range(len(ids))]


def reply(model: nn.Module, tokenizer, prompt: str | list[Message], **options) -> str:
    """`replies` to one prompt."""
    return replies(model, tokenizer, [prompt], **options)[0]


def _end_marks(model, tokenizer) -> list[int]:
    """The tokenizer's end mark, and those that the model brings, such as one that ends a turn."""
    own = getattr(model.generation_config, "eos_token_id", None)
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})


def _rows(tokenizer, examples) -> Rows:
    """The examples as rows: by the small model's tokenizer, or by one of transformers'."""
    if isinstance(examples, Rows):
        return examples
    if not len(examples):
        raise ValueError("there must be at least one example, got none")
    if not hasattr(tokenizer, "batch"):
        rows = encode(tokenizer, examples)
        if rows.cut or rows.dropped:
            raise ValueError(f"example {min(rows.cut + rows.dropped)} is longer than 1024 tokens; "
                             "encode them with a greater length, or a smaller one if a part is to "
                             "be measured, and pass the rows")
        return rows
    inputs, labels = (torch.from_numpy(array) for array in tokenizer.batch(examples))
    return Rows(list(inputs), list(labels), tokenizer.end)


def _passes(model, rows, batch_size) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Row numbers, logits and labels of all labelled positions, rows of like length together."""
    device, order = next(model.parameters()).device, rows.lengths.argsort(stable=True)
    causal = Causal.of(model)
    with _evaluating(model):
        for numbers in order.split(batch_size):
            inputs, labels = (tensor.to(device) for tensor in rows.batch(numbers))
            for logits, some, where in logits_at_labels(model, causal, inputs, labels):
                yield numbers[where.cpu()], logits, some


@contextmanager
def _evaluating(model):
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
