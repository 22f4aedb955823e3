"""What a training step really holds in memory, measured on the tensors themselves."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lib.costs import Memory
from lora_lib.torch.linear import stored_weights
from lora_lib.tuning.loop import cross_entropy


@dataclass(frozen=True)
class MeasuredMemory(Memory):
    """`Memory`, measured; `peak` is the most that a GPU held during the step, None on the CPU."""
    peak: int | None = None


def measure_memory(model: nn.Module, inputs: Tensor, labels: Tensor, *,
                   loss: Callable[..., Tensor] = cross_entropy) -> MeasuredMemory:
    """Take one training step with AdamW and count the bytes of what it holds.

    weights              parameters and quantized weights, each storage once
    gradients            of the parameters, each storage once (a tied weight is one)
    optimizer            AdamW's two moments, without its step counters of 4 bytes a tensor
    activations          every storage that autograd saves in the forward pass and that is not a
                         parameter, a buffer, the batch itself, or a single number

    The step's learning rate is 0: the parameters stay as they are, and no gradient is left behind.
    Raises ValueError if nothing in the model is trainable.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("nothing is trainable: every parameter is frozen")
    gpu = inputs.device if inputs.device.type == "cuda" else None
    if gpu:
        torch.cuda.reset_peak_memory_stats(gpu)
    optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=0.0)
    optimizer.zero_grad()
    saved = []

    def remember(tensor):
        if tensor.ndim:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        value = loss(model(inputs), labels)
    given = _storages([*model.parameters(), *model.buffers(), inputs, labels])
    activations = {key: size for key, size in _storages(saved).items() if key not in given}
    saved.clear()
    value.backward()
    optimizer.step()
    gradients = [p.grad for p in trainable if p.grad is not None]
    moments = [t for state in optimizer.state.values() for key, t in state.items() if key != "step"]
    measured = MeasuredMemory(
        weights=sum(_storages(stored_weights(model).values()).values()),
        gradients=sum(_storages(gradients).values()),
        optimizer=sum(_storages(moments).values()),
        activations=sum(activations.values()),
        peak=torch.cuda.max_memory_allocated(gpu) if gpu else None)
    optimizer.zero_grad()
    return measured


def _storages(tensors):
    """{address: bytes} of the memory behind the tensors; views of one storage count once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
