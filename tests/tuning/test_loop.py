"""fine_tune against loops written out by hand, and against itself cut short and resumed."""

import functools
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lora_lib.torch.inject import inject, merge
from lora_lib.torch.parts import lora_parameters
from lora_lib.tuning import loop
from lora_lib.tuning.loop import cross_entropy, fine_tune, warmup_cosine

gpu = pytest.mark.gpu


def network(dtype=torch.float64, dropout=0.0, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(dropout),
                         nn.Linear(16, 4)).to(dtype)


def adapted(dtype=torch.float64, dropout=0.0, seed=0):
    return inject(network(dtype, seed=seed), ["0", "3"], rank=2, alpha=4.0, dropout=dropout, seed=1)


def examples(n=10, dtype=torch.float64, seed=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(4, (n,), generator=generator)


def run(model, data=None, **options):
    data = examples(dtype=[*model.parameters()][-1].dtype) if data is None else data
    options = {"steps": 7, "batch_size": 4, "lr": 0.05, "progress": False} | options
    return fine_tune(model, data, **options)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def orders(n, batch_size, steps, seed=0):
    """Which rows each step takes: permutations laid end to end, cut into batches."""
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(n, generator=generator) for _ in range(steps * batch_size // n + 1)]
    return torch.cat(epochs)[:steps * batch_size].view(steps, batch_size)


# --- the steps themselves -----------------------------------------------------------------------

@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("build", [network, adapted])
def test_equals_a_plain_adamw_loop_bit_for_bit(build, weight_decay):
    model, twin = build(), build()
    losses = run(model, weight_decay=weight_decay, max_grad_norm=None)

    x, y = examples()
    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=0.05,
                                  weight_decay=weight_decay)
    expected = []
    for rows in orders(10, 4, 7):
        value = F.cross_entropy(twin(x[rows]), y[rows])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        expected.append(value.item())
    assert losses == expected
    assert equal(state(model), state(twin))


def test_one_step_is_adams_formula():
    model = nn.Linear(6, 4, bias=False).double()
    before, (x, y) = model.weight.detach().clone(), examples(4)
    g = torch.autograd.grad(F.cross_entropy(model(x), y), model.weight)[0]
    run(model, (x, y), steps=1, batch_size=4, max_grad_norm=None)
    expected = before - 0.05 * g / (g.abs() + 1e-8)       # both moments, corrected, are g and g^2
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-6, atol=1e-10)


def test_clipping_scales_the_whole_gradient_to_the_norm():
    limit, data = 0.01, examples(4)
    model, free = network(), network()
    seen = []

    def record(optimizer, *_):
        seen.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])

    handle = register_optimizer_step_pre_hook(record)
    try:
        run(model, data, steps=1, max_grad_norm=limit)
        run(free, data, steps=1, max_grad_norm=None)
    finally:
        handle.remove()
    clipped, whole = seen
    norm = math.sqrt(sum(float((g ** 2).sum()) for g in whole))
    assert norm > limit
    for c, g in zip(clipped, whole):
        torch.testing.assert_close(c, g * limit / norm, rtol=1e-4, atol=0)


def test_a_loose_clip_changes_nothing():
    model, free = network(), network()
    assert run(model, max_grad_norm=1e6) == run(free, max_grad_norm=None)
    assert equal(state(model), state(free))


def test_every_row_once_in_each_epoch():
    seen = []

    class Recorder(nn.Linear):
        def forward(self, x):
            seen.append(x[:, 0].clone())
            return super().forward(x)

    x = torch.arange(10.0)[:, None].expand(10, 6).contiguous()
    run(Recorder(6, 4), (x, torch.zeros(10, dtype=torch.long)), steps=10, batch_size=4)
    rows = torch.cat(seen).view(4, 10)                     # 40 rows: four epochs of ten
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in rows)
    assert not torch.equal(rows[0], rows[1])
    assert all(len(batch) == 4 for batch in seen)


def test_only_the_adapters_change():
    model = adapted()
    before = state(model)
    run(model)
    changed = {name for name, t in state(model).items() if not torch.equal(t, before[name])}
    assert changed == {"0.A", "0.B", "3.A", "3.B"}


