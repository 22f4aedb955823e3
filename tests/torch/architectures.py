"""Adapters between lora_lib, PEFT and transformers, on tiny unmodified models of several kinds.

Each function below takes one case through files and says "yes", or what went wrong. The tests ask
for "yes"; `scripts/compatibility.py` writes the same answers into the book.
"""

import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_lib.torch import inject, load_adapter, lora_modules, merge, save_adapter

TOLERANCE, EFFECT = 1e-5, 1e-2          # of the largest output: what is the same, what is not


@dataclass(frozen=True)
class Architecture:
    """A model of transformers: how to build a tiny one, and which modules to adapt."""

    name: str
    model_type: str
    auto: str                                       # the class that loads it again
    config: dict
    targets: tuple[str, ...]
    whole: str                                      # a module to train whole, as modules_to_save
    inputs: dict[str, Tensor] = field(hash=False)
    width: dict = field(hash=False)                 # what makes another base of the configuration
    depth: Callable[[int], dict] = field(hash=False)

    def base(self, seed: int = 0, **changes) -> nn.Module:
        """The pretrained model: the same weights on every call with one seed."""
        config = transformers.AutoConfig.for_model(self.model_type, **self.config | changes)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return getattr(transformers, self.auto).from_config(config).eval()


TOKENS = {"input_ids": torch.arange(14).reshape(2, 7)}
TEXT = TOKENS | {"labels": TOKENS["input_ids"]}
CLASSES = torch.tensor([0, 2])
HEAD = {"num_labels": 3, "problem_type": "single_label_classification"}   # else set by training
SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4}
WORDS = SIZE | {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = WORDS | {"num_key_value_heads": 2}


def standard(name, model_type, auto, config, targets, whole, inputs):
    """An Architecture whose configuration calls its sizes by their common names."""
    return Architecture(name, model_type, auto, config, tuple(targets), whole, inputs,
                        {"hidden_size": 32}, lambda layers: {"num_hidden_layers": layers})


ARCHITECTURES = {a.name: a for a in [
    standard("Llama", "llama", "AutoModelForCausalLM", GROUPED | {"tie_word_embeddings": False},
             ["q_proj", "v_proj", "down_proj"], "lm_head", TEXT),
    standard("Qwen3", "qwen3", "AutoModelForCausalLM",
             GROUPED | {"head_dim": 4, "tie_word_embeddings": True},
             ["q_proj", "v_proj", "down_proj"], "model.norm", TEXT),
    standard("Phi-3", "phi3", "AutoModelForCausalLM", GROUPED | {"tie_word_embeddings": False},
             ["qkv_proj", "gate_up_proj"], "lm_head", TEXT),
    Architecture("GPT-2", "gpt2", "AutoModelForCausalLM",
                 {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16,
                  "bos_token_id": 1, "eos_token_id": 2},
                 ("c_attn", "c_proj"), "ln_f", TEXT, {"n_embd": 32},
                 lambda layers: {"n_layer": layers}),
    standard("BERT", "bert", "AutoModelForSequenceClassification", WORDS | HEAD,
             ["query", "value", "dense"], "classifier", TOKENS | {"labels": CLASSES}),
    standard("RoBERTa", "roberta", "AutoModelForSequenceClassification",
             WORDS | HEAD, ["query", "dense"], "classifier",
             TOKENS | {"labels": CLASSES}),
    Architecture("T5", "t5", "AutoModelForSeq2SeqLM",
                 {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2,
                  "num_heads": 4, "decoder_start_token_id": 0},
                 ("q", "v", "wo"), "decoder.final_layer_norm", TEXT, {"d_model": 32},
                 lambda layers: {"num_layers": layers, "num_decoder_layers": layers}),
    standard("ViT", "vit", "AutoModelForImageClassification",
             SIZE | HEAD | {"image_size": 8, "patch_size": 4},
             ["q_proj", "v_proj", "fc1"], "classifier",
             {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
              "labels": CLASSES}),
]}


@torch.no_grad()
def outputs(model: nn.Module, architecture: Architecture) -> Tensor:
    return model.eval()(**architecture.inputs).logits


def train(model: nn.Module, architecture: Architecture, steps: int = 4) -> nn.Module:
    """A few steps of AdamW on whatever is trainable, by the model's own loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    with torch.random.fork_rng():
        torch.manual_seed(0)                                          # for dropout
        model.train()
        for _ in range(steps):
            optimizer.zero_grad()
            model(**architecture.inputs).loss.backward()
            optimizer.step()
    return model.eval()


def compare(one: nn.Module, other: nn.Module, architecture: Architecture) -> str:
    """ "yes" if the two give the same outputs, and not the base's."""
    one, other, base = (outputs(m, architecture) for m in (one, other, architecture.base()))
    error, effect = ((one - t).abs().max() / base.abs().max() for t in (other, base))
    if effect < EFFECT:
        return f"no: the adapter changes the outputs by {effect:.1g} only"
    return "yes" if error <= TOLERANCE else f"no: the outputs differ by {error:.1g}"


# From lora_lib to PEFT, and back.

def trained_here(architecture: Architecture, **options) -> nn.Module:
    model = inject(architecture.base(), list(architecture.targets), rank=2, alpha=4, seed=0,
                   **options)
    return train(model, architecture)


def trained_in_peft(architecture: Architecture, steps: int = 4, **options) -> nn.Module:
    config = {"r": 2, "lora_alpha": 4, "target_modules": list(architecture.targets), **options}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(architecture.base(), LoraConfig(**config))
    return train(model, architecture, steps)


def to_peft(architecture: Architecture, folder: Path, **options) -> str:
    ours = trained_here(architecture, **options)
    save_adapter(ours, folder)
    return compare(ours, PeftModel.from_pretrained(architecture.base(), folder), architecture)


def from_peft(architecture: Architecture, folder: Path, **options) -> str:
    theirs = trained_in_peft(architecture, **options)
    theirs.save_pretrained(folder)
    return compare(load_adapter(architecture.base(), folder), theirs, architecture)


def whole_to_peft(architecture: Architecture, folder: Path) -> str:
    return to_peft(architecture, folder, modules_to_save=[architecture.whole])


def whole_from_peft(architecture: Architecture, folder: Path) -> str:
    return from_peft(architecture, folder, modules_to_save=[architecture.whole])


# From lora_lib to plain transformers.

def merged(architecture: Architecture, folder: Path, **saving) -> str:
    """Whether a merged model's folder is an ordinary one, and loads as one."""
    model = trained_here(architecture, modules_to_save=[architecture.whole])
    architecture.base().save_pretrained(folder / "base", **saving)
    before = outputs(model, architecture)
    merge(model).save_pretrained(folder / "merged", **saving)
    here, there = (contents(folder / name) for name in ("merged", "base"))
    if here != there:
        return f"no: {here ^ there} differ"
    loaded = getattr(transformers, architecture.auto).from_pretrained(folder / "merged")
    error = (outputs(loaded, architecture) - before).abs().max() / before.abs().max()
    return "yes" if error <= TOLERANCE else f"no: the outputs differ by {error:.1g}"


def contents(folder: Path) -> set:
    """What a checkpoint of transformers holds, all but the numbers in its tensors."""
    found = set()
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            found |= {(file.name, key, tuple(t.shape)) for key, t in load_file(file).items()}
        else:
            found.add((file.name, json.dumps(json.loads(file.read_text()), sort_keys=True)))
    return found


def sharded(architecture: Architecture, folder: Path) -> str:
    answer = merged(architecture, folder, max_shard_size="8KB")
    shards = len(list((folder / "merged").glob("*.safetensors")))
    return answer if shards > 1 else "no: it is in one file"


DIRECTIONS = {f.__name__: f for f in (to_peft, from_peft, whole_to_peft, whole_from_peft, merged,
                                      sharded)}


@cache
def direction(name: str, architecture: str) -> str:
    """What one of DIRECTIONS says of one of ARCHITECTURES."""
    return _in_a_folder(DIRECTIONS[name], ARCHITECTURES[architecture])


def _in_a_folder(function, *arguments, **options):
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        for kind in (UserWarning, FutureWarning):            # PEFT's, on how it reads a setting
            warnings.simplefilter("ignore", kind)
        return function(*arguments, Path(folder), **options)


# PEFT's options: what loads here, and what is refused.

LAYERS = {"target_modules": ["q_proj", "v_proj"]}
OPTIONS = {
    "lora_dropout": ("Llama", {"lora_dropout": 0.1}),
    "use_rslora": ("Llama", {"use_rslora": True, "r": 3}),
    "rank_pattern": ("Llama", {"rank_pattern": {"q_proj": 3, "layers.1.self_attn.v_proj": 1}}),
    "alpha_pattern": ("Llama", {"alpha_pattern": {"^model.layers.0.mlp.down_proj": 1,
                                                  "v_proj": 9}}),
    'target_modules="all-linear"': ("Llama", {"target_modules": "all-linear"}),
    "target_modules, a regular expression": ("Llama", {"target_modules": r".*\.1\..*[qv]_proj"}),
    "exclude_modules": ("Llama", {"target_modules": "all-linear", "exclude_modules": ["up_proj"]}),
    "layers_to_transform": ("Llama", {"layers_to_transform": [1]}),
    "fan_in_fan_out": ("GPT-2", {"fan_in_fan_out": True}),
    "modules_to_save": ("BERT", {"modules_to_save": ["classifier", "pooler"]}),
    'task_type="SEQ_CLS", which trains the head': ("BERT", {"task_type": "SEQ_CLS"}),
    'init_lora_weights="gaussian"': ("Llama", {"init_lora_weights": "gaussian"}),
    'init_lora_weights="orthogonal"': ("Llama", {"init_lora_weights": "orthogonal"}),
    'init_lora_weights="pissa"': ("Llama", {"init_lora_weights": "pissa"}),
    'init_lora_weights="olora"': ("Llama", {"init_lora_weights": "olora"}),
    'bias="lora_only"': ("BERT", {"bias": "lora_only"}),
    'bias="all"': ("BERT", {"bias": "all"}),
    "lora_bias": ("BERT", {"lora_bias": True}),
    "use_dora": ("Llama", {"use_dora": True}),
    "target_modules, an embedding": ("Llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "target_modules, a convolution": ("ViT", {"target_modules": ["projection", "q_proj"]}),
    "target_parameters": ("Llama", {"target_parameters": ["down_proj.weight"], **LAYERS}),
    "trainable_token_indices": ("Llama", {"trainable_token_indices": [1, 2]}),
    "layer_replication": ("Llama", {"layer_replication": [[0, 2], [1, 2]]}),
    "modules_to_save, a tied weight": ("GPT-2", {"modules_to_save": ["lm_head"]}),
}


@cache
def option(name: str) -> str:
    """ "yes" if PEFT's adapter with the option loads here, or the error's words."""
    architecture, options = OPTIONS[name]
    return _in_a_folder(_option, ARCHITECTURES[architecture], options)


def _option(architecture, options, folder):
    theirs = trained_in_peft(architecture, **options)
    theirs.save_pretrained(folder)
    base = architecture.base()
    return refused(base, folder) or compare(base, theirs, architecture)


def refused(model: nn.Module, folder: Path) -> str | None:
    """The words of load_adapter's ValueError, or None. The model must be as it was."""
    before = {key: t.clone() for key, t in model.state_dict().items()}
    try:
        load_adapter(model, folder)
    except ValueError as error:
        after = model.state_dict()
        assert before.keys() == after.keys() and not lora_modules(model)
        assert all(torch.equal(t, after[key]) for key, t in before.items())
        return str(error).replace(f"{folder}/", "")
    return None


# Another base than the one that the adapter was trained on.

def wider(architecture: Architecture) -> nn.Module:
    return architecture.base(**architecture.width)


def deeper(architecture: Architecture) -> nn.Module:
    """One layer more; the others' weights are the base's."""
    return _of_depth(architecture, 3)


def shallower(architecture: Architecture) -> nn.Module:
    return _of_depth(architecture, 1)


def _of_depth(architecture, layers):
    model = architecture.base(**architecture.depth(layers))
    state = architecture.base().state_dict()
    model.load_state_dict({key: state.get(key, t) for key, t in model.state_dict().items()})
    return model


def other_weights(architecture: Architecture) -> nn.Module:
    return architecture.base(seed=1)


def other_architecture(architecture: Architecture) -> nn.Module:
    names = list(ARCHITECTURES)
    return ARCHITECTURES[names[names.index(architecture.name) - 3]].base()


OTHERS = {f.__name__: f for f in (wider, shallower, deeper, other_architecture, other_weights)}


@cache
def other_base(name: str, architecture: str, saved_by: str) -> str | None:
    """The words by which another base is refused, or None if the adapter loads into it."""
    return _in_a_folder(_other_base, OTHERS[name], ARCHITECTURES[architecture], saved_by)


def _other_base(other, architecture, saved_by, folder):
    if saved_by == "lora_lib":
        save_adapter(trained_here(architecture), folder)
    else:
        trained_in_peft(architecture).save_pretrained(folder)
    return refused(other(architecture), folder)
