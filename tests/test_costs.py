"""The predictions of lora_lib.costs, by hand on published shapes and against real allocations."""

import json
import subprocess
import sys
import weakref
from dataclasses import replace
from functools import partial

import pytest

from lora_lib.costs import (LLAMA_7B, Flops, ModelShape, adapter_bytes, checkpoint_bytes, flops,
                            full_parameters, layer_flops, lora_parameters, loss_buffers, memory,
                            nf4_bytes)

QV = ["q_proj", "v_proj"]


def test_imports_neither_torch_nor_numpy():
    program = ("import sys, lora_lib.costs\n"
               "assert not {'torch', 'numpy'} & set(sys.modules), sorted(sys.modules)")
    subprocess.run([sys.executable, "-c", program], check=True)


# --- parameters ---------------------------------------------------------------------------------

@pytest.mark.parametrize("rank, parameters", [(4, 32_768), (8, 65_536), (16, 131_072),
                                              (64, 524_288)])
def test_the_4096_table(rank, parameters):
    assert lora_parameters(4096, 4096, rank) == parameters
    assert full_parameters(4096, 4096) == 16_777_216


def test_a_rectangle():
    assert full_parameters(3, 5) == 15 and lora_parameters(3, 5, 2) == 2 * 5 + 3 * 2


def test_llama_7b_has_its_published_size():
    assert LLAMA_7B.parameters() == 6_738_415_616
    assert LLAMA_7B.lora_parameters(8, QV) == 32 * 2 * 65_536 == 4_194_304
    by_hand = 4 * 8 * 8192 + 3 * 8 * (4096 + 11008)
    assert LLAMA_7B.lora_parameters(8, "all-linear") == 32 * by_hand == 19_988_480


@pytest.mark.parametrize("rank", [0, -1, 4097])
def test_a_rank_that_cannot_be(rank):
    with pytest.raises(ValueError, match=f"rank must be between 1 and .* = 4096, got {rank}"):
        lora_parameters(4096, 4096, rank)
    for cost in (memory, flops):
        with pytest.raises(ValueError, match=f"got {rank}"):
            cost(LLAMA_7B, batch=1, sequence=8, rank=rank)


@pytest.mark.parametrize("change, error, message", [
    ({"num_layers": 0}, ValueError, "num_layers must be at least 1, got 0"),
    ({"vocab_size": 1.5}, TypeError, "vocab_size must be an integer, got 1.5"),
    ({"num_heads": 7}, ValueError, "must be a multiple of num_heads = 7"),
    ({"num_kv_heads": 3}, ValueError, "num_kv_heads = 3"),
    ({"num_kv_heads": 3, "head_dim": 8}, ValueError, "num_kv_heads = 3"),
    ({"head_dim": 0}, ValueError, "head_dim must be at least 1, got 0"),
])
def test_a_shape_that_cannot_be(change, error, message):
    sizes = {"vocab_size": 9, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2,
             "num_heads": 4} | change
    with pytest.raises(error, match=message):
        ModelShape(**sizes)


@pytest.mark.parametrize("options, error, message", [
    ({"target_modules": ["query"]}, ValueError, r"some of \('q_proj'.*got \['query'\]"),
    ({"target_modules": []}, ValueError, r"got \[\]"),
    ({"batch": 0}, ValueError, "batch must be at least 1"),
    ({"sequence": 2.0}, TypeError, "sequence must be an integer"),
    ({"weight_bytes": 0}, ValueError, "weight_bytes must be at least 1"),
    ({"moments": -1}, ValueError, "moments must be at least 0, got -1"),
    ({"rank": None, "quantized": True}, ValueError, "a quantized weight cannot be trained"),
])
def test_a_step_that_cannot_be(options, error, message):
    with pytest.raises(error, match=message):
        memory(LLAMA_7B, **({"batch": 1, "sequence": 8, "rank": 8} | options))


# --- bytes and FLOPs of the 7B shape, by hand ---------------------------------------------------

