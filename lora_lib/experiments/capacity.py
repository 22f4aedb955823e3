"""How many made-up facts an adapter holds: bits known against bits offered, by its size."""

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from lora_lib.experiments.trial import TARGETS, base
from lora_lib.tasks import BIOGRAPHY, BITS_PER_PERSON, biographies
from lora_lib.torch import cross_entropy, fine_tune, inject, warmup_cosine
from lora_lib.torch.language_model import rotary, rotate


class Top(nn.Module):
    """The layers of a model from `first` on: what enters them -> logits of the answer.

    Only the last layer's position `at` is computed where nothing else is needed.
    """

    def __init__(self, model, first: int):
        super().__init__()
        self.model, self.first, self.config = [model], first, model.config
        self.layers = nn.ModuleList(model.model["layers"][first:])

    def below(self, tokens: Tensor) -> Tensor:
        """What enters the first layer here; no adapter changes it."""
        model = self.model[0]
        x = model.model["embed_tokens"](tokens)
        for layer in model.model["layers"][:self.first]:
            x = layer(x, *self.angles(x))
        return x

    def angles(self, x):
        size = self.config.hidden_size // self.config.num_heads
        return rotary(x.shape[1], size, self.config.rope_theta, like=x)

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        c, s = self.angles(x)
        for layer in self.layers[:-1]:
            x = layer(x, c, s)
        layer, rows = self.layers[-1], torch.arange(len(x))
        attention, h = layer.self_attn, layer.input_layernorm(x)
        split = lambda y: y.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        q = split(attention.q_proj(h[rows, at])[:, None])
        q = rotate(q, c[at][:, None, None], s[at][:, None, None])
        k, v = rotate(split(attention.k_proj(h)), c, s), split(attention.v_proj(h))
        seen = torch.arange(x.shape[1]) <= at[:, None]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None])
        x = x[rows, at] + attention.o_proj(mixed.transpose(1, 2).flatten(-2))[:, 0]
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        model = self.model[0]
        return model.lm_head(model.model["norm"](x))


def facts(tokenizer, people, seed):
    pairs = biographies(people, seed)
    inputs, labels = map(torch.from_numpy, tokenizer.batch(pairs))
    at = (labels != -100).int().argmax(dim=1)
    return inputs[:, :at.max() + 1], at, labels[torch.arange(len(at)), at]


def trial(people, targets, rank, lr, steps=500, first=3, batch_size=10**6, seed=0, dtype="float32"):
    model = base(dtype)
    top = Top(model, first)
    tokens, at, labels = facts(model.tokenizer, people, seed)
    with torch.no_grad():
        x = top.below(tokens)
    if targets != "full":
        inject(top, TARGETS[targets], rank, 2 * rank, seed=seed)
    trained = sum(p.numel() for p in top.parameters() if p.requires_grad)
    losses = fine_tune(top, (x, at, labels), steps=steps, batch_size=min(batch_size, len(x)), lr=lr, seed=seed,
              schedule=warmup_cosine(steps, warmup=steps // 20), progress=False)
    with torch.no_grad():
        lost = nn.functional.cross_entropy(top(x, at), labels, reduction="sum").item() / math.log(2)
    return {"known": people * BITS_PER_PERSON - lost, "offered": people * BITS_PER_PERSON, "parameters": trained, "losses": losses}
