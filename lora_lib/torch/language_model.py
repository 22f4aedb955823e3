"""A small Llama: the language model that the course fine-tunes, and its pretrained weights."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lora_lib.text import Tokenizer

WEIGHTS = Path(__file__).parents[1] / "weights"


@dataclass(frozen=True)
class LanguageModelConfig:
    """The sizes of a model. `hidden_size` must be an even multiple of `num_heads`."""

    vocab_size: int
    hidden_size: int = 96
    intermediate_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(f"hidden_size must be an even multiple of num_heads = "
                             f"{self.num_heads}, got {self.hidden_size}")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary(length: int, size: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, size) of position * theta^(-2i / size), in the dtype of `like`.

    Both halves of the last dimension hold the same size / 2 angles (Su et al. 2021). The angles
    are taken in float32, as transformers takes them; a float64 model takes them in float64.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    frequencies = theta ** -(torch.arange(0, size, 2, dtype=dtype, device=like.device) / size)
    angles = torch.outer(torch.arange(length, dtype=dtype, device=like.device), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn every pair (x_i, x_{i + size/2}) of x (..., length, size) by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-second, first], dim=-1) * sines


class Attention(nn.Module):
    """Causal self-attention with rotary positions; x (batch, length, hidden) -> the same."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        size, self.heads = config.hidden_size, config.num_heads
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cosines, sines), rotate(k, cosines, sines)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention, then the MLP, each beside a residual path and behind a norm."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cosines, sines)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    """Tokens (batch, length) to logits (batch, length, vocab): a Llama (Touvron et al. 2023).

    Modules are named as in transformers' LlamaForCausalLM, so weights, and adapters, fit both.
    `lm_head` shares the embedding's weight. `seed` draws the first weights from N(0, 0.02^2).
    """

    def __init__(self, config: LanguageModelConfig, *, seed: int | None = None):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Layer(config) for _ in range(config.num_layers)),
            "norm": RMSNorm(config.hidden_size, config.norm_eps)})
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight
        generator = torch.Generator()
        generator.manual_seed(seed) if seed is not None else generator.seed()
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02, generator=generator)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.ndim != 2:
            raise ValueError(f"tokens must have shape (batch, length), got {tuple(tokens.shape)}")
        x = self.model["embed_tokens"](tokens)
        size = self.config.hidden_size // self.config.num_heads
        cosines, sines = rotary(tokens.shape[1], size, self.config.rope_theta, like=x)
        for layer in self.model["layers"]:
            x = layer(x, cosines, sines)
        return self.lm_head(self.model["norm"](x))
