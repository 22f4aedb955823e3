"""LoRA on the experts' parameters of mixture-of-experts models: against PEFT, and a closed form."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from lora_lib.torch import (Adapters, check, fine_tune, inject, load_adapter, lora_parameters,
                            lora_state_dict, merge, remove, save_adapter, save_gguf, unmerge)
from lora_lib.torch.experts import LoRAExperts, lora_experts
from lora_lib.torch.peft_format import CONFIG, WEIGHTS
from tests.torch.conftest import randomize

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SIZES = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, head_dim=8, max_position_embeddings=32, num_experts_per_tok=2)
FAMILIES = {
    "Mixtral": ("Mixtral", dict(intermediate_size=8, num_local_experts=4)),
    "Qwen3-MoE": ("Qwen3Moe", dict(intermediate_size=24, moe_intermediate_size=8, num_experts=4)),
    "gpt-oss": ("GptOss", dict(intermediate_size=8, num_local_experts=4)),
}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = torch.arange(24).view(2, 12)
each_family = pytest.mark.parametrize("family", FAMILIES)
# PEFT says so of patterns that it does use, for it looks for them among modules alone.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not",
                                        "ignore:.*gradient_checkpointing")


def moe(family="Mixtral"):
    name, sizes = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():                        # some leave their experts' memory as it was found
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.2)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def close(one, other):
    return torch.allclose(one, other, atol=1e-5, rtol=1e-4)


def trained(model, steps=3):
    """The losses of a few steps of plain gradient descent."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.SGD(parameters, lr=0.05), []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def with_peft(model, **options):
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "init_lora_weights": False,
                                "target_modules": [], "target_parameters": BOTH} | options)
    return peft.get_peft_model(model, config)


OPTIONS = {
    "both": {}, "one": {"target_parameters": BOTH[:1]}, "other": {"target_parameters": BOTH[1:]},
    "reversed": {"target_parameters": BOTH[::-1]}, "rslora": {"use_rslora": True},
    "layers too": {"target_modules": ["q_proj", "o_proj"]},
    "patterns": {"rank_pattern": {"experts.down_proj": 2},
                 "alpha_pattern": {r"layers\.1\.mlp\.experts\.gate_up_proj": 9}},
    "large rank": {"r": 40}, "router": {"target_parameters": ["mlp.gate.weight", *BOTH]},
}
CASES = [*((f, o) for f in FAMILIES for o in ("both", "layers too", "one")),
         *(("Mixtral", o) for o in OPTIONS if o not in ("both", "layers too", "one"))]


@pytest.mark.parametrize("family, option", CASES)
def test_what_peft_saves_loads_here_and_trains_alike(family, option, tmp_path):
    theirs = with_peft(moe(family), **OPTIONS[option])
    theirs.save_pretrained(tmp_path)
    base = logits(moe(family))
    ours = load_adapter(moe(family), tmp_path)
    assert not close(logits(theirs), base)                       # the adapter does something
    assert close(logits(ours), logits(theirs))
    for p in lora_parameters(ours):
        assert p.requires_grad
    assert trained(ours) == pytest.approx(trained(theirs), rel=1e-4)
    assert close(logits(ours), logits(theirs))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("modules, parameters", [
    ([], BOTH), (["q_proj", "v_proj"], BOTH), ([], BOTH[1:]),
    (["q_proj"], ["model.layers.1.mlp.experts.gate_up_proj"])])
def test_what_is_saved_here_loads_in_peft_and_here(family, modules, parameters, tmp_path):
    ours = inject(moe(family), modules, rank=3, alpha=5, target_parameters=parameters)
    assert torch.equal(logits(ours), logits(moe(family)))        # B is zero
    randomize(ours)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(moe(family), tmp_path, is_trainable=True)
    assert not close(logits(ours), logits(moe(family)))
    assert close(logits(ours), logits(theirs))
    assert torch.equal(logits(ours), logits(load_adapter(moe(family), tmp_path)))
    assert trained(ours) == pytest.approx(trained(theirs), rel=1e-4)
    assert close(logits(ours), logits(theirs))
    again = load_adapter(moe(family), tmp_path)                  # whose values are replaced
    randomize(again, seed=1)
    save_adapter(load_adapter(again, tmp_path), tmp_path / "again")
    saved = load_file(tmp_path / WEIGHTS)
    for key, t in load_file(tmp_path / "again" / WEIGHTS).items():
        assert torch.equal(t, saved.pop(key))
    assert not saved


