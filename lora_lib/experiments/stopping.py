"""A small assistant that learns when to stop, or never does: chapter 9's mistakes in the data.

The course's own small language model, with its tokenizer as one of transformers' and a chat
template, is taught to answer questions about tiny tales.
`python -m lora_lib.experiments.stopping` takes about two minutes on one core, in float64.
"""

import re

import torch
from torch import Tensor, nn

from lora_lib.experiments.sweep import column, main, read, select
from lora_lib.text import Tokenizer, questions
from lora_lib.torch import fine_tune, inject, load_pretrained, warmup_cosine
from lora_lib.tuning.data import Rows, encode, prompt_ids
from lora_lib.tuning.evaluation import exact_match

SEEDS, STEPS = range(5), 96
MISTAKES = ("none", "end masked", "wrong template")
MOST = 20                                               # tokens of an answer that does not end
TEMPLATE = ("{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}{{ m.content }}\nA:"
            "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")
# Another model's, Llama 2's.
LLAMA2 = ("{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} "
          "[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")


def pairs(n: int, seed: int) -> list[tuple[str, str]]:
    """(tale and question, the one word that answers it), without any template's marks."""
    return [(prompt.removesuffix("\nA:"), answer.strip())
            for prompt, answer in questions(n, seed, ["where", "feeling", "trade"], length=(2,))]


def chat_tokenizer(template: str = TEMPLATE):
    """The small model's tokenizer as one of transformers': the same words, the same numbers.

    A word that no tale has is cut into the longest known pieces, not letter by letter.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Inner
    from transformers import PreTrainedTokenizerFast
    tokens = Tokenizer().tokens
    inner = Inner(models.WordPiece({token: i for i, token in enumerate(tokens)},
                                   unk_token="<pad>", continuing_subword_prefix=""))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(" ?[A-Za-z]+|[^A-Za-z]"), "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([AddedToken(mark, special=True) for mark in ("<pad>", "<end>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<end>",
                                        eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = template
    return tokenizer


def padded(tokenizer, examples) -> tuple[Tensor, Tensor, Tensor]:
    """What a collator makes of examples, each (n, longest): token numbers, filled up with the
    tokenizer's padding; which of them are real; and which belong to an answer."""
    rows = encode(tokenizer, examples)
    longest = int(rows.lengths.max()) + 1
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    real, answer = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for i, (inputs, labels) in enumerate(zip(rows.inputs, rows.labels)):
        end = len(inputs) + 1
        ids[i, :end] = torch.cat([inputs, labels[-1:]])
        real[i, :end], answer[i, 1:end] = True, labels != -100
    return ids, real, answer


def tuned(data: Rows | tuple[Tensor, Tensor], seed: int) -> nn.Module:
    """The small model in float64 with adapters that were taught by `data`."""
    model = inject(load_pretrained("tales", dtype=torch.float64), "all-linear", rank=8, alpha=16,
                   seed=seed)
    fine_tune(model, data, steps=STEPS, batch_size=8, lr=4e-3, seed=seed,
              schedule=warmup_cosine(STEPS, warmup=5), progress=False)
    return model.eval()


def said(model: nn.Module, tokenizer, prompt: str) -> str:
    """The model's answer up to its end mark, which is shown, or to `MOST` tokens."""
    start = prompt_ids(tokenizer, prompt)
    out = model.generate(torch.tensor([start]), MOST, stop=(tokenizer.eos_token_id,))
    return tokenizer.decode(out[0, len(start):]).strip()


def data(mistake: str) -> Rows | tuple[Tensor, Tensor]:
    """The training data of every run, with one mistake or none."""
    tokenizer, examples = chat_tokenizer(), pairs(1000, seed=0)
    if mistake == "wrong template":
        return encode(chat_tokenizer(LLAMA2), examples)
    ids, _, answer = padded(tokenizer, examples)
    if mistake == "end masked":                         # what pad_token = eos_token leads to
        answer &= ids != tokenizer.eos_token_id
    return ids[:, :-1], ids.where(answer, -100)[:, 1:]


def trial(mistake: str, seed: int) -> dict[str, float]:
    """Shares of the test's questions: `right`, word and end mark, asked in the model's template;
    `as trained`, the same in the template of the training; `word`, whatever follows it; and
    `endless`, with no end in `MOST` tokens."""
    model, tokenizer, asked = tuned(data(mistake), seed), chat_tokenizer(), pairs(200, seed=5)
    trained = chat_tokenizer(LLAMA2) if mistake == "wrong template" else tokenizer
    answers = [said(model, tokenizer, prompt) for prompt, _ in asked[:40]]
    words = [re.match(r"\w*", answer)[0] for answer in answers]
    return {"right": exact_match(model, tokenizer, asked),
            "as trained": exact_match(model, trained, asked),
            "word": sum(w == answer for w, (_, answer) in zip(words, asked)) / len(words),
            "endless": sum("<end>" not in answer for answer in answers) / len(answers)}


def values(mistake: str, what: str = "right"):
    """The kept outcomes by seed."""
    return column(select(read("stopping"), mistake=mistake), what)


if __name__ == "__main__":
    main(trial, [{"mistake": m, "seed": seed} for m in MISTAKES for seed in SEEDS], "stopping")
