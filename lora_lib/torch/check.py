"""Look for the common mistakes in a model with adapters, and in its data, before it is used."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lora_lib.torch.experts import LoRAExperts
from lora_lib.torch.linear import full, weight_of
from lora_lib.torch.lora import LoRALinear
from lora_lib.torch.parts import (all_adapters, has_bias, idle_adapters, lora_parameters, parts_of,
                                  shapes_of)
from lora_lib.torch.tokens import token_rows

STAGES = ("start", "train", "serve")
SMALL = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Finding:
    """One mistake: a short `code`, the paths or rows that have it, what is wrong, why, and the fix."""

    code: str
    where: tuple[str, ...]
    message: str

    def __str__(self) -> str:
        more = f" and {len(self.where) - 2} more" if len(self.where) > 2 else ""
        return f"[{self.code}] {', '.join(self.where[:2])}{more}: {self.message}"


# What each code says: of the model, then of the data. The order is that of the findings.
MODEL = {
    "no adapter": "the model holds no LoRALinear; call inject() or load_adapter() first",
    "shape": "A must be (rank, in_features) and B (out_features, rank): they look transposed or "
             "swapped. A projects down, B projects up",
    "not finite": "A or B holds NaN or infinity; go back to the last good checkpoint, and lower lr",
    "both zero": "A and B are both zero, so both gradients are zero and stay so; draw A at random, "
                 "as inject() does",
    "random start": "the update is not zero before the first step, so training starts from another "
                    "model than the pretrained one; set B to zero (or pass stage='train' when you "
                    "go on with a trained adapter)",
    "base trainable": "this is no adapter, and it is trained: the savings are gone, and "
                      "save_adapter() will not keep it. Freeze it with requires_grad_(False), or "
                      "name it in also_trained if you mean it, and save it yourself",
    "adapter frozen": "A or B does not require a gradient and will not be trained; call "
                      "requires_grad_(True) on it",
    "16-bit adapter": "A and B are trained in 16 bits, where steps much smaller than the number "
                      "itself round to nothing; keep them in float32 (inject's default) and compute "
                      "in 16 bits by autocast",
    "merged": "the update is in the weight already, so training A and B would change nothing; call "
              "unmerge() first",
    "no gradient": "a backward pass has given other adapters a gradient and this one none: the "
                   "model does not use the layer (or no token chose this expert), and the adapter "
                   "would stay as it is; leave it out of target_modules",
    "new head": "this head is frozen and looks as if it were new: random weights and no bias. It is "
                "no part of the base, and save_adapter() does not keep it; name it in "
                "modules_to_save",
    "optimizer": "the optimizer does not hold this, so it will not be trained; build the optimizer "
                 "after inject(), from lora_parameters(model)",
    "optimizer extra": "the optimizer holds this, which the model does not train; build it after "
                       "inject(), from lora_parameters(model)",
    "base changed": "this frozen weight is not the base's: it was trained, or another base was "
                    "loaded; the adapter alone will not give this model back",
    "scaling forgotten": "the weight is base + B A, without the factor `scaling`; use merge()",
    "merged twice": "the weight holds the update twice: base + 2 scaling B A; load the base again, "
                    "then merge once",
    "counted twice": "the weight holds the update, and the layer adds it once more; it was merged "
                     "by hand: use merge(), or remove the adapter",
    "not in weight": "the layer says that it is merged, and its weight is the base's, without the "
                     "update; use merge()",
    "merged wrong": "the weight is not base + scaling B A; load the base again, then merge()",
    "training mode": "dropout is on, so outputs are noisy; call model.eval()",
    "untrained": "B is zero, so the adapter does nothing; did the optimizer hold it?",
    "unmerged": "every call pays for the adapter's own products; merge() if one adapter serves all "
                "requests (or allow={'unmerged'} if you switch adapters)",
}
DATA = {
    "vocabulary": "a token is negative or beyond the model's vocabulary; was a token added without "
                  "model.resize_token_embeddings()? A label that is not learned is -100",
    "new token": "its row of the embedding is frozen and looks as if it were new, near zero or the "
                 "mean of all rows, so it means nothing to the model; train it, by "
                 "inject(..., trainable_token_indices=...)",
    "not shifted": "the labels are the inputs themselves, so the model learns to repeat what it "
                   "sees; here a label is the token that comes next (transformers' models shift "
                   "inside): pass ids[:, :-1] and labels[:, 1:]",
    "shifted twice": "the labels are the tokens after the next, so every answer skips tokens; "
                     "shift by one place, once",
    "not next": "a label is not the token that comes next in the inputs, so the model learns "
                "another text than it will write; inputs must hold the prompt and the answer",
    "nothing learned": "every label is -100, so nothing is learned from it; did the mark that "
                       "tells where an answer begins not match?",
    "cut off": "its answer is cut off, so the model learns to stop where no end is; raise `length`, "
               "or take the example out",
    "left out": "its prompt leaves no room for an answer, so it is not trained on; raise `length`, "
                "or shorten the prompt",
    "two begins": "it begins with two begin marks, which the model never saw: the template wrote "
                  "one and the tokenizer another; pass add_special_tokens=False",
    "template": "it is not in the template of this tokenizer, in which the model will be asked; "
                "let encode() or apply_chat_template() write it",
    "prompt learned": "the prompt is learned too, so the model learns to write questions, and "
                      "the answers count for less; set the prompt's labels to -100",
    "padding learned": "padding, or a second end mark, is learned; set its labels to -100",
    "end masked": "the mark that ends the answer is not learned, so the model never learns to "
                  "stop. Where padding is the end mark too, it was masked with it: mask by length "
                  "or attention mask, not by token",
    "no end mark": "the answer ends without an end mark, so the model never learns to stop; append "
                   "tokenizer.eos_token, and see that the row is not cut off",
    "goes on": "tokens behind the end mark are learned, such as the next question, so the model "
               "learns to talk to itself; set their labels to -100",
}
MESSAGES = MODEL | DATA


@torch.no_grad()
def check(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *,
          base: nn.Module | Mapping[str, Tensor] | None = None, stage: str = "train",
          data=None, tokenizer=None, also_trained: Collection[str] = (),
          allow: Collection[str] = ()) -> list[Finding]:
    """The mistakes that can be seen in `model`; an empty list when there is none.

    stage         "start": before the first step of a new adapter; "train": before any other step;
                  "serve": before the model answers requests
    optimizer     the one that will train it: does it hold the adapters, and nothing frozen?
    base          the pretrained model, or its state dict: are the frozen weights still its own,
                  and merged ones base + scaling B A?
    data          what a causal model will be trained on, as `fine_tune` takes it: `Rows`, or token
                  numbers (inputs, labels), both (rows, length)
    tokenizer     transformers' tokenizer that made the data; model.tokenizer if there is one
    also_trained  patterns, such as "lm_head.*", of parameters that are trained beside the adapters
    allow         codes of `MESSAGES` to leave out

    A float weight counts as the same when it differs by no more than a few roundings. The model is
    not changed. Raises ValueError for an unknown stage or code, a base of another architecture, or
    data that are no token rows.
    """
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {STAGES}, got {stage!r}")
    if unknown := set(allow) - set(MESSAGES):
        raise ValueError(f"allow must hold codes of {list(MESSAGES)}, got {sorted(unknown)}")
    layers = all_adapters(model)
    rows = token_rows(model)
    own = {id(p) for p in lora_parameters(model)}
    found = _Found()
    if not layers and stage != "serve":
        found.add("no adapter", type(model).__name__)
    sound = {name: layer for name, layer in layers.items() if _sound(name, layer, found)}
    other = {name: p for name, p in model.named_parameters()
             if id(p) not in own and not any(fnmatchcase(name, pattern) for pattern in also_trained)}
    for name, part in rows.items():
        found.add("not finite", name, not torch.isfinite(part.rows).all())
        found.add("unmerged", name, stage == "serve" and not part.merged)
    for name, layer in sound.items():
        zero_A, zero_B = (not bool(t.any()) for t in (layer.A, layer.B))
        found.add("both zero", name, zero_A and zero_B)
        found.add("random start", name, stage == "start" and not (zero_A or zero_B))
        found.add("untrained", name, stage == "serve" and zero_B and not zero_A)
        found.add("unmerged", name, stage == "serve" and not layer.merged)
    if stage == "serve":
        for name, module in model.named_modules():
            dropping = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
            found.add("training mode", name, dropping and module.training)
    else:
        _check_training(model, layers, rows, other, optimizer, found)
    if base is not None:
        _check_base(layers, rows, sound, other, base, found)
    if data is not None:
        from lora_lib.tuning.data_check import check_data    # a room that stands on this one
        check_data(data, model, tokenizer or getattr(model, "tokenizer", None), found)
    return [Finding(code, tuple(found[code]), message) for code, message in MESSAGES.items()
            if code in found and code not in allow]


class _Found(dict):
    def add(self, code, where, condition=True):
        if condition:
            self.setdefault(code, []).append(where)


def _sound(name, layer, found):
    """Whether A and B can be multiplied at all."""
    shapes = shapes_of(layer)
    right = {part: tuple(getattr(layer, part).shape) for part in shapes} == shapes
    finite = all(bool(torch.isfinite(p).all()) for p in parts_of(layer))
    found.add("shape", name, not right)
    found.add("not finite", name, not finite)
    return right and finite


def _check_training(model, layers, rows, other, optimizer, found):
    for name, p in other.items():
        found.add("base trainable", name, p.requires_grad)
    for name, layer in (layers | rows).items():
        parts = [layer.rows] if name in rows else parts_of(layer)
        found.add("adapter frozen", name, not all(p.requires_grad for p in parts))
        found.add("16-bit adapter", name, any(p.requires_grad and p.dtype in SMALL for p in parts))
        found.add("merged", name, layer.merged)
    idle = idle_adapters(model)
    for name in idle if len(idle) < len(layers) else ():
        found.add("no gradient", name)
    for name in _new_heads(model, layers):
        found.add("new head", name)
    if optimizer is not None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        names = {id(p): name for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            found.add("optimizer", name, p.requires_grad and id(p) not in held)
            found.add("optimizer extra", name, not p.requires_grad and id(p) in held)
        found.add("optimizer extra", "a parameter of another model", bool(held - set(names)))


def _new_heads(model, layers):
    """Frozen linear layers outside the numbered blocks, with weights as transformers draws them."""
    std = getattr(getattr(model, "config", None), "initializer_range", None)
    base = getattr(model, "base_model", model)
    if not std or not layers or base is model:
        return
    inside = {id(m) for m in base.modules()}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or id(module) in inside or module is output \
                or name in layers or module.weight.requires_grad or "before_lora" in vars(module):
            continue
        W, bias = module.weight.detach().float(), module.bias
        error = 3 * std / (2 * W.numel()) ** 0.5         # three standard errors of a deviation
        if abs(W.square().mean().sqrt() - std) < error and (bias is None or not bias.any()):
            yield name


def _check_base(layers, rows, sound, other, base, found):
    if isinstance(base, nn.Module):
        within = all_adapters(base)
        within |= token_rows(base)
        base = {_plain(name, within): p for name, p in base.named_parameters()}
    for name, p in other.items():
        plain = _plain(name, layers | rows)
        if plain not in base or base[plain].shape != p.shape:
            raise ValueError(f"base must have {plain} of shape {tuple(p.shape)}, got "
                             f"{tuple(base[plain].shape) if plain in base else 'none of that name'}")
        path, _, leaf = plain.rpartition(".")
        path = plain if plain in layers else path
        if plain != name and (leaf == "weight" or plain in layers):
            if path in rows:
                here, there = (_others(W, rows[path].tokens) for W in (p, base[plain]))
                found.add("base changed", name, not _same(here, there, p.dtype))
            elif path in sound:
                _check_merge(path, layers[path], base[plain], found)
        else:
            expected, layer = base[plain], layers.get(path)
            if leaf == "bias" and layer and layer.merged and has_bias(layer):
                expected = expected + layer.scaling * layer.B_bias
            found.add("base changed", name, not _same(p, expected, p.dtype))


def _plain(name, layers):
    """The parameter's name without what its adapter brought: ".linear", or a parametrization."""
    bare = name.replace(".parametrizations.", ".").removesuffix(".original")
    if bare in layers or bare != name and bare.rpartition(".")[0] in layers:
        return bare
    path, _, leaf = name.rpartition(".")
    path = path.removesuffix(".linear") if path.removesuffix(".linear") in layers else path
    return f"{path}.{leaf}"


def _check_merge(name, layer: LoRALinear | LoRAExperts, original, found):
    """Which sum is in the weight? Each candidate is one mistake; the right one comes first."""
    W = layer.original if isinstance(layer, LoRAExperts) else weight_of(layer.linear)
    dtype = W.dtype
    delta = full(layer.delta_weight()).double()
    base = original.detach().to(W.device).double()
    candidates = {
        True: ((None, 1), ("merged twice", 2), ("scaling forgotten", 1 / layer.scaling),
               ("not in weight", 0)),
        False: ((None, 0), ("counted twice", 1)),
    }[layer.merged]
    for code, times in candidates:
        if _same(W, base + times * delta, dtype):
            found.add(code, name, code is not None)
            return
    found.add("merged wrong" if layer.merged else "base changed", name)


def _others(W, tokens):
    """The rows of W that are not trained."""
    return W.detach().index_fill(0, tokens.to(W.device), 0)


def _same(one, other, dtype):
    """Within four roundings of `dtype`, in the Frobenius norm."""
    one, other = full(one).double(), other.detach().to(one.device).double()
    scale = torch.maximum(one.norm(), other.norm())
    return bool((one - other).norm() <= 4 * torch.finfo(dtype).eps * scale)
