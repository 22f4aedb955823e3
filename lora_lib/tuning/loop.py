"""The training loop: AdamW on whatever is trainable, in mixed precision, with exact resume."""

import math
import numbers
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lora_lib.torch.linear import stored_weights
from lora_lib.torch.parts import idle_adapters
from lora_lib.torch.targets import few
from lora_lib.tuning.data import Rows
from lora_lib.tuning.head import Causal
from lora_lib.tuning.resume import TrainingRun, fingerprint


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of logits (..., classes) against labels (...), a scalar.

    A label of -100 is left out. `outputs` may also be an object with `.logits`, as transformers
    returns. Logits of 16 bits are compared in float32.
    """
    logits = getattr(outputs, "logits", outputs)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100)


def warmup_cosine(steps: int, warmup: int = 0, final: float = 0.0) -> Callable[[int], float]:
    """A schedule: from near 0 up to 1 in `warmup` steps, then along a cosine down to `final`."""
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup must be between 0 and steps - 1 = {steps - 1}, got {warmup}")

    def schedule(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / (steps - warmup))
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
    return schedule


def fine_tune(model: nn.Module, data: tuple[Tensor, ...] | Rows, *, steps: int,
              batch_size: int = 16, lr: float = 1e-3, weight_decay: float = 0.0,
              max_grad_norm: float | None = 1.0,
              schedule: Callable[[int], float] | None = None,
              loss: Callable[..., Tensor] = cross_entropy, precision: str = "auto",
              micro_batch_size: int | None = None, checkpoint: str | Path | None = None,
              checkpoint_every: int = 100, seed: int = 0, progress: bool = True) -> list[float]:
    """Train the parameters that require a gradient with AdamW; return every step's loss.

    After `inject` that trains the adapters; on a plain model, everything (full fine-tuning).
    data       (inputs, labels): tensors of one length n; the loss is loss(model(inputs), labels).
               Every step takes `batch_size` rows of a seeded permutation of the n, renewed when
               it runs out. The data stay where they are; batches move to the model's device.
               Or `Rows`, of many lengths: rows of like length then share a batch, and a causal
               model of transformers computes its loss where there are labels (tuning/head.py).
    schedule   the learning rate of a step is lr * schedule(step), with steps counted from 0;
               None keeps it at lr.
    max_grad_norm   gradients are scaled down to this norm; None leaves them as they are.
    precision  "model" computes in the model's own dtypes; "bfloat16" and "float16" under autocast,
               float16 with a scaled loss. "auto" is "model" on the CPU; on a GPU bfloat16 where it
               is native, and float16 elsewhere.
    micro_batch_size   so many of a batch's rows go through the model at a time, None for all; their
               gradients are summed. Activations take that much less memory, and the step is the
               same up to rounding, and another draw of dropout. (transformers' models can do with
               still less, in more time: call `model.gradient_checkpointing_enable()` before.)
    checkpoint  a safetensors file, replaced atomically every `checkpoint_every` steps and at the
               end. If it exists, the run goes on from there: on the CPU bit for bit as if it had
               never stopped. `steps` may grow; the rest must be as it was.

    Random numbers (the order of the data, dropout) come from `seed`; the caller's are left alone,
    and so are train() and eval() modes. Raises ValueError or TypeError for arguments that cannot
    be, or a checkpoint that is damaged or another run's, before anything is changed, and
    FloatingPointError when the loss or its gradient is not finite: the model then keeps the
    parameters of the step before. Warns of adapters that the first step's gradient does not reach.
    """
    part = batch_size if micro_batch_size is None else micro_batch_size
    _check_numbers(steps=steps, batch_size=batch_size, lr=lr, weight_decay=weight_decay,
                   max_grad_norm=max_grad_norm, checkpoint_every=checkpoint_every, seed=seed,
                   micro_batch_size=part)
    if micro_batch_size and loss is not cross_entropy:
        raise ValueError("micro_batch_size sums the losses of parts by their numbers of labels, as "
                         "cross_entropy needs; leave it out for a loss of your own")
    trainable = _trainable(model)
    device = trainable[0].device
    precision = _precision(precision, device, trainable)
    ragged = isinstance(data, Rows)
    rows_of = _batches(_length(data, batch_size), batch_size, seed,
                       data.lengths if ragged else None)
    causal = Causal.of(model) if ragged and loss is cross_entropy else None
    schedule = schedule or (lambda step: 1.0)
    path = _checkpoint_path(checkpoint)
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
    run = TrainingRun(model, optimizer, scaler, device, settings={} if path is None else {
        "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm, "precision": precision, "seed": seed,
        "device": device.type, "data": _fingerprint(data),
        "frozen weights": fingerprint({name: t for name, t in stored_weights(model).items()
                                       if not t.requires_grad})}
        | ({"micro_batch_size": micro_batch_size} if micro_batch_size else {}))
    autocast = lambda: _autocast(precision, device)

    with _training_mode(model), _own_random_numbers(seed, device), torch.enable_grad():
        if path is not None and path.exists():
            run.load(path, steps, schedule)
        start = len(run.losses)
        hidden = {} if progress else {"disable": True}     # else TQDM_DISABLE decides
        bar = tqdm(islice(rows_of, start, steps), initial=start, total=steps, unit="step",
                   leave=False, **hidden)
        for step, rows in enumerate(bar, start):
            batch = [t.to(device) for t in (
                data.batch(rows) if ragged else [t[rows.to(t.device)] for t in data])]
            run.factors.append(_set_lr(optimizer, lr, schedule, step))
            optimizer.zero_grad()
            run.losses.append(_backward(causal or model, loss, batch, part, autocast, scaler, step))
            if step == start:
                _warn_of_idle(model)
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(trainable, max_grad_norm or math.inf)
            _check_gradient(norm, scaler, step)
            scaler.step(optimizer)           # skips a step whose float16 gradients overflowed
            scaler.update()
            bar.set_postfix(loss=f"{run.losses[-1]:.4f}", refresh=False)
            if path is not None and ((step + 1) % checkpoint_every == 0 or step + 1 == steps):
                run.save(path)
    optimizer.zero_grad()
    return run.losses


def _backward(model, loss, batch, part, autocast, scaler, step):
    """Add the gradients of a batch's loss, `part` rows at a time; returns the loss, a float.

    Rows of a `Causal` model read copies of what they have in common. The gradient gathers there,
    and goes through it once.
    """
    *_, labels = batch
    shared = isinstance(model, Causal)
    with autocast():
        past = model.beginning(*batch) if shared else []
    copies = [tuple(t.detach().requires_grad_(t.requires_grad) for t in pair) for pair in past]
    total, asked = 0.0, lambda t: int((t != -100).sum())
    if (shared or loss is cross_entropy) and not asked(labels):
        raise ValueError(f"every label in the batch of step {step} is -100, so there is nothing to "
                         "learn from it; the model keeps the parameters of the step before. Were "
                         "the answers cut off, or masked with the prompts?")
    for *inputs, some in zip(*(t.split(part) for t in batch)):
        share = 1.0 if part >= len(labels) else asked(some) / asked(labels)
        if share:
            with autocast():
                value = model.loss(*inputs, some, copies) if shared else loss(model(*inputs), some)
            total += share * _finite(value, step)
            scaler.scale(value * share).backward()
    read = [(t, copy.grad) for pair, twins in zip(past, copies) for t, copy in zip(pair, twins)
            if copy.grad is not None]
    if read:
        torch.autograd.backward(*zip(*read))
    return total


def _warn_of_idle(model):
    """Name the adapters that no gradient has reached."""
    idle = idle_adapters(model)
    if idle:
        warnings.warn(f"no gradient reaches the adapters of {few(idle)}, which stay as they are: "
                      "the model does not use these layers for this batch (as with experts that "
                      "no token chose), or not in a way that gives a gradient", stacklevel=3)


def _batches(n: int, batch_size: int, seed: int,
             lengths: Tensor | None = None) -> Iterator[Tensor]:
    """Row numbers, `batch_size` at a time, from one seeded permutation of n after another.

    With `lengths`, the rows of every few batches are sorted by length, so that little of a batch is
    padding, and the batches shuffled again.
    """
    generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    together = 1 if lengths is None else min(16, max(1, n // batch_size))
    while True:
        while len(order) < batch_size * together:    # the rest of an epoch goes into the next batch
            order = torch.cat([order, torch.randperm(n, generator=generator)])
        some, order = order[:batch_size * together], order[batch_size * together:]
        if lengths is None:
            yield some
        else:
            batches = some[lengths[some].argsort(stable=True)].split(batch_size)
            yield from (batches[i] for i in torch.randperm(together, generator=generator))


@contextmanager
def _training_mode(model):
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _own_random_numbers(seed, device):
    """Seed the global generators that dropout draws from, and put them back afterwards."""
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus, device_type="cuda"):
        torch.default_generator.manual_seed(seed)
        if gpus:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _autocast(precision, device):
    if precision == "model":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


def _set_lr(optimizer, lr, schedule, step):
    factor = float(schedule(step))
    if not (math.isfinite(factor) and factor >= 0):
        raise ValueError(f"schedule({step}) must be finite and not negative, got {factor}")
    for group in optimizer.param_groups:
        group["lr"] = lr * factor
    return factor


def _finite(value, step):
    if not (isinstance(value, Tensor) and value.ndim == 0):
        raise ValueError(f"loss must return a tensor with no dimensions, got "
                         f"{tuple(value.shape) if isinstance(value, Tensor) else value!r}")
    if not value.requires_grad:
        raise ValueError("the loss does not depend on any trainable parameter")
    number = value.item()
    if not math.isfinite(number):
        raise FloatingPointError(f"the loss is {number} at step {step}; the model keeps the "
                                 "parameters of the step before. Try a smaller lr")
    return number


def _check_gradient(norm, scaler, step):
    if not scaler.is_enabled() and not math.isfinite(norm):
        raise FloatingPointError(f"the gradient's norm is {norm.item()} at step {step}; the model "
                                 "keeps the parameters of the step before. Try a smaller lr")
    if scaler.is_enabled() and scaler.get_scale() < 1:
        raise FloatingPointError(f"gradients overflow float16 even unscaled, at step {step}; "
                                 'use precision="bfloat16" or "model"')


def _trainable(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if getattr(module, "merged", False) is True:
            raise ValueError(f"{name} is merged: its update would be trained without being used; "
                             "call unmerge(model) first")
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("nothing is trainable: every parameter is frozen; call inject() for "
                         "adapters, or model.requires_grad_() for full fine-tuning")
    return trainable


def _length(data, batch_size):
    if isinstance(data, Rows):
        if not any((labels != -100).any() for labels in data.labels):
            raise ValueError("no label is left: every one is -100, so there is nothing to learn")
        n = len(data)
        if batch_size > n:
            raise ValueError(f"batch_size = {batch_size} is more than the {n} rows of data")
        return n
    if not (isinstance(data, (tuple, list)) and len(data) >= 2
            and all(isinstance(tensor, Tensor) and tensor.ndim for tensor in data)):
        raise TypeError("data must be a tuple of tensors (inputs, labels), each with the rows as "
                        "its first dimension")
    lengths = {len(tensor) for tensor in data}
    if len(lengths) > 1:
        raise ValueError("data must have one length, got "
                         + " and ".join(str(len(tensor)) for tensor in data))
    n = lengths.pop()
    if batch_size > n:
        raise ValueError(f"batch_size = {batch_size} is more than the {n} rows of data")
    return n


def _precision(precision, device, trainable):
    if precision not in ("auto", "model", "bfloat16", "float16"):
        raise ValueError('precision must be "auto", "model", "bfloat16", or "float16", '
                         f"got {precision!r}")
    if precision == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if native else "float16" if device.type == "cuda" else "model"
    if precision == "float16" and any(p.dtype == torch.float16 for p in trainable):
        raise ValueError("float16 training needs trainable parameters in float32, where the "
                         "scaled gradients are divided again; got float16 ones")
    return precision


def _fingerprint(data):
    if isinstance(data, Rows):
        data = (torch.cat(data.inputs), torch.cat(data.labels), data.lengths)
    return fingerprint(dict(enumerate(data)))


def _checkpoint_path(checkpoint):
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"checkpoint must be a file in a folder that exists, got {path}")
    return path


def _check_numbers(*, lr, weight_decay, max_grad_norm, **integers):
    for name, value in integers.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        least = 0 if name == "seed" else 1
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    reals = {"lr": lr, "weight_decay": weight_decay}
    if max_grad_norm is not None:
        reals["max_grad_norm"] = max_grad_norm
    for name, value in reals.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not math.isfinite(value) or value < 0 or (value == 0 and name != "weight_decay"):
            raise ValueError(f"{name} must be finite and positive, got {value}")
