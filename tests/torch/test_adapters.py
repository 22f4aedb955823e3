"""Named adapters: against PEFT's own, against closed form, and back to the base bit for bit."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from lora_lib.torch import (LoRALinear, fine_tune, inject, load_adapter, lora_modules,
                            lora_parameters, merge, remove, save_adapter, unmerge)
from lora_lib.torch.adapters import Adapters
from lora_lib.torch.inject import inject_each
from tests.torch.conftest import exact_bytes, randomize, x

PLANS = {"a": {"fc": (1, 4.0), "out": (3, 2.0)}, "b": {"fc": (2, 3.0)}, "c": {"mid": (2, -1.0)}}


class Toy(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.mid = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.out = nn.Linear(6, 4)
        self.to(dtype)

    def forward(self, x):
        return self.out(torch.tanh(self.mid(torch.tanh(self.fc(x)))))


def one(name, dtype=torch.float64):
    """A model with one of the adapters alone, made without the class under test."""
    return randomize(inject_each(Toy(dtype), PLANS[name], use_rslora=name == "b"), seed=ord(name))


@pytest.fixture
def folders(tmp_path):
    return {name: save_adapter(one(name), tmp_path / name) for name in PLANS}


@pytest.fixture
def kept(folders):
    adapters = Adapters(Toy())
    for name, folder in folders.items():
        adapters.load(name, folder)
    return adapters


def weights(model):
    """Every tensor of the base by its plain name, to the bit."""
    return {name.replace(".linear.", "."): exact_bytes(t) for name, t in model.named_parameters()
            if not name.endswith((".A", ".B"))}


def summed(selection, dtype=torch.float64):
    """The base with the closed form W + sum of weight * scaling * B A in its weights."""
    model = Toy(dtype)
    for name, weight in selection.items():
        for path, layer in lora_modules(one(name, dtype)).items():
            scaling = layer.alpha / (math.sqrt(layer.rank) if name == "b" else layer.rank)
            W = model.get_submodule(path).weight.data
            W += (weight * scaling * (layer.B @ layer.A)).detach().to(dtype)
    return model


SELECTIONS = [{"a": 1}, {"b": 0.5}, {"a": 1, "b": 1}, {"a": 0.7, "b": -2.5}, {"a": 1, "c": 1},
              {"c": 0.25, "b": 0, "a": 3}]


class TestInForce:
    @pytest.mark.parametrize("selection", SELECTIONS, ids=str)
    def test_is_the_sum_in_closed_form(self, kept, selection):
        expected = summed(selection)(x(torch.float64))
        kept.activate(selection)
        assert kept.active == selection and not kept.merged
        torch.testing.assert_close(kept.model(x(torch.float64)), expected, rtol=1e-12, atol=1e-12)
        kept.merge(selection)
        assert kept.active == selection and kept.merged and not lora_modules(kept.model)
        torch.testing.assert_close(kept.model(x(torch.float64)), expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("name", PLANS)
    def test_one_is_the_adapter_itself(self, kept, name):
        model = kept.model
        kept.activate(name)
        assert lora_modules(model) == kept.layers(name) and kept.active == {name: 1}
        assert torch.equal(model(x(torch.float64)), one(name)(x(torch.float64)))
        parameters = lora_parameters(model)
        kept.activate({"a": 2, "b": 1})
        kept.activate({name: 1.0})
        assert all(p is q for p, q in zip(lora_parameters(model), parameters, strict=True))

    def test_none_is_the_base(self, kept):
        for nothing in (None, {}):
            kept.activate("a")
            kept.activate(nothing)
            assert kept.active == {} and not lora_modules(kept.model)
            assert torch.equal(kept.model(x(torch.float64)), Toy()(x(torch.float64)))

    def test_switching_leaves_every_weight_where_it_is(self, kept):
        places = {id(p) for p in kept.model.parameters()}
        for selection in ("a", {"a": 1, "b": 1}, "c", None):
            kept.activate(selection)
        assert {id(p) for p in kept.model.parameters()} == places
        assert weights(kept.model) == weights(Toy())

    def test_a_sum_has_the_stacked_rank_and_only_where_it_must(self, kept):
        kept.activate({"a": 1, "b": 1})
        layers = lora_modules(kept.model)
        assert {path: layer.rank for path, layer in layers.items()} == {"fc": 3, "out": 3}
        kept.activate({"b": 1, "c": 1})
        assert lora_modules(kept.model).keys() == {"fc", "mid"}

    def test_more_rank_than_the_matrix_has(self, kept):
        for i in range(3):
            kept.add(f"full {i}", ["fc", "out"], rank=4, seed=i)
            kept.activate(f"full {i}")
            randomize(kept.model, seed=i)
        selection = {f"full {i}": i + 1.0 for i in range(3)}
        kept.activate(selection)
        layers = lora_modules(kept.model)
        assert {path: layer.rank for path, layer in layers.items()} == {"fc": 6, "out": 4}
        for path, layer in layers.items():
            each = [w * kept.layers(name)[path].delta_weight() for name, w in selection.items()]
            torch.testing.assert_close(layer.delta_weight(), sum(each), rtol=1e-12, atol=1e-12)

    def test_a_sum_of_16_bit_adapters_is_taken_in_float32(self):
        adapters = Adapters(Toy(torch.bfloat16))
        for name, seed in (("a", 1), ("b", 2)):
            adapters.add(name, ["fc"], rank=2, alpha=2 / 3, dtype=torch.bfloat16)
            adapters.activate(name)
            randomize(adapters.model, seed)
        adapters.activate({"a": 0.3, "b": 0.7})
        layer = adapters.model.fc
        expected = sum(w * adapters.layers(name)["fc"].delta_weight()
                       for name, w in (("a", 0.3), ("b", 0.7)))
        torch.testing.assert_close(layer.delta_weight(), expected, rtol=1e-6, atol=1e-6)

    def test_follows_the_model_s_mode(self, kept):
        kept.add("d", ["fc"], rank=2, dropout=0.5)
        kept.model.eval()
        kept.activate("d")
        assert not kept.model.fc.training and not kept.model.fc.dropout.training
        kept.model.train()
        kept.activate("a")
        assert kept.model.fc.training and kept.model.out.training

    @pytest.mark.gpu
    def test_follows_the_model_to_the_gpu(self, kept):
        kept.activate("a")
        kept.model.to("cuda")
        for selection in ("b", {"a": 1, "b": 1}, "a"):
            kept.activate(selection)
            assert {p.device.type for p in kept.model.parameters()} == {"cuda"}
        kept.merge({"a": 1, "b": 1})
        kept.unmerge()
        kept.activate(None)
        assert weights(kept.model.cpu()) == weights(Toy())


class TestMerge:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16,
                                       torch.float16], ids=str)
    def test_comes_back_bit_for_bit(self, dtype, folders):
        adapters = Adapters(Toy(dtype))
        for name, folder in folders.items():
            adapters.load(name, folder)
        original = weights(adapters.model)
        for selection in (*SELECTIONS, "a", {"a": 100}):
            adapters.merge(selection)
            assert weights(adapters.model) != original
            adapters.unmerge()
            assert weights(adapters.model) == original and not adapters.merged
        # unmerge(model), which has only the sum to go by, does not
        model = merge(one("a", torch.float32), keep_adapters=True)
        assert weights(unmerge(model)) != weights(Toy(torch.float32))

    def test_is_rounded_once(self, kept):
        selection = {"a": 0.7, "b": -2.5}
        exact = summed(selection)
        kept.activate(None)
        kept.model.to(torch.float32)
        base = copy.deepcopy(kept.model).double()
        kept.merge(selection)
        for path in ("fc", "out"):
            delta = (exact.get_submodule(path).weight - Toy().get_submodule(path).weight)
            wanted = (base.get_submodule(path).weight + delta).float()
            got = kept.model.get_submodule(path).weight
            assert got.dtype == torch.float32
            error, u = (got - wanted).abs().max(), torch.finfo(torch.float32).eps
            assert error <= 2 * u * wanted.abs().max()

    def test_always_from_the_original(self, kept):
        kept.merge("a")
        once = weights(kept.model)
        for selection in ("b", {"a": 1, "b": 1}, "a", "a"):
            kept.merge(selection)
        assert weights(kept.model) == once

    def test_unmerge_puts_the_selection_beside_the_weights(self, kept):
        kept.activate({"a": 1, "b": 2})
        before = kept.model(x(torch.float64))
        kept.merge(kept.active)
        kept.unmerge()
        assert kept.active == {"a": 1, "b": 2}
        assert torch.equal(kept.model(x(torch.float64)), before)

    def test_what_it_costs(self, kept):
        assert kept.host_bytes == 0
        kept.merge("b")
        assert kept.host_bytes == 8 * (6 * 6 + 6)                 # fc: weight and bias
        kept.merge({"a": 1, "b": 1})
        assert kept.host_bytes == 8 * (6 * 6 + 6 + 6 * 4 + 4)
        kept.activate("a")
        assert kept.host_bytes == 0

    def test_an_overflow_changes_nothing(self, kept, unchanged):
        kept.activate({"a": 1, "b": 1})
        with unchanged(Toy()), pytest.raises(ValueError, match="fc: W and scaling .* NaN or inf"):
            kept.merge({"c": 1, "b": 1e308})
        assert kept.active == {"a": 1, "b": 1} and not kept.merged and kept.host_bytes == 0
        assert weights(kept.model) == weights(Toy())
        kept.merge("a")
        merged = weights(kept.model)
        with pytest.raises(ValueError, match="NaN"):
            kept.merge({"c": 1, "b": 1e308})
        assert kept.active == {"a": 1} and kept.merged and weights(kept.model) == merged

    def test_conv1d(self):
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        torch.manual_seed(0)
        model = nn.Sequential(conv1d(4, 6))
        base = copy.deepcopy(model)
        adapters = Adapters(randomize(inject(model, ["0"], rank=2)), present="a")
        delta = adapters.layers("a")["0"].delta_weight()
        adapters.merge({"a": 0.5})
        torch.testing.assert_close(model[0].weight, base[0].weight + 0.5 * delta.T)
        adapters.activate(None)
        assert torch.equal(model[0].weight, base[0].weight)


    def test_quantized(self):
        from lora_lib.torch.nf4 import quantize
        model = quantize(Toy(torch.float32), ["fc", "mid"], block=4)
        adapters = Adapters(randomize(inject(model, ["fc"], rank=2)), present="a")
        adapters.activate(None)
        before = {key: exact_bytes(t) for key, t in model.state_dict().items()}
        adapters.merge({"a": 0.5})
        assert {key: exact_bytes(t) for key, t in model.state_dict().items()} != before
        adapters.activate(None)
        assert {key: exact_bytes(t) for key, t in model.state_dict().items()} == before


class TestComeAndGo:
    def test_the_model_s_own(self, folders):
        model = load_adapter(Toy(), folders["a"])
        layers = lora_modules(model)
        adapters = Adapters(model, present="a")
        assert adapters.names == ["a"] and adapters.active == {"a": 1}
        assert lora_modules(model) == layers == adapters.layers("a")
        adapters.load("b", folders["b"])
        assert adapters.active == {"a": 1} and lora_modules(model) == layers

    def test_a_new_one_is_inject_s(self):
        adapters = Adapters(Toy())
        adapters.add("a", ["fc", "out"], rank=2, alpha=3.0, dropout=0.25, seed=1, use_rslora=True)
        assert adapters.active == {} and not lora_modules(adapters.model)
        adapters.activate("a")
        other = inject(Toy(), ["fc", "out"], 2, 3.0, 0.25, seed=1, use_rslora=True)
        for mine, its in zip(adapters.layers("a").values(), lora_modules(other).values()):
            assert torch.equal(mine.A, its.A) and mine.scaling == its.scaling
            assert mine.dropout.p == 0.25 and mine.use_rslora

    @pytest.mark.parametrize("how", ["beside", "merged", "nothing"])
    def test_coming_leaves_in_force_what_was(self, kept, folders, how):
        if how == "beside":
            kept.activate({"a": 1, "b": 1})
        elif how == "merged":
            kept.merge("a")
        before = kept.active, kept.merged, kept.model(x(torch.float64))
        kept.load("a again", folders["a"])
        kept.add("new", ["mid"], rank=1)
        kept.combine("ab", {"a": 1, "b": 1})
        kept.save("b", folders["b"])
        assert (kept.active, kept.merged) == before[:2]
        assert torch.equal(kept.model(x(torch.float64)), before[2])
        assert kept.names == ["a", "b", "c", "a again", "new", "ab"]

    def test_training_the_one_in_force_moves_it_alone(self, kept):
        inputs = x(torch.float64)
        labels = torch.arange(5) % 4
        others = {name: {k: t.clone() for k, t in kept.state_dict(name).items()} for name in "abc"}
        kept.activate("a")
        fine_tune(kept.model, (inputs, labels), steps=2, batch_size=5, lr=0.1, progress=False)
        for name in "abc":
            same = [torch.equal(t, others[name][k]) for k, t in kept.state_dict(name).items()]
            assert not any(same) if name == "a" else all(same)
        kept.activate(None)
        assert weights(kept.model) == weights(Toy())

    def test_training_is_what_it_is_without_names(self, kept):
        data = x(torch.float64), torch.arange(5) % 4
        alone = one("b")
        kept.activate("b")
        kept.activate("c")
        kept.activate("b")
        losses = [fine_tune(model, data, steps=3, batch_size=4, lr=0.1, progress=False)
                  for model in (alone, kept.model)]
        assert losses[0] == losses[1]
        for p, q in zip(lora_parameters(alone), lora_parameters(kept.model), strict=True):
            assert torch.equal(p, q)

    def test_a_sum_is_frozen_and_shows_later_training_of_its_parts(self, kept):
        kept.activate({"a": 1, "b": 1})
        with pytest.raises(ValueError, match="nothing is trainable"):
            fine_tune(kept.model, (x(torch.float64), torch.zeros(5).long()), steps=1)
        with torch.no_grad():
            kept.layers("a")["fc"].B.add_(1)
        kept.activate({"a": 1, "b": 1})
        torch.testing.assert_close(
            kept.model.fc.delta_weight(),
            sum(kept.layers(name)["fc"].delta_weight() for name in "ab"))

    def test_a_combination_is_an_adapter_of_its_own(self, kept):
        kept.combine("ab", {"a": 2, "b": -1})
        expected = summed({"a": 2, "b": -1})(x(torch.float64))
        with torch.no_grad():
            kept.layers("a")["fc"].B.add_(1)
        kept.activate("ab")
        torch.testing.assert_close(kept.model(x(torch.float64)), expected, rtol=1e-12, atol=1e-12)
        assert all(p.requires_grad for p in lora_parameters(kept.model))
        kept.activate({"ab": 1, "c": 1})                          # a sum of sums
        expected = summed({"a": 2, "b": -1, "c": 1})(x(torch.float64))
        torch.testing.assert_close(kept.model(x(torch.float64)), expected, rtol=1e-12, atol=1e-12)

    def test_saved_and_loaded(self, kept, tmp_path):
        kept.activate("c")
        load_adapter(model := Toy(), kept.save("a", tmp_path / "one"))
        assert torch.equal(model(x(torch.float64)), one("a")(x(torch.float64)))
        selection = {"a": 0.5, "b": 2}
        load_adapter(model := Toy(), kept.save(selection, tmp_path / "sum"))
        torch.testing.assert_close(model(x(torch.float64)), summed(selection)(x(torch.float64)))
        assert kept.active == {"c": 1}

    def test_saved_while_another_is_merged_it_still_knows_the_base(self, kept, tmp_path):
        kept.merge({"b": 100})
        load_adapter(Toy(), kept.save("a", tmp_path))             # check_base
        assert kept.merged

    def test_state(self, kept):
        tensors = {k: t.clone() for k, t in kept.state_dict("a").items()}
        assert "base_model.model.out.lora_B.weight" in tensors and len(tensors) == 4
        kept.activate("a")
        randomize(kept.model, seed=9)
        kept.activate({"b": 1, "c": 1})
        kept.load_state_dict("a", tensors)
        kept.activate("a")
        assert torch.equal(kept.model(x(torch.float64)), one("a")(x(torch.float64)))

    def test_removed(self, kept, folders):
        kept.activate("a")
        kept.remove("b")
        assert kept.names == ["a", "c"]
        kept.load("b", folders["c"])
        assert kept.layers("b").keys() == {"mid"}


class TestErrors:
    @pytest.mark.parametrize("call, error, message", [
        (lambda a, f: a.activate("x"), ValueError, r"no adapter 'x'; there are \['a', 'b', 'c'\]"),
        (lambda a, f: a.merge({"a": 1, "x": 1}), ValueError, "no adapter 'x'; there are"),
        (lambda a, f: a.merge(None), ValueError, "nothing to merge in None; choose from"),
        (lambda a, f: a.merge({}), ValueError, "nothing to merge in {}"),
        (lambda a, f: a.unmerge(), ValueError, "nothing is merged; in force.*{'a': 1}"),
        (lambda a, f: a.activate({"b": math.nan}), ValueError, "weight of 'b' must be finite, got"),
        (lambda a, f: a.activate({"b": "1"}), TypeError, "weight of 'b' must be a number, got '1'"),
        (lambda a, f: a.activate({"b": True}), TypeError, "weight of 'b' must be a number"),
        (lambda a, f: a.activate(["a"]), TypeError, "a selection is a name, .* got list"),
        (lambda a, f: a.remove("x"), ValueError, "no adapter 'x'"),
        (lambda a, f: a.remove("a"), ValueError, "'a' is in force"),
        (lambda a, f: a.layers("x"), ValueError, "no adapter 'x'"),
        (lambda a, f: a.save("x", f["a"]), ValueError, "no adapter 'x'"),
        (lambda a, f: a.save(None, f["a"]), ValueError, "no adapter to save"),
        (lambda a, f: a.load("a", f["b"]), ValueError, "'a' already, of .*'b'"),
        (lambda a, f: a.load("d", f["a"] / "nothing"), FileNotFoundError, "nothing"),
        (lambda a, f: a.add("b", ["fc"]), ValueError, "'b' already"),
        (lambda a, f: a.add("d", ["fx"]), ValueError, "nothing in the model is called 'fx'"),
        (lambda a, f: a.add("d", ["fc"], rank=99), ValueError, "rank must be between"),
        (lambda a, f: a.add("", ["fc"]), TypeError, "must be a string with a letter, got ''"),
        (lambda a, f: a.combine("a", {"b": 1}), ValueError, "'a' already"),
        (lambda a, f: a.combine("d", {"x": 1}), ValueError, "no adapter 'x'"),
        (lambda a, f: a.combine("d", None), ValueError, "nothing to combine"),
        (lambda a, f: a.state_dict("x"), ValueError, "no adapter 'x'"),
        (lambda a, f: a.load_state_dict("a", a.state_dict("b")), ValueError,
         r"'a' does not fit: .*fc.lora_A.weight has shape \(1, 6\) in it and \(2, 6\)"),
    ])
    def test_names_what_there_is_and_changes_nothing(self, kept, folders, unchanged, call, error,
                                                     message):
        kept.activate("a")
        names = kept.names
        with unchanged(kept.model), pytest.raises(error, match=message):
            call(kept, folders)
        assert kept.names == names and kept.active == {"a": 1} and not kept.merged

    @pytest.mark.parametrize("call", [lambda a: a.activate("b"), lambda a: a.merge("b"),
                                      lambda a: a.add("d", ["mid"]), lambda a: a.state_dict("b")])
    def test_the_model_changed_behind_its_back(self, kept, call):
        kept.activate("a")
        remove(kept.model)
        with pytest.raises(ValueError, match="fc, out were put in or taken out by other means"):
            call(kept)

    def test_merged_behind_its_back(self, kept):
        kept.activate("a")
        merge(kept.model, keep_adapters=True)
        with pytest.raises(ValueError, match="fc, out is merged by merge"):
            kept.activate("b")
        unmerge(kept.model)
        kept.activate("b")

    def test_modules_that_are_trained_whole(self, kept, tmp_path, unchanged):
        other = randomize(inject(Toy(), ["fc"], rank=2, modules_to_save=["out"]))
        save_adapter(other, tmp_path)
        kept.activate("a")
        with unchanged(kept.model):
            for gain in (lambda: kept.load("d", tmp_path),
                         lambda: kept.add("d", ["fc"], rank=2, modules_to_save=["out"])):
                with pytest.raises(ValueError, match="'d' trains out whole, or rows"):
                    gain()
        assert kept.names == ["a", "b", "c"]
        with pytest.raises(ValueError, match="trains out whole, or rows"):
            Adapters(other, present="d")

    def test_a_model_that_has_an_adapter_or_none(self):
        with pytest.raises(ValueError, match="an adapter already, in fc, out; give it a name"):
            Adapters(one("a"))
        with pytest.raises(ValueError, match="present='a', but the model holds no LoRALinear"):
            Adapters(Toy(), present="a")
        with pytest.raises(ValueError, match="is merged"):
            Adapters(merge(one("a"), keep_adapters=True), present="a")
        with pytest.raises(ValueError, match="no LoRALinear with a path"):
            Adapters(LoRALinear(nn.Linear(6, 6), rank=2), present="a")


# ------------------------------------------------------------------------------ against PEFT
TARGETS = {"w": (["q_proj", "v_proj"], 4, 8), "x": (["q_proj", "down_proj"], 2, 6),
           "y": (["gate_proj", "k_proj"], 4, 4), "z": (["q_proj", "v_proj"], 4, 1)}


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


@pytest.fixture
def both(peft, llama, tmp_path):
    """PEFT's model with four adapters, and Adapters that loaded what PEFT saved of it."""
    def config(targets, r, alpha, rslora=False):
        return peft.LoraConfig(target_modules=targets, r=r, lora_alpha=alpha, use_rslora=rslora)

    theirs = peft.get_peft_model(llama(), config(*TARGETS["w"]), adapter_name="w")
    for name in "xyz":
        theirs.add_adapter(name, config(*TARGETS[name], rslora=name == "x"))
    generator = torch.Generator().manual_seed(3)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
    theirs.save_pretrained(tmp_path)
    ours = Adapters(llama())
    for name in TARGETS:
        ours.load(name, tmp_path / name)
    return theirs.eval(), ours