def test_the_state_of_a_7b_model():
    n, adapters = 6_738_415_616, 4_194_304
    full = memory(LLAMA_7B, batch=1, sequence=512)
    lora = memory(LLAMA_7B, batch=1, sequence=512, rank=8)
    assert (full.weights, full.gradients, full.optimizer) == (4 * n, 4 * n, 8 * n)
    assert (lora.weights, lora.gradients, lora.optimizer) == (2 * n + 4 * adapters, 4 * adapters,
                                                              8 * adapters)
    assert full.total == 16 * n + full.activations
    assert memory(LLAMA_7B, batch=1, sequence=512, moments=0).optimizer == 0
    assert adapter_bytes(LLAMA_7B, 8, QV) == 4 * adapters
    assert adapter_bytes(LLAMA_7B, 8, QV, bytes_each=2) == 2 * adapters
    assert checkpoint_bytes(LLAMA_7B) == 12 * n and checkpoint_bytes(LLAMA_7B, 8) == 12 * adapters


def test_activations_grow_with_the_tokens_and_lora_does_not_save_them():
    one, four = (memory(LLAMA_7B, batch=b, sequence=512, rank=8).activations for b in (1, 4))
    tables = 2 * 512 * 128 * 2                                   # cosines and sines, one batch's
    assert four - tables == 4 * (one - tables)
    full = memory(LLAMA_7B, batch=1, sequence=512).activations
    assert 0.5 < one / full < 1


def test_flops_of_a_7b_model():
    """6 N and 4 N to the token, N the weights in products, plus attention's own products."""
    tokens = 512
    n = 6_738_415_616 - 32000 * 4096 - 65 * 4096                # less the embedding, the norms
    attention = 32 * 2 * (2 * tokens * tokens * 4096)           # two products in each layer
    full = flops(LLAMA_7B, batch=1, sequence=tokens)
    assert full == Flops(2 * n * tokens + attention, 4 * n * tokens + 2 * attention)
    lora = flops(LLAMA_7B, batch=1, sequence=tokens, rank=8)
    assert lora.total / full.total == pytest.approx(2 / 3, abs=0.01)
    assert lora.forward == full.forward + 2 * 4_194_304 * tokens


def test_flops_of_one_layer():
    full, frozen, lora = (layer_flops(4096, 4096, tokens=10, rank=r) for r in (None, 0, 8))
    base = 2 * 10 * 4096 * 4096
    assert full == Flops(base, 2 * base) and frozen == Flops(base, base)
    assert lora.forward - frozen.forward == 2 * 10 * 65_536
    assert lora.backward - frozen.backward == 4 * 10 * 65_536
    assert layer_flops(4096, 4096, rank=0, input_gradient=False).backward == 0
    with pytest.raises(ValueError, match="rank must be between 1 and"):
        layer_flops(4, 4, rank=5)


# --- against what PyTorch allocates and counts --------------------------------------------------

torch = pytest.importorskip("torch")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

BATCH, SEQUENCE, RANK = 3, 16, 4
SHAPES = {"LanguageModel": ModelShape(96, 64, 176, 3, 4, tied_embeddings=True),
          "transformers": ModelShape(96, 64, 176, 3, 4, num_kv_heads=2)}
QWEN = {"Qwen2": ModelShape(96, 64, 176, 2, 4, num_kv_heads=2, qkv_bias=True),
        "Qwen3": ModelShape(96, 64, 176, 2, 6, num_kv_heads=3, head_dim=24, qk_norm=True)}
TARGETS = [None, QV, ["v_proj"], ["o_proj"], ["up_proj"], "gate_proj", ["down_proj"], "all-linear"]


def build(kind, shape, dtype=torch.float32):
    if kind != "LanguageModel":
        return hugging_face(shape).to(dtype)
    from lora_lib.models.tales import LanguageModel, LanguageModelConfig
    config = LanguageModelConfig(shape.vocab_size, shape.hidden_size, shape.intermediate_size,
                                 shape.num_layers, shape.num_heads)
    return LanguageModel(config, seed=0).to(dtype)


def hugging_face(shape):
    transformers = pytest.importorskip("transformers")
    family = "Qwen3" if shape.qk_norm else "Qwen2" if shape.qkv_bias else "Llama"
    config = getattr(transformers, f"{family}Config")
    head = {} if family == "Qwen2" else {"head_dim": shape.head_dim}
    return getattr(transformers, f"{family}ForCausalLM")(config(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size, num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads, num_key_value_heads=shape.num_kv_heads, **head,
        tie_word_embeddings=shape.tied_embeddings, attn_implementation="sdpa", use_cache=False))