def test_full_fine_tuning_changes_everything_and_lowers_the_loss():
    model = network()
    before = state(model)
    losses = run(model, steps=60)
    assert all(not torch.equal(t, before[name]) for name, t in state(model).items())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_a_parameter_that_the_loss_does_not_reach_stays():
    model = network()
    model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    run(model)
    assert torch.equal(model.unused.detach(), torch.ones(3, dtype=torch.float64))


def test_the_schedule_is_the_learning_rate_of_each_step():
    factors = [0.5, 0.0, 2.0]
    model, twin = network(), network()
    run(model, steps=3, schedule=lambda step: factors[step], max_grad_norm=None)
    x, y = examples()
    optimizer = torch.optim.AdamW(twin.parameters(), weight_decay=0)
    for rows, factor in zip(orders(10, 4, 3), factors):
        optimizer.param_groups[0]["lr"] = 0.05 * factor
        optimizer.zero_grad()
        F.cross_entropy(twin(x[rows]), y[rows]).backward()
        optimizer.step()
    assert equal(state(model), state(twin))


def test_warmup_cosine():
    schedule = warmup_cosine(10, warmup=4, final=0.1)
    assert [schedule(s) for s in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert schedule(4) == 1.0
    assert schedule(7) == pytest.approx(0.55)              # halfway down, between 1 and 0.1
    assert schedule(10) == schedule(99) == pytest.approx(0.1)
    assert all(schedule(s) > schedule(s + 1) for s in range(4, 10))
    with pytest.raises(ValueError, match="warmup must be between 0 and steps - 1 = 9, got 10"):
        warmup_cosine(10, warmup=10)


def test_cross_entropy_of_sequences_leaves_out_minus_100():
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    labels = torch.tensor([[1, -100, 4], [0, 2, -100]])
    log_p = logits.log_softmax(-1)
    expected = -(log_p[0, 0, 1] + log_p[0, 2, 4] + log_p[1, 0, 0] + log_p[1, 1, 2]) / 4
    torch.testing.assert_close(cross_entropy(logits, labels), expected)

    class Output:
        pass
    output = Output()
    output.logits = logits
    assert cross_entropy(output, labels) == cross_entropy(logits, labels)
    assert cross_entropy(logits.bfloat16(), labels).dtype == torch.float32


@pytest.mark.parametrize("size", [1, 3, 4])
def test_parts_of_a_batch_are_weighted_by_their_labels(size):
    """Some rows have no label at all; the step is that of the whole batch's mean."""
    x, y = examples(16)
    y[::3] = -100
    whole, parts = network(), network()
    expected, losses = run(whole, (x, y), batch_size=8), run(parts, (x, y), batch_size=8,
                                                             micro_batch_size=size)
    assert losses == pytest.approx(expected, rel=1e-12)
    for left, right in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)


def test_a_loss_of_ones_own_and_two_inputs():
    class Sum(nn.Linear):
        def forward(self, a, b):
            return super().forward(a + b)

    x, _ = examples(8)
    target = torch.randn(8, 4, dtype=torch.float64)
    model = Sum(6, 4).double()
    losses = run(model, (x, x, target), steps=1, batch_size=8, loss=F.mse_loss)
    torch.manual_seed(0)
    assert losses[0] != pytest.approx(0)
    twin = Sum(6, 4).double()
    losses = run(twin, (x, x, twin(x, x).detach()), steps=1, batch_size=8, loss=F.mse_loss)
    assert losses == [pytest.approx(0, abs=1e-25)]


# --- what is left alone -------------------------------------------------------------------------

def test_the_callers_random_numbers_and_modes_are_left_alone():
    model = adapted(dropout=0.5).eval()
    model[1].train()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    run(model)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_dropout_is_on_and_comes_from_the_seed():
    plain, first, second, other = (adapted(dropout=p) for p in (0.0, 0.5, 0.5, 0.5))
    torch.manual_seed(1)
    losses = run(first)
    torch.manual_seed(2)
    assert run(second) == losses and equal(state(first), state(second))
    assert run(plain) != losses
    assert run(other, seed=1) != losses