TOKENS = torch.arange(24).view(2, 12) % 50


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def close(ours, theirs):
    torch.testing.assert_close(logits(ours.model), logits(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
class TestAgainstPEFT:
    def test_set_adapter_and_disable_adapter(self, both):
        theirs, ours = both
        seen = []
        for name in (*TARGETS, "w"):
            theirs.set_adapter(name)
            ours.activate(name)
            close(ours, theirs)
            seen.append(logits(ours.model))
        assert all((one - two).abs().max() > 0.1 for one, two in zip(seen, seen[1:]))
        ours.activate(None)
        with theirs.disable_adapter():
            close(ours, theirs)

    @pytest.mark.parametrize("selection", [{"w": 1, "x": 1}, {"w": 0.5, "x": -1.5}, {"z": 0.3},
                                           {"w": 1, "x": 0.7, "y": 2, "z": 1}], ids=str)
    def test_weighted_cat(self, both, selection):
        theirs, ours = both
        theirs.add_weighted_adapter([*selection], [*selection.values()], "sum",
                                    combination_type="cat")
        theirs.set_adapter("sum")
        ours.activate(selection)
        close(ours, theirs)
        ours.merge(selection)
        close(ours, theirs)

    def test_weighted_linear_where_it_is_the_sum(self, both):
        """It adds A to A and B to B: on modules that only one of them has, that is the sum."""
        theirs, ours = both
        for names, equal in ((["w", "y"], True), (["w", "z"], False)):
            theirs.add_weighted_adapter(names, [0.5, 2.0], "".join(names),
                                        combination_type="linear")
            theirs.set_adapter("".join(names))
            ours.activate(dict(zip(names, [0.5, 2.0])))
            assert torch.allclose(logits(ours.model), logits(theirs), 1e-4, 1e-4) is equal

    def test_merge_adapter(self, both):
        theirs, ours = both
        theirs.merge_adapter(["w", "x"])
        ours.merge({"w": 1, "x": 1})
        close(ours, theirs)
        named = dict(ours.model.named_parameters())
        for name, p in theirs.get_base_model().named_parameters():
            if "lora_" not in name:
                torch.testing.assert_close(named[name.replace(".base_layer", "")], p)

    def test_peft_loads_what_was_saved_here(self, both, peft, llama, tmp_path):
        _, ours = both
        folders = {"w": ours.save("w", tmp_path / "one"),
                   "sum": ours.save({"w": 1, "x": -0.5, "y": 2}, tmp_path / "sum")}
        theirs = peft.PeftModel.from_pretrained(llama(), folders["w"], adapter_name="w")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            theirs.load_adapter(folders["sum"], adapter_name="sum")
        for name, selection in (("w", "w"), ("sum", {"w": 1, "x": -0.5, "y": 2})):
            theirs.set_adapter(name)
            ours.activate(selection)
            close(ours, theirs.eval())
