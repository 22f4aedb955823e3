"""Every mistake is planted and found, alone; clean models of many kinds give no finding."""

import copy

import pytest
import torch
from torch import nn

from lora_lib.torch import (check, fine_tune, inject, load_adapter, load_pretrained, lora_modules,
                            lora_parameters, merge, save_adapter, unmerge)
from lora_lib.torch.check import MODEL

PATH = "model.layers.1.self_attn.v_proj"
DATA = (torch.arange(64).reshape(4, 16) % 50, torch.arange(1, 65).reshape(4, 16) % 50)


@pytest.fixture
def base(llama):
    return llama()


def adapted(base, trained=True, **options):
    model = inject(copy.deepcopy(base), ["q_proj", "v_proj"], rank=4, alpha=8, seed=0, **options)
    if trained:
        fine_tune(model, DATA, steps=3, batch_size=4, lr=1e-2, progress=False)
    return model


def layer_of(model):
    return lora_modules(model)[PATH]


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])


def codes(findings):
    return [f.code for f in findings]


# --------------------------------------------------------------------------------- planted bugs
def forget_to_freeze(base):
    return adapted(base).requires_grad_(True), {}


def transpose(base):
    model = adapted(base)
    layer = layer_of(model)
    layer.A, layer.B = nn.Parameter(layer.A.T.clone()), nn.Parameter(layer.B.T.clone())
    return model, {}


def swap(base):
    model = adapted(base)
    layer = layer_of(model)
    layer.A, layer.B = layer.B, layer.A
    return model, {}


def put_nan(base):
    model = adapted(base)
    layer_of(model).A.data[0, 0] = torch.nan
    return model, {}


def zero_both(base):
    model = adapted(base, trained=False)
    layer_of(model).A.data.zero_()
    return model, {}


def randomize_both(base):
    model = adapted(base, trained=False)
    layer_of(model).B.data.normal_()
    return model, {"stage": "start"}


def freeze_all(base):
    return adapted(base).requires_grad_(False), {}


def store_in_bf16(base):
    return adapted(base, trained=False, dtype=torch.bfloat16), {}


def train_merged(base):
    return merge(adapted(base), keep_adapters=True), {"base": base}


def build_the_optimizer_first(base):
    model = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(model.parameters())
    inject(model, ["q_proj", "v_proj"], rank=4, seed=0)
    return model, {"optimizer": optimizer}


def change_the_base(base):
    model = adapted(base)
    model.model.layers[0].mlp.up_proj.weight.data.add_(1e-5)
    return model, {"base": base}


def change_the_adapted_weight(base):
    model = adapted(base)
    layer_of(model).linear.weight.data.add_(1e-5)
    return model, {"base": base}


def merged_by_hand(times, scaled):
    def plant(base):
        model = merge(adapted(base), keep_adapters=True)
        layer = layer_of(model)
        delta = layer.delta_weight() if scaled else layer.B @ layer.A
        layer.linear.weight.data.copy_(base.get_submodule(PATH).weight + times * delta)
        return model, {"base": base, "stage": "serve", "allow": {"unmerged"}}
    return plant


def merge_by_hand_and_keep_the_adapter(base):
    model = adapted(base)
    layer = layer_of(model)
    layer.linear.weight.data += layer.delta_weight()
    return model, {"base": base}


def leave_dropout_on(base):
    model = merge(adapted(base, dropout=0.1), keep_adapters=True)
    return model.train(), {"stage": "serve"}


def never_train(base):
    return merge(adapted(base, trained=False), keep_adapters=True), {"stage": "serve"}


def leave_unmerged(base):
    return adapted(base), {"stage": "serve"}


def nothing_injected(base):
    return copy.deepcopy(base).requires_grad_(False), {}


PLANTED = {
    forget_to_freeze: ["base trainable"], transpose: ["shape"], swap: ["shape"],
    put_nan: ["not finite"], zero_both: ["both zero"], randomize_both: ["random start"],
    freeze_all: ["adapter frozen"], store_in_bf16: ["16-bit adapter"], train_merged: ["merged"],
    build_the_optimizer_first: ["optimizer", "optimizer extra"],
    change_the_base: ["base changed"], change_the_adapted_weight: ["base changed"],
    merged_by_hand(1, False): ["scaling forgotten"], merged_by_hand(2, True): ["merged twice"],
    merged_by_hand(0, True): ["not in weight"], merged_by_hand(1.5, True): ["merged wrong"],
    merge_by_hand_and_keep_the_adapter: ["counted twice"], leave_dropout_on: ["training mode"],
    never_train: ["untrained"], leave_unmerged: ["unmerged"], nothing_injected: ["no adapter"],
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__qualname__)
def test_a_planted_mistake_is_found_and_nothing_else(base, plant, unchanged):
    model, options = plant(base)
    with unchanged(model):
        found = check(model, **options)
    assert codes(found) == PLANTED[plant]
    assert all(str(f).startswith(f"[{f.code}] ") and f.where for f in found)