def prepared(kind, target, dtype=torch.float32, double=None):
    """A model, adapted or whole; a batch; and what costs wants to know of it."""
    from lora_lib.torch.inject import inject
    from lora_lib.torch.nf4 import quantize
    shape = (SHAPES | QWEN)[kind]
    model = build(kind, shape, dtype)
    if double is not None:
        quantize(model, double=double)
    if target is not None:
        inject(model, target, rank=RANK, seed=0)
    generator = torch.Generator().manual_seed(0)
    tokens, labels = (torch.randint(96, (BATCH, SEQUENCE), generator=generator) for _ in range(2))
    step = {"batch": BATCH, "sequence": SEQUENCE} | (
        {} if target is None else {"rank": RANK, "target_modules": target})
    return shape, model, tokens, labels, step


@pytest.mark.parametrize("shape", [LLAMA_7B, *SHAPES.values(), *QWEN.values()])
def test_parameters_are_those_of_transformers_model(shape):
    with torch.device("meta"):
        assert sum(p.numel() for p in hugging_face(shape).parameters()) == shape.parameters()


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("kind", SHAPES)
def test_memory_is_what_pytorch_holds(kind, target):
    """In float32 to the byte, on both implementations: the trace mirrors autograd exactly."""
    from lora_lib.tuning.memory import measure_memory
    shape, model, tokens, labels, step = prepared(kind, target)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    measured = measure_memory(model, tokens, labels)
    expected = memory(shape, weight_bytes=4, trainable_bytes=4, activation_bytes=4, **step)
    for part in ("weights", "gradients", "optimizer", "activations", "total"):
        assert getattr(measured, part) == getattr(expected, part), part
    assert measured.peak is None
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("target", [QV, "all-linear"], ids=str)
@pytest.mark.parametrize("kind", SHAPES)
def test_memory_beside_a_bfloat16_base(kind, target):
    """The same: no bfloat16 copies of A and B are kept."""
    from lora_lib.tuning.memory import measure_memory
    shape, model, tokens, labels, step = prepared(kind, target, torch.bfloat16)
    measured, expected = measure_memory(model, tokens, labels), memory(shape, **step)
    for part in ("weights", "gradients", "optimizer", "activations"):
        assert getattr(measured, part) == getattr(expected, part), part


def same(measured, expected):
    assert {part: getattr(measured, part) for part in vars(expected)} == vars(expected)


@pytest.mark.parametrize("target", [None, ["k_proj"], "all-linear"], ids=str)
@pytest.mark.parametrize("kind", QWEN)
def test_heads_of_another_size_biases_and_norms_of_heads(kind, target):
    from lora_lib.tuning.memory import measure_memory
    shape, model, tokens, labels, step = prepared(kind, target)
    expected = memory(shape, weight_bytes=4, trainable_bytes=4, activation_bytes=4, **step)
    same(measure_memory(model, tokens, labels), expected)


# --- a base in four bits ------------------------------------------------------------------------

@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("out_features, in_features, block", [
    (1, 1, 64), (64, 64, 64), (176, 64, 2), (129, 131, 32), (260, 257, 64)])
def test_nf4_bytes_are_those_of_the_layers_buffers(out_features, in_features, block, double):
    from lora_lib.torch.nf4 import NF4Linear
    layer = NF4Linear(torch.nn.Linear(in_features, out_features), block, double)
    stored = sum(buffer.untyped_storage().nbytes() for buffer in layer.buffers())
    assert nf4_bytes(out_features, in_features, block=block, double=double) == stored


def test_a_large_weight_takes_the_bits_that_the_paper_names():
    """QLoRA, section 3: 0.5 bits a weight for the blocks' constants, 0.127 when they are doubled."""
    for double, bits in ((False, 4.5), (True, 4.127)):
        assert nf4_bytes(4096, 4096, double=double) * 8 / 4096**2 == pytest.approx(bits, abs=5e-4)


@pytest.mark.parametrize("block", [0, 3])
def test_a_block_that_cannot_be(block):
    with pytest.raises(ValueError, match=f"block must be .*, got {block}"):
        nf4_bytes(4, 4, block=block)


@pytest.mark.parametrize("double, dtype", [(False, torch.float32), (True, torch.bfloat16)])
@pytest.mark.parametrize("target", [QV, "all-linear"], ids=str)
@pytest.mark.parametrize("kind", [*SHAPES, "Qwen2"])
def test_memory_beside_an_nf4_base(kind, target, double, dtype):
    from lora_lib.tuning.memory import measure_memory
    shape, model, tokens, labels, step = prepared(kind, target, dtype, double)
    expected = memory(shape, quantized=True, double=double, weight_bytes=dtype.itemsize,
                      activation_bytes=dtype.itemsize, **step)
    same(measure_memory(model, tokens, labels), expected)


