"""A small Llama: the language model that the course fine-tunes, and its pretrained weights."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from lora_lib.text import Tokenizer
from lora_lib.torch.lora import shared_input

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
    """Cosines and sines (length, size) of position / theta^(2i / size), in the dtype of `like`.

    Both halves of the last dimension hold the same size / 2 angles (Su et al. 2021). The angles
    are float32 whatever the dtype, as in transformers.
    """
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=like.device) / size
    positions = torch.arange(length, dtype=torch.float32, device=like.device)
    angles = torch.outer(positions, 1.0 / theta ** exponents).repeat(1, 2)
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
        q, k, v = (out.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for out in shared_input(x, self.q_proj, self.k_proj, self.v_proj))
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
        gate, up = shared_input(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


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
    `lm_head` shares the embedding's weight. `seed` draws the first weights.
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
        self._draw(seed)

    def _draw(self, seed):
        """Every weight from N(0, 1 / inputs); 2 * num_layers times less variance where a layer
        adds to the residual path, whose size then does not grow with depth."""
        generator = torch.Generator()
        generator.manual_seed(seed) if seed is not None else generator.seed()
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                variance = 1 / weight.shape[1] / (2 * self.config.num_layers if adds else 1)
                nn.init.normal_(weight, std=variance ** 0.5, generator=generator)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits for the token after each; a position sees itself and what is left of it.

        Padding on the right therefore changes nothing to its left. Raises ValueError unless
        `tokens` is (batch, length).
        """
        if tokens.ndim != 2:
            raise ValueError(f"tokens must have shape (batch, length), got {tuple(tokens.shape)}")
        x = self.model.embed_tokens(tokens)
        size = self.config.hidden_size // self.config.num_heads
        cosines, sines = rotary(tokens.shape[1], size, self.config.rope_theta, like=x)
        for layer in self.model.layers:
            x = layer(x, cosines, sines)
        return self.lm_head(self.model.norm(x))

    @torch.no_grad()
    def generate(self, tokens: Tensor, max_new_tokens: int, *, stop: Sequence[int] = (),
                 temperature: float = 0.0, seed: int | None = None) -> Tensor:
        """Continue tokens (batch, length), all of one length, by up to `max_new_tokens`.

        The likeliest token each time; with a temperature above 0, one drawn from
        softmax(logits / temperature). A row ends with the first token that is in `stop`, which
        then fills it up; when all have ended, so does the loop.
        """
        if not temperature >= 0:
            raise ValueError(f"temperature must not be negative, got {temperature}")
        generator = torch.Generator(tokens.device)
        generator.manual_seed(seed) if seed is not None else generator.seed()
        stops = torch.tensor(list(stop), dtype=tokens.dtype, device=tokens.device)
        ended = torch.zeros(len(tokens), 1, dtype=torch.bool, device=tokens.device)
        for _ in range(max_new_tokens):
            logits = self(tokens)[:, -1].float()
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)
            else:
                chances = (logits / temperature).softmax(-1)
                token = torch.multinomial(chances, 1, generator=generator)
            token = torch.where(ended, tokens[:, -1:], token)
            tokens, ended = torch.cat([tokens, token], dim=1), ended | torch.isin(token, stops)
            if ended.all():
                break
        return tokens


def load(path: Path = WEIGHTS / "tales.safetensors") -> LanguageModel:
    """The pretrained model with its `tokenizer` and its `pretraining` record, in float32.

    The weights are stored in bfloat16, which float32 and float64 hold exactly. Raises ValueError
    if the word lists have changed since the weights were trained.
    """
    with safe_open(path, framework="pt") as file:
        record = {key: json.loads(value) for key, value in file.metadata().items()}
        weights = {key: file.get_tensor(key) for key in file.keys()}
    tokenizer = Tokenizer()
    if record.pop("tokens") != tokenizer.tokens:
        raise ValueError(f"{path.name} was trained on other words than lora_lib.text has now; "
                         "run scripts/pretrain_language_model.py again")
    model = LanguageModel(LanguageModelConfig(**record.pop("config")), seed=0)
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    model.tokenizer, model.pretraining = tokenizer, record
    return model.eval()
