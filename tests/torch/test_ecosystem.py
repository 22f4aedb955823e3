"""Injected models inside what people train with: torch's machinery, Trainer, accelerate, DDP."""

import copy
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer,
                          TrainingArguments)

from lora_lib.torch import (LanguageModel, LanguageModelConfig, LoRALayer, LoRALinear, check,
                            inject, load_adapter, lora_modules, lora_parameters, lora_state_dict,
                            merge, save_adapter)
from tests.torch import two_processes

IDS = torch.randint(50, (4, 8), generator=torch.Generator().manual_seed(1))
BASES = ("llama", "gpt2", "course")
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"],
           "course": ["q_proj", "v_proj", "down_proj"]}


def base_of(kind, dtype=torch.float64):
    """A tiny model with random weights, the same on every call."""
    torch.manual_seed(0)
    if kind == "llama":
        model = two_processes.base()
    elif kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=4,
                                           n_positions=16, bos_token_id=0, eos_token_id=0))
    else:
        model = LanguageModel(LanguageModelConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4))
    for p in model.parameters():                # transformers' 0.02 gives an adapter no grip
        nn.init.normal_(p, std=0.3)
    return model.to(dtype)


def adapted(kind, dtype=torch.float64):
    """`base_of(kind)` with adapters that change the output, without dropout."""
    model = inject(base_of(kind, dtype), TARGETS[kind], rank=2, seed=0).eval()
    return two_processes.fill(model)