def test_works_inside_no_grad():
    with torch.no_grad():
        assert run(network()) == run(network())


# --- mixed precision ----------------------------------------------------------------------------

@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_computes_in_16_bits_and_trains_in_32(precision):
    seen = set()

    class Head(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            seen.add(out.dtype)
            return out

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), Head(16, 4))
    twin = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    twin.load_state_dict(model.state_dict())
    losses = run(model, steps=40, precision=precision)
    exact = run(twin, steps=40, precision="model")
    assert seen == {getattr(torch, precision)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert losses != exact
    assert losses == pytest.approx(exact, abs=0.1)


def test_auto_on_the_cpu_is_the_models_own_precision():
    assert run(network(torch.float32)) == run(network(torch.float32), precision="model")


def test_float16_skips_a_step_that_overflows_and_goes_on(tmp_path):
    """The loss times 65536 overflows float16 in the backward pass: the first steps are skipped."""
    model = network(torch.float32)
    before, path = state(model), tmp_path / "run.safetensors"
    big = lambda outputs, labels: 64 * cross_entropy(outputs, labels)  # noqa: E731
    losses = run(model, steps=1, loss=big, precision="float16", checkpoint=path)
    assert math.isfinite(losses[0]) and equal(state(model), before)
    run(model, steps=20, loss=big, precision="float16", checkpoint=path)
    assert not equal(state(model), before)
    assert all(torch.isfinite(t).all() for t in state(model).values())


def test_float16_gives_up_when_gradients_never_fit():
    model = network(torch.float32)
    before = state(model)
    with pytest.raises(FloatingPointError, match="gradients overflow float16 even unscaled"):
        run(model, steps=60, loss=lambda o, y: 1e9 * cross_entropy(o, y), precision="float16")
    assert equal(state(model), before)


# --- checkpoint and resume ----------------------------------------------------------------------

PRECISIONS = [(torch.float64, "model"), (torch.float32, "model"), (torch.float32, "bfloat16"),
              (torch.float32, "float16"), (torch.bfloat16, "model")]


@pytest.mark.parametrize("dtype, precision", PRECISIONS)
@pytest.mark.parametrize("build", [network, adapted])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, build, dtype, precision):
    """Cut in the first step, inside an epoch, at a checkpoint, and one step before the end."""
    options = {"precision": precision, "schedule": warmup_cosine(11, 3), "weight_decay": 0.01}
    whole = build(dtype, dropout=0.5)
    losses = run(whole, steps=11, **options)
    for cut in (1, 3, 5, 10):
        path = tmp_path / f"{cut}.safetensors"
        first, second = build(dtype, dropout=0.5), build(dtype, dropout=0.5)
        assert run(first, steps=cut, checkpoint=path, **options) == losses[:cut]
        torch.manual_seed(cut)
        assert run(second, steps=11, checkpoint=path, **options) == losses
        assert equal(state(second), state(whole))


def test_the_scale_of_float16_is_resumed(tmp_path):
    """With overflows in between: the scale differs from its first value when the run goes on."""
    big = lambda outputs, labels: 64 * cross_entropy(outputs, labels)  # noqa: E731
    options = {"precision": "float16", "loss": big}
    whole, cut = adapted(torch.float32, 0.5), adapted(torch.float32, 0.5)
    losses = run(whole, steps=12, **options)
    run(cut, steps=5, checkpoint=tmp_path / "c", **options)
    assert run(cut, steps=12, checkpoint=tmp_path / "c", **options) == losses
    assert equal(state(cut), state(whole))


def test_averages_of_a_batch_norm_are_resumed(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).double()

    whole, first, second = build(), build(), build()
    losses = run(whole, steps=8)
    run(first, steps=3, checkpoint=tmp_path / "c")
    assert run(second, steps=8, checkpoint=tmp_path / "c") == losses
    assert equal(state(second), state(whole))


def test_tied_and_unused_parameters_are_resumed(tmp_path):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).double()
        model[2].weight = model[0].weight
        model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
        return model

    whole, first, second = build(), build(), build()
    losses = run(whole, steps=8)
    run(first, steps=3, checkpoint=tmp_path / "c")
    assert run(second, steps=8, checkpoint=tmp_path / "c") == losses
    assert equal(state(second), state(whole))
    assert second[2].weight is second[0].weight


