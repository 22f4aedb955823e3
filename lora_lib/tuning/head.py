"""A causal model's loss computed where there are labels: the number that all logits give, sooner.

A language model spends a part of its work in the head, which gives one logit for each of 49,152
tokens or more at every position. Prompts have no labels, so nothing there is asked of it. And where
all rows of a batch begin with the same tokens, such as a system prompt, a causal model's states
are the same too: they are computed once, and the rows read them as they read their own past.
"""

import inspect
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK = 512         # positions whose logits exist at a time
SHORTEST = 8        # a common beginning shorter than this is not worth the trouble
Past = list[tuple[Tensor, Tensor]]  # keys and values (1, heads, length, width) of each layer
NOT_SO = (AttributeError, TypeError, ValueError, RuntimeError, IndexError)   # built otherwise


@dataclass(frozen=True)
class Causal:
    """A causal model of transformers in two parts: the `body`, which gives states, and the `head`.

    `shares` says whether rows may read a common beginning from a cache.
    """

    body: nn.Module
    head: nn.Linear
    shares: bool

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module) -> "Causal | None":
        """The parts of `model`, or None where they do not give what the whole gives.

        Tried on three rows of tokens: some models scale their states, or bend their logits where
        they are large.
        """
        head = getattr(model, "get_output_embeddings", lambda: None)()
        body = getattr(model, "base_model", model)
        if type(head) is not nn.Linear or body is model or hasattr(head.weight, "full_tensor"):
            return None
        device = head.weight.device
        tokens = torch.arange(6 * SHORTEST, device=device).reshape(3, -1)
        tokens = (tokens * 7 + 11) % head.out_features
        tokens[:, :SHORTEST] = tokens[0, :SHORTEST]
        labels = tokens.clone()
        labels[:, :SHORTEST] = -100
        modes = {m: m.training for m in model.modules()}
        model.eval()
        heard = []

        def louder(_, args, logits):                 # so that a bend at large logits shows
            heard[:] = args[0], logits * (100 / logits.abs().max())
            return heard[1]

        handle = head.register_forward_hook(louder)
        try:
            whole = model(tokens).logits
            handle.remove()
            if not torch.equal(whole.float(), heard[1].float()):
                return None
            theirs = heard[0][labels != -100].double()
            limit = torch.finfo(heard[0].dtype).eps ** 0.5 * theirs.norm()
            for shares in ([True, False] if may_share(model) else [False]):
                with suppress(*NOT_SO):
                    parts = cls(body, head, shares)
                    if (parts.states(tokens, labels)[0].double() - theirs).norm() <= limit:
                        return parts
        except NOT_SO:
            pass
        finally:
            handle.remove()
            for module, mode in modes.items():
                module.training = mode
        return None

    def beginning(self, inputs: Tensor, labels: Tensor) -> Past:
        """Each layer's keys and values of the tokens that all rows begin with; empty if none do."""
        common = self._common(inputs, labels)
        if not common:
            return []
        cache = self._read(inputs[:1, :common], [])[1]
        return [(layer.keys, layer.values) for layer in cache.layers]

    def states(self, inputs: Tensor, labels: Tensor,
               past: Past | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """States (m, width), labels (m,) and row numbers (m,) of the m positions with a label.

        `past` is the `beginning` of a batch that these rows are part of; None finds their own.
        """
        past = self.beginning(inputs, labels) if past is None else past
        start = past[0][0].shape[2] if past else 0
        asked = labels[:, start:] != -100
        place = torch.arange(1, asked.shape[1] + 1, device=asked.device)
        end = start + max(1, int((asked.any(0) * place).max()))      # after it nobody is asked
        asked, labels = asked[:, :end - start], labels[:, start:end]
        rows = torch.arange(len(inputs), device=inputs.device)[:, None].expand_as(asked)
        return self._read(inputs[:, start:end], past)[0][asked], labels[asked], rows[asked]

    def loss(self, inputs: Tensor, labels: Tensor, past: Past | None = None) -> Tensor:
        """The mean cross-entropy over the labels, a scalar; `cross_entropy` of all logits."""
        states, labels, _ = self.states(inputs, labels, past)
        weight, bias = self.head.weight, self.head.bias
        return _HeadLoss.apply(states, weight, bias, labels) / len(labels)

    def _read(self, tokens, past):
        """States (n, length, width) of tokens (n, length) after `past`; the cache, if shared."""
        if not self.shares:
            return self.body(input_ids=tokens, use_cache=False).last_hidden_state, None
        from transformers import DynamicCache
        cache = DynamicCache()
        for i, pair in enumerate(past):
            cache.update(*(t.expand(len(tokens), -1, -1, -1) for t in pair), i)
        names = inspect.signature(self.body.forward).parameters
        key = "cache" if "cache" in names else "past_key_values"
        out = self.body(input_ids=tokens, **{key: cache}, use_cache=True)
        return out.last_hidden_state, cache

    def _common(self, inputs, labels):
        """How many tokens all rows begin with, none of which has a label."""
        if not self.shares or len(inputs) < 2:
            return 0
        same = (inputs == inputs[0]).all(0) & (labels == -100).all(0)
        count = int(same.int().cumprod(0).sum())
        return count if SHORTEST <= count < inputs.shape[1] else 0


def may_share(model: nn.Module) -> bool:
    """Whether a common beginning may be computed once: full attention, nothing random, a cache."""
    config = getattr(model, "config", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    parts = list(model.modules())
    dropping = any(isinstance(m, nn.Dropout) and m.p > 0 for m in parts)
    again = any(getattr(m, "gradient_checkpointing", False) for m in parts)    # keeps no cache
    return (kinds == {"full_attention"} and not getattr(config, "sliding_window", None)
            and not getattr(config, "attention_dropout", 0) and not dropping and not again)


@torch.no_grad()
def logits_at_labels(model: nn.Module, causal: Causal | None, inputs: Tensor,
                     labels: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Logits (c, vocab), labels (c,) and row numbers (c,), a chunk of labelled positions at a time.

    Without `causal` the model's own logits are used, all at once.
    """
    if causal is None:
        outputs, asked = model(inputs), labels != -100
        logits = getattr(outputs, "logits", outputs)
        yield logits[asked], labels[asked], asked.nonzero()[:, 0]
        return
    for states, some, rows in zip(*(t.split(CHUNK) for t in causal.states(inputs, labels))):
        yield causal.head(states), some, rows


class _HeadLoss(torch.autograd.Function):
    """The summed cross-entropy of states (m, width) through a head (vocab, width).

    A chunk's logits are made, turned into the gradient at once, and dropped: the gradient of a
    sum of losses needs nothing from above but one factor.
    """

    @staticmethod
    def forward(ctx, states, weight, bias, labels):
        need_states, need_weight, need_bias, _ = ctx.needs_input_grad
        wide = torch.promote_types(states.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=states.device)
        d_states = torch.zeros(states.shape, dtype=wide, device=states.device) \
            if need_states else None
        d_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=wide) if need_bias else None
        narrow = weight.to(states.dtype)
        for start in range(0, len(states), CHUNK):
            part, some = states[start:start + CHUNK], labels[start:start + CHUNK]
            logits = F.linear(part, narrow, None if bias is None else bias.to(part.dtype)).to(wide)
            high = logits.logsumexp(-1, keepdim=True)
            total += (high - logits.gather(1, some[:, None])).sum()
            if need_states or need_weight or need_bias:
                error = logits.sub_(high).exp_()                     # softmax, in the same memory
                error[torch.arange(len(some), device=some.device), some] -= 1
                small = error.to(states.dtype)
                if need_states:
                    d_states[start:start + CHUNK] = small @ narrow
                if need_weight:
                    d_weight += small.t() @ part
                if need_bias:
                    d_bias += error.sum(0)
        ctx.gradients = d_states, d_weight, d_bias
        ctx.dtypes = states.dtype, weight.dtype, getattr(bias, "dtype", None)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        scaled = [None if g is None else (g * grad).to(dtype)
                  for g, dtype in zip(ctx.gradients, ctx.dtypes)]
        return *scaled, None
