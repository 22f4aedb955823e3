"""Adapter files: PEFT's, in both directions; and whatever is wrong with one leaves no trace."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_lib.torch import (LoRALinear, inject, load_adapter, lora_modules, lora_parameters,
                            lora_state_dict, merge, remove, save_adapter, unmerge)
from lora_lib.torch.inject import inject_each
from lora_lib.torch.parts import saved_modules
from tests.torch.conftest import randomize, x

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROOT = Path(__file__).parents[2]


class Toy(nn.Module):
    """Names that are ends of other names: fc and block.fc, block.1 and block.11."""

    def __init__(self, seed=0, width=6):
        super().__init__()
        torch.manual_seed(seed)
        self.fc, self.out = nn.Linear(width, width), nn.Linear(width, 4)
        self.block = nn.ModuleDict({n: nn.Linear(width, width) for n in ("fc", "1", "11")})

    def forward(self, x):
        for layer in (self.fc, *self.block.values()):
            x = torch.tanh(layer(x)) + x
        return self.out(x)


def adapted(targets=("block.fc", "out"), **options):
    return randomize(inject(Toy(), list(targets), **{"rank": 2, "alpha": 3.0, **options}))


@pytest.fixture
def saved(tmp_path):
    """A folder with the adapter of `adapted()`."""
    return save_adapter(adapted(), tmp_path / "adapter")


def config_of(folder):
    return json.loads((folder / CONFIG).read_text())


def edit(folder, **changes):
    """Change settings in a folder's configuration; None takes one out."""
    config = config_of(folder) | changes
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def rewrite(folder, change):
    """Pass the tensors of a folder through `change`, and write them without the metadata."""
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors) or tensors, folder / WEIGHTS)


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


class TestRoundTrip:
    @pytest.mark.parametrize("options", [
        {}, {"alpha": 0}, {"alpha": 1 / 3}, {"alpha": -2.0}, {"use_rslora": True},
        {"dropout": 0.25}, {"rank": 4}, {"dtype": torch.bfloat16}, {"dtype": torch.float64},
        {"targets": ["1", "11"]}, {"targets": ["fc"]}, {"targets": ["fc", "out", "1", "11"]},
    ], ids=str)
    def test_into_a_fresh_model_and_over_another_adapter(self, options, tmp_path):
        model = adapted(**options)
        assert save_adapter(model, tmp_path / "deep" / "adapter") == tmp_path / "deep" / "adapter"
        folder = str(tmp_path / "deep" / "adapter")              # a string is as good as a Path
        fresh = Toy()
        assert load_adapter(fresh, folder) is fresh
        over = load_adapter(randomize(adapted(**options), seed=5), folder)
        for loaded in (fresh, over):
            assert list(lora_modules(loaded)) == list(lora_modules(model))
            for a, b in zip(lora_modules(loaded).values(), lora_modules(model).values()):
                assert (a.rank, a.alpha, a.scaling) == (b.rank, b.alpha, b.scaling)
                assert a.dropout.p == b.dropout.p and a.use_rslora == b.use_rslora
                assert torch.equal(a.A.to(b.A.dtype), b.A) and torch.equal(a.B.to(b.B.dtype), b.B)
            torch.testing.assert_close(loaded.eval()(x()), model.eval()(x()), rtol=1e-6, atol=1e-6)
        trained = {n for n, p in fresh.named_parameters() if p.requires_grad}
        assert trained == {f"{n}.{part}" for n in lora_modules(model) for part in "AB"}

    def test_a_rank_and_an_alpha_for_each_layer(self, tmp_path):
        plan = {"fc": (1, 4.0), "block.fc": (2, 5.0), "block.1": (2, 5.0), "block.11": (3, 0.5)}
        model = randomize(inject_each(Toy(), plan))
        loaded = load_adapter(Toy(), save_adapter(model, tmp_path))
        assert {n: (a.rank, a.alpha) for n, a in lora_modules(loaded).items()} == plan
        assert torch.equal(loaded(x()), model(x()))

    def test_the_files(self, tmp_path):
        model = adapted(dropout=0.25)
        save_adapter(model, tmp_path, base_model_name_or_path="some/model", task_type="CAUSAL_LM")
        assert sorted(files(tmp_path)) == [CONFIG, WEIGHTS]
        tensors = load_file(tmp_path / WEIGHTS)
        assert tensors.keys() == lora_state_dict(model).keys() and len(tensors) == 4
        assert all(torch.equal(t, tensors[key]) for key, t in lora_state_dict(model).items())
        config = config_of(tmp_path)
        expected = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "lora_dropout": 0.25,
                    "bias": "none", "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
                    "base_model_name_or_path": "some/model", "task_type": "CAUSAL_LM"}
        assert expected.items() <= config.items()
        umask = os.umask(0)
        os.umask(umask)
        assert (tmp_path / WEIGHTS).stat().st_mode & 0o777 == 0o666 & ~umask

    def test_saving_changes_nothing_in_the_model(self, tmp_path, unchanged):
        model = adapted()
        with unchanged(model):
            save_adapter(model, tmp_path)

    def test_a_merged_model_can_be_saved(self, tmp_path):
        model = adapted()
        before = model(x())
        save_adapter(merge(model, keep_adapters=True), tmp_path)
        torch.testing.assert_close(load_adapter(Toy(), tmp_path)(x()), before)

    def test_saving_over_an_older_adapter(self, saved):
        model = adapted(["fc"], rank=3)
        save_adapter(model, saved)
        assert torch.equal(load_adapter(Toy(), saved)(x()), model(x()))
        assert sorted(files(saved)) == [CONFIG, WEIGHTS]

    def test_load_then_remove_and_unmerge(self, saved):
        model, base = Toy(), Toy()(x())
        load_adapter(model, saved)
        assert not torch.allclose(model(x()), base)
        before = model(x())
        unmerge(merge(model, keep_adapters=True))
        torch.testing.assert_close(model(x()), before)
        torch.testing.assert_close(remove(model)(x()), base)

    def test_a_file_in_another_precision(self, saved):
        rewrite(saved, lambda t: {k: v.double() for k, v in t.items()})
        loaded = load_adapter(Toy(), saved)
        assert all(p.dtype == torch.float32 for p in lora_parameters(loaded))
        assert torch.equal(loaded(x()), adapted()(x()))


