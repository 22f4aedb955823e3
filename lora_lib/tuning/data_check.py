"""The mistakes that token rows can hold, found before a model is trained on them.

`lora_lib.torch.check(model, data=rows, tokenizer=tokenizer)` reports them.
"""

from itertools import groupby
from os.path import commonprefix

import torch
from jinja2 import TemplateError
from torch import Tensor, nn

from lora_lib.torch.tokens import frozen_weight, token_rows
from lora_lib.tuning.data import Rows, rendered

# What stands before an answer in the templates that people know, without spaces.
OPENINGS = ("<|im_start|>assistant", "[/INST]", "<start_of_turn>model",
            "<|start_header_id|>assistant", "<|assistant|>", "<｜Assistant｜>", "###Response:",
            "###Assistant:", "ASSISTANT:")


def check_data(data: Rows | tuple[Tensor, Tensor], model: nn.Module, tokenizer, found) -> None:
    """Call found.add(code, where) for every mistake in `data`, as `fine_tune` would take it.

    Raises ValueError for data that are no token rows, or a tokenizer that is not transformers'.
    """
    if getattr(tokenizer, "eos_token_id", None) is None:
        raise ValueError("tokenizer must be one of transformers' with an eos_token, got "
                         f"{type(tokenizer).__name__}; check(..., tokenizer=tokenizer)")
    names, pairs = _pairs(data)
    cut = set()
    if isinstance(data, Rows):
        cut = {f"example {i}" for i in data.cut}
        for code, numbers in (("cut off", data.cut), ("left out", data.dropped)):
            for i in numbers:
                found.add(code, f"example {i}")
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    size = len(tokenizer) if embedding is None else len(embedding.weight)
    seen = _Seen(tokenizer, model)
    rows = {}
    for name, (inputs, labels) in zip(names, pairs):
        tokens = torch.cat([inputs, labels[labels != -100]])
        if bool(((tokens < 0) | (tokens >= size)).any()):
            found.add("vocabulary", name)
        elif not bool((labels != -100).any()):
            found.add("nothing learned", name)
        else:
            rows[name] = inputs, labels
    used = {int(t) for row in rows.values() for t in torch.cat([row[0], row[1][row[1] >= 0]])}
    for token in _new_tokens(model, embedding, sorted(used - {tokenizer.pad_token_id})):
        found.add("new token", f"token {token}, {tokenizer.decode([token])!r}")
    rows = _aligned(rows, found)
    squashed = {name: seen.text(ids) for name, (ids, _, _) in rows.items()}
    foreign = [name for name, text in squashed.items() if any(m in text for m in seen.foreign)]
    for name, (ids, learned, hidden) in rows.items():
        left, right = seen.learned_padding(ids, learned)
        found.add("padding learned", name, left + right > 0)
        learned = [yes and left <= i < len(ids) - right for i, yes in enumerate(learned)]
        if not any(learned):
            continue
        before = ids[:learned.index(True)]
        alone = sum(token != seen.pad for token in before) <= 1      # a text, all of it learned
        own = bool(seen.opening) and seen.opening in squashed[name]
        # One text may well speak of another template; a mistake is in most rows.
        strange = name in foreign and 2 * len(foreign) >= len(rows)
        bare = seen.has_template and bool(seen.opening) and not own and not alone
        prompt = own and seen.opening not in seen.text(before)
        found.add("template", name, strange or bare)
        found.add("prompt learned", name, prompt)
        found.add("two begins", name, seen.begins_twice(ids, padded=not isinstance(data, Rows)))
        if name not in cut:
            seen.check_ends(name, ids, learned, hidden, found, whole=prompt or alone)