class Logits(nn.Module):
    """Token ids to a tensor of logits, which transformers' models wrap."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        if isinstance(self.model, LanguageModel):
            return self.model(ids)
        return self.model(input_ids=ids, use_cache=False).logits


def loss_of(logits, ids=IDS):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradients(model, loss=None):
    (loss_of(Logits(model)(IDS)) if loss is None else loss).backward()
    found = [p.grad for p in lora_parameters(model)]
    model.zero_grad()
    return found


def assert_equal(ours, reference, tolerance=0.0):
    """Each pair is equal to `tolerance` times the largest number in the reference."""
    assert len(ours) == len(reference) > 0
    for one, other in zip(ours, reference):
        torch.testing.assert_close(one, other, rtol=0,
                                   atol=tolerance * other.abs().max().item())


@pytest.mark.parametrize("kind", BASES)
class TestTorch:
    def test_compile_without_graph_breaks(self, kind):
        model = adapted(kind)
        expected, logits = gradients(model), Logits(model)
        compiled = torch.compile(logits, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(IDS), logits(IDS))
        assert_equal(gradients(model, loss_of(compiled(IDS))), expected, 1e-10)

    def test_export(self, kind):
        model = adapted(kind)
        expected = Logits(model)(IDS)
        program = torch.export.export(Logits(model), (IDS,))
        torch.testing.assert_close(program.module()(IDS), expected)
        program = torch.export.export(Logits(merge(model)), (IDS,))
        assert not any(name.endswith((".A", ".B")) for name in program.state_dict)
        torch.testing.assert_close(program.module()(IDS), expected)

    def test_state_dict_goes_through_a_file_without_pickle(self, kind, tmp_path):
        model = adapted(kind)
        torch.save(model.state_dict(), tmp_path / "state.pt")
        other = inject(base_of(kind), TARGETS[kind], rank=2, seed=9).eval()
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
        assert torch.equal(Logits(other)(IDS), Logits(model)(IDS))

    def test_deepcopy_shares_nothing(self, kind):
        model = adapted(kind)
        twin, expected = copy.deepcopy(model), Logits(model)(IDS)
        assert [p.requires_grad for p in twin.parameters()] == \
            [p.requires_grad for p in model.parameters()]
        assert torch.equal(Logits(twin)(IDS), expected)
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        assert torch.equal(Logits(model)(IDS), expected)

    def test_functional_call(self, kind):
        model = adapted(kind)
        logits = Logits(model)
        adapters = {name: p for name, p in logits.named_parameters() if p.requires_grad}

        def loss(adapters):
            return loss_of(torch.func.functional_call(logits, adapters, (IDS,)))

        found = torch.func.grad(loss)(adapters)
        assert_equal([found[name] for name in adapters], gradients(model), 1e-10)

    def test_a_bfloat16_base_keeps_float32_adapters(self, kind):
        model = inject(base_of(kind, torch.bfloat16), TARGETS[kind], rank=2)
        assert Logits(model)(IDS).dtype == torch.bfloat16
        assert {g.dtype for g in gradients(model)} == {torch.float32}
        assert check(model) == []

    def test_casting_after_injection_casts_the_adapters_and_check_says_so(self, kind):
        model = adapted(kind).bfloat16()
        assert Logits(model)(IDS).dtype == torch.bfloat16
        assert {g.dtype for g in gradients(model)} == {torch.bfloat16}
        assert [f.code for f in check(model)] == ["16-bit adapter"]

    def test_autocast(self, kind):
        model = adapted(kind, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            logits = Logits(model)(IDS)
        assert logits.dtype == torch.bfloat16
        assert {g.dtype for g in gradients(model, loss_of(logits.float()))} == {torch.float32}

    def test_injected_on_the_meta_device_and_filled_later(self, kind):
        with torch.device("meta"):
            model = inject(base_of(kind), TARGETS[kind], rank=2, seed=0)
        assert {p.device.type for p in model.parameters()} == {"meta"}
        model = inject(base_of(kind).to("meta"), TARGETS[kind], rank=2, seed=0)
        state = adapted(kind).state_dict()
        model.load_state_dict(state, assign=True)
        assert_equal(list(lora_state_dict(model).values()),
                     list(lora_state_dict(adapted(kind)).values()))
        assert {n for n, p in model.named_parameters() if p.requires_grad} == \
            {f"{n}.{part}" for n in lora_modules(model) for part in "AB"}

    @pytest.mark.gpu
    def test_moving_to_the_gpu(self, kind):
        model = adapted(kind)
        expected = Logits(model)(IDS)
        model.to("cuda")
        assert {p.device.type for p in model.parameters()} == {"cuda"}
        # Also a float64 Llama has its norms and its angles in float32.
        close = partial(torch.testing.assert_close, rtol=1.3e-6, atol=1e-5)
        close(Logits(model)(IDS.cuda()).cpu(), expected)
        close(Logits(merge(model))(IDS.cuda()).cpu(), expected)


def test_a_default_device_does_not_change_what_a_seed_means():
    expected = LoRALayer(4, 4, 2, seed=0).A
    with torch.device("meta"):
        assert torch.equal(LoRALayer(4, 4, 2, seed=0, device="cpu").A, expected)
        layer = LoRALayer(4, 4, 2, seed=0)
    assert layer.A.device == layer.B.device == torch.device("meta")


def test_compiled_code_notices_a_merge():
    layer = two_processes.fill(LoRALinear(nn.Linear(8, 6), rank=2, seed=0))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = compiled(x)
    for change in (layer.merge, layer.unmerge):
        change()
        torch.testing.assert_close(compiled(x), expected)


def test_a_compiled_model_is_saved_under_the_names_inside(tmp_path):
    compiled = torch.compile(adapted("course"))
    with pytest.raises(ValueError, match="_orig_mod"):
        inject(torch.compile(base_of("course")), "q_proj")
    save_adapter(compiled, tmp_path)
    assert lora_state_dict(compiled).keys() == lora_state_dict(compiled._orig_mod).keys()
    assert lora_modules(load_adapter(base_of("course"), tmp_path))


COMPILER = (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")) and \
    Path(sysconfig.get_path("include"), "Python.h").exists()


@pytest.mark.skipif(not COMPILER, reason="inductor needs a C++ compiler and Python.h")
def test_the_layer_through_inductor():
    layer = two_processes.fill(LoRALinear(nn.Linear(8, 6), rank=2, seed=0))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    layer(x).square().sum().backward()
    expected = layer(x), layer.A.grad, layer.B.grad
    layer.zero_grad()
    out = torch.compile(layer, fullgraph=True)(x)
    out.square().sum().backward()
    for ours, reference in zip((out, layer.A.grad, layer.B.grad), expected):
        torch.testing.assert_close(ours, reference)


class TestActivationCheckpointing:
    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_gradients_are_the_same(self, kind, reentrant):
        model = adapted(kind)
        expected = gradients(model)
        model.train()                                  # an eval model checkpoints nothing
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        calls = []
        layer = next(iter(lora_modules(model).values()))
        layer.register_forward_hook(lambda *_: calls.append(1))
        assert_equal(gradients(model), expected, 1e-10)
        assert len(calls) == 2                                    # forward, and again in backward

    def test_the_trap_a_frozen_embedding_leaves_a_reentrant_checkpoint_without_gradients(self):
        layer, x = two_processes.fill(LoRALinear(nn.Linear(8, 8), 2, seed=0)), torch.ones(3, 8)
        expected = gradients(layer, layer(x).sum())
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            out = checkpoint(layer, x, use_reentrant=True)
        assert not out.requires_grad and "Gradients will be None" in str(said[0].message)
        for fix in ({"use_reentrant": False}, {"use_reentrant": True}):
            if fix["use_reentrant"]:
                x.requires_grad_()                     # what enable_input_require_grads() does
            assert_equal(gradients(layer, checkpoint(layer, x, **fix).sum()), expected, 1e-6)


def rows():
    """Each row repeats one of four tokens, which adapters learn in a few steps."""
    return [{"input_ids": ids, "labels": ids} for ids in torch.arange(4).repeat(8, 4).T]


def test_trainer_and_a_base_that_another_library_has_quantized(tmp_path):
    """It asks the flag of transformers' own adapters, which the page on engines sets."""
    model = inject(base_of("llama", torch.float32), ["q_proj"], rank=4, seed=0)
    model.is_quantized = True                    # as bitsandbytes leaves it
    settings = TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=4,
                                 use_cpu=True, report_to="none", disable_tqdm=True,
                                 logging_strategy="no", save_strategy="no")
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, settings, train_dataset=rows())
    model._hf_peft_config_loaded = True
    before = [p.clone() for p in lora_parameters(model)]
    Trainer(model, settings, train_dataset=rows()).train()
    assert not all(map(torch.equal, before, lora_parameters(model)))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
