"""The calculator's JavaScript counts what lora_lib.costs counts, to the byte."""

import json
import random
from dataclasses import asdict

import pytest

from lora_lib import costs, plots, presets
from lora_lib.presets import PRESETS
from tests.moving import stored
from tests.moving.node import call

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def drawn(rng):
    """A shape and the arguments of costs.memory, of sizes that are met and odd ones."""
    kv = rng.randint(1, 16)
    shape = costs.ModelShape(
        vocab_size=rng.randint(1, 300_000), hidden_size=rng.randint(1, 16_384),
        intermediate_size=rng.randint(1, 60_000), num_layers=rng.randint(1, 48),
        num_heads=kv * rng.randint(1, 8), num_kv_heads=kv, head_dim=rng.randint(1, 256),
        tied_embeddings=rng.random() < 0.5, qkv_bias=rng.random() < 0.3, qk_norm=rng.random() < 0.3)
    targets = rng.sample(LINEARS, rng.randint(1, len(LINEARS)))
    least = min(min(shape.linears()[name]) for name in targets)
    rank = None if rng.random() < 0.25 else rng.randint(1, min(least, 300))
    step = {"batch": rng.randint(1, 64), "sequence": rng.randint(1, 32_768), "rank": rank,
            "weight_bytes": rng.choice((2, 4)), "activation_bytes": rng.choice((2, 4, 8)),
            "trainable_bytes": rng.choice((2, 4)), "moments": rng.randint(0, 2),
            "quantized": rank is not None and rng.random() < 0.5, "double": rng.random() < 0.5,
            "checkpointing": rng.random() < 0.5}
    return shape, targets, step


def test_equal_to_costs_on_a_thousand_inputs():
    rng = random.Random(0)
    cases = [drawn(rng) for _ in range(1000)]
    given = [[asdict(shape), {**step, "targets": targets}] for shape, targets, step in cases]
    found = call("fits", """(cases) => cases.map(([model, step]) => [parameters(model),
        memory(model, step), lossBuffers(model, step),
        step.rank === null ? null : adapterParameters(model, step.rank, step.targets)])""", given)
    for (shape, targets, step), (parameters, memory, buffers, adapter) in zip(cases, found):
        expected = costs.memory(shape, target_modules=targets, **step)
        assert parameters == shape.parameters() and memory == vars(expected)
        assert max(expected.total, parameters) < 2**53
        assert buffers == costs.loss_buffers(shape, batch=step["batch"], sequence=step["sequence"])
        assert adapter == (step["rank"] and shape.lora_parameters(step["rank"], targets))


@pytest.mark.parametrize("change, options", [
    ({}, {"rank": 8, "target_modules": ["q_proj", "v_proj"]}),
    ({"method": "full fine-tuning"}, {}),
    ({"targets": "all linear"}, {"rank": 8, "target_modules": "all-linear"}),
    ({"precision": "32 bits"}, {"rank": 8, "weight_bytes": 4, "activation_bytes": 4}),
    ({"precision": "NF4, 4 bits", "checkpointing": True},
     {"rank": 8, "quantized": True, "checkpointing": True})])
def test_the_choices_of_the_page_mean_these_arguments(change, options):
    shape = costs.LLAMA_7B
    found = call("fits", "(model, change) => memory(model, stepOf({ ...START, ...change }))",
                 asdict(shape), change)
    assert found == vars(costs.memory(shape, batch=1, sequence=512, **options))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_chosen(name):
    shape = asdict(PRESETS[name].shape)
    assert call("fits", "(model) => [problem(model, stepOf(START)), parameters(model)]", shape) == [
        "", PRESETS[name].shape.parameters()]


@pytest.mark.parametrize("model, change, said", [
    ({"num_kv_heads": 3}, {}, "multiple"),
    ({}, {"method": "full fine-tuning", "precision": "NF4, 4 bits"}, "cannot be trained"),
    ({"num_kv_heads": 1}, {"rank": 256}, "128 at most"),
    ({"num_kv_heads": 1}, {"rank": 128}, "")])
def test_what_cannot_be_is_said(model, change, said):
    found = call("fits", "(model, change) => problem(model, stepOf({ ...START, ...change }))",
                 asdict(costs.LLAMA_7B) | model, change)
    assert said in found and bool(found) == bool(said)


def test_a_gpu_holds_it_only_with_the_losss_buffers():
    found = call("fits", "(...given) => [15.8e9, 15.9e9, 16e9, 16.1e9].map((total) => "
                         "fit(16, total, 0.15e9))")
    assert found == ["yes", "hardly", "hardly", "no"]


def test_the_figure_shows_the_numbers_of_its_page():
    """Chapter 5 prints the memory of a 7B Llama, by part, and its adapter; so does the figure."""
    figure = stored.data("05_training", "training-51b")
    rows = {row[0]: row[1:] for row in stored.table("05_training", "training-49")}
    assert figure == json.loads(json.dumps(presets.choices("Llama 7B")))
    model = figure["presets"][figure["at"]["model"]]["shape"]
    for line, change in (("full", {"method": "full fine-tuning"}), ("LoRA, q and v", {}),
                         ("LoRA, all linear", {"targets": "all linear"})):
        found = call("fits", """(model, change) => {
            const found = Object.values(memory(model, stepOf({ ...START, ...change })));
            return [...found, sum(found)].map(gigabytes); }""", model, change)
        assert rows[line][:5] == [text.removesuffix(" GB") for text in found]
    adapter = call("fits", '(model) => megabytes(4 * adapterParameters(model, START.rank, '
                           'TARGETS[START.targets]))', model)
    assert rows["LoRA, q and v"][-1] == adapter


def test_parts_have_the_colours_of_the_pages_pictures():
    assert call("fits", "() => PARTS") == plots.MEMORY


def test_a_model_to_begin_with_must_be_there():
    assert list(presets.choices("Qwen3 8B")["presets"]) == list(PRESETS)
    with pytest.raises(ValueError, match="no preset is called 'Qwen'"):
        presets.choices("Qwen")