def _new_tokens(model, embedding, used):
    """The tokens whose rows of a frozen embedding look as if they were new: near zero, as
    transformers draws them, or near the mean of all rows. The rows of pretrained models have half
    of the usual length and distance at the least."""
    W = None if embedding is None else frozen_weight(embedding)
    if not isinstance(W, Tensor) or W.requires_grad or W.is_meta or not used \
            or not W.is_floating_point():
        return []
    trained = {int(t) for name, part in token_rows(model).items() for t in part.tokens
               if model.get_submodule(name) is embedding}
    some = W[::max(1, len(W) // 4096)].float()              # enough for a mean and two medians
    mean, rows = some.mean(dim=0), W[torch.tensor(used, device=W.device)].float()
    new = rows.norm(dim=1) < some.norm(dim=1).median() / 4
    new |= (rows - mean).norm(dim=1) < (some - mean).norm(dim=1).median() / 4
    return [token for token, yes in zip(used, new.tolist()) if yes and token not in trained]


def _pairs(data):
    """Names, and inputs and labels (length,), of all rows."""
    if isinstance(data, Rows):
        left_out = set(data.dropped)
        numbers = [i for i in range(len(data) + len(left_out)) if i not in left_out]
        return [f"example {i}" for i in numbers], list(zip(data.inputs, data.labels))
    tensors = isinstance(data, (tuple, list)) and len(data) == 2 and all(
        isinstance(t, Tensor) and t.ndim == 2 and not t.is_floating_point() for t in data)
    if not (tensors and data[0].shape == data[1].shape):
        raise ValueError("data must be Rows, or token numbers (inputs, labels) of one shape "
                         "(rows, length)")
    return [f"row {i}" for i in range(len(data[0]))], list(zip(*(t.cpu() for t in data)))


def _aligned(rows, found):
    """Each row's tokens, which of them are learned, and whether a last one is masked and unknown.

    A label is the token `shift` places on: one is right; none, or two, is a mistake, and if one
    row shows it, it is that of the rows that show nothing.
    """
    fits = {name: {shift for shift in (1, 0, 2) if _fits(inputs, labels, shift)}
            for name, (inputs, labels) in rows.items()}
    plain = [shifts for shifts in fits.values() if 1 not in shifts]
    order = [shift for shift in (0, 2) if any(shift in shifts for shifts in plain)] + [1]
    aligned = {}
    for name, (inputs, labels) in rows.items():
        shift = next((s for s in order if s in fits[name]), None)
        code = {1: None, 0: "not shifted", 2: "shifted twice", None: "not next"}[shift]
        found.add(code, name, code is not None)
        if shift is None:
            continue
        masked = labels == -100
        ids, learned = inputs.tolist(), ([False] * shift + (~masked).tolist())
        behind = labels[len(labels) - shift:].tolist()           # tokens that no input holds
        ids += behind[:next((i for i, label in enumerate(behind) if label == -100), shift)]
        aligned[name] = ids, learned[:len(ids)], len(ids) < len(inputs) + shift
    return aligned


def _fits(inputs, labels, shift):
    ahead, labels = inputs[shift:], labels[:len(labels) - shift]
    asked = labels != -100
    return torch.equal(ahead[asked], labels[asked])


class _Seen:
    """What the tokenizer and the model say of marks, and what the rows do with them."""

    def __init__(self, tokenizer, model):
        self.tokenizer = tokenizer
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        self.ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        pad = tokenizer.pad_token_id
        self.pad = tokenizer.eos_token_id if pad is None else pad
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        whole = self.opening = ""
        user, answer = ({"role": "user", "content": "(question)"},
                        {"role": "assistant", "content": "(answer)"})
        try:
            asked = rendered(tokenizer, [user], ask=True).rpartition("(question)")[2]
            whole = rendered(tokenizer, [user, answer], ask=False)
            between = whole.partition("(question)")[2].partition("(answer)")[0]
            self.opening = _squash(commonprefix([asked, between]))
        except (TemplateError, ValueError):
            pass                                             # a template with demands of its own
        known = _squash(whole + str(tokenizer.chat_template))
        self.foreign = [mark for mark in OPENINGS if self.has_template and mark not in known]
        self._blank = {}

    def text(self, ids):
        return _squash(self.tokenizer.decode(ids, skip_special_tokens=False))

    def blank(self, token):
        if token not in self._blank:
            self._blank[token] = not self.tokenizer.decode([token]).strip()
        return self._blank[token]

    def begins_twice(self, ids, padded):
        begin, start = self.tokenizer.bos_token_id, 0
        if begin is None or padded and begin == self.pad:
            return False
        while padded and ids[start:start + 1] == [self.pad]:
            start += 1
        return ids[start:start + 2] == [begin, begin]

    def learned_padding(self, ids, learned):
        """How many tokens at the left and at the right; one end mark behind an answer is none."""
        padding = [token == self.pad for token in ids]
        left, right = ((some + [False]).index(False) for some in (padding, padding[::-1]))
        right = max(0, right - (self.pad in self.ends))
        return left * any(learned[:left]), right * any(learned[len(ids) - right:])

    def check_ends(self, name, ids, learned, hidden, found, whole):
        """Is the mark behind each answer learned, and nothing behind the mark?"""
        stretches = [[i for i in group if not self.blank(ids[i])]
                     for yes, group in groupby(range(len(ids)), learned.__getitem__) if yes]
        stretches = [said for said in stretches if said]
        for said in stretches:
            ended = [i for i in said if ids[i] in self.ends]
            if not ended:
                behind = (i for i in range(said[-1] + 1, len(ids)) if not self.blank(ids[i]))
                behind = next(behind, None)
                masked = hidden if behind is None else ids[behind] in self.ends
                found.add("end masked", name, masked)
                found.add("no end mark", name, not masked and said is stretches[-1])
            elif not whole:
                after = {ids[i] for i in said if i > ended[0]} - self.ends - {self.pad}
                found.add("goes on", name, bool(after))


def _squash(text):
    return "".join(text.split())
