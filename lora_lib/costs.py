"""What training costs, worked out from shapes alone: parameters, bytes, FLOPs. Plain Python."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from lora_lib.rules import check_rank

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def full_parameters(out_features: int, in_features: int) -> int:
    """d k: the numbers in a weight W (d, k)."""
    return out_features * in_features


def lora_parameters(out_features: int, in_features: int, rank: int) -> int:
    """r (d + k): the numbers in B (d, r) and A (r, k) together."""
    return check_rank(rank, in_features, out_features) * (out_features + in_features)


def _integer(name, value, least=1):
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a Llama-style model: they fix its every weight.

    Each of `num_layers` layers has two RMSNorms, attention with `num_heads` query heads and
    `num_kv_heads` key and value heads (None: as many), and a gated MLP, all without biases.
    Around them stand an embedding, a last norm, and an output head, which is the embedding again
    if `tied_embeddings`. Raises ValueError for dimensions that do not divide.

    A head has `head_dim` numbers (None: hidden_size / num_heads). `qkv_bias` adds the biases that
    Qwen2 has on its query, key and value projections; `qk_norm` the two RMSNorms, over the numbers
    of a head, that Qwen3 has after its query and key projections.
    """
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    tied_embeddings: bool = False
    head_dim: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self):
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads",
                     "num_kv_heads"):
            _integer(name, getattr(self, name))
        divides = self.head_dim is not None or self.hidden_size % self.num_heads == 0
        if not divides or self.num_heads % self.num_kv_heads:
            raise ValueError(f"hidden_size = {self.hidden_size} must be a multiple of num_heads = "
                             f"{self.num_heads}, and that of num_kv_heads = {self.num_kv_heads}")
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        _integer("head_dim", self.head_dim)

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of each linear layer in one Transformer layer, by name."""
        h, m, head = self.hidden_size, self.intermediate_size, self.head_dim or 0
        q, kv = head * self.num_heads, head * (self.num_kv_heads or self.num_heads)
        return {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q),
                "gate_proj": (m, h), "up_proj": (m, h), "down_proj": (h, m)}

    def parameters(self) -> int:
        """Every number in the model."""
        shapes = self.linears()
        layer = sum(full_parameters(*s) for s in shapes.values()) + 2 * self.hidden_size
        if self.qkv_bias:
            layer += sum(shapes[name][0] for name in ("q_proj", "k_proj", "v_proj"))
        if self.qk_norm:
            layer += 2 * (self.head_dim or 0)
        ends = (1 if self.tied_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_layers * layer + ends + self.hidden_size

    def lora_parameters(self, rank: int, target_modules: str | Iterable[str]) -> int:
        """Every number in its adapters, of one rank, on the layers that `targets` names."""
        shapes = self.linears()
        return self.num_layers * sum(lora_parameters(*shapes[name], rank)
                                     for name in self.targets(target_modules))

    def targets(self, target_modules: str | Iterable[str]) -> tuple[str, ...]:
        """The linear layers that `target_modules` names; "all-linear" is all seven.

        Raises ValueError for any other name.
        """
        known = tuple(self.linears())
        if target_modules == "all-linear":
            return known
        names = [target_modules] if isinstance(target_modules, str) else [*target_modules]
        if not names or not set(names) <= set(known):
            raise ValueError(f"target_modules must be some of {known} or 'all-linear', got {names}")
        return tuple(name for name in known if name in names)


# Touvron et al. 2023, table 2; the MLP's width and the vocabulary are the released weights'.
# Llama 2 7B has the same dimensions.
LLAMA_7B = ModelShape(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32,
                      num_heads=32)


@dataclass(frozen=True)
class Memory:
    """Bytes held at the end of a training step's forward pass, by what they are for.

    With activation checkpointing the activations may be the most a little later: see `memory`.
    """
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of matrix products; a multiplication and an addition are two."""
    forward: int
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward


def trained_parameters(shape: ModelShape, rank: int | None,
                       target_modules: str | Iterable[str] = ("q_proj", "v_proj")) -> int:
    """All parameters when rank is None (full fine-tuning), else those of the adapters."""
    return shape.parameters() if rank is None else shape.lora_parameters(rank, target_modules)