def test_every_code_is_planted():
    elsewhere = {"no gradient", "new head"}                  # tests/torch/test_field.py
    assert {code for found in PLANTED.values() for code in found} == set(MODEL) - elsewhere


def test_the_path_is_named(base):
    model, options = change_the_adapted_weight(base)
    assert check(model, **options)[0].where == (PATH,)
    model, _ = forget_to_freeze(base)
    found = check(model)[0]
    assert "model.embed_tokens.weight" in found.where and f"{len(found.where) - 2} more" in str(found)


# ------------------------------------------------------------------------------ no false alarm
@pytest.mark.parametrize("options", [
    {}, {"use_rslora": True}, {"dropout": 0.2}, {"init_std": 0.01}])
def test_a_clean_model_is_clean_at_every_stage(base, options):
    model = adapted(base, trained=False, **options)
    assert check(model, adamw(model), base=base, stage="start") == []
    fine_tune(model, DATA, steps=3, batch_size=4, lr=1e-2, progress=False)
    assert check(model, adamw(model), base=base) == []
    assert check(model.eval(), base=base, stage="serve", allow={"unmerged"}) == []
    assert check(merge(model, keep_adapters=True), base=base, stage="serve") == []
    assert check(unmerge(model), base=base) == []
    assert check(merge(model), stage="serve") == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_base_with_float32_adapters_is_clean(base, dtype):
    base = base.to(dtype)
    model = inject(copy.deepcopy(base), "all-linear", rank=2, seed=0)
    for p in lora_parameters(model):
        p.data.normal_(std=0.05)
    assert check(model, adamw(model), base=base) == []
    merged = merge(copy.deepcopy(model), keep_adapters=True)
    assert check(merged, base=base, stage="serve") == []
    layer = lora_modules(merged)["model.layers.0.mlp.up_proj"]
    layer.linear.weight.data = layer.merge_weights(layer.linear.weight)
    assert codes(check(merged, base=base, stage="serve")) == ["merged twice"]


def test_the_course_model_a_loaded_adapter_and_a_state_dict_are_clean(tmp_path):
    base = load_pretrained()
    model = inject(load_pretrained(), "all-linear", rank=2, seed=0)
    fine_tune(model, DATA, steps=2, batch_size=4, progress=False)
    path = save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(load_pretrained(), path)
    assert check(loaded, base=base.state_dict(), stage="serve", allow=["unmerged"]) == []
    assert check(loaded, base=load_adapter(load_pretrained(), path)) == []   # an adapted one's own


def test_what_is_trained_on_purpose_can_be_named(base):
    model = adapted(base, trained=False)
    model.lm_head.requires_grad_(True)
    fine_tune(model, DATA, steps=2, batch_size=4, progress=False)
    assert codes(check(model, base=base)) == ["base trainable", "base changed"]
    assert check(model, adamw(model), base=base, also_trained=["lm_head.*"]) == []


def test_an_optimizer_of_another_model_is_found(base):
    model, other = adapted(base), adapted(base)
    assert codes(check(model, adamw(other))) == ["optimizer", "optimizer extra"]


# ---------------------------------------------------------------------------------- bad arguments
def test_arguments_that_cannot_be_are_refused(base, llama):
    model = adapted(base)
    with pytest.raises(ValueError, match=r"stage must be one of .*, got 'test'"):
        check(model, stage="test")
    with pytest.raises(ValueError, match=r"allow must hold codes of .*, got \['noise'\]"):
        check(model, allow={"noise"})
    with pytest.raises(ValueError, match="base must have .* got none of that name"):
        check(model, base=nn.Linear(3, 3))


def test_a_module_to_save_is_no_base(base):
    model = inject(copy.deepcopy(base), ["q_proj"], rank=2, modules_to_save=["lm_head"])
    assert check(model, adamw(model), base=base, stage="start") == []
    with torch.no_grad():
        model.lm_head.weight += 1
    assert check(model, adamw(model), base=base, stage="start") == []