def test_a_finished_run_is_only_read(tmp_path):
    model, fresh, path = adapted(), adapted(), tmp_path / "c"
    losses = run(model, checkpoint=path)
    before = path.read_bytes()
    assert run(fresh, checkpoint=path) == losses
    assert equal(state(fresh), state(model)) and path.read_bytes() == before


def test_the_checkpoint_holds_what_is_trained_and_nothing_frozen(tmp_path):
    run(adapted(), checkpoint=tmp_path / "c.safetensors")
    saved = load_file(tmp_path / "c.safetensors")
    parts = {f"{i}.{p}" for i in "03" for p in "AB"}
    assert set(saved) == {"losses", "factors", "rng.cpu"} | {
        f"{kind}.parameter.{part}" for kind in ("", "step", "exp_avg", "exp_avg_sq")
        for part in parts}
    assert len(saved["losses"]) == 7
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]


def test_written_every_so_many_steps_and_at_the_end(tmp_path, monkeypatch):
    from lora_lib.tuning.resume import TrainingRun
    written, save = [], TrainingRun.save
    monkeypatch.setattr(TrainingRun, "save", lambda self, path: (written.append(len(self.losses)),
                                                                 save(self, path)))
    run(network(), steps=8, checkpoint=tmp_path / "c", checkpoint_every=3)
    assert written == [3, 6, 8]