def memory(shape: ModelShape, *, batch: int, sequence: int, rank: int | None = None,
           target_modules: str | Iterable[str] = ("q_proj", "v_proj"), weight_bytes: int = 2,
           trainable_bytes: int = 4, activation_bytes: int = 2, moments: int = 2,
           quantized: bool = False, double: bool = True, checkpointing: bool = False) -> Memory:
    """The bytes of one training step on `batch` sequences of `sequence` tokens.

    rank None is full fine-tuning; otherwise LoRA of that rank on `target_modules`.

    weights      `weight_bytes` for each frozen number, `trainable_bytes` for each trained one
    gradients    `trainable_bytes` for each trained number
    optimizer    `moments` times `trainable_bytes` for each trained number: 2 for Adam, 1 for SGD
                 with momentum, 0 for plain SGD
    activations  what the forward pass keeps for the backward pass, at `activation_bytes` a number,
                 but at least 4 for what is computed in float32 at any precision: the norms (their
                 input and its 1 / rms), attention's log-sum-exp, the loss's log-probabilities

    With the defaults a trained number costs 16 bytes and a frozen one 2. The 16 are float32 weight,
    gradient, and two moments; mixed precision with a 16-bit copy beside a float32 master also
    comes to 16 (Rajbhandari et al. 2020, section 3.1). For a model in float32 pass 4 throughout.

    `quantized` stores the frozen linear layers in NF4, as `lora_lib.torch.nf4.quantize` does, with
    double quantization or without (`nf4_bytes`); what is no linear layer of a Transformer layer
    keeps its `weight_bytes`. Full fine-tuning has nothing frozen: a ValueError.

    `checkpointing` keeps each Transformer layer's input alone and computes the layer again in the
    backward pass. Activations are then the inputs and the larger of two: what the head and the loss
    keep, which is gone when the last layer is computed again, and what one layer keeps.

    Left out: temporary buffers (`loss_buffers` has the largest), the allocator's rounding, dropout,
    the batch itself. Attention is taken to be fused (it keeps no sequence x sequence matrix),
    adapters to be lora_lib's, the rest to be plain PyTorch operations, and nothing else to be
    recomputed.
    """
    for name, value in (("weight_bytes", weight_bytes), ("trainable_bytes", trainable_bytes),
                        ("activation_bytes", activation_bytes)):
        _integer(name, value)
    _integer("moments", moments, least=0)
    trained = trained_parameters(shape, rank, target_modules)
    if quantized and rank is None:
        raise ValueError("a quantized weight cannot be trained: full fine-tuning (rank None) needs "
                         "quantized=False")
    frozen = 0 if rank is None else _frozen_bytes(shape, weight_bytes, quantized, double)
    trace = _Trace(shape, batch, sequence, rank, target_modules,
                   casts=quantized and activation_bytes != trainable_bytes).run()
    return Memory(weights=frozen + trained * trainable_bytes,
                  gradients=trained * trainable_bytes,
                  optimizer=trained * trainable_bytes * moments,
                  activations=trace.most_kept(activation_bytes) if checkpointing else
                  trace.all_kept(activation_bytes))