def test_a_7b_base_in_four_bits_by_hand():
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    rest = 6_738_415_616 - linear
    nf4 = memory(LLAMA_7B, batch=1, sequence=512, rank=8, quantized=True, double=False)
    assert nf4.weights == linear * 9 // 16 + 2 * rest + 4 * 4_194_304
    half = memory(LLAMA_7B, batch=1, sequence=512, rank=8)
    assert (nf4.gradients, nf4.optimizer) == (half.gradients, half.optimizer)
    # The adapters on a quantized layer keep A and B in 16 bits too, but A not in the lowest layer.
    assert nf4.activations - half.activations == 2 * (4_194_304 - 2 * 8 * 4096)


# --- every layer computed again -----------------------------------------------------------------

def checkpointed(kind, target, dtype, vocabulary):
    """As `prepared`, with another vocabulary, under torch.utils.checkpoint."""
    from lora_lib.torch.inject import inject
    shape = replace((SHAPES | QWEN)[kind], vocab_size=vocabulary)
    model = build(kind, shape, dtype)
    if target is not None:
        inject(model, target, rank=RANK, seed=0)
    for layer in model.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    tokens = torch.randint(96, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(0))
    return shape, model, tokens


def kept_by(call, given):
    """The storages that autograd saves, less the given tensors': {address: bytes}."""
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks:
        result = call()
    known = {t.untyped_storage().data_ptr() for t in given}
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved if t.ndim}
    return result, {key: size for key, size in found.items() if key not in known}


@pytest.mark.parametrize("vocabulary, largest", [(96, "a layer"), (2000, "the head and the loss")])
@pytest.mark.parametrize("kind, target, dtype", [
    ("transformers", None, torch.float32), ("transformers", QV, torch.bfloat16),
    ("transformers", "all-linear", torch.float32), ("Qwen3", "all-linear", torch.bfloat16)])
def test_activations_when_every_layer_is_computed_again(kind, target, vocabulary, largest, dtype):
    from lora_lib.tuning.memory import measure_memory
    shape, model, tokens = checkpointed(kind, target, dtype, vocabulary)
    each, layers, inputs = dtype.itemsize, model.model.layers, []
    given = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
             for layer in layers]
    whole = measure_memory(model, tokens, tokens).activations
    for hook in given:
        hook.remove()
    # What a layer keeps that is not its input, measured as it stands there, computed once.
    del layers[1].forward
    x = inputs[1].detach().clone().requires_grad_()
    tables = model.model.rotary_emb(x, torch.arange(SEQUENCE)[None])
    _, layer = kept_by(lambda: layers[1](x, position_embeddings=tables), [x, *model.parameters()])
    kept = len(layers) * BATCH * SEQUENCE * shape.hidden_size * each
    assert (sum(layer.values()) > whole - kept) == (largest == "a layer")
    step = {"rank": RANK, "target_modules": target} if target else {}
    expected = memory(shape, batch=BATCH, sequence=SEQUENCE, weight_bytes=each,
                      activation_bytes=each, checkpointing=True, **step)
    assert expected.activations == max(whole, kept + sum(layer.values()))


