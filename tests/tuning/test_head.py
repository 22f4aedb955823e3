"""Losses at the labels against the cross-entropy of all logits, with every gradient."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lib.torch import inject, lora_parameters
from lora_lib.tuning import head as room
from lora_lib.tuning.data import Rows, encode
from lora_lib.tuning.head import Causal, logits_at_labels, may_share
from lora_lib.tuning.loop import cross_entropy, fine_tune
from tests.tuning.tiny import PAIRS, byte_tokenizer, causal

KINDS = ("llama", "qwen2", "gpt2", "phi")
each_kind = pytest.mark.parametrize("kind", KINDS)
SYSTEM = {"role": "system", "content": "Answer with a flower or a thing that has the colour."}


def batch(common=12, rows=5, length=30, seed=0):
    """Random rows that begin with `common` tokens without a label, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(1, 257, (rows, length), generator=generator)
    labels = torch.randint(1, 257, (rows, length), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.4] = -100
    inputs[:, :common] = inputs[0, :common]
    labels[:, :common] = -100
    for i in range(rows):
        inputs[i, length - i:], labels[i, length - i:] = 0, -100
    return inputs, labels


def gradients(model, value):
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    return dict(zip(names, torch.autograd.grad(value, parameters)))


def assert_same(model, inputs, labels, parts=None):
    """Our loss and its gradients are those of the cross-entropy of all logits, in float64.

    Llama's norms compute in float32 all the same, and round a sum over rows that share a beginning
    once where they round it row by row otherwise, and over fewer positions where the last have no
    label.
    """
    parts = parts or Causal.of(model)
    ours, theirs = parts.loss(inputs, labels), cross_entropy(model(inputs), labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    limit = 1e-6 if parts._common(inputs, labels) or (labels[:, -1] == -100).all() else 1e-10
    ours, theirs = gradients(model, ours), gradients(model, theirs)
    for name in theirs:
        assert (ours[name] - theirs[name]).norm() <= limit * theirs[name].norm(), name


# --- the loss and its gradients -----------------------------------------------------------------

@each_kind
@pytest.mark.parametrize("common", [0, 7, 12])
def test_the_loss_and_every_gradient_of_a_whole_model(kind, common):
    """All is trained: the tied head of three, and Phi's own head with its bias."""
    model = causal(kind, torch.float64)
    parts = Causal.of(model)
    assert parts.shares and (parts.head.bias is not None) == (kind == "phi")
    assert (parts.head.weight is model.get_input_embeddings().weight) == (kind != "phi")
    inputs, labels = batch(common)
    assert parts._common(inputs, labels) == (common if common >= room.SHORTEST else 0)
    assert_same(model, inputs, labels)


@each_kind
@pytest.mark.parametrize("common", [0, 12])
def test_the_loss_and_the_gradients_of_adapters_under_a_frozen_head(kind, common):
    model = inject(causal(kind, torch.float64), "all-linear", rank=2, seed=0, dtype=torch.float64)
    for p in lora_parameters(model):
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    assert_same(model, *batch(common))


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_the_head_trained_alone(part):
    model = causal("phi", torch.float64).requires_grad_(False)
    getattr(model.lm_head, part).requires_grad_(True)
    assert_same(model, *batch())


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_the_chunks_do_not_change_the_loss(monkeypatch, chunk):
    monkeypatch.setattr(room, "CHUNK", chunk)
    assert_same(causal("phi", torch.float64), *batch())


def test_one_row_and_one_label():
    model = causal("llama", torch.float64)
    inputs, labels = batch()
    assert_same(model, inputs[:1], labels[:1])
    alone = torch.full_like(labels, -100)
    alone[2, 20] = 9
    assert_same(model, inputs, alone)


def test_rows_that_are_the_same_to_the_end():
    """A common beginning is never the whole row: something must be left to read it."""
    model = causal("llama", torch.float64)
    inputs = torch.arange(20).repeat(3, 1)
    labels = torch.full_like(inputs, -100)
    labels[1, -1] = 4
    assert_same(model, inputs, labels)
    parts = Causal.of(model)
    assert parts._common(inputs, torch.full_like(inputs, -100)) == 0


@pytest.mark.parametrize("common", [0, 12])
def test_rows_without_a_label_have_no_states(common):
    model, (inputs, labels) = causal("llama", torch.float64), batch(common)
    states, some, rows = Causal.of(model).states(inputs, torch.full_like(labels, -100))
    assert states.shape == (0, 32) and not len(some) and not len(rows)


def test_the_factor_from_above_reaches_every_gradient():
    model = causal("phi", torch.float64)
    parts, (inputs, labels) = Causal.of(model), batch()
    once = gradients(model, parts.loss(inputs, labels))
    thrice = gradients(model, 3 * parts.loss(inputs, labels))
    for name in once:
        torch.testing.assert_close(thrice[name], 3 * once[name], rtol=1e-9, atol=1e-12)


def test_in_16_bits_the_loss_is_summed_in_float32():
    model = causal("llama", torch.bfloat16)
    inputs, labels = batch()
    ours = Causal.of(model).loss(inputs, labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, cross_entropy(model(inputs), labels), rtol=5e-3, atol=0)


def test_under_autocast_the_loss_is_the_one_of_autocast():
    model, (inputs, labels) = causal("llama"), batch()
    parts = Causal.of(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = parts.loss(inputs, labels), cross_entropy(model(inputs), labels)
    torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=0)
    ours, theirs = gradients(model, ours), gradients(model, theirs)
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype
        assert (ours[name] - theirs[name]).norm() < 0.05 * theirs[name].norm()


@each_kind
def test_logits_at_labels_are_the_models_own(kind, monkeypatch):
    monkeypatch.setattr(room, "CHUNK", 7)
    model, (inputs, labels) = causal(kind, torch.float64), batch()
    asked = labels != -100
    with torch.no_grad():
        whole = model(inputs).logits[asked]
    for parts in (Causal.of(model), None):
        logits, some, rows = (torch.cat(t) for t in
                              zip(*logits_at_labels(model, parts, inputs, labels)))
        torch.testing.assert_close(logits, whole, rtol=1e-9, atol=1e-9)
        assert torch.equal(some, labels[asked]) and torch.equal(rows, asked.nonzero()[:, 0])


# --- what is never made -------------------------------------------------------------------------

class Largest(TorchDispatchMode):
    """The most numbers in any tensor (..., vocabulary) that is not a view of a weight."""

    def __init__(self, model):
        super().__init__()
        self.weights = {p.data_ptr() for p in model.parameters()}
        self.size, self.most = model.config.vocab_size, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if (isinstance(t, torch.Tensor) and t.shape[-1:] == (self.size,)
                    and t.data_ptr() not in self.weights):
                self.most = max(self.most, t.numel())
        return out


def test_all_logits_are_never_held(monkeypatch):
    monkeypatch.setattr(room, "CHUNK", 4)
    model = inject(causal("llama"), "all-linear", rank=2, seed=0)
    inputs, labels = batch()
    parts = Causal.of(model)
    with Largest(model) as seen:
        parts.loss(inputs, labels).backward()
    assert seen.most == 4 * 257
    with Largest(model) as seen:
        cross_entropy(model(inputs), labels).backward()
    assert seen.most == inputs.numel() * 257                 # the measure sees them where they are


@pytest.mark.parametrize("common", [0, 12])
def test_a_common_beginning_is_computed_once(common):
    model, (inputs, labels) = causal("llama"), batch(common)
    parts, seen = Causal.of(model), []
    handle = model.model.layers[0].mlp.register_forward_hook(
        lambda module, args, out: seen.append(tuple(args[0].shape[:2])))
    parts.loss(inputs, labels)
    handle.remove()
    end = int((labels != -100).any(0).nonzero().max()) + 1   # what follows is not computed at all
    assert end < 30 and seen == ([(1, 12), (5, end - 12)] if common else [(5, end)])


# --- which models, and when ---------------------------------------------------------------------

@pytest.mark.parametrize("kind, options", [
    ("gemma2", {}), ("cohere", {}),                          # logits bent at 30; logits / 16
    ("cohere", {"logit_scale": 1.0}), ("gemma2", {"final_logit_softcapping": None})])
@pytest.mark.parametrize("std", [0.02, 0.4])
def test_a_model_that_changes_its_logits_is_left_whole(kind, options, std):
    """With small weights a logit is far from where Gemma bends it, until training makes it large.
    Where neither is done, the same architectures are taken apart."""
    model = causal(kind, torch.float64, std, **options)
    parts = Causal.of(model)
    assert (parts is None) == (not options)
    if parts:
        assert_same(model, *batch(), parts)


def test_what_is_no_causal_model_is_left_whole():
    from transformers import AutoModel, BertConfig
    bert = AutoModel.from_config(BertConfig(hidden_size=32, num_hidden_layers=1,
                                            num_attention_heads=2, intermediate_size=32))
    assert Causal.of(bert) is None and Causal.of(torch.nn.Linear(3, 3)) is None


def test_the_model_is_left_as_it_was():
    model = causal("llama").train()
    model.lm_head.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    Causal.of(model)
    assert model.training and not model.lm_head.training and not model.lm_head._forward_hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def with_adapter_dropout():
    return inject(causal("llama", torch.float64), "all-linear", rank=2, dropout=0.3, seed=0)


def with_checkpointing():
    model = causal("llama", torch.float64)
    model.gradient_checkpointing_enable()
    return model


@pytest.mark.parametrize("build", [
    with_adapter_dropout, with_checkpointing, lambda: causal("gpt2 with dropout", torch.float64),
    lambda: causal("llama", torch.float64, attention_dropout=0.1),
    lambda: causal("qwen2", torch.float64, use_sliding_window=True, sliding_window=9,
                   max_window_layers=1)])
def test_the_beginning_is_not_shared_where_that_would_change_something(build):
    model = build()
    assert not may_share(model) and not Causal.of(model).shares
    assert_same(model.eval(), *batch())


def test_the_loss_under_gradient_checkpointing():
    model = with_checkpointing().train()
    assert_same(model, *batch())


# --- in the training loop -----------------------------------------------------------------------

def system_rows():
    return encode(byte_tokenizer(), [[SYSTEM, {"role": "user", "content": f"{prompt} {i}"},
                                      {"role": "assistant", "content": answer * (1 + i % 3)}]
                                     for i, (prompt, answer) in enumerate(PAIRS * 3)])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_training_goes_step_by_step_as_with_all_logits(kind, monkeypatch):
    def trained():
        model = inject(causal(kind, torch.float64), "all-linear", rank=4, seed=0,
                       dtype=torch.float64)
        losses = fine_tune(model, system_rows(), steps=12, batch_size=4, lr=1e-2, progress=False)
        return model, losses

    ours, losses = trained()
    monkeypatch.setattr(Causal, "of", lambda model: None)
    theirs, expected = trained()
    assert losses == pytest.approx(expected, rel=1e-6) and losses[-1] < losses[0]
    for left, right in zip(lora_parameters(ours), lora_parameters(theirs), strict=True):
        assert (left - right).norm() <= 1e-4 * right.norm()


@pytest.mark.parametrize("size", [1, 2, 3, 99])
@pytest.mark.parametrize("kind, shares", [("llama", True), ("gpt2", True), ("gemma2", False)])
def test_parts_of_a_batch_take_the_step_of_the_whole(kind, shares, size):
    """Answers of many lengths; a common beginning still goes through the model once."""
    def trained(seen, **options):
        model = inject(causal(kind, torch.float64, final_logit_softcapping=None), "all-linear",
                       rank=4, seed=0, dtype=torch.float64)
        parts = Causal.of(model)
        layer = next(m for n, m in model.named_modules() if n.endswith("mlp"))
        layer.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
        losses = fine_tune(model, system_rows(), steps=6, batch_size=5, lr=1e-2, progress=False,
                           **options)
        return model, losses, parts.shares

    seen, in_parts = [], []
    whole, expected, _ = trained(seen)
    ours, losses, shared = trained(in_parts, micro_batch_size=size)
    a_step = {1: [1] * 5, 2: [2, 2, 1], 3: [3, 2], 99: [5]}[size]
    assert shared == shares
    assert in_parts[-6 * len([1] * shares + a_step):] == ([1] * shares + a_step) * 6
    assert losses == pytest.approx(expected, rel=1e-6)
    for left, right in zip(lora_parameters(ours), lora_parameters(whole), strict=True):
        assert (left - right).norm() <= 1e-4 * right.norm()


def test_parts_hold_less_at_a_time():
    """Every tensor that autograd keeps, at its highest: with the parts one row, a small part."""
    from torch.autograd.graph import saved_tensors_hooks

    def most(**options):
        held = peak = 0

        def keep(tensor):
            nonlocal held, peak
            box = [tensor, tensor.numel() if tensor.ndim > 2 else 0]
            held += box[1]
            peak = max(peak, held)
            return box

        def give(box):
            nonlocal held
            held -= box[1]
            box[1] = 0
            return box[0]

        model = inject(causal("llama"), "all-linear", rank=2, seed=0)
        with saved_tensors_hooks(keep, give):
            fine_tune(model, system_rows(), steps=1, batch_size=8, progress=False, **options)
        return peak

    assert most(micro_batch_size=1) < 0.4 * most()


def test_a_loss_of_ones_own_gets_all_logits():
    seen = []

    def loss(outputs, labels):
        seen.append(outputs.logits.shape[:2] == labels.shape)
        return cross_entropy(outputs, labels)

    model = inject(causal("llama"), "all-linear", rank=2, seed=0)
    fine_tune(model, system_rows(), steps=2, batch_size=4, loss=loss, progress=False)
    assert seen == [True, True]


class Recording(Rows):
    """Rows that note which of them every batch takes."""

    def batch(self, numbers):
        self.taken.append(numbers.tolist())
        return super().batch(numbers)


def taken(rows, seed=0, **options):
    recording = Recording(rows.inputs, rows.labels, rows.pad)
    object.__setattr__(recording, "taken", [])
    model = inject(causal("llama"), ["q_proj"], rank=2, seed=0)
    fine_tune(model, recording, seed=seed, progress=False, **options)
    return recording.taken


def test_every_row_is_used_once_in_each_epoch():
    rows = system_rows()
    batches = taken(rows, steps=9, batch_size=4)             # three epochs of 12 rows
    for epoch in range(3):
        assert sorted(sum(batches[3 * epoch:3 * epoch + 3], [])) == list(range(12))
    assert batches != taken(rows, seed=1, steps=9, batch_size=4)
    assert batches == taken(rows, steps=9, batch_size=4)
    assert len({tuple(map(tuple, batches[i:i + 3])) for i in (0, 3, 6)}) > 1


def test_rows_that_do_not_fill_the_batches_are_used_equally_often():
    batches = taken(system_rows(), steps=24, batch_size=5)   # 120 rows out of 12: ten epochs
    uses = torch.bincount(torch.tensor(sum(batches, [])), minlength=12)
    assert all(len(batch) == 5 for batch in batches) and uses.tolist() == [10] * 12


def test_rows_of_like_length_share_a_batch():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 60, (64,), generator=generator).tolist()
    rows = Rows([torch.ones(n, dtype=torch.long) for n in lengths],
                [torch.ones(n, dtype=torch.long) for n in lengths], 0)
    padding = lambda batches: sum(  # noqa: E731
        4 * max(lengths[i] for i in some) - sum(lengths[i] for i in some) for some in batches)
    ours = taken(rows, steps=16, batch_size=4)
    drawn = torch.randperm(64, generator=generator).view(16, 4).tolist()
    assert padding(ours) < 0.2 * padding(drawn)
    longest = [max(lengths[i] for i in some) for some in ours]
    assert longest != sorted(longest)                        # and the batches come in any order


