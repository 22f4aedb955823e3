"""NF4 against the published levels, bitsandbytes, a float32 layer, and what autograd keeps."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_lib.torch import (cross_entropy, fine_tune, inject, load_adapter, load_pretrained,
                            lora_modules, lora_parameters, mean_loss, merge, remove, save_adapter,
                            unmerge)
from lora_lib.torch.linear import is_linear, is_quantized, shape_of
from lora_lib.torch.nf4 import (EIGHT_BIT, NF4, PAIRS, NF4Linear, decode, encode, normal_levels,
                                pack, quantize)
from tests.torch.conftest import exact_bytes, randomize

# Dettmers et al. 2023, appendix E.
PUBLISHED = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
             -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
             0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
             0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(k=96, d=80, *, bias=True, dtype=torch.float32, seed=0):
    layer = nn.Linear(k, d, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(randn(d, k, seed=seed))
        if bias:
            layer.bias.copy_(randn(d, seed=seed + 1))
    return layer


def nearest(W, block, levels=NF4):
    """Each number's nearest level times its block's absmax, one block at a time."""
    out = torch.empty_like(W).flatten()
    flat = W.flatten()
    for start in range(0, len(flat), block):
        part = flat[start:start + block]
        scale = part.abs().max()
        distance = (part[:, None] - levels * scale).abs()
        out[start:start + block] = levels[distance.argmin(1)] * scale
    return out.view_as(W)


class TestLevels:
    def test_published(self):
        torch.testing.assert_close(NF4, torch.tensor(PUBLISHED), atol=2e-7, rtol=0)

    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_of_other_sizes(self, bits):
        levels = normal_levels(bits)
        assert len(levels) == 2**bits and 0 in levels and (levels.diff() > 0).all()
        assert levels[0] == -1 and levels[-1] == 1

    def test_equal_steps_in_probability(self):
        sigma = torch.special.ndtri(torch.tensor(1 - (1 / 30 + 1 / 32) / 2, dtype=torch.float64))
        steps = torch.special.ndtr(NF4.double() * sigma).diff()
        for side in (steps[:7], steps[7:]):
            torch.testing.assert_close(side, side.mean().expand_as(side), atol=1e-6, rtol=0)


class TestEncode:
    @pytest.mark.parametrize("shape, block", [((8, 16), 64), ((5, 7), 8), ((3, 4), 2), ((9,), 4)])
    def test_nearest_level_of_each_block(self, shape, block):
        W = randn(*shape)
        torch.testing.assert_close(decode(*encode(W, block), shape), nearest(W, block))

    def test_absmax_and_zero_survive(self):
        W = randn(4, 64)
        W[:, 5] = 0
        codes, absmax = encode(W)
        back = decode(codes, absmax, W.shape)
        peak = W.abs().argmax(1, keepdim=True)
        assert torch.equal(back.gather(1, peak), W.gather(1, peak)) and not back[:, 5].any()

    def test_bytes_hold_two_codes_and_decode_as_pairs(self):
        W = randn(4, 64)
        codes, absmax = encode(W)
        packed = pack(codes)
        assert packed.dtype == torch.uint8 and packed.shape == (4, 32)
        assert torch.equal(torch.stack([packed >> 4, packed & 15], -1).flatten(1), codes)
        assert torch.equal(decode(packed, absmax, W.shape, PAIRS), decode(codes, absmax, W.shape))

    def test_zeros(self):
        codes, absmax = encode(torch.zeros(2, 64))
        assert not decode(codes, absmax, (2, 64)).any()

    def test_levels_of_eight_bits(self):
        W = randn(4, 256)
        back = decode(*encode(W, 256, EIGHT_BIT), W.shape, EIGHT_BIT)
        half_step = W.abs().amax(1, keepdim=True) / 254
        assert ((back - W).abs() <= half_step * 1.0001).all()


class TestBitsAndBytes:
    """Rows are multiples of the block: elsewhere its CPU build (0.50.2) dequantizes wrongly."""

    @pytest.fixture
    def bnb(self):
        logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
        pytest.importorskip("bitsandbytes")
        import bitsandbytes.functional
        return bitsandbytes.functional

    def test_levels(self, bnb):
        torch.testing.assert_close(NF4, bnb.get_4bit_type("nf4", device="cpu"), atol=2e-7, rtol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_codes_and_values(self, bnb, dtype):
        W = randn(128, 192, dtype=dtype)
        packed, state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4")
        codes, absmax = encode(W)
        assert torch.equal(pack(codes).flatten(), packed.flatten())
        assert torch.equal(absmax, state.absmax)
        torch.testing.assert_close(decode(codes, absmax, W.shape).to(dtype),
                                   bnb.dequantize_4bit(packed, state))

    def test_absmaxes_with_its_eight_bit_floats(self, bnb):
        """Double quantization is `encode` once more; with its levels, its codes."""
        W = randn(512, 512)
        _, state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=True)
        absmax = encode(W)[1]
        codes, scale = encode(absmax - absmax.mean(), 256, bnb.create_dynamic_map())
        different = (codes.flatten() != state.absmax.flatten()).float().mean()
        assert different < 0.01                               # ties, by the mean's last bit
        torch.testing.assert_close(scale, state.state2.absmax, atol=1e-6, rtol=0)

    def test_equal_steps_are_no_worse_there(self, bnb):
        W = randn(512, 512)
        packed, state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4",
                                          compress_statistics=True)
        theirs = (bnb.dequantize_4bit(packed, state) - W).norm()
        layer = NF4Linear(linear(512, 512)).quantize_(W)
        assert (layer.dequantize() - W).norm() <= theirs


class TestLayer:
    @pytest.mark.parametrize("double", [False, True])
    @pytest.mark.parametrize("bias", [False, True])
    def test_is_the_linear_layer_with_the_rounded_weight(self, bias, double):
        plain = linear(bias=bias)
        layer = NF4Linear(plain, double=double)
        x = randn(2, 3, 96)
        torch.testing.assert_close(layer(x), F.linear(x, layer.dequantize(), plain.bias))
        assert layer.bias is plain.bias
        assert is_linear(layer) and is_quantized(layer) and shape_of(layer) == (80, 96)

    def test_without_double_the_nearest_levels(self):
        plain = linear()
        torch.testing.assert_close(NF4Linear(plain, 32, double=False).dequantize(),
                                   nearest(plain.weight.detach(), 32))

    def test_double_moves_an_absmax_by_half_a_step_at_most(self):
        plain = linear(128, 256)
        W, exact = NF4Linear(plain).dequantize(), NF4Linear(plain, double=False).dequantize()
        absmax = encode(plain.weight)[1]
        off = absmax - absmax.mean()
        half_step = off.view(-1, 256).abs().amax(1).repeat_interleave(256) / 254
        moved = (W - exact).abs().view(-1, 64).amax(1)
        assert 0 < moved.max() and (moved <= half_step * 1.001).all()

    def test_bits_per_parameter(self):
        plain = linear(512, 512, bias=False)
        bits = [NF4Linear(plain, double=d).bytes() * 8 / 512**2 for d in (False, True)]
        assert bits[0] == 4.5
        assert bits[1] == 4 + 8 / 64 + 32 / (64 * 256) + 32 / 512**2      # the last is the mean
        assert round(bits[1], 3) == 4.127
        stored = NF4Linear(plain).state_dict()
        assert sum(t.nbytes for t in stored.values()) == NF4Linear(plain).bytes()

    def test_conv1d(self):
        from transformers.pytorch_utils import Conv1D
        conv = Conv1D(80, 96)
        nn.init.normal_(conv.weight)
        layer = NF4Linear(conv)
        assert layer.dequantize().shape == (80, 96)
        error = (layer(randn(5, 96)) - conv(randn(5, 96))).norm() / conv(randn(5, 96)).norm()
        assert error < 0.15

    def test_weight_of_one_size_and_zeros(self):
        plain = linear(64, 2)
        nn.init.constant_(plain.weight, 0.25)
        assert torch.equal(NF4Linear(plain).dequantize(), plain.weight)
        nn.init.zeros_(plain.weight)
        assert not NF4Linear(plain).dequantize().any()

    def test_absmaxes_never_come_back_negative(self):
        plain = linear(64, 256)
        with torch.no_grad():
            plain.weight[1:] *= 1e-6                    # next to one large block
        W = NF4Linear(plain).dequantize()
        assert (W * plain.weight >= 0).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_computes_in_the_dtype_of_the_layer(self, dtype):
        layer = NF4Linear(linear(dtype=dtype))
        assert layer.dequantize().dtype == layer(randn(2, 96, dtype=dtype)).dtype == dtype

    def test_to_a_dtype_and_back_keeps_what_is_stored(self):
        layer = NF4Linear(linear())
        W, before = layer.dequantize(), layer.state_dict()
        layer.to(torch.bfloat16)
        assert torch.equal(layer.dequantize(), W.to(torch.bfloat16))
        assert layer.bias.dtype == torch.bfloat16
        layer.float()
        assert torch.equal(layer.dequantize(), W)
        for key in before.keys() - {"bias"}:
            assert exact_bytes(layer.state_dict()[key]) == exact_bytes(before[key])

    @pytest.mark.parametrize("double", [False, True])
    def test_state_dict_and_deepcopy(self, double):
        layer, other = (NF4Linear(linear(seed=s), double=double) for s in (0, 5))
        twin = copy.deepcopy(layer)
        other.load_state_dict(layer.state_dict())
        for same in (twin, other):
            assert torch.equal(same.dequantize(), layer.dequantize())
        layer.quantize_(randn(80, 96, seed=9))
        assert not torch.equal(twin.dequantize(), layer.dequantize())

    def test_state_dict_of_another_layout(self):
        state = NF4Linear(linear()).state_dict()
        with pytest.raises(RuntimeError, match="size mismatch for codes"):
            NF4Linear(linear(), block=32).load_state_dict(state)
        with pytest.raises(RuntimeError, match="absmax"):
            NF4Linear(linear(), double=False).load_state_dict(state)

    def test_quantize_in_place(self):
        layer, W = NF4Linear(linear()), randn(80, 96, seed=3)
        stored = layer.codes
        assert layer.quantize_(W) is layer and layer.codes is stored
        fresh = linear(seed=3)
        assert torch.equal(layer.dequantize(), NF4Linear(fresh).dequantize())

    def test_mode(self):
        assert not NF4Linear(linear().eval()).training and NF4Linear(linear()).training


class TestBackward:
    def test_gradients_are_those_of_the_rounded_layer(self):
        layer = NF4Linear(linear(dtype=torch.float64))
        plain = linear(dtype=torch.float64)
        plain.weight.data = layer.dequantize()
        grads = []
        for module in (layer, plain):
            x = randn(2, 3, 96, dtype=torch.float64).requires_grad_()
            module(x).square().sum().backward()
            grads.append((x.grad, module.bias.grad))
            module.bias.grad = None
        torch.testing.assert_close(*grads)

    def test_gradcheck_twice(self):
        layer = NF4Linear(linear(4, 3, dtype=torch.float64), block=4).requires_grad_(False)
        x = randn(2, 4, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(layer, x)
        assert torch.autograd.gradgradcheck(lambda x: layer(x).tanh(), x)

    def test_functional_gradient(self):
        layer = NF4Linear(linear(dtype=torch.float64))
        grad = torch.func.grad(lambda x: layer(x).sum())(randn(96, dtype=torch.float64))
        torch.testing.assert_close(grad, layer.dequantize().sum(0))

    def test_autograd_keeps_no_weight(self):
        """Of an nn.Linear it keeps the weight, of 4 bytes a number; here the codes alone."""
        saved = {}
        for module in (linear(bias=False).requires_grad_(False), NF4Linear(linear(bias=False))):
            kept = saved[type(module)] = []
            with torch.autograd.graph.saved_tensors_hooks(
                    lambda t: kept.append(t) or t, lambda t: t):
                x = randn(5, 96).requires_grad_()
                y = module(x)
            y.sum().backward()
        assert [t.nbytes for t in saved[nn.Linear]] == [80 * 96 * 4]
        assert not any(t.is_floating_point() and t.numel() for t in saved[NF4Linear])
        assert sum(t.nbytes for t in saved[NF4Linear]) == NF4Linear(linear(bias=False)).bytes()

    def test_a_weight_written_before_backward_is_noticed(self):
        layer = NF4Linear(linear())
        y = layer(randn(5, 96).requires_grad_())
        layer.quantize_(randn(80, 96, seed=4))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_autocast(self):
        layer, plain = NF4Linear(linear()), linear()
        plain.weight.data = layer.dequantize()
        results = []
        for module in (layer, plain):
            x = randn(5, 96).requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = module(x)
            y.float().sum().backward()
            assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
            results.append((y.float(), x.grad))
        torch.testing.assert_close(*results, atol=0.2, rtol=0.02)


class TestErrors:
    def test_not_a_linear_layer(self):
        for module in (nn.Embedding(3, 4), nn.Identity(), NF4Linear(linear())):
            with pytest.raises(TypeError, match=f"got {type(module).__name__}"):
                NF4Linear(module)

    @pytest.mark.parametrize("block", [0, -2, 7, 64.0, True, None, "64"])
    def test_block(self, block):
        with pytest.raises(ValueError, match=f"even positive integer, got {block!r}"):
            NF4Linear(linear(), block)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_not_finite(self, value, unchanged):
        layer, W = NF4Linear(linear()), randn(80, 96)
        W[3, 4] = value
        with unchanged(layer), pytest.raises(ValueError, match="NaN or infinity"):
            layer.quantize_(W)

    def test_shape(self, unchanged):
        layer = NF4Linear(linear())
        with unchanged(layer), pytest.raises(ValueError, match=r"\(80, 96\), got \(96, 80\)"):
            layer.quantize_(randn(96, 80))


class TestModel:
    def test_all_linear_leaves_the_head_and_the_outputs_nearly(self, llama):
        model = llama()
        tokens = torch.arange(20).view(2, 10)
        before = model(tokens).logits
        assert quantize(model, block=8) is model
        quantized = [n for n, m in model.named_modules() if isinstance(m, NF4Linear)]
        assert len(quantized) == 14 and isinstance(model.lm_head, nn.Linear)
        assert 0 < (model(tokens).logits - before).norm() < 0.3 * before.norm()

    def test_chosen_targets(self, llama):
        model = quantize(llama(), ["q_proj", "v_proj"], block=16, double=False)
        layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
        assert len(layers) == 4
        assert all(layer.block == 16 and not layer.double for layer in layers)

    @pytest.mark.parametrize("error, match, arguments", [
        (ValueError, "nothing in the model is called 'query'", {"target_modules": ["query"]}),
        (ValueError, "q_proj: block must be an even", {"block": 3}),
        (TypeError, "expected an nn.Linear", {"target_modules": ["embed_tokens"]}),
    ])
    def test_errors_change_nothing(self, llama, unchanged, error, match, arguments):
        model = llama()
        with unchanged(model), pytest.raises(error, match=match):
            quantize(model, **arguments)

    def test_one_weight_that_is_not_finite(self, llama, unchanged):
        model = llama()
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
        with unchanged(model), pytest.raises(ValueError, match="layers.1.mlp.up_proj: .*NaN"):
            quantize(model)

    def test_twice_adapted_or_tied(self, llama, unchanged):
        model = quantize(llama(tied=True), ["q_proj"])
        with unchanged(model), pytest.raises(TypeError, match="q_proj: .*got NF4Linear"):
            quantize(model)
        with unchanged(model), pytest.raises(ValueError, match="shares its weight"):
            quantize(model, ["lm_head"])
        inject(model, ["q_proj", "v_proj"], rank=2)
        for name in ("q_proj", "v_proj"):
            with unchanged(model), pytest.raises(ValueError, match="has an adapter"):
                quantize(model, [name])

    def test_multihead_attention(self, unchanged):
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
        with unchanged(model), pytest.raises(TypeError, match="MultiheadAttention"):
            quantize(model)


class TestAdapters:
    """lora_lib's own functions on a quantized base."""

    @pytest.fixture
    def base(self, llama):
        return lambda seed=0: quantize(llama(seed=seed), block=8)

    def test_injected_changes_nothing_and_trains_only_adapters(self, base):
        model, tokens = base(), torch.arange(20).view(2, 10)
        before = model(tokens).logits
        inject(model, "all-linear", rank=2, seed=0)
        assert len(lora_modules(model)) == 14
        assert torch.equal(model(tokens).logits, before)
        assert {id(p) for p in model.parameters() if p.requires_grad} == \
            {id(p) for p in lora_parameters(model)}
        assert all(p.dtype == torch.float32 for p in lora_parameters(model))

    def test_training_leaves_the_codes(self, base):
        model = inject(base(), "all-linear", rank=2, seed=0)
        codes = {n: exact_bytes(b) for n, b in model.named_buffers()}
        tokens = torch.randint(0, 50, (8, 10), generator=torch.Generator().manual_seed(0))
        losses = fine_tune(model, (tokens[:, :-1], tokens[:, 1:]), steps=20, batch_size=8, lr=1e-2)
        assert losses[-1] < losses[0] - 0.3
        assert {n: exact_bytes(b) for n, b in model.named_buffers()} == codes

    def test_resume_is_exact(self, base, tmp_path):
        tokens = torch.randint(0, 50, (8, 10), generator=torch.Generator().manual_seed(0))
        data = tokens[:, :-1], tokens[:, 1:]
        whole, parts = (inject(base(), "all-linear", rank=2, seed=0) for _ in range(2))
        losses = fine_tune(whole, data, steps=4, batch_size=4)
        for steps in (2, 4):
            resumed = fine_tune(parts, data, steps=steps, batch_size=4,
                                checkpoint=tmp_path / "run.safetensors")
        assert resumed == losses
        for one, other in zip(lora_parameters(whole), lora_parameters(parts)):
            assert torch.equal(one, other)

    def test_gradients_equal_those_beside_the_dequantized_base(self, base, llama):
        quantized, plain = base(), llama()
        with torch.no_grad():
            for name, module in quantized.named_modules():
                if isinstance(module, NF4Linear):
                    plain.get_submodule(name).weight.copy_(module.dequantize())
        tokens, grads = torch.arange(20).view(2, 10), []
        for model in (quantized, plain):
            randomize(inject(model, "all-linear", rank=2, seed=0))
            cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).backward()
            grads.append([p.grad for p in lora_parameters(model)])
        torch.testing.assert_close(*grads)

    def test_merge_rounds_the_sum(self, base):
        model = randomize(inject(base(), ["q_proj"], rank=2, seed=0))
        sums = {name: layer.linear.weight + layer.delta_weight()
                for name, layer in lora_modules(model).items()}
        merge(model)
        for name, total in sums.items():
            layer = model.get_submodule(name)
            assert type(layer) is NF4Linear
            rounded = NF4Linear(layer_with(total), block=8)
            torch.testing.assert_close(layer.dequantize(), rounded.dequantize())

    def test_unmerge_comes_back_as_far_as_four_bits_can(self, base):
        model = randomize(inject(base(), ["q_proj"], rank=2, seed=0))
        before = {n: layer.linear.weight for n, layer in lora_modules(model).items()}
        unmerge(merge(model, keep_adapters=True))
        for name, layer in lora_modules(model).items():
            size = torch.maximum(before[name].norm(), layer.delta_weight().norm())
            assert 0 < (layer.linear.weight - before[name]).norm() < 0.3 * size

    def test_removed(self, base, unchanged):
        model, tokens = base(), torch.arange(20).view(2, 10)
        before = model(tokens).logits
        remove(randomize(inject(model, "all-linear", rank=2)))
        assert torch.equal(model(tokens).logits, before)

    def test_merge_that_cannot_be(self, base, unchanged):
        model = randomize(inject(base(), "all-linear", rank=2))
        next(iter(lora_modules(model).values())).B.data[0, 0] = torch.inf
        with unchanged(model), pytest.raises(ValueError, match="NaN or infinity"):
            merge(model)

    def test_saved_and_loaded(self, base, llama, tmp_path):
        model, tokens = base(), torch.arange(20).view(2, 10)
        randomize(inject(model, "all-linear", rank=2, seed=0))
        save_adapter(model, tmp_path)
        loaded = load_adapter(base(), tmp_path)
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
        for other in (base(seed=1), llama()):              # another base, and the same in float32
            with pytest.raises(ValueError, match="not the one that the adapter was trained on"):
                load_adapter(other, tmp_path)
        load_adapter(llama(), tmp_path, check_base=False)

    def test_peft_reads_the_adapter(self, base, llama, tmp_path):
        from peft import PeftModel
        model, tokens = base(), torch.arange(20).view(2, 10)
        randomize(inject(model, "all-linear", rank=2, seed=0))
        save_adapter(model, tmp_path)
        plain = llama()
        with torch.no_grad():
            for name, layer in lora_modules(model).items():
                plain.get_submodule(name).weight.copy_(layer.linear.weight)
        theirs = PeftModel.from_pretrained(plain, tmp_path).eval()
        torch.testing.assert_close(theirs(tokens).logits, model(tokens).logits, rtol=1e-4,
                                   atol=1e-4)

    def test_gpt2(self):
        from transformers import GPT2Config, GPT2LMHeadModel
        config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)
        model = quantize(GPT2LMHeadModel(config).eval(), block=16)
        layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
        assert len(layers) == 4                            # attention's two, the MLP's two
        tokens = torch.arange(20).view(2, 10)
        before = model(tokens).logits
        inject(model, "all-linear", rank=2)
        assert torch.equal(model(tokens).logits, before)

    def test_the_language_model_hardly_notices(self):
        from lora_lib.text import tales
        model = load_pretrained("tales")
        held_out = tales(20, seed=99)
        before = mean_loss(model, model.tokenizer, held_out)
        quantize(model)
        after = mean_loss(model, model.tokenizer, held_out)
        assert abs(after - before) < 0.02


@pytest.mark.gpu
def test_on_a_gpu():
    layer = NF4Linear(linear())
    W, y = layer.dequantize(), layer(randn(5, 96))
    layer.to("cuda")
    torch.testing.assert_close(layer.dequantize().cpu(), W, rtol=0, atol=0)
    x = randn(5, 96).cuda().requires_grad_()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        low = layer(x)
    low.float().sum().backward()
    torch.testing.assert_close(low.float().cpu(), y, atol=0.3, rtol=0.03)
    fresh = NF4Linear(linear().cuda())
    assert torch.equal(fresh.codes, layer.codes)


def layer_with(W):
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False)
    layer.weight.data = W
    return layer
