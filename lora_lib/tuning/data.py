"""From prompts and answers to tokens: the model's own template, loss on the answers alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Message = dict[str, str]                                     # {"role": ..., "content": ...}
Example = str | tuple[str, str] | list[Message]              # a text, a pair, a conversation

# For a tokenizer without a template of its own.
PLAIN = ("{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + eos_token }}\n\n"
         "{% elif m.role == 'system' %}{{ m.content }}\n\n"
         "{% else %}### Instruction:\n{{ m.content }}\n\n### Response:\n{% endif %}{% endfor %}")


@dataclass(frozen=True)
class Rows:
    """Token rows of many lengths, for `fine_tune`: a row's labels are the tokens that come next.

    `inputs` and `labels` hold one tensor (length,) a row; a label of -100 is not learned. `pad`
    fills a batch up on the right, where a causal model never looks. `cut` and `dropped` are the
    numbers of the examples whose end was cut off, and of those that had no room for an answer.
    """

    inputs: list[Tensor]
    labels: list[Tensor]
    pad: int
    cut: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def lengths(self) -> Tensor:
        """The number of tokens of every row (n,)."""
        return torch.tensor([len(row) for row in self.inputs])

    def batch(self, numbers: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and labels (batch, longest) of the rows with these numbers."""
        filled = lambda rows, value: nn.utils.rnn.pad_sequence(
            [rows[int(i)] for i in numbers], batch_first=True, padding_value=value)
        return filled(self.inputs, self.pad), filled(self.labels, -100)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels (n, longest) of all rows."""
        return self.batch(range(len(self)))

    def __str__(self) -> str:
        learned = sum(int((row != -100).sum()) for row in self.labels)
        text = (f"{len(self):,} rows of {int(self.lengths.min())} to {int(self.lengths.max())} "
                f"tokens, {learned:,} of {int(self.lengths.sum()):,} learned")
        if self.cut:
            text += f"; {len(self.cut)} cut off (the first is number {self.cut[0]})"
        if self.dropped:
            text += (f"; {len(self.dropped)} left out, no room for an answer "
                     f"(the first is number {self.dropped[0]})")
        return text


def conversation(example: tuple[str, str] | list[Message]) -> list[Message]:
    """A pair as two messages; a conversation as it is."""
    if isinstance(example, tuple):
        prompt, answer = example
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return example


def prompt_ids(tokenizer, prompt: str | list[Message]) -> list[int]:
    """What stands before an answer, as tokens: a prompt, or messages, in the model's template."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return _ids(tokenizer, rendered(tokenizer, messages, ask=True), first=True)


def encode(tokenizer, examples: Iterable[Example], *, length: int = 1024) -> Rows:
    """Rows of at most `length` tokens for `fine_tune`.

    In a pair or a conversation the answers are learned, each with the mark that ends it; of a
    plain text every token but the first is. The words around the messages come from the
    tokenizer's chat template, and what stands before an answer is the same tokens as `prompt_ids`
    gives, as when the model is asked. An answer is cut off at `length`; an example
    without room for any is left out; both are counted in the rows.

    Raises ValueError, with the number of the example, for one that holds no answer, or that the
    template cannot write; for no example at all, or none with room; for a tokenizer without an end
    mark.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token: the model could not learn where to stop")
    inputs, labels, cut, dropped = [], [], [], []
    number, longest = -1, 0
    for number, example in enumerate(examples):
        try:
            read = _text_ids if isinstance(example, str) else _chat_ids
            ids, learned = read(tokenizer, example)
        except ValueError as error:
            raise ValueError(f"example {number}: {error}") from error
        if not any(learned[:length + 1]):
            dropped.append(number)
            longest = max(longest, learned.index(True))
            continue
        if len(ids) > length + 1:
            cut.append(number)
        inputs.append(torch.tensor(ids[:length + 1][:-1]))
        labels.append(torch.tensor([i if yes else -100 for i, yes in
                                    zip(ids[1:length + 1], learned[1:])]))
    if number < 0:
        raise ValueError("expected at least one example, got none")
    if not inputs:
        raise ValueError(f"length = {length} leaves no room for an answer in any of the "
                         f"{number + 1} examples; the longest prompt has {longest} tokens")
    return Rows(inputs, labels, tokenizer.eos_token_id, tuple(cut), tuple(dropped))


def _text_ids(tokenizer, text):
    """A plain text with its end mark, all of it learned but the first token."""
    if not text.strip():
        raise ValueError("the text is empty")
    ids = tokenizer(text)["input_ids"]
    ids = ids if ids[-1:] == [tokenizer.eos_token_id] else ids + [tokenizer.eos_token_id]
    return ids, [False] + [True] * (len(ids) - 1)


def _chat_ids(tokenizer, example):
    """A conversation's tokens, and which of them are learned: each answer up to its end mark."""
    messages = conversation(example)
    ids, learned, done = [], [], ""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i in answers:
        before = rendered(tokenizer, messages[:i], ask=True)
        whole = rendered(tokenizer, messages[:i + 1], ask=False)
        if not (before.startswith(done) and whole.startswith(before)):
            raise ValueError("the chat template does not write a conversation turn by turn, so "
                             f"the answer in message {i} cannot be told from the rest")
        said, end, rest = whole[len(before):].partition(tokenizer.eos_token)
        prompt = _ids(tokenizer, before[len(done):], first=not done)
        answer = _ids(tokenizer, before[len(done):] + said + end, first=not done)
        together = answer[:len(prompt)] == prompt        # else a token would reach over the border
        answer = answer[len(prompt):] if together else _ids(tokenizer, said + end, first=False)
        if not end and i == answers[-1]:
            answer.append(tokenizer.eos_token_id)
        ids += prompt + answer
        learned += [False] * len(prompt) + [True] * len(answer)
        done = whole[:len(whole) - len(rest)]
    if not any(learned):
        raise ValueError("there is no answer in it: no message has the role 'assistant'")
    return ids, learned


def rendered(tokenizer, messages, ask):
    """Messages in the tokenizer's template, up to where an answer begins if we `ask`."""
    own = getattr(tokenizer, "chat_template", None)
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask,
                                         **({} if own else {"chat_template": PLAIN}))


def _ids(tokenizer, text, first):
    """A template writes the begin mark itself; without one, the tokenizer puts it first."""
    alone = first and not getattr(tokenizer, "chat_template", None)
    return tokenizer(text, add_special_tokens=alone)["input_ids"]