def test_the_head_is_gone_when_the_last_layer_is_computed_again():
    """So the larger of the two counts, not the sum."""
    from lora_lib.tuning.loop import cross_entropy
    shape, model, tokens = checkpointed("transformers", QV, torch.float32, 5000)
    saved, alive = {}, []

    def remember(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = weakref.ref(storage), storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        loss = cross_entropy(model(tokens), tokens)
    given = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = lambda: sum(size for key, (storage, size) in saved.items()
                       if key not in given and storage() is not None)
    inputs, numbers = BATCH * SEQUENCE * shape.hidden_size * 4, BATCH * SEQUENCE * 5000
    before = held()
    model.model.layers[-1].self_attn.register_forward_pre_hook(lambda *_: alive.append(held()))
    loss.backward()
    assert before > 3 * inputs + 4 * numbers and 3 * inputs <= alive[0] < 5 * inputs


def test_checkpointing_a_7b_model():
    kept, again = (memory(LLAMA_7B, batch=1, sequence=512, rank=8, checkpointing=flag)
                   for flag in (False, True))
    assert again.activations < kept.activations / 5
    assert again.total - again.activations == kept.total - kept.activations
    inputs = 32 * 512 * 4096 * 2
    assert again.activations == inputs + 512 * (4096 * 4 + 4 + 32000 * 4)


def test_what_the_loss_holds_beside():
    """Live tensors, counted at every operation: the backward pass adds two arrays of logits."""
    from lora_lib.tuning.loop import cross_entropy
    logits = torch.randn(BATCH, SEQUENCE, 5000, requires_grad=True)
    labels = torch.randint(5000, (BATCH, SEQUENCE))
    with Live() as live:
        loss = cross_entropy(logits, labels)
        kept, live.most = live.now, live.now
        loss.backward()
    shape = replace(SHAPES["transformers"], vocab_size=5000)
    expected = loss_buffers(shape, batch=BATCH, sequence=SEQUENCE)
    assert live.most - kept == pytest.approx(expected, rel=0.01)


class Live(TorchDispatchMode):
    """The bytes of the tensors that operations made and that are still there: now, and at most."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.known = 0, 0, set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **kwargs or {})
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        self.most = max(self.most, self.now)
        return made

    def add(self, storage):
        if (key := storage.data_ptr()) not in self.known:
            self.known.add(key)
            self.now += storage.nbytes()
            weakref.finalize(storage, self.drop, key, storage.nbytes())

    def drop(self, key, size):
        self.known.discard(key)
        self.now -= size


# --- other precisions, files --------------------------------------------------------------------

@pytest.mark.parametrize("kind", SHAPES)
def test_full_fine_tuning_in_bfloat16(kind):
    from lora_lib.tuning.memory import measure_memory
    shape, model, tokens, labels, step = prepared(kind, None, torch.bfloat16)
    measured = measure_memory(model, tokens, labels)
    expected = memory(shape, trainable_bytes=2, **step)
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(measured, part) == getattr(expected, part), part
    assert measured.activations == pytest.approx(expected.activations, rel=0.1)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("kind", SHAPES)
def test_flops_are_what_pytorch_counts(kind, target):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from lora_lib.tuning.loop import cross_entropy
    shape, model, tokens, labels, step = prepared(kind, target)
    # PyTorch's counter does not know the CPU's fused attention; it sees the plain one's products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        value = cross_entropy(model(tokens), labels)
        forward = counter.get_total_flops()
        value.backward()
    assert flops(shape, **step) == Flops(forward, counter.get_total_flops() - forward)


def test_adapter_and_checkpoint_files_hold_these_bytes(tmp_path):
    from lora_lib.torch.checkpoint import save_adapter
    from lora_lib.tuning.loop import fine_tune
    shape, model, tokens, labels, step = prepared("LanguageModel", QV)
    path = tmp_path / "run.safetensors"
    fine_tune(model, (tokens, labels), steps=1, batch_size=2, checkpoint=path, progress=False)
    save_adapter(model, tmp_path / "adapter")

    def tensor_bytes(file):
        whole = file.read_bytes()
        header = json.loads(whole[8:8 + int.from_bytes(whole[:8], "little")])
        return {name: t["data_offsets"][1] - t["data_offsets"][0]
                for name, t in header.items() if name != "__metadata__"}

    sizes = tensor_bytes(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(sizes.values()) == adapter_bytes(shape, RANK, QV)
    sizes = tensor_bytes(path)
    kept = sum(size for name, size in sizes.items()
               if name.startswith((".parameter", "exp_avg")))
    assert kept == checkpoint_bytes(shape, RANK, QV)


def test_measuring_a_frozen_model_is_refused():
    from lora_lib.tuning.memory import measure_memory
    with pytest.raises(ValueError, match="nothing is trainable"):
        measure_memory(torch.nn.Linear(2, 2).requires_grad_(False), torch.ones(1, 2), None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu_the_peak_holds_all_parts():
    from lora_lib.tuning.memory import measure_memory
    _, model, tokens, labels, _ = prepared("LanguageModel", QV)
    measured = measure_memory(model.cuda(), tokens.cuda(), labels.cuda())
    assert measured.peak >= measured.weights + measured.activations
    assert measured.optimizer == 2 * measured.gradients