def test_a_run_on_rows_resumes_bit_for_bit(tmp_path):
    rows, path = system_rows(), tmp_path / "run.safetensors"
    build = lambda: inject(causal("llama"), "all-linear", rank=2, seed=0)  # noqa: E731
    options = {"batch_size": 5, "lr": 1e-2, "progress": False}
    whole, first, second = build(), build(), build()
    losses = fine_tune(whole, rows, steps=9, **options)
    fine_tune(first, rows, steps=4, checkpoint=path, **options)
    assert fine_tune(second, rows, steps=9, checkpoint=path, **options) == losses
    assert all(torch.equal(a, b) for a, b in zip(lora_parameters(second), lora_parameters(whole)))


def test_a_checkpoint_of_other_rows_is_refused(tmp_path):
    rows, path = system_rows(), tmp_path / "run.safetensors"
    options = {"batch_size": 4, "checkpoint": path, "progress": False}
    build = lambda: inject(causal("llama"), ["q_proj"], rank=2, seed=0)  # noqa: E731
    fine_tune(build(), rows, steps=2, **options)
    unlearned = [*rows.labels[:3], torch.full_like(rows.labels[3], -100), *rows.labels[4:]]
    cut = lambda part: [part[0][:-1], torch.cat([part[0][-1:], part[1]]), *part[2:]]  # noqa: E731
    for other in (Rows(rows.inputs, unlearned, rows.pad), Rows(rows.inputs[1:], rows.labels[1:], 0),
                  Rows(cut(rows.inputs), cut(rows.labels), rows.pad)):
        with pytest.raises(ValueError, match="data: "):
            fine_tune(build(), other, steps=4, **options)


def test_rows_without_a_label_are_refused():
    model = inject(causal("llama"), ["q_proj"], rank=2, seed=0)
    rows = Rows([torch.ones(5, dtype=torch.long)] * 2, [torch.full((5,), -100)] * 2, 0)
    with pytest.raises(ValueError, match="every one is -100"):
        fine_tune(model, rows, steps=1, batch_size=2, progress=False)
    with pytest.raises(ValueError, match="batch_size = 20 is more than the 12 rows"):
        fine_tune(model, system_rows(), steps=1, batch_size=20, progress=False)