class TestTrainer:
    def trainer(self, kind, folder, seed=0):
        model = inject(base_of(kind, torch.float32), TARGETS[kind], rank=4, dropout=0.1, seed=seed)
        settings = TrainingArguments(
            str(folder), max_steps=20, save_steps=10, per_device_train_batch_size=4,
            learning_rate=5e-2, seed=seed, use_cpu=True, report_to="none", disable_tqdm=True,
            logging_strategy="no", activation_checkpointing=(kind == "llama"))
        return Trainer(model, settings, train_dataset=rows(), eval_dataset=rows())

    def test_trains_the_adapters_saves_them_and_resumes(self, kind, tmp_path):
        trainer = self.trainer(kind, tmp_path)
        model = trainer.model
        before = {name: p.clone() for name, p in model.named_parameters()}
        start = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < 0.9 * start
        assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == \
            {f"{n}.{part}" for n in lora_modules(model) for part in "AB"}

        resumed = self.trainer(kind, tmp_path)         # dropout and order come back too
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
        assert_equal(list(lora_state_dict(resumed.model).values()),
                     list(lora_state_dict(model).values()))

        save_adapter(model, tmp_path / "adapter")
        served = load_adapter(base_of(kind, torch.float32), tmp_path / "adapter").eval()
        expected = Logits(model.eval())(IDS)
        assert torch.equal(Logits(served)(IDS), expected)
        merge(served).save_pretrained(tmp_path / "merged")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(Logits(plain)(IDS), expected)


class TestAccelerate:
    def run(self, steps, per_batch, accumulate=1, start=None, save=None):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        model = adapted("llama")
        optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
        loader = torch.utils.data.DataLoader(IDS, batch_size=per_batch)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        if start:
            accelerator.load_state(start)
        for _ in range(steps):
            for ids in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(loss_of(Logits(model)(ids), ids))
                    optimizer.step()
                    optimizer.zero_grad()
        if save:
            accelerator.save_state(save)
        return lora_state_dict(accelerator.unwrap_model(model)).values()

    def test_accumulated_gradients_are_the_whole_batchs(self):
        assert_equal(list(self.run(3, per_batch=1, accumulate=4)),
                     list(self.run(3, per_batch=4)), 1e-8)

    def test_saved_state_resumes_exactly(self, tmp_path):
        self.run(2, per_batch=2, save=tmp_path)
        assert_equal(list(self.run(2, per_batch=2, start=tmp_path)), list(self.run(4, per_batch=2)))


def test_two_processes_do_what_one_does(tmp_path):
    """DDP, FSDP2 and accelerate: gradients, their norm, and the weights after three steps."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
               "--master_addr=127.0.0.1", f"--master_port={port}", two_processes.__file__, tmp_path]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]

    model = two_processes.adapted()
    first = two_processes.train(model, two_processes.tokens(), lora_parameters(model))
    assert first["norm"] > 2 * two_processes.CLIP                 # so that clipping is tested
    for way in ("ddp", "fsdp", "accelerate"):
        found = load_file(tmp_path / way / "gradients.safetensors")
        assert_equal([found[name] for name in first], list(first.values()), 1e-10)
        other = load_adapter(two_processes.base(), tmp_path / way)
        assert_equal(list(lora_state_dict(other).values()), list(lora_state_dict(model).values()),
                     1e-10)
