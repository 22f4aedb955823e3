"""The bottleneck adapter against torch's own layers, its fit against planted updates, the sweep."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_lib.experiments import bottleneck, sweep
from lora_lib.experiments.bottleneck import BOTTLENECK, LORA, Bottleneck, bottlenecks, start
from lora_lib.experiments.claims import DOES_NOT, HOLDS, UNDECIDED
from lora_lib.experiments.trial import base
from lora_lib.torch import fine_tune, lora_parameters

TOKENS = torch.randint(2, 200, (16, 20), generator=torch.Generator().manual_seed(0))


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def with_updates(dtype="float64"):
    model = start(BOTTLENECK, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for module in bottlenecks(model):
        nn.init.normal_(module.up.weight, std=0.1, generator=generator)
    return model


def test_it_is_a_block_and_a_network_behind_it():
    block = nn.Linear(6, 4).double()
    module = Bottleneck(block, 4, 3, seed=0)
    nn.init.normal_(module.up.weight)
    x = torch.randn(5, 6, dtype=torch.float64)
    y = block(x)
    expected = y + F.gelu(y @ module.down.weight.T) @ module.up.weight.T
    torch.testing.assert_close(module(x), expected)
    assert module.down.weight.shape == (3, 4) and module.up.weight.shape == (4, 3)


def test_a_model_starts_as_the_base_and_only_the_adapters_are_trained():
    model = start(BOTTLENECK)
    assert torch.equal(model(TOKENS), base()(TOKENS))
    ends = {f"model.layers.{i}.{block}.{part}.weight" for i in range(4)
            for block in ("self_attn", "mlp") for part in ("down", "up")}
    assert trained(model) == ends
    downs = [module.down.weight for module in bottlenecks(model)]
    assert not any(torch.equal(downs[0], other) for other in downs[1:])
    again, other = start(BOTTLENECK), start(BOTTLENECK, seed=1)
    assert torch.equal(bottlenecks(again)[3].down.weight, downs[3])
    assert not torch.equal(bottlenecks(other)[3].down.weight, downs[3])


def test_both_methods_train_equally_many_numbers():
    numbers = [sum(p.numel() for p in start(method).parameters() if p.requires_grad)
               for method in (LORA, BOTTLENECK)]
    assert numbers[0] == numbers[1] == sum(p.numel() for p in lora_parameters(start(LORA)))
    with pytest.raises(ValueError, match="got 'prefix'"):
        start("prefix")


def test_training_lowers_the_loss_and_leaves_the_base():
    model, kept = start(BOTTLENECK), dict(base().named_parameters())
    losses = fine_tune(model, (TOKENS[:, :-1], TOKENS[:, 1:]), steps=12, batch_size=16, lr=1e-2,
                       progress=False)
    assert losses[-1] < losses[0] - 0.1
    left = {name.replace(".block.", "."): p for name, p in model.named_parameters()
            if not p.requires_grad}
    assert set(left) == set(kept) and all(torch.equal(left[name], kept[name]) for name in kept)


def test_what_is_not_linear_is_told_from_what_is(monkeypatch):
    model = with_updates()
    shares = bottleneck.not_linear(model, TOKENS)
    assert len(shares) == 8 and min(shares) > 0.02 and max(shares) < 1
    hooked = [len(module.block._forward_hooks) for module in bottlenecks(model)]
    assert hooked == [0] * 8
    # for the first: residuals by numpy's solver, one position a row
    first = bottlenecks(model)[0]
    seen = []
    hook = first.block.register_forward_hook(lambda _, args, out: seen.append(out))
    model(TOKENS)
    hook.remove()
    y = seen[0].detach().flatten(0, 1)
    u = first.update(y).detach().numpy()
    inputs = np.column_stack([y.numpy(), np.ones(len(y))])
    rest = u - inputs @ np.linalg.lstsq(inputs, u)[0]
    assert shares[0] == pytest.approx(np.linalg.norm(rest) / np.linalg.norm(u), rel=1e-6)
    # without the nonlinearity nothing is left
    monkeypatch.setattr(bottleneck.F, "gelu", lambda x: x)
    assert max(bottleneck.not_linear(model, TOKENS)) < 1e-10
    merged = bottleneck.merge_fits(model, TOKENS)
    torch.testing.assert_close(merged(TOKENS), model(TOKENS))
    assert bottlenecks(merged) == [] and len(bottlenecks(model)) == 8
    assert bottleneck.not_linear(start(LORA), TOKENS) == []


def test_times_are_ratios_of_medians_and_every_round_has_its_own_order():
    times = bottleneck.call_times(0, rounds=60)
    assert set(times) == {"LoRA merged", "LoRA not merged", "bottleneck"}
    assert times["LoRA not merged"] > times["LoRA merged"] < times["bottleneck"]
    called = []
    bottleneck.medians({name: lambda name=name: called.append(name) for name in "abc"}, rounds=40)
    rounds = {tuple(called[i:i + 3]) for i in range(0, 120, 3)}
    assert len(rounds) == 6 and all(sorted(each) == ["a", "b", "c"] for each in rounds)


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A sweep whose outcome is known: LoRA's best rate is 8e-3, the bottleneck's 1e-3, far below
    where its grid begins; its loss is higher by `behind`."""
    monkeypatch.setattr(sweep, "RESULTS", tmp_path)

    def run(behind, seed=0):
        rng, rows, done = np.random.default_rng(seed), {}, -1
        while done != len(rows):
            done = len(rows)
            for p in bottleneck.points():
                far = np.log2(p["lr"] / (1e-3 if p["method"] == BOTTLENECK else 8e-3))
                loss = 1 + far**2 / 10 + behind * (p["method"] == BOTTLENECK)
                rows.setdefault(str(p), p | {
                    "steps": 200, "match": 0.5, "loss": loss + 0.004 * rng.normal(),
                    "valid": loss + 0.004 * rng.normal(), "not linear": 0.3})
            sweep.write(tmp_path / "bottleneck.csv", rows.values())
        sweep.write(tmp_path / "bottleneck_speed.csv", [
            {"seed": s, "LoRA merged": 1 + 0.01 * s, "bottleneck": 1.3 + 0.01 * s, "step": 0.8}
            for s in range(3)])
        return [v.verdict for v in bottleneck.verdicts()]
    return run


@pytest.mark.parametrize("behind, verdict", [(0.0, HOLDS), (0.02, UNDECIDED), (0.2, DOES_NOT)])
def test_the_verdicts_follow_the_numbers(planted, behind, verdict):
    assert planted(behind) == [verdict, HOLDS, HOLDS]
    task = bottleneck.TASKS[0]
    assert bottleneck.best_rate(task, BOTTLENECK) == 1e-3
    assert [row["seed"] for row in bottleneck.compared(task, LORA)] == [*range(5)]
    assert bottleneck.lead(task, "loss") == pytest.approx([behind] * 5, abs=0.02)


def test_the_kept_sweep_is_whole():
    for task in bottleneck.TASKS:
        for method in bottleneck.METHODS:
            rates = {row["lr"] for row in bottleneck.rows(task, method)}
            assert min(rates) < bottleneck.best_rate(task, method) < max(rates)
            assert [r["seed"] for r in bottleneck.compared(task, method)] == [0, 1, 2, 3, 4]
    assert len(bottleneck.compared(bottleneck.TASKS[-1], LORA, 400)) == 3
    assert len(bottleneck.verdicts()) == 3
