"""Injection against PEFT's choice of modules; merging, removing; errors that leave no trace."""

import copy

import pytest
import torch
from torch import nn

from lora_lib.torch import (LoRALinear, inject, lora_modules, lora_parameters, lora_state_dict,
                            merge, remove, unmerge)
from lora_lib.torch.inject import inject_each
from lora_lib.torch.parts import saved_modules
from tests.torch.conftest import randomize, x

X = x(torch.float64)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(0.0)

    def forward(self, x):
        return x + self.drop(self.v_proj(torch.tanh(self.q_proj(self.norm(x)))))


class Toy(nn.Module):
    """Linear layers at three depths, and a narrow head."""

    def __init__(self, dtype=torch.float64, seed=0, width=6):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.proj = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, 3)
        self.to(dtype)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(self.proj(x))


QV = ["layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.1.v_proj"]


class TestTargets:
    @pytest.mark.parametrize("targets, names", [
        (["q_proj", "v_proj"], QV),
        (("v_proj", "q_proj"), QV),                              # the model's order, not the list's
        ({"q_proj"}, QV[::2]),
        ("q_proj", QV[::2]),
        ("head", ["head"]),
        (["proj.0"], ["proj.0"]),
        (["layers.1.q_proj"], QV[2:3]),
        (["1.q_proj", "head"], [QV[2], "head"]),
        (["q_proj", "layers.0.q_proj"], QV[::2]),                # said twice
        (r"layers\.\d\.[qv]_proj", QV),
        (r".*\.1\.(q|v)_proj|head", [*QV[2:], "head"]),
        ("all-linear", [*QV, "proj.0", "head"]),
    ])
    def test_by_suffix_list_or_regex(self, targets, names):
        model = Toy()
        before = model(X)
        assert inject(model, targets, rank=2) is model
        assert list(lora_modules(model)) == names
        assert torch.equal(model(X), before)                   # B is zero

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("targets", [
        ["q_proj"], ["q_proj", "v_proj"], ["self_attn.q_proj", "down_proj"],
        ["model.layers.0.self_attn.q_proj"], ["0.mlp.gate_proj"],
        r".*\.layers\.1\.(self_attn\.[qv]|mlp\.up)_proj", r"model.*_proj", "all-linear",
    ], ids=str)
    def test_the_same_modules_as_peft(self, targets, tied, llama):
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import Linear

        theirs = get_peft_model(llama(tied), LoraConfig(r=2, target_modules=targets))
        names = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules()
                 if isinstance(m, Linear)}
        ours = inject(llama(tied), targets, rank=2)
        assert set(lora_modules(ours)) == names and names
        assert "lm_head" not in names
        trained = {n for n, p in theirs.named_parameters() if p.requires_grad}
        assert {k.replace(".weight", ".default.weight") for k in lora_state_dict(ours)} == trained

    def test_an_untied_head_by_its_name(self, llama):
        assert list(lora_modules(inject(llama(), ["lm_head"], rank=2))) == ["lm_head"]