def nf4_bytes(out_features: int, in_features: int, *, block: int = 64, double: bool = True) -> int:
    """What an `NF4Linear` stores of a frozen weight W (d, k).

    Half a byte a number, and each block's largest magnitude: in float32 or, `double`, in one byte,
    with a float32 for every 256 of them and one more for their mean. The last block, and the last
    256, are filled up. Raises ValueError for a block that is not even and positive.
    """
    if _integer("block", block, least=2) % 2:
        raise ValueError(f"block must be even, got {block}")
    blocks = -(-full_parameters(out_features, in_features) // block)
    groups = -(-blocks // 256)
    return blocks * block // 2 + (groups * (256 + 4) + 4 if double else 4 * blocks)


def loss_buffers(shape: ModelShape, *, batch: int, sequence: int) -> int:
    """Bytes that `memory` leaves out: what the loss's backward pass holds for a moment.

    Two arrays beside the log-probabilities, each with a float32 for every token and word of the
    vocabulary: the gradients of the log-probabilities and of the logits.
    """
    return 2 * 4 * _integer("batch", batch) * _integer("sequence", sequence) * shape.vocab_size


def _frozen_bytes(shape, weight_bytes, quantized, double):
    if not quantized:
        return shape.parameters() * weight_bytes
    linears = shape.linears().values()
    rest = shape.parameters() - shape.num_layers * sum(full_parameters(*s) for s in linears)
    return rest * weight_bytes + shape.num_layers * sum(
        nf4_bytes(*s, double=double) for s in linears)


def flops(shape: ModelShape, *, batch: int, sequence: int, rank: int | None = None,
          target_modules: str | Iterable[str] = ("q_proj", "v_proj")) -> Flops:
    """The FLOPs of one training step's matrix products, attention's included.

    rank None is full fine-tuning: about 6 for each weight and token, 2 forward and 4 backward.
    LoRA leaves out the weights' gradients, 2 of the 6, and adds the adapters' own products.
    Attention is counted over the whole sequence x sequence square, as PyTorch's counter does;
    a causal kernel skips up to half of it. Fused kernels compute the scores again in the backward
    pass, which is not counted.
    """
    trace = _Trace(shape, batch, sequence, rank, target_modules).run()
    return Flops(trace.forward, trace.backward)


def layer_flops(out_features: int, in_features: int, *, tokens: int = 1, rank: int | None = None,
                input_gradient: bool = True) -> Flops:
    """The FLOPs of one linear layer on `tokens` rows.

    rank None trains the weight; 0 freezes it; r of 1 or more freezes it and trains an adapter,
    x W^T + (x A^T) B^T, whose own products cost 2 r (d + k) a row forward and twice that backward.
    `input_gradient` False is for a layer with nothing to train before it.
    """
    if rank:
        check_rank(rank, in_features, out_features)
    base = 2 * tokens * out_features * in_features
    down, up = 2 * tokens * in_features * (rank or 0), 2 * tokens * out_features * (rank or 0)
    # Gradients of: B and x A^T (up, up), A (down), the weight (base), x (base, down).
    backward = 2 * up + down + (base if rank is None else 0)
    return Flops(base + down + up, backward + (base + down if input_gradient else 0))


def adapter_bytes(shape: ModelShape, rank: int, target_modules: str | Iterable[str],
                  bytes_each: int = 4) -> int:
    """The tensors in an adapter file; its header adds one or two hundred bytes a tensor."""
    return shape.lora_parameters(rank, target_modules) * bytes_each


def checkpoint_bytes(shape: ModelShape, rank: int | None = None,
                     target_modules: str | Iterable[str] = ("q_proj", "v_proj"),
                     trainable_bytes: int = 4) -> int:
    """The tensors that resuming needs: what is trained, with Adam's two moments of each number."""
    return 3 * trainable_bytes * trained_parameters(shape, rank, target_modules)


@dataclass(eq=False)
class _Tensor:
    numel: int
    requires_grad: bool
    float32: bool = False


def _bytes(tensors, each):
    """The bytes of tensors at `each` a number, but at least 4 for those in float32."""
    return sum(t.numel * (max(4, each) if t.float32 else each) for t in tensors)


@dataclass
class _Trace:
    """A forward pass on shapes alone: it keeps what autograd would keep, and counts products.

    The rule is autograd's: a product keeps each factor whose partner needs a gradient, and
    nothing needs a gradient before the first trained weight.
    """
    shape: ModelShape
    batch: int
    sequence: int
    rank: int | None
    target_modules: str | Iterable[str]
    casts: bool = False                          # adapters keep A and B in the activations' dtype
    layers: list[tuple[_Tensor, dict[int, _Tensor]]] = field(default_factory=list)
    kept: dict[int, _Tensor] = field(default_factory=dict)   # in this layer; last, at the head
    forward: int = 0
    backward: int = 0

    def run(self):
        s, full = self.shape, self.rank is None
        trained_parameters(s, self.rank, self.target_modules)        # checks rank and targets
        self.tokens = _integer("batch", self.batch) * _integer("sequence", self.sequence)
        self.adapted = () if full else s.targets(self.target_modules)
        x = _Tensor(self.tokens * s.hidden_size, full)               # the embeddings
        self.rotary = _Tensor(2 * self.sequence * s.head_dim, False)
        for _ in range(s.num_layers):
            self.layers.append((x, self.kept))
            x = self.plus(x, self.attention(self.norm(x)))
            x = self.plus(x, self.mlp(self.norm(x)))
            self.kept = {}
        self.linear(self.norm(x), "lm_head", (s.vocab_size, s.hidden_size))
        self.keep(_Tensor(self.tokens * s.vocab_size, True, float32=True))   # log-probabilities
        return self

    def all_kept(self, each):
        """The bytes kept at the end of the forward pass; the rotary tables once for all layers."""
        kept = dict(self.kept)
        for _, inside in self.layers:
            kept.update(inside)
        return _bytes(kept.values(), each)

    def most_kept(self, each):
        """The most bytes kept at one time when every layer is computed again."""
        # A layer's first norm keeps the layer's input itself, unless it must make a float32 of it.
        again = max(_bytes(kept.values(), each)
                    - (_bytes([x], each) if x.requires_grad and each >= 4 else 0)
                    for x, kept in self.layers)
        return (_bytes((x for x, _ in self.layers), each)
                + max(again, _bytes(self.kept.values(), each)))

    def attention(self, x):
        q, k, v = (self.linear(x, name) for name in ("q_proj", "k_proj", "v_proj"))
        if self.shape.qk_norm:
            q, k = (self.norm(part, self.tokens * heads) for part, heads in (
                (q, self.shape.num_heads), (k, self.shape.num_kv_heads)))
        out = _Tensor(q.numel, q.requires_grad or k.requires_grad or v.requires_grad)
        if out.requires_grad:
            log_sum_exp = _Tensor(self.tokens * self.shape.num_heads, True, float32=True)
            self.keep(q, k, v, out, log_sum_exp)
        if q.requires_grad or k.requires_grad:
            self.keep(self.rotary)                                   # cosines and sines
        product = 2 * self.sequence * q.numel                        # Q K^T, and as much for P V
        scores = q.requires_grad or k.requires_grad
        self.forward += 2 * product
        self.backward += product * (v.requires_grad + scores + q.requires_grad + k.requires_grad)
        return self.linear(out, "o_proj")

    def mlp(self, x):
        gate, up = self.linear(x, "gate_proj"), self.linear(x, "up_proj")
        silu = _Tensor(gate.numel, gate.requires_grad)
        if gate.requires_grad:
            self.keep(gate, up)
        if up.requires_grad:
            self.keep(silu)
        return self.linear(_Tensor(up.numel, gate.requires_grad or up.requires_grad), "down_proj")

    def norm(self, x, rows=None):
        full = self.rank is None
        if x.requires_grad:
            self.keep(_Tensor(x.numel, True, float32=True))          # x
            self.keep(_Tensor(rows or self.tokens, True, float32=True))      # 1 / rms
        if full:
            self.keep(_Tensor(x.numel, True))                        # x / rms, for the gain
        return _Tensor(x.numel, x.requires_grad or full)

    def linear(self, x, name, weight=None):
        d, k = weight or self.shape.linears()[name]
        rank = None if self.rank is None else self.rank if name in self.adapted else 0
        cost = layer_flops(d, k, tokens=self.tokens, rank=rank, input_gradient=x.requires_grad)
        self.forward, self.backward = self.forward + cost.forward, self.backward + cost.backward
        if rank != 0:
            self.keep(x)                                             # for W's gradient, or A's
        if rank:
            self.keep(_Tensor(self.tokens * rank, True))             # x A^T, for B's
        if rank and self.casts:
            self.keep(_Tensor(d * rank, True))                       # B, for the gradient of x A^T
            if x.requires_grad:
                self.keep(_Tensor(rank * k, True))                   # A, for x's
        return _Tensor(self.tokens * d, x.requires_grad or rank != 0)

    def plus(self, x, y):
        return _Tensor(x.numel, x.requires_grad or y.requires_grad)

    def keep(self, *tensors):
        self.kept.update((id(tensor), tensor) for tensor in tensors)
