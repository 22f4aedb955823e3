"""One adapted linear layer by each of the libraries, with the same W, bias, A, B and scaling."""

import copy

import loralib
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lora_lib.torch import LoRALinear, shared_input

SCALING = 2


class Formula(nn.Module):
    """W x + b + scaling * B (A x), as one would write it down."""

    def __init__(self, linear: nn.Linear, A: Tensor, B: Tensor):
        super().__init__()
        self.linear, self.A, self.B = linear, nn.Parameter(A), nn.Parameter(B)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + SCALING * F.linear(F.linear(x, self.A), self.B)


def peft(linear: nn.Linear, A: Tensor, B: Tensor) -> nn.Module:
    """PEFT's own layer with its defaults: A and B in float32 beside a 16-bit weight."""
    rank = len(A)
    config = LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=["0"])
    layer = get_peft_model(nn.Sequential(linear), config).base_model.model[0]
    return _filled(layer, layer.lora_A.default.weight, layer.lora_B.default.weight, A, B)


def microsoft(linear: nn.Linear, A: Tensor, B: Tensor) -> nn.Module:
    """loralib's layer, all in the weight's dtype, as it has no other."""
    d, k = linear.weight.shape
    layer = loralib.Linear(k, d, r=len(A), lora_alpha=SCALING * len(A), merge_weights=False)
    layer = layer.to(linear.weight)
    layer.weight, layer.bias = linear.weight, linear.bias
    return _filled(layer, layer.lora_A, layer.lora_B, A, B)


def ours(linear: nn.Linear, A: Tensor, B: Tensor) -> LoRALinear:
    layer = LoRALinear(linear, len(A), SCALING * len(A))
    return _filled(layer, layer.A, layer.B, A, B)


class Kernel(nn.Module):
    """The Triton kernel, which only a GPU has: x read once for x W^T and x A^T, y written once."""

    def __init__(self, linear: nn.Linear, A: Tensor, B: Tensor):
        super().__init__()
        self.linear, self.A, self.B = linear, nn.Parameter(A), nn.Parameter(B)

    def forward(self, x: Tensor) -> Tensor:
        return kernel().lora_linear(x, self.linear.weight, self.linear.bias, self.A, self.B, SCALING)


def kernel():
    """Its module, which needs Triton."""
    from lora_lib.torch import kernel
    return kernel


ADAPTED = {"lora_lib": ours, "PEFT": peft, "loralib": microsoft,
           "formula": lambda linear, A, B: Formula(linear, A.to(linear.weight),
                                                   B.to(linear.weight))}


def layers(size: int, rank: int, *, dtype=torch.float32, device="cpu",
           seed: int = 0) -> dict[str, nn.Module]:
    """{method: module} on one random square layer; "frozen" has no adapter, "full" is trained.

    On a GPU there is "kernel" too, up to its rank."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator) / shape[-1] ** 0.5
    linear = nn.Linear(size, size, dtype=dtype, device=device).requires_grad_(False)
    with torch.no_grad():
        linear.weight.copy_(draw(size, size)), linear.bias.copy_(draw(size))
    A, B = draw(rank, size).to(device), draw(size, rank).to(device)
    adapted = dict(ADAPTED)
    if device == "cuda" and rank <= kernel().MAX_RANK:
        adapted["kernel"] = Kernel
    return {"frozen": linear, "full": copy.deepcopy(linear).requires_grad_(),
            **{name: make(copy.deepcopy(linear), A.clone(), B.clone())
               for name, make in adapted.items()}}


class Three(nn.Module):
    """Queries, keys and values: three layers that read one x."""

    def __init__(self, modules: list[nn.Module], together: bool):
        super().__init__()
        self.parts, self.together = nn.ModuleList(modules), together

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.together:
            return shared_input(x, *self.parts)
        return tuple(part(x) for part in self.parts)


def threes(size: int, rank: int, **options) -> dict[str, nn.Module]:
    """`layers`, three of each."""
    drawn = [layers(size, rank, seed=seed, **options) for seed in range(3)]
    return {name: Three([one[name] for one in drawn], name == "lora_lib") for name in drawn[0]}


@torch.no_grad()
def _filled(layer, own_A, own_B, A, B):
    own_A.copy_(A), own_B.copy_(B)
    return layer
