"""How good is a language model? Losses, right answers, and what it says."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lib.text import Tokenizer
from lora_lib.tuning.data import prompt_ids
from lora_lib.tuning.loop import cross_entropy


def complete(model: nn.Module, tokenizer: Tokenizer, prompt: str, max_new_tokens: int = 40,
             **options) -> str:
    """How the model goes on after `prompt`, up to a newline or the end of the text.

    `options` are `generate`'s temperature and seed.
    """
    newline = tokenizer.encode("\n")[0]
    start = [tokenizer.end, *tokenizer.encode(prompt)]
    tokens = torch.tensor([start], device=next(model.parameters()).device)
    tokens = model.generate(tokens, max_new_tokens, stop=(tokenizer.end, newline), **options)
    return tokenizer.decode(tokens[0, len(start):].tolist())


def exact_match(model: nn.Module, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]],
                batch_size: int = 256) -> float:
    """The share of pairs (prompt, answer) whose whole answer greedy decoding would produce.

    One forward pass over prompt and answer is enough. Greedy decoding writes the answer if and
    only if each of its tokens is the likeliest after the prompt and the answer's tokens before
    it, and these are just the positions that the pass has computed.
    """
    right = 0
    for logits, labels in _passes(model, tokenizer, pairs, batch_size):
        right += ((logits.argmax(-1) == labels) | (labels == -100)).all(dim=1).sum().item()
    return right / len(pairs)


def mean_loss(model: nn.Module, tokenizer: Tokenizer, examples: Sequence[str | tuple[str, str]],
              batch_size: int = 256) -> float:
    """The cross-entropy in nats per token: of whole texts, or of the answers in pairs."""
    total = count = 0
    for logits, labels in _passes(model, tokenizer, examples, batch_size):
        total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        count += (labels != -100).sum().item()
    return total / count


def _passes(model, tokenizer, examples, batch_size):
    """Logits and labels of all examples, a batch at a time."""
    if not examples:
        raise ValueError("there must be at least one example, got none")
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for start in range(0, len(examples), batch_size):
            inputs, labels = (torch.from_numpy(array).to(device) for array in
                              tokenizer.batch(examples[start:start + batch_size]))
            with torch.no_grad():
                outputs = model(inputs)
            yield getattr(outputs, "logits", outputs), labels
    finally:
        model.train(training)


@torch.no_grad()
def answer_loss(model: nn.Module, data: tuple[Tensor, Tensor], *, batch_size: int = 8) -> float:
    """The mean loss of the answers' tokens, in nats; every token counts the same."""
    device = next(model.parameters()).device
    total = count = 0
    for inputs, labels in zip(*(tensor.to(device).split(batch_size) for tensor in data)):
        known = int((labels != -100).sum())
        total += cross_entropy(model(inputs), labels).item() * known
        count += known
    return total / count


@torch.no_grad()
def reply(model: nn.Module, tokenizer, prompt: str, *, max_new_tokens: int = 60) -> str:
    """The model's own answer to a prompt: the likeliest token each time, up to the end mark."""
    ids = torch.tensor([prompt_ids(tokenizer, prompt)], device=next(model.parameters()).device)
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                         max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip()
