"""What the adapter tests share: a model's exact state, and a small real transformer."""

from contextlib import contextmanager

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """On tensors this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