def test_layers_and_parameters_of_other_ranks_share_a_file(tmp_path):
    ours = inject(moe(), ["q_proj"], rank=2, alpha=4)
    inject(ours, [], rank=5, alpha=10, target_parameters=BOTH[:1])
    inject(ours, [], rank=3, alpha=2, target_parameters=BOTH[1:])      # nested, though put later
    with pytest.warns(UserWarning, match="vLLM takes one factor"):
        save_adapter(randomize(ours), tmp_path)
    assert close(logits(ours), logits(peft.PeftModel.from_pretrained(moe(), tmp_path)))
    assert torch.equal(logits(ours), logits(load_adapter(moe(), tmp_path)))


class Experts(nn.Module):
    def __init__(self, is_transposed, experts=3):
        super().__init__()
        self.is_transposed, self.reads = is_transposed, 0
        self.W = nn.Parameter(torch.randn(experts, *((4, 5) if is_transposed else (5, 4))))
        self.bias = nn.Parameter(torch.randn(experts, 5))

    def forward(self, x):                        # (experts, n, 4): one batch for each expert
        W = self.W if self.is_transposed else self.W.mT
        return x @ W + self.bias[:, None]


class Matrix(nn.Module):
    """A parameter of two dimensions, read by its module."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(5, 4))

    def forward(self, x):
        return F.linear(x, self.W)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_those_of_the_closed_form(transposed):
    torch.manual_seed(0)
    model = nn.Sequential(Experts(transposed)).double()
    W, bias = model[0].W.detach().clone(), model[0].bias.detach()
    randomize(inject(model, [], 2, 6, target_parameters=["0.W"]))
    part, x, weight = lora_experts(model)["0.W"], torch.randn(3, 7, 4).double(), \
        torch.randn(3, 7, 5).double()
    y = model(x)
    (y * weight).sum().backward()
    for e in range(3):
        A, B, We = part.A[e].detach(), part.B[e].detach(), W[e].T if transposed else W[e]
        G = weight[e].T @ x[e]                   # the gradient of the expert's whole weight
        assert torch.allclose(y[e], x[e] @ (We + 3 * B @ A).T + bias[e])
        assert torch.allclose(part.B.grad[e], 3 * G @ A.T)
        assert torch.allclose(part.A.grad[e], 3 * B.T @ G)
    assert part.original.grad is None and not model[0].bias.requires_grad


def test_a_matrix_is_one_expert(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(Matrix(), nn.Linear(5, 3))
    model = randomize(inject(copy.deepcopy(base), ["1"], 2, 6, target_parameters=["0.W"]))
    part, x = lora_experts(model)["0.W"], torch.randn(7, 4)
    assert torch.allclose(model[0](x), x @ (base[0].W + 3 * part.B[0] @ part.A[0]).T, atol=1e-5)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert close(theirs(x), model(x))


def test_a_parameter_is_computed_once_for_all_experts(monkeypatch):
    model, calls = inject(moe(), [], 2, target_parameters=BOTH), []
    model.set_experts_implementation("eager")    # which reads the parameter once for each expert
    forward = LoRAExperts.forward
    monkeypatch.setattr(LoRAExperts, "forward", lambda s, W: calls.append(s) or forward(s, W))
    logits(model)
    assert len(calls) == 4                       # two parameters in two layers
    with pytest.raises(TypeError):
        model.model.layers[0].mlp.experts(None, None, None)
    assert not torch.nn.utils.parametrize._cache_enabled


@each_family
def test_merge_unmerge_remove(family):
    base = moe(family)
    model = randomize(inject(copy.deepcopy(base), ["q_proj"], 3, target_parameters=BOTH))
    before, order = logits(model), list(base.state_dict())
    merge(model, keep_adapters=True)
    assert close(logits(model), before) and not close(before, logits(base))
    assert all(part.merged for part in lora_experts(model).values())
    unmerge(model)
    assert close(logits(model), before)
    merged = merge(copy.deepcopy(model))
    assert close(logits(merged), before) and list(merged.state_dict()) == order
    remove(model)
    assert list(model.state_dict()) == order and type(model) is type(base)
    for name, p in base.named_parameters():
        assert torch.allclose(model.get_parameter(name), p, atol=1e-5)
    experts = model.model.layers[0].mlp.experts
    assert type(experts) is type(base.model.layers[0].mlp.experts)
    assert not experts._forward_hooks and not experts._forward_pre_hooks
    assert torch.allclose(logits(model), logits(base), atol=1e-4)


def test_after_a_remove_the_file_is_nested_in_peft_s_order(tmp_path):
    model = remove(inject(moe(), [], 3, target_parameters=BOTH[:1]))
    randomize(inject(model, [], 3, target_parameters=BOTH))
    save_adapter(model, tmp_path)
    assert close(logits(model), logits(peft.PeftModel.from_pretrained(moe(), tmp_path)))


def test_a_copy_has_adapters_of_its_own():
    model = randomize(inject(moe(), [], 3, target_parameters=BOTH))
    twin, before = copy.deepcopy(model), logits(model)
    randomize(twin, seed=1)
    merge(twin)
    assert torch.equal(logits(model), before) and not close(logits(twin), before)
    one = inject(moe(), [], 3, target_parameters=BOTH[:1])
    twin, before = copy.deepcopy(one), logits(one)
    randomize(inject(twin, [], 3, target_parameters=BOTH[1:]))
    assert torch.equal(logits(one), before) and not close(logits(twin), before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_checkpointing_are_the_same(reentrant):
    plain = randomize(inject(moe(), [], 3, target_parameters=BOTH)).train()
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    saving.enable_input_require_grads()
    for model in (plain, saving):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for p, q in zip(lora_parameters(plain), lora_parameters(saving)):
        assert p.grad.abs().max() > 0 and torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-7)


def test_a_wrong_order_of_experts_is_seen(tmp_path):
    """The planted fault: B by expert, then rank, as A is."""
    model = randomize(inject(moe(), [], 3, target_parameters=BOTH))
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for key, t in tensors.items():
        if ".lora_B." in key:
            tensors[key] = t.view(len(t), 3, 4).transpose(1, 2).reshape(t.shape).contiguous()
    save_file(tensors, tmp_path / WEIGHTS)
    for wrong in (peft.PeftModel.from_pretrained(moe(), tmp_path),
                  load_adapter(moe(), tmp_path)):
        assert not close(logits(wrong), logits(model))


def test_the_keys_are_those_of_peft():
    model = inject(moe("gpt-oss"), ["q_proj"], 3, target_parameters=BOTH)
    theirs = with_peft(moe("gpt-oss"), target_modules=["q_proj"])
    expected = {k: t.shape for k, t in peft.get_peft_model_state_dict(theirs).items()}
    assert {k: t.shape for k, t in lora_state_dict(model).items()} == expected


def test_check_and_fine_tune_know_them():
    base, model = moe(), inject(moe(), [], 3, target_parameters=BOTH)
    assert not check(model, base=base, stage="start")
    optimizer = torch.optim.AdamW(lora_parameters(model))
    assert not check(model, optimizer, stage="start")
    losses = fine_tune(model, (IDS[:, :-1], IDS[:, 1:]), steps=3, lr=0.01, batch_size=2,
                       loss=lambda out, labels: F.cross_entropy(out.logits.flatten(0, 1),
                                                                labels.flatten()))
    assert losses[-1] < losses[0] and not check(model, base=base)
    merge(model, keep_adapters=True)
    assert [f.code for f in check(model, base=base)] == ["merged"]
    part = lora_experts(model)["model.layers.0.mlp.experts.down_proj"]
    with torch.no_grad():
        part.original.add_(part.delta_weight())
    found = {f.code: f.where for f in check(model, base=base)}
    assert found["merged twice"] == ("model.layers.0.mlp.experts.down_proj",)
    part.A.data[0, 0, 0] = float("nan")
    assert "not finite" in {f.code for f in check(model)}


def test_a_nan_or_an_overflow_is_refused_before_anything_is_written(tmp_path, unchanged):
    model = inject(moe(), ["q_proj"], 3, target_parameters=BOTH)
    with torch.no_grad():
        randomize(model)
        lora_experts(model)["model.layers.1.mlp.experts.down_proj"].B[2, 0, 0] = float("nan")
    with unchanged(model), pytest.raises(ValueError, match="down_proj: W and scaling"):
        merge(model)
    with pytest.raises(ValueError, match="lora_B.weight holds NaN"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("options, error, words", [
    ({"target_parameters": "down_proj"}, TypeError, "must be a list of names"),
    ({"target_parameters": ["experts.down"]}, ValueError, "nearest are .*down_proj"),
    ({"target_parameters": BOTH, "dropout": 0.1}, ValueError, "has no dropout"),
    ({"target_parameters": ["q_proj.bias"]}, ValueError, "no parameter in the model is called"),
    ({"target_parameters": ["input_layernorm.weight"]}, ValueError, r"shape \(16,\)"),
    ({"target_parameters": BOTH, "rank": 9}, ValueError, "rank must be between 1 and"),
    ({"target_parameters": BOTH, "modules_to_save": ["mlp"]}, ValueError, "trained whole"),
    ({"target_modules": ["q_proj"], "target_parameters": ["q_proj.weight"]}, ValueError,
     "has an adapter of its own"),
    ({}, ValueError, "must name at least one"),
])
def test_what_cannot_be_is_refused_and_the_model_is_as_it_was(options, error, words, unchanged):
    model = moe()
    with unchanged(model), pytest.raises(error, match=words):
        inject(model, **{"target_modules": []} | options)


def test_what_has_no_code_for_them_says_so(tmp_path, unchanged):
    model = inject(moe(), ["q_proj"], 3, target_parameters=BOTH)
    with unchanged(model), pytest.raises(ValueError, match="has been adapted before"):
        inject(model, [], target_parameters=BOTH)
    with pytest.raises(ValueError, match="holds an adapter"):
        inject(model, ["v_proj"], modules_to_save=["experts"])
    with pytest.raises(ValueError, match="Adapters handles adapters of layers alone"):
        Adapters(model)
    with pytest.raises(ValueError, match="one_scaling"):
        save_adapter(model, tmp_path, one_scaling=True)
    bare = moe().requires_grad_(False)
    with unchanged(bare), pytest.raises(ValueError, match="Adapters handles"):
        Adapters(bare).add("one", ["q_proj"], target_parameters=BOTH)
    save_adapter(model, tmp_path / "both")
    with unchanged(bare), pytest.raises(ValueError, match="Adapters handles"):
        Adapters(bare).load("one", tmp_path / "both")
    with pytest.raises(ValueError, match="meta device"):
        inject(moe().to("meta"), [], target_parameters=BOTH)
    with pytest.raises(ValueError, match="one expert, transposed"):
        inject(nn.Sequential(Experts(True, experts=1)), [], 2, target_parameters=["0.W"])
    with pytest.raises(TypeError, match="float8"):
        inject(nn.Sequential(Experts(False)).to(torch.float8_e4m3fn), [], 2,
               target_parameters=["0.W"])


def test_a_gguf_file_of_them_is_refused(tmp_path):
    pytest.importorskip("gguf")
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1))
    inject(llama, ["q_proj"], 2, target_parameters=["down_proj.weight"])
    with pytest.raises(ValueError, match="save_gguf handles adapters of layers alone"):
        save_gguf(llama, tmp_path / "adapter.gguf")


@pytest.mark.parametrize("fault, words", [
    ("gone", "for which the file holds nothing"), ("more", "the model has no"),
    ("shape", "expected .* for 4 experts"), ("text", "must be a list of names"),
    ("unknown", "the model has no .*mlp.experts.base_layer"), ("dropout", "has no dropout"),
])
def test_a_file_that_does_not_fit_is_refused(fault, words, tmp_path, unchanged):
    with_peft(moe()).save_pretrained(tmp_path)
    tensors, config = load_file(tmp_path / WEIGHTS), json.loads((tmp_path / CONFIG).read_text())
    if fault == "gone":
        tensors = {k: t for k, t in tensors.items() if ".1.mlp.experts.base_layer" not in k}
    if fault == "shape":
        tensors = {k: t[:-1].clone() if "lora_A" in k else t for k, t in tensors.items()}
    if fault == "more":
        config["target_parameters"] = BOTH[1:]
    if fault == "text":
        config["target_parameters"] = "experts"
    if fault == "unknown":
        config["target_parameters"] = ["experts.w1"]
    if fault == "dropout":
        config["lora_dropout"] = 0.1
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    model = moe()
    with unchanged(model), pytest.raises(ValueError, match=words):
        load_adapter(model, tmp_path)


def test_a_name_in_a_file_that_finds_nothing_is_passed_over_as_in_peft(tmp_path):
    """PEFT writes gate_up_proj for all-linear in a model of this kind whose layers are all dense."""
    base = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(
        vocab_size=32, hidden_size=16, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, first_k_dense_replace=1)).eval()
    settings = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    with pytest.warns(RuntimeWarning, match="no parameter was matched"):
        theirs = peft.get_peft_model(copy.deepcopy(base), settings)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert "gate_up_proj" in config["target_parameters"]
    model = load_adapter(copy.deepcopy(base), tmp_path)
    assert logits(base).sub(logits(model)).abs().max() > 0.01
    torch.testing.assert_close(logits(model), logits(theirs))


def test_another_base_is_refused(tmp_path):
    model = randomize(inject(moe(), [], 3, target_parameters=BOTH))
    merge(model, keep_adapters=True)             # what was the base's is noted all the same
    save_adapter(model, tmp_path)
    other = moe()
    with torch.no_grad():
        other.model.layers[1].mlp.experts.down_proj.add_(1)
    with pytest.raises(ValueError, match="not the one that the adapter was trained on"):
        load_adapter(other, tmp_path)
    load_adapter(moe(), tmp_path)


def test_in_16_bits_the_adapters_are_float32_and_the_experts_stay_as_they_are(tmp_path):
    model = moe().to(torch.bfloat16)
    inject(model, [], 3, target_parameters=BOTH)
    part = lora_experts(model)["model.layers.0.mlp.experts.down_proj"]
    assert part.A.dtype == torch.float32
    assert model.model.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert trained(model)[-1] < trained(model, 1)[0] + 1
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(moe().to(torch.bfloat16), tmp_path)
    assert torch.equal(logits(theirs), logits(model))


def test_a_wrong_nesting_is_seen_by_peft(tmp_path):
    """The planted fault: the first parameter outermost."""
    model = randomize(inject(moe(), [], 3, target_parameters=BOTH))
    save_adapter(model, tmp_path)
    swapped = {}
    for key, t in load_file(tmp_path / WEIGHTS).items():
        key = key.replace(".base_layer", "") if ".base_layer" in key else \
            key.replace("experts", "experts.base_layer")
        swapped[key] = t
    save_file(swapped, tmp_path / WEIGHTS)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(moe(), tmp_path)
    with pytest.raises(ValueError, match="expected .* for 4 experts"):
        load_adapter(moe(), tmp_path)


# --- layers whose names PEFT takes for those of experts -------------------------------------------

def dense(family="Glm4Moe"):
    """Two layers, the first without experts; shared experts in the second."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **SIZES, intermediate_size=24, moe_intermediate_size=8, n_routed_experts=4, n_group=1,
        topk_group=1, first_k_dense_replace=1, n_shared_experts=1)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.2)
    return model