class TestParameters:
    def test_only_A_and_B_are_trained(self):
        model = inject(Toy(), ["q_proj", "head"], rank=2)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {f"{n}.{part}" for n in (QV[0], QV[2], "head") for part in "AB"}
        assert ({id(p) for p in lora_parameters(model)}
                == {id(p) for p in model.parameters() if p.requires_grad})
        assert sum(p.numel() for p in lora_parameters(model)) == 2 * (12 + 12 + 9)

    def test_a_step_changes_the_adapters_and_nothing_else(self):
        model = inject(Toy(), ["q_proj", "head"], rank=2, dropout=0.1, seed=0)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.1)
        for _ in range(2):                                       # the first step moves only B
            model(X).square().mean().backward()
            optimizer.step()
        for name, p in model.named_parameters():
            adapter = name.endswith((".A", ".B"))
            assert (p.grad is not None) == adapter
            assert torch.equal(p, before[name]) != adapter

    def test_a_second_injection_elsewhere_keeps_the_first(self):
        model = inject(inject(Toy(), "q_proj", rank=2), "head", rank=3)
        assert list(lora_modules(model)) == [QV[0], QV[2], "head"]
        assert len(lora_parameters(model)) == 6
        assert all(p.requires_grad for p in lora_parameters(model))

    def test_options_reach_every_layer(self):
        model = inject(Toy(torch.bfloat16), "q_proj", 2, 4.0, 0.25, seed=0, use_rslora=True,
                       dtype=torch.float64, init_std=2.0)
        for layer in lora_modules(model).values():
            assert layer.A.dtype == torch.float64 and layer.dropout.p == 0.25
            assert layer.scaling == pytest.approx(4 / 2**0.5) and layer.A.std() > 1

    def test_the_seed_decides_and_layers_differ(self):
        def draws(seed):
            return lora_parameters(inject(Toy(), "q_proj", 2, seed=seed))[::2]

        first, again, other = draws(3), draws(3), draws(4)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])
        assert torch.equal(draws(torch.Generator().manual_seed(3))[1], first[1])

    def test_the_names_in_the_state_dict_are_pefts(self):
        model = randomize(inject(Toy(), ["head"], rank=2))
        state = lora_state_dict(model)
        assert list(state) == ["base_model.model.head.lora_A.weight",
                               "base_model.model.head.lora_B.weight"]
        assert torch.equal(state["base_model.model.head.lora_A.weight"], model.head.A)
        assert not any(t.requires_grad for t in state.values())

    def test_copies_and_state_dicts_of_an_injected_model(self):
        model = randomize(inject(Toy(), "q_proj", rank=2))
        clone, other = copy.deepcopy(model), inject(Toy(seed=9), "q_proj", rank=2)
        other.load_state_dict(model.state_dict())
        out = model(X)
        assert torch.equal(clone(X), out) and torch.equal(other(X), out)
        randomize(clone, seed=5)
        assert torch.equal(model(X), out) and not torch.equal(clone(X), out)
        assert [p.requires_grad for p in clone.parameters()] == [p.requires_grad
                                                                 for p in model.parameters()]

    def test_the_mode_is_kept(self):
        for mode in (True, False):
            model = inject(Toy().train(mode), "q_proj", rank=2, dropout=0.5)
            assert all(m.training is mode for m in model.modules())