PROGRAM = """
import os, signal, sys, torch
sys.path.insert(0, {tests!r})
from lora_lib.tuning import loop
from test_loop import adapted, examples, run, state
from safetensors.torch import save_file
path, die_after, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
print("ready", flush=True)
calls = 0
def loss(outputs, labels):
    global calls
    calls += 1
    if calls > die_after:
        os.kill(os.getpid(), signal.SIGKILL)
    return loop.cross_entropy(outputs, labels)
model = adapted(dropout=0.5)
losses = run(model, steps=20, loss=loss, checkpoint=path, checkpoint_every=3)
save_file(state(model) | {{"losses": torch.tensor(losses, dtype=torch.float64)}}, out)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_killed_process_goes_on_from_its_last_checkpoint(tmp_path):
    """Killed twice, between checkpoints; the third process ends where one unbroken run does."""
    program = PROGRAM.format(tests=str(Path(__file__).parent))
    path, out = tmp_path / "run.safetensors", tmp_path / "out.safetensors"

    def start(die_after):
        return subprocess.run([sys.executable, "-c", program, path, str(die_after), out],
                              cwd=Path(__file__).parents[2], capture_output=True, text=True)

    for die_after, done in ((5, 3), (9, 12)):
        process = start(die_after)
        assert process.returncode == -signal.SIGKILL, process.stderr
        assert len(load_file(path)["losses"]) == done
    process = start(1000)
    assert process.returncode == 0, process.stderr

    whole = adapted(dropout=0.5)
    losses = run(whole, steps=20)
    saved = load_file(out)
    assert saved.pop("losses").tolist() == losses
    assert equal(saved, state(whole))


def test_an_interrupt_leaves_the_last_checkpoint(tmp_path):
    calls = []

    def loss(outputs, labels):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return cross_entropy(outputs, labels)

    model, whole, path = adapted(dropout=0.5).eval(), adapted(dropout=0.5), tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        run(model, steps=9, loss=loss, checkpoint=path, checkpoint_every=2)
    assert not model.training
    assert len(load_file(path)["losses"]) == 4
    assert run(model, steps=9, checkpoint=path) == run(whole, steps=9)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c"
    run(adapted(), steps=3, checkpoint=path)
    before = path.read_bytes()

    def full_disk(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run(adapted(), steps=6, checkpoint=path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "flipped bit", "another file"])
def test_a_damaged_checkpoint_is_refused_and_the_model_left_alone(tmp_path, damage):
    path = tmp_path / "c"
    run(adapted(), checkpoint=path)
    whole = path.read_bytes()
    if damage == "another file":
        save_file({"w": torch.ones(3)}, path)
    else:
        path.write_bytes({"truncated": whole[:-50], "empty": b"", "text": b"hello" * 20,
                          "flipped bit": whole[:-9] + bytes([whole[-9] ^ 16]) + whole[-8:]}[damage])
    message = {"flipped bit": "is damaged", "another file": "not a checkpoint of fine_tune"}
    model = adapted(seed=0)
    before, on_disk = state(model), path.read_bytes()
    with pytest.raises(ValueError, match=message.get(damage, "is not a readable checkpoint")):
        run(model, steps=9, checkpoint=path)
    assert equal(state(model), before) and path.read_bytes() == on_disk


@pytest.mark.parametrize("change, message", [
    ({"lr": 0.01}, "lr: 0.05 in the checkpoint, 0.01 now"),
    ({"batch_size": 5}, "batch_size: 4 in the checkpoint, 5 now"),
    ({"weight_decay": 0.1}, "weight_decay: 0.0 in the checkpoint, 0.1 now"),
    ({"max_grad_norm": None}, "max_grad_norm: 1.0 in the checkpoint, None now"),
    ({"seed": 1}, "seed: 0 in the checkpoint, 1 now"),
    ({"micro_batch_size": 2}, "micro_batch_size: absent in the checkpoint, 2 now"),
    ({"precision": "float16"}, "precision: model in the checkpoint, float16 now"),
    ({"data": examples(seed=6)}, "data: "),
    ({"data": examples(11)}, "data: "),
    ({"schedule": warmup_cosine(9)}, "another schedule"),
    ({"steps": 6}, "holds 7 steps, more than steps = 6"),
])
def test_another_runs_checkpoint_is_refused(tmp_path, change, message):
    path = tmp_path / "c"
    run(adapted(), checkpoint=path)
    model = adapted()
    before, on_disk = state(model), path.read_bytes()
    with pytest.raises(ValueError, match=message):
        run(model, **({"steps": 9, "checkpoint": path} | change))
    assert equal(state(model), before) and path.read_bytes() == on_disk


def test_another_model_is_refused_by_name(tmp_path):
    path = tmp_path / "c"
    run(adapted(), checkpoint=path)
    with pytest.raises(ValueError, match="frozen weights: "):
        run(adapted(seed=3), checkpoint=path)
    wider = inject(network(), ["0", "3"], rank=3, alpha=4.0, seed=1)
    with pytest.raises(ValueError, match=r"parameter.0.A: float64 \[2, 6\] in the checkpoint, "
                                         r"float64 \[3, 6\] now"):
        run(wider, checkpoint=path)
    fewer = inject(network(), ["0"], rank=2, alpha=4.0, seed=1)
    with pytest.raises(ValueError, match=r"parameter.3.A: float64 \[2, 16\] in the checkpoint, "
                                         "absent now"):
        run(fewer, checkpoint=path)
    with pytest.raises(ValueError, match=r"parameter.0.A: float64 .* float32 "):
        run(adapted(torch.float32), examples(), checkpoint=path)


# --- errors -------------------------------------------------------------------------------------

def test_a_loss_that_is_not_finite_stops_before_it_does_harm(tmp_path):
    path, models = tmp_path / "c", []

    def loss(outputs, labels):
        models.append(state(model))
        value = cross_entropy(outputs, labels)
        return value * math.nan if len(models) == 6 else value

    model = adapted()
    with pytest.raises(FloatingPointError, match="the loss is nan at step 5"):
        run(model, steps=9, loss=loss, checkpoint=path, checkpoint_every=2)
    assert equal(state(model), models[5]) and not equal(models[5], models[4])
    assert len(load_file(path)["losses"]) == 4


def test_a_gradient_that_is_not_finite_stops_before_it_does_harm():
    class Root(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad / 0

    model = adapted()
    before = state(model)
    for norm in (1.0, None):
        with pytest.raises(FloatingPointError, match="the gradient's norm is .* at step 0"):
            run(model, loss=lambda o, y: Root.apply(cross_entropy(o, y)), max_grad_norm=norm)
    assert equal(state(model), before)


@pytest.mark.parametrize("options, error, message", [
    ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
    ({"steps": 2.5}, TypeError, "steps must be an integer, got 2.5"),
    ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
    ({"batch_size": True}, TypeError, "batch_size must be an integer"),
    ({"micro_batch_size": 0}, ValueError, "micro_batch_size must be at least 1, got 0"),
    ({"micro_batch_size": 2, "loss": lambda o, y: o.sum()}, ValueError, "a loss of your own"),
    ({"batch_size": 11}, ValueError, "batch_size = 11 is more than the 10 rows"),
    ({"lr": 0}, ValueError, "lr must be finite and positive, got 0"),
    ({"lr": math.nan}, ValueError, "lr must be finite"),
    ({"lr": "fast"}, TypeError, "lr must be a number, got 'fast'"),
    ({"weight_decay": -1}, ValueError, "weight_decay must be finite"),
    ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be finite and positive"),
    ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be at least 1"),
    ({"seed": -1}, ValueError, "seed must be at least 0"),
    ({"precision": "float8"}, ValueError, "precision must be .*got 'float8'"),
    ({"schedule": lambda step: math.inf}, ValueError, r"schedule\(0\) must be finite"),
    ({"schedule": lambda step: -1}, ValueError, r"schedule\(0\) must be finite"),
    ({"loss": lambda o, y: o}, ValueError, r"tensor with no dimensions, got \(4, 4\)"),
    ({"loss": lambda o, y: o.detach().sum()}, ValueError, "does not depend on any trainable"),
    ({"checkpoint": "no/such/folder/c"}, ValueError, "checkpoint must be a file in a folder that"),
    ({"checkpoint": "."}, ValueError, "checkpoint must be a file in a folder that exists"),
    ({"data": examples()[0]}, TypeError, "data must be a tuple of tensors"),
    ({"data": (examples()[0],)}, TypeError, "data must be a tuple of tensors"),
    ({"data": (examples()[0], [1] * 10)}, TypeError, "data must be a tuple of tensors"),
    ({"data": (examples()[0], examples()[1][:9])}, ValueError, "one length, got 10 and 9"),
])
def test_arguments_that_cannot_be(options, error, message):
    model = adapted()
    before = state(model)
    with pytest.raises(error, match=message):
        run(model, **options)
    assert equal(state(model), before)


def test_models_that_cannot_be_trained():
    with pytest.raises(ValueError, match=r"nothing is trainable.*call inject\(\)"):
        run(network().requires_grad_(False))
    with pytest.raises(ValueError, match=r"0 is merged.*call unmerge"):
        run(merge(adapted(), keep_adapters=True))
    with pytest.raises(TypeError, match="model must be an nn.Module, got function"):
        fine_tune(lambda x: x, examples(), steps=1)
    with pytest.raises(ValueError, match="trainable parameters in float32"):
        run(network(torch.float16), precision="float16")


def test_progress_shows_the_loss_and_can_be_silent(capfd, monkeypatch):
    # What a person sees, also where TQDM_DISABLE was set before tqdm was imported.
    monkeypatch.setattr(loop, "tqdm", functools.partial(loop.tqdm, disable=False))
    losses = run(network(), progress=True, steps=3)
    shown = capfd.readouterr().err
    assert "3/3" in shown or "2/3" in shown or "0/3" in shown
    assert len(losses) == 3
    run(network(), progress=False)
    assert capfd.readouterr().err == ""


# --- on a GPU -----------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["auto", "model", "bfloat16", "float16"])
def test_on_a_gpu_the_run_resumes_and_follows_the_cpu(tmp_path, precision):
    whole, first, second = (adapted(torch.float32, 0.5).cuda() for _ in range(3))
    before = torch.cuda.get_rng_state()
    losses = run(whole, steps=9, precision=precision)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    run(first, steps=4, precision=precision, checkpoint=tmp_path / "c")
    resumed = run(second, steps=9, precision=precision, checkpoint=tmp_path / "c")
    assert resumed == pytest.approx(losses, rel=1e-3)
    for left, right in zip(lora_parameters(second), lora_parameters(whole), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)
    plain = run(adapted(torch.float32).cuda(), precision=precision)
    assert plain == pytest.approx(run(adapted(torch.float32)), abs=0.05)
