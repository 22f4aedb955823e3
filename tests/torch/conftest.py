"""What the adapter tests share: random adapters, a model's exact state, a small transformer."""

from contextlib import contextmanager

import pytest
import torch

from lora_lib.torch import lora_parameters


@pytest.fixture(autouse=True, scope="module")
def torch_on_one_thread(one_thread):
    pass


def randomize(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lora_parameters(model):
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def x(dtype=torch.float32):
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(7)).to(dtype)


def exact_bytes(tensor):
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def state(model):
    modules = list(model.named_modules(remove_duplicate=False))
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return ([(name, m, m.training, getattr(m, "merged", None)) for name, m in modules],
            [(name, id(t), t.requires_grad, t.dtype, exact_bytes(t)) for name, t in tensors])


@pytest.fixture
def unchanged():
    """`with unchanged(model):` the same modules, flags, and values, bit for bit, after it."""
    @contextmanager
    def check(model):
        before = state(model)
        yield
        assert state(model) == before
    return check


@pytest.fixture
def llama():
    """llama(tied=False): a Llama of transformers' with random weights, the same on every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(tied=False, seed=0):
        config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24,
                             num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                             tie_word_embeddings=tied)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config).eval()
            for p in model.parameters():                     # transformers' 0.02 hides differences
                torch.nn.init.normal_(p, std=0.3)
        return model
    return make
