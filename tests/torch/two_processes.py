"""Two processes train one tiny Llama in three ways. torchrun runs it: two_processes.py FOLDER

test_ecosystem.py starts it, and compares what it leaves in FOLDER with one process on the whole
batch. What has no counterpart there is asserted here.
"""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lora_lib.torch import (check, inject, load_adapter, lora_modules, lora_parameters, merge,
                            save_adapter)

STEPS, CLIP = 3, 0.01
TARGETS = ["q_proj", "v_proj", "down_proj"]


def base():
    """A Llama with random weights, in float64 so that the order of a sum hardly matters."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(config).double()


def adapted():
    """The same with adapters of rank 3, which two processes cannot halve."""
    return fill(inject(base(), TARGETS, rank=3, seed=0))


def fill(model):
    """Put random numbers in every B, so that the adapters do something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in lora_modules(model).values():
            layer.B.copy_(torch.randn(layer.B.shape, generator=generator))
    return model


def tokens():
    """Four rows of eight."""
    return torch.randint(50, (4, 8), generator=torch.Generator().manual_seed(2))


def optimizer_of(model):
    return torch.optim.AdamW(lora_parameters(model), lr=1e-2)


def whole(tensor):
    """All of a tensor that FSDP has split; every process must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(model, rows, parameters):
    """STEPS steps on `rows`. Returns the first gradient of each adapter, and their norm."""
    optimizer, first = torch.optim.AdamW(parameters, lr=1e-2), None
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        gradients = [whole(p.grad).clone() for p in parameters]
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters, CLIP))
        first = first or named(gradients, norm)
        optimizer.step()
    return first


def refuses(error, says, function, *arguments):
    try:
        function(*arguments)
    except error as refusal:
        assert says in str(refusal), refusal
    else:
        raise AssertionError(f"{function.__name__} did not raise {error.__name__}")


def named(gradients, norm):
    return {str(i): gradient for i, gradient in enumerate(gradients)} | {"norm": norm}


def ddp(rows, folder):
    model = adapted()
    wrapped = DistributedDataParallel(model)
    gradients = train(wrapped, rows, lora_parameters(model))
    sent = wrapped._get_ddp_logging_data()["total_parameter_size_bytes"]
    assert sent == sum(p.nbytes for p in lora_parameters(model))       # the frozen base is not sent
    if dist.get_rank() == 0:
        save_adapter(model, folder / "ddp")
    refuses(ValueError, "its .module", save_adapter, wrapped, folder / "never")
    refuses(ValueError, "inject() first", inject, DistributedDataParallel(base()), TARGETS)
    return gradients


def fsdp(rows, folder):
    model = adapted()
    for layer in (*model.model.layers, model):
        fully_shard(layer)
    assert all(hasattr(p, "full_tensor") for p in model.parameters())
    gradients = train(model, rows, lora_parameters(model))
    assert check(model, optimizer_of(model), base=base()) == []
    save_adapter(model, folder / "fsdp")
    dist.barrier()                                                     # the first process wrote
    refuses(ValueError, "load_adapter() first", load_adapter, model, folder / "fsdp")
    before = model(input_ids=rows, use_cache=False).logits
    after = merge(model)(input_ids=rows, use_cache=False).logits
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)
    return gradients


def accelerate(_, folder):
    """Each process gets one row at a time and accumulates two."""
    accelerator, model = Accelerator(cpu=True, gradient_accumulation_steps=2), adapted()
    first = None
    loader = DataLoader(tokens(), batch_size=1)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer_of(model), loader)
    for _ in range(STEPS):
        for rows in loader:
            with accelerator.accumulate(wrapped):
                accelerator.backward(wrapped(input_ids=rows, labels=rows).loss)
                if accelerator.sync_gradients:
                    gradients = [p.grad.clone() for p in lora_parameters(model)]
                    norm = accelerator.clip_grad_norm_(lora_parameters(model), CLIP)
                    first = first or named(gradients, norm)
                optimizer.step()
                optimizer.zero_grad()
    assert accelerator.unwrap_model(wrapped) is model
    if accelerator.is_main_process:
        save_adapter(model, folder / "accelerate")
    return first


def sixteen_bit_base(rows):
    """A frozen base in bfloat16 beside adapters in float32: one group of FSDP holds both."""
    model = inject(base().bfloat16(), TARGETS, rank=3, seed=0)
    alone = copy.deepcopy(model)
    for layer in (*model.model.layers, model):
        fully_shard(layer)
    model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
    alone(input_ids=tokens(), labels=tokens()).loss.backward()
    for ours, reference in zip(lora_parameters(model), lora_parameters(alone)):
        assert ours.dtype == ours.grad.dtype == torch.float32
        torch.testing.assert_close(whole(ours.grad), reference.grad, rtol=0,
                                   atol=0.02 * reference.grad.abs().max().item())


def inject_after_sharding():
    """FSDP would not know of A and B: each process would go on alone, without a word."""
    model = fully_shard(base())
    refuses(TypeError, "inject() first", inject, model, TARGETS)
    assert not lora_modules(model) and all(p.requires_grad for p in model.parameters())


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mine = tokens()[2 * rank:2 * rank + 2]
    inject_after_sharding()
    sixteen_bit_base(mine)
    for way in (ddp, fsdp, accelerate):
        gradients = way(mine, folder)
        if rank == 0:
            save_file(gradients, folder / way.__name__ / "gradients.safetensors")
    dist.destroy_process_group()