class TestMerge:
    @pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
    def test_plain_layers_give_the_same(self, dtype, tolerance):
        free = Toy(dtype)
        linears = [m for m in free.modules() if isinstance(m, nn.Linear)]
        model = randomize(inject(free, "all-linear", rank=2))
        before = model(x(dtype))
        assert not torch.allclose(before, Toy(dtype)(x(dtype)))
        assert merge(model) is model
        assert [m for m in model.modules() if isinstance(m, nn.Linear)] == linears   # the originals
        assert all(type(m) is nn.Linear for m in linears) and not lora_modules(model)
        torch.testing.assert_close(model(x(dtype)), before, rtol=tolerance, atol=tolerance)

    def test_equal_to_pefts_merge_and_unload(self, llama):
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "down_proj"]
        ours = randomize(inject(llama(), targets, rank=3, alpha=5))
        theirs = get_peft_model(llama(), LoraConfig(r=3, lora_alpha=5, target_modules=targets))
        state = {key.replace(".weight", ".default.weight"): t
                 for key, t in lora_state_dict(ours).items()}
        assert not theirs.load_state_dict(state, strict=False).unexpected_keys
        merged, reference = merge(ours).state_dict(), theirs.merge_and_unload().state_dict()
        assert merged.keys() == reference.keys()
        for name, t in merged.items():
            torch.testing.assert_close(t, reference[name], rtol=1e-6, atol=1e-6)
            changed = not torch.equal(t, llama().state_dict()[name])
            assert changed == name.endswith(("q_proj.weight", "down_proj.weight"))

    def test_keep_adapters_and_unmerge(self):
        model = randomize(inject(Toy(), "all-linear", rank=2))
        before, adapters = model(X), lora_modules(model)
        merge(merge(model, keep_adapters=True), keep_adapters=True)          # twice is once
        assert lora_modules(model) == adapters and all(a.merged for a in adapters.values())
        torch.testing.assert_close(model(X), before, rtol=1e-12, atol=1e-12)
        assert unmerge(unmerge(model)) is model
        assert not any(a.merged for a in adapters.values())
        torch.testing.assert_close(model(X), before, rtol=1e-12, atol=1e-12)
        merge(model, keep_adapters=True)
        merge(model)                                             # the second only takes them out
        assert not lora_modules(model)
        torch.testing.assert_close(model(X), before, rtol=1e-12, atol=1e-12)

    def test_a_merged_one_among_others(self):
        model = randomize(inject(Toy(), "q_proj", rank=2))
        before = model(X)
        model.layers[1].q_proj.merge()
        torch.testing.assert_close(merge(model)(X), before, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("function", [merge, unmerge, remove])
    def test_all_or_nothing(self, function, unchanged):
        model = randomize(inject(Toy(), "q_proj", rank=2))
        if function is not merge:
            merge(model, keep_adapters=True)
        with torch.no_grad():
            model.layers[1].q_proj.B[0, 0] = float("nan")
        with unchanged(model), pytest.raises(ValueError, match=r"layers.1.q_proj: .*NaN"):
            function(model)

    def test_training_after_unmerge(self):
        model = unmerge(merge(randomize(inject(Toy(), "q_proj", rank=2)), keep_adapters=True))
        twin = randomize(inject(Toy(), "q_proj", rank=2))
        for m in (model, twin):
            optimizer = torch.optim.SGD(lora_parameters(m), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                m(X).square().mean().backward()
                optimizer.step()
        torch.testing.assert_close(model(X), twin(X), rtol=1e-10, atol=1e-12)


class TestRemove:
    @pytest.mark.parametrize("merged", [False, True])
    def test_the_originals_come_back(self, merged):
        model = Toy()
        modules, before = dict(model.named_modules()), model(X)
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        randomize(inject(model, ["q_proj", "proj.0"], rank=2))
        if merged:
            merge(model, keep_adapters=True)
        assert remove(model) is model
        after = dict(model.named_modules())
        assert after.keys() == modules.keys() and all(after[n] is modules[n] for n in modules)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p, weights[name], rtol=0, atol=1e-15 if merged else 0)
            assert not p.requires_grad
        torch.testing.assert_close(model(X), before, rtol=0, atol=1e-13 if merged else 0)
        assert lora_modules(inject(model, "q_proj", rank=2))     # and once more

    @pytest.mark.parametrize("function", [merge, unmerge, remove])
    def test_without_adapters(self, function, unchanged):
        model = Toy()
        with unchanged(model), pytest.raises(ValueError, match="no LoRALinear"):
            function(model)

    @pytest.mark.parametrize("function", [merge, unmerge, remove])
    def test_a_lone_layer_has_methods_of_its_own(self, function, unchanged):
        layer = LoRALinear(nn.Linear(6, 5), rank=2)
        with unchanged(layer), pytest.raises(ValueError, match="itself a LoRALinear"):
            function(layer)


def trained(model, steps=3):
    """The model after some steps on all that lora_parameters gives."""
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model


class TestModulesToSave:
    @pytest.mark.parametrize("names, whole", [
        (["head"], ["head"]), ("head", ["head"]), (["proj", "head"], ["proj", "head"]),
        (["norm"], ["layers.0.norm", "layers.1.norm"]), (["proj", "proj.0"], ["proj"]),
        (r"layers\.\d\.norm", ["layers.0.norm", "layers.1.norm"]), ([], []), (None, []),
    ])
    def test_named_as_targets_are(self, names, whole):
        model = inject(Toy(), "q_proj", rank=2, modules_to_save=names)
        assert list(saved_modules(model)) == whole
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {f"{n}.{part}" for n in QV[::2] for part in "AB"} | {
            f"{n}.{key}" for n in whole for key in model.get_submodule(n).state_dict()}
        assert ({id(p) for p in lora_parameters(model)}
                == {id(p) for p in model.parameters() if p.requires_grad})

    def test_a_target_inside_one_gets_no_adapter(self):
        model = inject(Toy(), "all-linear", rank=2, modules_to_save=["proj", "head"])
        assert list(lora_modules(model)) == QV

    def test_it_is_trained_and_in_the_state_dict(self):
        model, base = trained(inject(Toy(), "q_proj", rank=2, modules_to_save=["head"])), Toy()
        assert not torch.equal(model.head.weight, base.head.weight)
        assert torch.equal(model.proj[0].weight, base.proj[0].weight)
        state = lora_state_dict(model)
        assert torch.equal(state["base_model.model.head.bias"], model.head.bias)
        assert len(state) == 6 and not any("before_lora" in key for key in model.state_dict())

    def test_remove_gives_the_base_back(self):
        base = Toy().state_dict()
        model = inject(Toy(), "q_proj", rank=2, modules_to_save=["head"])
        model = remove(copy.deepcopy(trained(model)))
        assert model.state_dict().keys() == base.keys() and not saved_modules(model)
        assert all(torch.equal(t, base[key]) for key, t in model.state_dict().items())
        assert not any(p.requires_grad for p in model.parameters())

    def test_merge_keeps_what_it_learned(self):
        model = trained(inject(Toy(), "q_proj", rank=2, modules_to_save=["head"]))
        before, head = model(X), model.head.weight.clone()
        assert list(saved_modules(unmerge(merge(model, keep_adapters=True)))) == ["head"]
        merge(model)
        torch.testing.assert_close(model(X), before, rtol=1e-12, atol=1e-12)
        assert torch.equal(model.head.weight, head) and not saved_modules(model)
        assert not any(p.requires_grad for p in model.parameters())

    def test_a_second_injection_keeps_the_first_values(self):
        model = trained(inject(Toy(), "q_proj", rank=2, modules_to_save=["head"]))
        inject(model, "v_proj", rank=2, modules_to_save=["head", "norm"])
        assert list(saved_modules(model)) == ["layers.0.norm", "layers.1.norm", "head"]
        assert all(p.requires_grad for p in lora_parameters(model))
        assert torch.equal(remove(model).head.weight, Toy().head.weight)

    def test_a_part_of_one_that_is_there_is_in_it(self):
        model = inject(Toy(), "q_proj", rank=2, modules_to_save=["proj"])
        inject(model, "v_proj", rank=2, modules_to_save=["proj.0"])
        assert list(saved_modules(model)) == ["proj"]

    def test_the_same_training_as_in_peft(self):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["head"])
        theirs = get_peft_model(Toy(), config)
        ours = inject(Toy(), "q_proj", rank=2, alpha=8, modules_to_save=["head"])
        with torch.no_grad():
            for name, layer in lora_modules(ours).items():
                layer.A.copy_(theirs.base_model.model.get_submodule(name).lora_A.default.weight)
        optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            theirs(X).square().mean().backward()
            optimizer.step()
        torch.testing.assert_close(trained(ours)(X), theirs(X), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("make, names, error, message", [
        (Toy, ["haed"], ValueError, "modules_to_save: nothing.*'haed'.*nearest.*'head'"),
        (Toy, [3], TypeError, "modules_to_save must be a name"),
        (Toy, ["q_proj"], ValueError, "names only modules that modules_to_save"),
        (Toy, ["layers.0", "layers.1"], ValueError, "names only modules"),
        (Toy, ["proj.1"], TypeError, "proj.1 is a ReLU without.*nothing to train"),
        (lambda: inject(Toy(), "head", rank=2), ["head"], ValueError, "head holds an adapter"),
        (lambda: inject(Toy(), "proj.0", rank=2), ["proj"], ValueError, "proj holds an adapter"),
        (lambda: inject(Toy(), "head", rank=2, modules_to_save=["proj.0"]), ["proj"], ValueError,
         "proj holds .* a module to save already"),
    ])
    def test_errors(self, make, names, error, message, unchanged):
        model = make()
        with unchanged(model), pytest.raises(error, match=message):
            inject(model, "q_proj", rank=2, modules_to_save=names)

    def test_an_error_on_the_way_leaves_no_mark(self, unchanged):
        model = Toy()
        with unchanged(model), pytest.raises(ValueError, match="got 99"):
            inject(model, "v_proj", rank=99, modules_to_save=["norm"])
        assert not saved_modules(model)

    def test_a_tied_one_is_refused(self, llama, unchanged):
        model = llama(tied=True)
        with unchanged(model), pytest.raises(ValueError, match="lm_head shares its weight.*embed"):
            inject(model, ["q_proj"], rank=2, modules_to_save=["lm_head"])

    def test_no_adapter_inside_one_that_is_there(self, unchanged):
        model = inject(Toy(), "q_proj", rank=2, modules_to_save=["proj"])
        for function in (lambda: inject(model, "proj.0", rank=2),
                         lambda: inject_each(Toy(), {"head": (2, 1)}, modules_to_save=["head"])):
            with unchanged(model), pytest.raises(ValueError, match="is trained whole"):
                function()


def shared_parameter():
    model = Toy()
    model.layers[1].q_proj.weight = model.layers[0].q_proj.weight
    return model


def shared_module():
    model = Toy()
    model.layers[1].q_proj = model.layers[0].q_proj
    return model


def with_attention():
    model = Toy()
    model.attention = nn.MultiheadAttention(6, 2)
    return model


def injected():
    return randomize(inject(Toy(), "q_proj", rank=2))


def merged():
    return merge(injected(), keep_adapters=True)


def computed():
    model = Toy()
    nn.utils.parametrizations.weight_norm(model.layers[1].q_proj)
    return model


def half_frozen():
    model = Toy()
    model.layers[0].requires_grad_(False)
    return model.eval()


class TestErrors:
    @pytest.mark.parametrize("make, arguments, error, message", [
        (Toy, {"target_modules": ["query"]}, ValueError, "called 'query'.*nearest.*q_proj"),
        (Toy, {"target_modules": "qproj"}, ValueError, r"'qproj'.*\['q_proj'"),
        (Toy, {"target_modules": ["layers.0.k_proj"]}, ValueError, "nearest.*layers.0.q_proj"),
        (Toy, {"target_modules": ["q_proj", "w_proj"]}, ValueError, "called 'w_proj'"),
        (Toy, {"target_modules": ["_proj"]}, ValueError, "'_proj'"),        # no part of a name
        (Toy, {"target_modules": [r".*q_proj"]}, ValueError, "called"),     # no regex in a list
        (Toy, {"target_modules": r"layers\.\d\.[qv]"}, ValueError, "called"),   # no whole path
        (Toy, {"target_modules": r"layers\.\d"}, TypeError, "layers.0 is a Block"),
        (Toy, {"target_modules": r"layers\.(\d"}, ValueError, r"\(\\\\d' is no regular"),
        (Toy, {"target_modules": []}, ValueError, r"at least one module, got \[\]"),
        (Toy, {"target_modules": ""}, ValueError, "at least one module, got ''"),
        (Toy, {"target_modules": ["q_proj", ""]}, ValueError, r"got \['q_proj', ''\]"),
        (Toy, {"target_modules": None}, TypeError, "list of names, got None"),
        (Toy, {"target_modules": 3}, TypeError, "list of names, got 3"),
        (Toy, {"target_modules": [3]}, TypeError, r"list of names, got \[3\]"),
        (Toy, {"target_modules": ["norm"]}, TypeError, "layers.0.norm is a LayerNorm"),
        (Toy, {"target_modules": ["q_proj", "proj.1"]}, TypeError, "proj.1 is a ReLU"),
        (nn.ReLU, {"target_modules": "all-linear"}, ValueError, "no nn.Linear"),
        (nn.ReLU, {"target_modules": "fc"}, ValueError, "it has no linear layer"),
        (injected, {"target_modules": "q_proj"}, ValueError, "layers.0.q_proj.*adapted before"),
        (injected, {"target_modules": "all-linear"}, ValueError, "adapted before"),
        (injected, {"target_modules": ["linear"]}, ValueError, "called 'linear'"),
        (merged, {"target_modules": "q_proj"}, ValueError, "is merged into its weight"),
        (shared_parameter, {"target_modules": "q_proj"}, ValueError,
         r"shares its weight.*layers.0.q_proj.weight, layers.1.q_proj.weight"),
        (with_attention, {"target_modules": "out_proj"}, TypeError,
         "attention.out_proj belongs to an nn.MultiheadAttention"),
        (computed, {"target_modules": "q_proj"}, TypeError, "layers.1.q_proj: .*computed"),
        (Toy, {"target_modules": "all-linear", "rank": 7}, ValueError, "got 7"),
        (half_frozen, {"target_modules": ["q_proj", "head"], "rank": 5}, ValueError,
         "head: .*got 5"),
        (half_frozen, {"target_modules": "q_proj", "rank": 0}, ValueError, "got 0"),
        (half_frozen, {"target_modules": "q_proj", "alpha": float("nan")}, ValueError, "got nan"),
        (half_frozen, {"target_modules": "q_proj", "alpha": "big"}, TypeError, "got 'big'"),
        (half_frozen, {"target_modules": "q_proj", "dropout": 2}, ValueError, "got 2"),
        (half_frozen, {"target_modules": "q_proj", "dtype": torch.int8}, TypeError, "torch.int8"),
        (half_frozen, {"target_modules": "q_proj", "dtype": "float16"}, TypeError, "'float16'"),
        (half_frozen, {"target_modules": "q_proj", "scale": 2}, TypeError, "scale"),
    ], ids=lambda v: str(v) if isinstance(v, dict) else getattr(v, "__name__", ""))
    def test_the_model_is_as_before(self, make, arguments, error, message, unchanged):
        model = make()
        with unchanged(model), pytest.raises(error, match=message):
            inject(model, **{"rank": 2, **arguments})

    def test_a_tied_head_is_refused(self, llama, unchanged):
        model = llama(tied=True)
        with unchanged(model), pytest.raises(ValueError, match="lm_head shares its weight.*embed"):
            inject(model, ["q_proj", "lm_head"], rank=2)

    def test_any_other_error_on_the_way_leaves_no_trace(self, monkeypatch, unchanged):
        model, real = Toy(), torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *size, **options: (
            real(*size, **options) if size[0] == 6 else 1 / 0))              # the head is the third
        with unchanged(model), pytest.raises(ZeroDivisionError):
            inject(model, ["q_proj", "head"], rank=2)