class TestPEFT:
    """transformers' Llama with PEFT's adapters and ours, float32, outputs to 1e-6."""

    @pytest.fixture
    def close(self, llama):
        ids = torch.arange(14).reshape(2, 7)

        def check(ours, theirs):
            with torch.no_grad():
                ours, theirs, base = (m.eval()(ids).logits for m in (ours, theirs, llama()))
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
            assert not torch.allclose(ours, base, rtol=1e-2, atol=1e-2)
        return check

    @pytest.mark.parametrize("targets, options", [
        (["q_proj", "v_proj"], {}),
        (["q_proj", "v_proj"], {"use_rslora": True, "rank": 3, "alpha": 1.5}),
        ("all-linear", {"dropout": 0.1}),
        (["model.layers.1.mlp.down_proj"], {"alpha": -7}),
        (r"model\.layers\.0\..*_proj", {"rank": 1}),
        (["lm_head"], {}),
    ], ids=str)
    def test_ours_in_peft(self, targets, options, llama, close, tmp_path):
        from peft import PeftModel

        ours = randomize(inject(llama(), targets, **{"rank": 2, "alpha": 4, **options}))
        for p in lora_parameters(ours):
            p.data *= 0.1
        save_adapter(ours, tmp_path)
        close(ours, PeftModel.from_pretrained(llama(), tmp_path))

    @pytest.mark.parametrize("options", [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "r": 3},
        {"target_modules": "all-linear", "lora_dropout": 0.1, "init_lora_weights": "gaussian"},
        {"target_modules": r".*layers\.0.*\.(q|up)_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"target_modules": ["q_proj", "v_proj", "up_proj"],
         "rank_pattern": {"q_proj": 3, "layers.1.self_attn.v_proj": 1, r"model.layers.\d.mlp.*": 4},
         "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 0.5, "q_proj": 2, "mlp.up_proj": 6}},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True,
         "rank_pattern": {"v_proj": 4}, "alpha_pattern": {"layers.1.self_attn.v_proj": 16}},
    ], ids=str)
    @pytest.mark.filterwarnings("ignore:.*use_rslora")
    def test_pefts_in_ours_and_back(self, options, llama, close, tmp_path):
        from peft import LoraConfig, PeftModel, get_peft_model

        theirs = get_peft_model(llama(), LoraConfig(**{"r": 2, "lora_alpha": 4, **options}))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in theirs.named_parameters():
                if ".lora_B." in name:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
        theirs.save_pretrained(tmp_path / "theirs")
        ours = load_adapter(llama(), tmp_path / "theirs")
        close(ours, theirs)
        back = PeftModel.from_pretrained(llama(), save_adapter(ours, tmp_path / "ours"))
        close(ours, back)
        scaling = {n.removeprefix("base_model.model."): m.scaling["default"]
                   for n, m in back.named_modules() if hasattr(m, "lora_A")}
        assert {n: a.scaling for n, a in lora_modules(ours).items()} == pytest.approx(scaling)

    @pytest.mark.parametrize("plan", [
        {"fc": (2, 3.0)},                                        # a list would reach block.fc too
        {"fc": (2, 4.0), "block.fc": (3, 5.0), "block.1": (3, 5.0)},
        {"block.1": (1, 3.0), "block.11": (2, 4.0), "out": (2, 4.0)},
    ], ids=str)
    def test_names_that_end_in_other_names(self, plan, tmp_path):
        from peft import PeftModel

        ours = randomize(inject_each(Toy(), plan))
        theirs = PeftModel.from_pretrained(Toy(), save_adapter(ours, tmp_path))
        torch.testing.assert_close(ours(x()), theirs(x()), rtol=1e-5, atol=1e-5)
        names = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules()
                 if hasattr(m, "lora_A")}
        assert names == set(plan)

    @pytest.mark.parametrize("options, message", [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"init_lora_weights": "pissa"}, "'pissa' changed the base"),
        ({"init_lora_weights": "pissa_niter_2"}, "'pissa_niter_2' changed the base"),
        ({"init_lora_weights": "olora"}, "'olora' changed the base"),
        ({"target_modules": ["embed_tokens"]}, "names model.embed_tokens, an nn.Embedding"),
    ], ids=str)
    def test_what_ours_would_compute_otherwise_is_refused(self, options, message, llama, tmp_path,
                                                          unchanged):
        from peft import LoraConfig, get_peft_model

        options = {"r": 2, "target_modules": ["q_proj"], **options}
        get_peft_model(llama(), LoraConfig(**options)).save_pretrained(tmp_path)
        model = llama()
        with unchanged(model), pytest.raises(ValueError, match=message):
            load_adapter(model, tmp_path)

    @pytest.mark.parametrize("method", ["IA3Config", "PromptTuningConfig"])
    def test_another_method_of_peft(self, method, llama, tmp_path, unchanged):
        import peft

        options = {"PromptTuningConfig": {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"},
                   "IA3Config": {"target_modules": ["q_proj"], "feedforward_modules": []}}[method]
        theirs = peft.get_peft_model(llama(), getattr(peft, method)(**options))
        theirs.save_pretrained(tmp_path)
        model = llama()
        with unchanged(model), pytest.raises(ValueError, match="peft_type 'LORA'"):
            load_adapter(model, tmp_path)

    def test_another_peft_type_by_name(self, saved, unchanged):
        edit(saved, peft_type="LOHA")
        model = Toy()
        with unchanged(model), pytest.raises(ValueError, match="peft_type 'LORA'"):
            load_adapter(model, saved)


class Normed(Toy):
    """A head of several parts, one with buffers."""

    def __init__(self, seed=0, classes=3):
        super().__init__(seed)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, classes))

    def forward(self, x):
        return self.head(super().forward(x))


