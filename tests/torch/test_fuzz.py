"""A few hundred damaged adapter folders; tests.torch.fuzz tries as many as one likes."""

import json
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_lib.torch import checkpoint, lora, peft_format, samples
from tests.torch import fuzz
from tests.torch.damage import MUTATIONS

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapter")


@pytest.mark.parametrize("kind", MUTATIONS)
def test_a_damaged_folder_is_refused_or_means_what_it_says(kind, folder):
    @settings(max_examples=12, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=False))
    def tried(rng):
        outcome, text, _ = fuzz.attempt(rng, [kind], folder)
        assert outcome != "FINDING", text

    tried()


@pytest.mark.parametrize("kind, outcomes", [
    ("reorder", {"loaded"}), ("take_away", {"refused"}), ("another_base", {"loaded", "refused"}),
    ("swap_keys", {"loaded", "refused"}), ("change_setting", {"loaded", "refused"})])
def test_what_becomes_of_them(kind, outcomes, folder):
    assert {fuzz.attempt(random.Random(n), [kind], folder)[0] for n in range(30)} == outcomes


def test_a_number_is_the_same_input_again(folder):
    def bytes_of(number):
        rng = random.Random(number)
        kinds = fuzz.kinds_of(rng)
        fuzz.attempt(rng, kinds, folder)
        return kinds, {path.name: path.read_bytes() for path in folder.iterdir()}

    assert bytes_of(3) == bytes_of(3) != bytes_of(4)


def set_half(model, path, **options):
    """Writes before it has checked everything."""
    try:
        return checkpoint.load_adapter(model, path, **options)
    except ValueError:
        with torch.no_grad():
            model.pooler.bias[0] += 1
        raise


def say_nothing(model, path, **options):
    """Takes whatever is wrong for an empty adapter."""
    try:
        return checkpoint.load_adapter(model, path, **options)
    except ValueError:
        return model


# What each part of the library would have to get wrong, and what finds it.
FAULTS = {
    "numbers": ("poison", peft_format, "_number", lambda t, what: t, "not finite"),
    "the note": ("change_the_note", peft_format, "_samples", lambda text, file: json.loads(text),
                 "Error"),
    "paths": ("rename_a_path", checkpoint, "by_own_path", lambda model, found: found,
              "loaded, though Nonsense: two of"),
    "patterns": ("explode", checkpoint, "check_patterns", lambda *_: None, "TooLong"),
    "sizes": ("huge_header", peft_format, "LARGEST", dict.fromkeys(peft_format.LARGEST, 2**40),
              "memory rose"),
    "the base": ("another_base", samples, "spread", lambda *_: None, "another base"),
    "whole modules": ("drop_keys", checkpoint, "check_whole", lambda *_: None, "KeyError"),
    "ranks": ("reorder", checkpoint, "settings", lambda config, key, _, names:
              dict.fromkeys(names, config[key]), "without a fault is refused"),
    "scaling": ("reorder", lora, "scaling_of", lambda rank, alpha, _: alpha / rank,
                "loaded, though AssertionError"),
    "order": ("change_shape", fuzz, "load_adapter", set_half, "the model is another one"),
    "silence": ("truncate", fuzz, "load_adapter", say_nothing, "loaded, though"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, folder, monkeypatch):
    kind, where, name, broken, expected = FAULTS[fault]
    monkeypatch.setattr(where, name, broken)
    monkeypatch.setattr(fuzz, "SECONDS", 0.5)
    monkeypatch.setattr(fuzz, "MEGABYTES", 20)
    for number in range(1, 150):
        outcome, text, _ = fuzz.attempt(random.Random(number), [kind], folder)
        if outcome == "FINDING" and expected in text:
            return
    pytest.fail(f"{kind} did not find it")