@pytest.mark.filterwarnings("ignore:Found missing adapter keys", "ignore:.*target_parameters")
def test_adapters_that_peft_would_lose_are_named(tmp_path, recwarn):
    """What the warning says is what PEFT does; without such layers it says nothing."""
    names = ["gate_proj", "up_proj", "down_proj"]
    model = randomize(inject(dense(), [*names, "q_proj"], 2, seed=0))
    with pytest.warns(UserWarning, match="PEFT will lose the adapters of model.layers.0.mlp.down_p"):
        save_adapter(model, tmp_path / "lost")
    theirs = peft.PeftModel.from_pretrained(dense(), tmp_path / "lost").eval()
    held = {name for name, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert held and not any(name.endswith(tuple(names)) for name in held)
    assert not close(logits(theirs), logits(model))
    assert close(logits(load_adapter(dense(), tmp_path / "lost")), logits(model))
    recwarn.clear()
    for other, base in (("layers", dense), ("parameters", lambda: moe("Qwen3-MoE"))):
        model = randomize(inject(base(), ["q_proj"], 2, seed=0,
                                 target_parameters=BOTH if other == "parameters" else ()))
        save_adapter(model, tmp_path / other)
    assert not [w for w in recwarn.list if "PEFT will lose" in str(w.message)]
    assert close(logits(peft.PeftModel.from_pretrained(dense(), tmp_path / "layers").eval()),
                 logits(load_adapter(dense(), tmp_path / "layers")))