def whole(seed=0):
    """Adapters and a head that have been changed, buffers too."""
    model = inject(Normed(), ["block.fc"], 2, 3.0, modules_to_save=["head"])
    randomize(model, seed)
    model.head[1].running_mean += 1
    model.head[1].num_batches_tracked += 7
    return model.eval()


class TestModulesToSave:
    @pytest.fixture
    def saved(self, tmp_path):
        return save_adapter(whole(), tmp_path / "adapter")

    @pytest.mark.parametrize("make", [Normed, lambda: whole(seed=5)])
    def test_into_a_fresh_model_and_over_another(self, make, saved):
        model = load_adapter(make(), saved).eval()
        assert torch.equal(model(x()), whole()(x())) and list(saved_modules(model)) == ["head"]
        for key, t in model.head.state_dict().items():
            assert torch.equal(t, whole().head.state_dict()[key])
        assert torch.equal(remove(model)(x()), Normed().eval()(x()))

    def test_ours_in_peft_and_back(self, saved, tmp_path):
        from peft import PeftModel

        theirs = PeftModel.from_pretrained(Normed(), saved).eval()
        torch.testing.assert_close(theirs(x()), whole()(x()))
        assert config_of(saved)["modules_to_save"] == ["head"]
        theirs.save_pretrained(tmp_path / "theirs")
        assert torch.equal(load_adapter(Normed(), tmp_path / "theirs").eval()(x()), whole()(x()))

    @pytest.mark.parametrize("change, message", [
        (lambda t: t.pop("base_model.model.head.1.running_mean"),
         r"modules_to_save: head.1.running_mean has shape None in the file, expected \(4,\)"),
        (lambda t: t.update({"base_model.model.head.3.weight": torch.ones(2)}),
         r"head.3.weight has shape \(2,\) in the file, expected None"),
        (lambda t: t["base_model.model.head.0.weight"][0].fill_(float("nan")), "NaN or infinity"),
        (lambda t: [t.pop(key) for key in list(t) if ".head." in key],
         r"names 1 modules .* the file holds nothing, such as head|differ in \['head'\]"),
        (lambda t: t.update({"base_model.model.out.weight": torch.ones(4, 6)}),
         r"out.weight \(4, 6\) is not the A or B.*nor of modules_to_save = \['head'\]"),
    ])
    def test_a_file_that_does_not_fit(self, change, message, saved, unchanged):
        rewrite(saved, lambda tensors: (change(tensors), None)[1])
        for model in (Normed(), whole(seed=5)):
            with unchanged(model), pytest.raises(ValueError, match=message):
                load_adapter(model, saved)

    @pytest.mark.parametrize("make, message", [
        (lambda: Normed(classes=2), r"head.2.bias has shape \(3,\) in the file, expected \(2,\)"),
        (Toy, "the model has no head"),
        (lambda: inject(Normed(), ["block.fc"], 2, 3.0), r"differ in \['head'\]"),
    ])
    def test_a_model_that_does_not_fit(self, make, message, saved, unchanged):
        model = make()
        with unchanged(model), pytest.raises(ValueError, match=message):
            load_adapter(model, saved)

    def test_the_list_must_be_one(self, saved, unchanged):
        edit(saved, modules_to_save="head")
        model = Normed()
        with unchanged(model), pytest.raises(ValueError, match="must be a list of names"):
            load_adapter(model, saved)

    def test_names_that_peft_would_read_otherwise(self, tmp_path):
        model = inject(Toy(), ["out"], rank=2, modules_to_save=["fc"])
        assert list(saved_modules(model)) == ["fc", "block.fc"]
        save_adapter(model, tmp_path)
        model = inject_each(Toy(), {"out": (2, 1.0)}, modules_to_save=["fc"])
        with pytest.raises(ValueError, match=r"look for \['block.fc'\] .*too"):
            save_adapter(model, tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_a_task_type_whose_head_peft_wants(self, tmp_path):
        model = Toy()
        model.classifier = nn.Linear(4, 2)
        inject(model, ["fc"], rank=2)
        with pytest.raises(ValueError, match=r"\['classifier'\].*leave task_type out"):
            save_adapter(model, tmp_path / "new", task_type="SEQ_CLS")
        save_adapter(model, tmp_path / "new")
        inject(model, ["out"], rank=2, modules_to_save=["classifier"])
        save_adapter(model, tmp_path / "new", task_type="SEQ_CLS")

    def test_weights_tied_inside_a_module(self, tmp_path):
        model = Normed()
        model.head[2] = nn.Linear(4, 4)
        model.head[2].weight = model.head[0].weight
        randomize(inject(model, ["block.fc"], rank=2, modules_to_save=["head"])).eval()
        fresh = Normed()
        fresh.head[2] = nn.Linear(4, 4)
        fresh.head[2].weight = fresh.head[0].weight
        loaded = load_adapter(fresh, save_adapter(model, tmp_path)).eval()
        assert torch.equal(loaded(x()), model(x()))


class TestBase:
    """check_base: a base that the adapter was not trained on."""

    def test_another_base_of_the_same_shape(self, saved, unchanged):
        other = Toy(seed=1)
        with unchanged(other), pytest.raises(ValueError, match="block.fc: .*check_base=False"):
            load_adapter(other, saved)
        with unchanged(model := randomize(inject(Toy(seed=1), ["block.fc", "out"], 2, 3.0))):
            with pytest.raises(ValueError, match="trained on"):
                load_adapter(model, saved)
        load_adapter(other, saved, check_base=False)
        assert torch.equal(other.out.A, adapted().out.A)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_the_base_in_another_precision(self, saved, dtype):
        loaded = load_adapter(Toy().to(dtype), saved)
        tolerance = 0.2 if dtype == torch.bfloat16 else 0.02
        torch.testing.assert_close(loaded(x(dtype)).float(), adapted()(x()),
                                   rtol=tolerance, atol=tolerance)

    def test_a_base_with_an_adapter_merged_into_it_is_another(self, saved, unchanged):
        model = merge(adapted())
        with unchanged(model), pytest.raises(ValueError, match="trained on"):
            load_adapter(model, saved)

    def test_another_shape(self, saved, unchanged):
        model = Toy(width=8)
        message = r"block.fc: .*\(2, 6\).*expected \(2, 8\)"
        with unchanged(model), pytest.raises(ValueError, match=message):
            load_adapter(model, saved)

    def test_a_deeper_base(self, unchanged, tmp_path):
        model = adapted(["fc", "block.fc", "1"])               # "fc" in the file stands for two
        save_adapter(model, tmp_path)
        deeper = Toy()
        deeper.more = nn.ModuleDict({"fc": nn.Linear(6, 6)})
        message = "names 1 modules of this model.*such as more.fc: is it another base"
        with unchanged(deeper), pytest.raises(ValueError, match=message):
            load_adapter(deeper, tmp_path)

    def test_another_architecture(self, saved, unchanged):
        model = nn.Sequential(nn.Linear(6, 6))
        with unchanged(model), pytest.raises(ValueError, match="no block.fc.*another base"):
            load_adapter(model, saved)

    @pytest.mark.parametrize("module, error, message", [
        (nn.ReLU(), TypeError, "block.fc is a ReLU"),
        (nn.Bilinear(6, 6, 6), TypeError, "block.fc is a Bilinear"),
        (nn.Conv1d(6, 6, 1), TypeError, "block.fc is a Conv1d"),
    ])
    def test_a_module_of_another_kind(self, saved, module, error, message, unchanged):
        model = Toy()
        model.block["fc"] = module
        with unchanged(model), pytest.raises(error, match=message):
            load_adapter(model, saved)

    def test_tied_weights(self, saved, unchanged):
        model = Toy()
        model.fc.weight = model.block["fc"].weight
        with unchanged(model), pytest.raises(ValueError, match="shares its weight"):
            load_adapter(model, saved, check_base=False)


class TestOverAnAdapter:
    @pytest.mark.parametrize("options, message", [
        ({"targets": ["block.fc"]}, r"differ in \['out'\]"),
        ({"targets": ["block.fc", "fc", "out"]}, r"differ in \['fc'\]"),
        ({"rank": 3}, "the model has .*3, 3.0, False.*the file .*2, 3, False"),
        ({"alpha": 4.0}, "the model has .*2, 4.0"),
        ({"use_rslora": True}, "the model has .*True"),
    ], ids=str)
    def test_it_must_be_the_same(self, saved, options, message, unchanged):
        model = adapted(**options)
        with unchanged(model), pytest.raises(ValueError, match=message):
            load_adapter(model, saved)

    def test_not_while_merged(self, saved, unchanged):
        model = merge(adapted(), keep_adapters=True)
        with unchanged(model), pytest.raises(ValueError, match="merged; unmerge"):
            load_adapter(model, saved)


def nan(tensors):
    next(iter(tensors.values()))[0, 0] = float("nan")


def infinity(tensors):
    next(iter(tensors.values()))[-1, -1] = -float("inf")


def too_large(tensors):
    key = next(iter(tensors))
    tensors[key] = tensors[key].double() * 1e300


def under_two_names(tensors):
    key = "base_model.model.block.fc.lora_A.weight"
    tensors[key.replace("block.fc", "block._orig_mod.fc")] = tensors[key] * 2


def without_a_B(tensors):
    del tensors["base_model.model.out.lora_B.weight"]


def with_more(tensors):
    tensors["base_model.model.lm_head.weight"] = torch.ones(3, 3)


def with_a_magnitude(tensors):
    tensors["base_model.model.out.lora_magnitude_vector.weight"] = torch.ones(3)


def with_another_prefix(tensors):
    return {key.removeprefix("base_model.model."): t for key, t in tensors.items()}


def of_integers(tensors):
    return {key: t.to(torch.int32) for key, t in tensors.items()}


def flat(tensors):
    return {key: t.flatten() for key, t in tensors.items()}


def transposed(tensors):
    return {key: t.T.contiguous() for key, t in tensors.items()}


def of_rank_3(tensors):
    return {key: torch.ones(3, t.shape[1]) if "lora_A" in key else torch.ones(t.shape[0], 3)
            for key, t in tensors.items()}


def wide_A(tensors):
    tensors["base_model.model.out.lora_A.weight"] = torch.ones(2, 7)


def empty(tensors):
    tensors.clear()
    return {}


@pytest.fixture(params=["fresh", "adapted"])
def target(request):
    """What an adapter is loaded into: a plain model, or one that has such an adapter."""
    return Toy() if request.param == "fresh" else randomize(adapted(), seed=5)


class TestDamage:
    @pytest.mark.parametrize("change, message", [
        (nan, "NaN or infinity"), (infinity, "NaN or infinity"), (too_large, "large for float32"),
        (under_two_names, "holds .*block.fc.lora_A.weight twice"), (without_a_B, "out has no lora_B"),
        (with_more, "lm_head.weight .* not the A or B"), (with_a_magnitude, "magnitude.* not the"),
        (with_another_prefix, "not the A or B"), (of_integers, "not the A or B"),
        (flat, "not the A or B"), (transposed, "have shapes"), (of_rank_3, r"have shapes \(3, 6\)"),
        (wide_A, r"out: .*\(2, 7\).*expected \(2, 6\)"), (empty, "no adapter"),
    ], ids=lambda v: getattr(v, "__name__", ""))
    def test_tensors(self, saved, target, change, message, unchanged):
        rewrite(saved, change)
        with unchanged(target), pytest.raises(ValueError, match=message):
            load_adapter(target, saved)

    @pytest.mark.parametrize("changes, error, message", [
        ({"r": 3}, ValueError, "have shapes|the file"),
        ({"r": None}, ValueError, "'r' is missing"),
        ({"lora_alpha": None}, ValueError, "'lora_alpha' is missing"),
        ({"r": "2"}, ValueError, "must be an integer of at least 1, got '2'"),
        ({"r": 2.5}, ValueError, "must be an integer of at least 1, got 2.5"),
        ({"r": True}, ValueError, "must be an integer of at least 1, got True"),
        ({"lora_alpha": "16"}, ValueError, "must be a finite number, below 1e38, got '16'"),
        ({"lora_alpha": float("nan")}, ValueError, "a finite number.*got nan"),
        ({"lora_alpha": 10**400}, ValueError, "too large|below 1e38|the file"),
        ({"lora_alpha": True}, ValueError, "must be a finite number, below 1e38, got True"),
        ({"peft_type": None}, ValueError, "peft_type"),
        ({"rank_pattern": {"out": 3}}, ValueError, "out: .*have shapes|out: the model"),
        ({"rank_pattern": {"(": 3}}, ValueError, r"rank_pattern: '\(' is no regular expression"),
        ({"alpha_pattern": {"*": 3}}, ValueError, r"alpha_pattern: '\*' is no regular expression"),
        ({"alpha_pattern": ["out"]}, ValueError, r"alpha_pattern must be an object, got \['out'\]"),
        ({"use_dora": True}, ValueError, "use_dora = True is not supported"),
        ({"bias": "lora_only"}, ValueError, "bias = 'lora_only' is not supported"),
        ({"init_lora_weights": "loftq"}, ValueError, "'loftq' changed the base"),
    ], ids=lambda v: str(v) if isinstance(v, dict) else "")
    def test_settings(self, saved, target, changes, error, message, unchanged):
        edit(saved, **changes)
        with unchanged(target), pytest.raises(error, match=message):
            load_adapter(target, saved)

    @pytest.mark.parametrize("dropout", [2, -1, "0.1", float("nan")])
    def test_a_dropout_that_cannot_be(self, saved, dropout, unchanged):
        edit(saved, lora_dropout=dropout)
        model = Toy()
        with unchanged(model), pytest.raises((TypeError, ValueError), match="dropout must be"):
            load_adapter(model, saved)

    @pytest.mark.parametrize("text", [b"", b"[]", b"null", b"\xff\xfe", b'{"peft_type": "LORA"'])
    def test_a_configuration_that_is_none(self, saved, target, text, unchanged):
        (saved / CONFIG).write_bytes(text)
        with unchanged(target), pytest.raises(ValueError, match=CONFIG):
            load_adapter(target, saved)

    def test_truncated_anywhere(self, saved, target, unchanged):
        whole = (saved / WEIGHTS).read_bytes()
        lengths = {0, 1, 7, 8, 9, len(whole) - 1, *range(0, len(whole), 61)}
        with unchanged(target):
            for length in sorted(lengths):
                (saved / WEIGHTS).write_bytes(whole[:length])
                with pytest.raises(ValueError, match=f"{WEIGHTS} is damaged"):
                    load_adapter(target, saved)
        (saved / WEIGHTS).write_bytes(whole)
        load_adapter(target, saved)

    def test_longer_than_it_should_be(self, saved, target, unchanged):
        with open(saved / WEIGHTS, "ab") as file:
            file.write(b"\0" * 8)
        with unchanged(target), pytest.raises(ValueError, match="damaged"):
            load_adapter(target, saved)

    def sort_out(self, target, contents, file, unchanged):
        """Load each of `contents` from `file`: the numbers of the refused, what the rest gave."""
        refused, loaded = [], {}
        for i, content in enumerate(contents):
            file.write_bytes(content)
            try:
                loaded[i] = lora_state_dict(load_adapter(copy.deepcopy(target), file.parent))
            except (TypeError, ValueError):
                refused.append(i)
        with unchanged(target):
            for i in refused:
                file.write_bytes(contents[i])
                with pytest.raises((TypeError, ValueError)):
                    load_adapter(target, file.parent)
        return refused, loaded

    @pytest.mark.parametrize("mask", [0x01, 0x80])
    def test_a_flipped_byte_of_the_weights_is_noticed_or_harmless(self, saved, target, mask,
                                                                  unchanged):
        whole = (saved / WEIGHTS).read_bytes()
        data = 8 + int.from_bytes(whole[:8], "little")           # where the header ends
        places = [*range(mask % 7, data, 7), *range(data, len(whole), 5)]
        contents = [whole[:i] + bytes([whole[i] ^ mask]) + whole[i + 1:] for i in places]
        _, loaded = self.sort_out(target, contents, saved / WEIGHTS, unchanged)
        expected = lora_state_dict(adapted())
        for i, state in loaded.items():
            assert places[i] < data                              # no value changes unnoticed
            assert all(torch.equal(t, expected[key]) for key, t in state.items())

    def test_a_flipped_byte_of_the_configuration(self, saved, target, unchanged):
        whole = (saved / CONFIG).read_bytes()
        contents = [whole[:i] + bytes([whole[i] ^ 0x10]) + whole[i + 1:]
                    for i in range(0, len(whole), 3)]
        refused, loaded = self.sort_out(target, contents, saved / CONFIG, unchanged)
        assert len(refused) > 20 and loaded

    @pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern"])
    def test_a_regular_expression_without_end(self, saved, target, key, unchanged, monkeypatch):
        monkeypatch.setattr("lora_lib.torch.peft_format.PATIENCE", 0.5)
        monkeypatch.setattr(target, "block", nn.ModuleDict({"a" * 60: nn.Linear(6, 6)}))
        edit(saved, **{key: {r"(\w+\.?)+!": 2} if "pattern" in key else r"(\w+\.?)+!"})
        with unchanged(target), pytest.raises(ValueError, match="expressions take more than 0.5 s"):
            load_adapter(target, saved)

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
    def test_stored_as_float8(self, saved, dtype):
        rewrite(saved, lambda tensors: {key: t.to(dtype) for key, t in tensors.items()})
        model = load_adapter(Toy(), saved)
        assert torch.equal(model.out.B, adapted().out.B.to(dtype).float())

    @pytest.mark.parametrize("gone", [CONFIG, WEIGHTS, "."])
    def test_missing(self, saved, target, gone, unchanged):
        shutil.rmtree(saved) if gone == "." else (saved / gone).unlink()
        with unchanged(target), pytest.raises(FileNotFoundError, match=str(saved)):
            load_adapter(target, saved)

    def test_a_file_where_the_folder_should_be(self, tmp_path, target, unchanged):
        path = tmp_path / "file"
        path.write_text("mine")
        with unchanged(target):
            with pytest.raises(OSError, match=str(path)):
                load_adapter(target, path)
            with pytest.raises(FileExistsError, match=str(path)):
                save_adapter(adapted(), path)
        assert path.read_text() == "mine"


class TestSaving:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_not_finite_is_refused(self, saved, value):
        before, model = files(saved), adapted()
        with torch.no_grad():
            model.out.B[1, 1] = value
        with pytest.raises(ValueError, match="out.lora_B.weight holds NaN or infinity"):
            save_adapter(model, saved)
        assert files(saved) == before

    @pytest.mark.parametrize("make, message", [
        (Toy, "no LoRALinear"), (lambda: merge(adapted()), "no LoRALinear"),
        (lambda: LoRALinear(nn.Linear(4, 4), 2), "with a name"),
    ])
    def test_no_adapter(self, make, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            save_adapter(make(), tmp_path / "new")
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("option", [{"dropout": 0.5}, {"use_rslora": True}])
    def test_what_pefts_format_has_no_place_for(self, option, tmp_path):
        model = inject(adapted(["out"]), "block.fc", 2, 3.0, **option)
        with pytest.raises(ValueError, match=f"one {next(iter(option))} for all adapters"):
            save_adapter(model, tmp_path / "new")
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("when", ["tensors", "settings"])
    @pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
    @pytest.mark.parametrize("old", [False, True])
    def test_an_error_inside_the_write(self, old, error, when, tmp_path, monkeypatch):
        folder = tmp_path / "adapter"
        if old:
            save_adapter(adapted(), folder)
        before = files(folder) if old else {}

        def half(path, *_, **__):
            with open(path, "w") as file:
                file.write("half")
            raise error

        def half_of_the_tensors(tensors, path, metadata):
            half(path)

        if when == "tensors":
            monkeypatch.setattr("lora_lib.torch.checkpoint.save_file", half_of_the_tensors)
        else:
            monkeypatch.setattr(Path, "write_text", half)
        with pytest.raises(type(error)):
            save_adapter(adapted(["fc"], rank=3), folder)
        assert files(folder) == before                           # no temporary files either

    def test_killed_at_every_point_of_a_write(self, saved):
        """A process that dies in the write of the tensors, of the settings, or between the two."""
        script = f"""
import importlib.util, os, pathlib, signal, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from lora_lib.torch import checkpoint, load_adapter
spec = importlib.util.spec_from_file_location("tests", {__file__!r})
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def half(path, *_, **__):
    with open(path, "w") as file:
        file.write("half")
        file.flush()
        die()

def child(point):
    if point == "tensors":
        checkpoint.save_file = lambda tensors, path, *_: half(path)
    elif point == "settings":
        pathlib.Path.write_text = half
    else:                                       # after one of the two has taken its place
        replace, calls = os.replace, []
        os.replace = lambda *paths: die() if calls else (calls.append(1), replace(*paths))
    checkpoint.save_adapter(tests.adapted(alpha=5.0), pathlib.Path({str(saved)!r}))

for point in ("tensors", "settings", "between"):
    pid = os.fork()
    if not pid:
        child(point)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), point
    adapter = load_adapter(tests.Toy(), {str(saved)!r})
    old = tests.adapted()
    assert all(torch.equal(a, b) for a, b in
               zip(tests.lora_parameters(adapter), tests.lora_parameters(old))), point
    if point != "between":
        assert adapter.out.alpha == 3, point
print("done")
"""
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                             env=os.environ | {"OMP_NUM_THREADS": "1"})    # threads and fork
        assert run.stdout == "done\n", run.stderr


@pytest.mark.gpu
def test_from_a_gpu_to_the_cpu_and_back(tmp_path):
    model = adapted().cuda()
    save_adapter(model, tmp_path)
    torch.testing.assert_close(load_adapter(Toy(), tmp_path)(x()), model(x().cuda()).cpu())
    loaded = load_adapter(Toy().cuda(), tmp_path)
    assert all(p.is_cuda for p in lora_parameters(loaded))
    torch.testing.assert_close(loaded(x().cuda()), model(x().cuda()))
