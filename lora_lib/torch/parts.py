"""What a model with adapters holds: they, what is trained beside them, their names in a file."""

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lora_lib.torch.experts import LoRAExperts, lora_experts, nested
from lora_lib.torch.linear import full, stored
from lora_lib.torch.lora import LoRALinear
from lora_lib.torch.peft_format import HALVES, INNER, ROWS
from lora_lib.torch.tokens import saved_rows, token_rows

Adapter: TypeAlias = LoRALinear | LoRAExperts


def lora_modules(model: nn.Module) -> dict[str, LoRALinear]:
    """Every LoRALinear in the model, by its path."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that is trained whole beside the adapters (`modules_to_save`), by its path."""
    return {name: m for name, m in model.named_modules() if "before_lora" in vars(m)}


def all_adapters(model: nn.Module) -> dict[str, Adapter]:
    """Every LoRALinear by its path, then every LoRAExperts by its parameter's."""
    return lora_modules(model) | lora_experts(model)


def shapes_of(layer: Adapter) -> dict[str, tuple[int, ...]]:
    """The shapes that an adapter's A and B must have, and its B_bias if there is one."""
    lead = (layer.experts,) if isinstance(layer, LoRAExperts) else ()
    shapes: dict[str, tuple[int, ...]] = {"A": (*lead, layer.rank, layer.in_features),
                                          "B": (*lead, layer.out_features, layer.rank)}
    return shapes | ({"B_bias": (layer.out_features,)} if has_bias(layer) else {})


def has_bias(layer: Adapter) -> bool:
    """Whether the adapter's B has a bias (lora_bias)."""
    return getattr(layer, "B_bias", None) is not None


def parts_of(layer: Adapter) -> list[nn.Parameter]:
    """What of an adapter is trained: A, B, and B_bias if there is one."""
    return [getattr(layer, part) for part in shapes_of(layer)]


def idle_adapters(model: nn.Module) -> list[str]:
    """After a backward pass: the adapters that are trained and got no gradient, by path."""
    return [name for name, layer in all_adapters(model).items()
            if layer.A.grad is None and layer.B.grad is None
            and (layer.A.requires_grad or layer.B.requires_grad)]


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every adapter, the rows of tokens, then the modules to save: what the optimizer
    gets."""
    return [*(p for layer in all_adapters(model).values() for p in parts_of(layer)),
            *(part.rows for part in token_rows(model).values()),
            *(p for module in saved_modules(model).values() for p in module.parameters())]


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every adapter, trained rows and modules to save, under PEFT's names for its files.

    In a model that FSDP 2 has split, every process must call this, and gets whole tensors. The
    names that wrappers put into paths (torch.compile, DataParallel, checkpoint_wrapper) are left
    out. Raises ValueError for an A or B that is not whole, or not there (flattened by FSDP 1, on
    the meta device), and if DistributedDataParallel wraps the model, or a part of it.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(f"{name or 'the model'} is wrapped in DistributedDataParallel, and "
                             "every process would write: pass its .module, in one process")
    bare = bare_path(model)
    state, adapters = {}, all_adapters(model)
    paths = nested(lora_experts(model), dict(model.named_modules()))
    for name, layer in adapters.items():
        for part, shape in shapes_of(layer).items():
            tensor = full(stored(layer, part).detach())
            if tuple(tensor.shape) != shape or tensor.is_meta:
                raise ValueError(
                    f"{name}: {part} has shape {tuple(tensor.shape)} on {tensor.device}, expected "
                    f"{shape} with its values. Under FSDP 1 or ZeRO-3 gather the parameters first "
                    "(FSDP.summon_full_params, deepspeed.zero.GatheredParameters)")
            if name in paths:
                tensor = layer.to_file(part, tensor)
            state[f"{bare(paths.get(name, name))}.{HALVES[part]}"] = tensor
    for name, rows in saved_rows(model).items():
        state[f"{bare(name)}.{ROWS}"] = full(rows.rows.detach())
    for name, module in saved_modules(model).items():
        state |= {f"{bare(name)}.{key}": full(t) for key, t in module.state_dict().items()}
    return {f"base_model.model.{key}": t for key, t in state.items()}


def inner_name(module: nn.Module) -> str | None:
    """The name under which a wrapper holds what it wraps; None for what is no wrapper."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
    found = [name for name in INNER if name in module._modules]
    return found[0] if found else "module" if isinstance(module, wrappers) else None


def bare_path(model: nn.Module) -> Callable[[str], str]:
    """A function from a module's path to the same without the names that wrappers put into it."""
    inner = {f"{name}.{leaf}" if name else leaf for name, module in model.named_modules()
             if (leaf := inner_name(module))}

    def bare(path):
        parts = path.split(".")
        return ".".join(part for i, part in enumerate(parts)
                        if ".".join(parts[:i + 1]) not in inner)
    return bare if inner else lambda path: path


def check_bare(model: nn.Module) -> None:
    """Raise ValueError if a wrapper's name would be in the paths of the model's modules."""
    for name, module in model.named_modules():
        if inner := inner_name(module):
            raise ValueError(f"{name or 'the model'} is wrapped in {type(module).__name__}: pass "
                             f"what is inside, its .{inner}; inject() first, then wrap")
