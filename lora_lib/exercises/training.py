"""Assignment 5, Training: the visible tests on a loop, on names, and on saved adapters."""

import json
import tempfile
from pathlib import Path

import numpy as np

from lora_lib.exercises.feedback import Wrong, call, is_like, same

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def train_layer(answer, *, d=5, k=6, rank=2, seed=0):
    """5.1: a few steps of gradient descent on A and B of one layer, with autograd."""
    import torch

    rng = np.random.default_rng(seed)
    x, W, target = rng.normal(size=(7, k)), rng.normal(size=(d, k)), rng.normal(size=(7, d))
    A, B = rng.normal(size=(rank, k)) / np.sqrt(k), 0.5 * rng.normal(size=(d, rank))
    scaling, lr, steps = 1.5, 0.2, 3
    given = [torch.from_numpy(v) for v in (x, W, A, B)]
    result = call(answer, *given, scaling, torch.from_numpy(target), lr, steps)
    if not isinstance(result, (tuple, list)) or len(result) != 3:
        raise Wrong("expected (A, B, losses), got "
                    + ("None: return them" if result is None else f"a {type(result).__name__}"))
    new_A, new_B, losses = result
    right = _descend(x, W, A, B, scaling, target, lr, steps)
    wrong = {
        "the scaling is missing": _descend(x, W, A, B, 1.0, target, lr, steps),
        "the loss is the sum of the squares; divide by their number":
            _descend(x, W, A, B, scaling, target, lr * target.size, steps),
        "the squares are summed over the outputs; the mean is over all entries":
            _descend(x, W, A, B, scaling, target, lr * d, steps),
        "the gradients of earlier steps are still in .grad: clear them before each backward":
            _descend(x, W, A, B, scaling, target, lr, steps, "kept"),
        "W was trained, too; it is frozen": _descend(x, W, A, B, scaling, target, lr, steps, "W"),
        "A was not trained; look for what detaches its path":
            _descend(x, W, A, B, scaling, target, lr, steps, "no A"),
        "B was not trained; look for what detaches its path":
            _descend(x, W, A, B, scaling, target, lr, steps, "no B"),
        "the steps go up the gradient, not down": _descend(x, W, A, B, scaling, target, -lr, steps),
        "one step is missing": _descend(x, W, A, B, scaling, target, lr, steps - 1),
        "nothing was trained": (A, B, [])}
    for name, found, place in (("B", new_B, 1), ("A", new_A, 0)):
        same(found, torch.from_numpy(right[place]), f"after {steps} steps, {name}", rtol=1e-6,
             dtype=True, hints={hint: values[place] for hint, values in wrong.items()})
    if not isinstance(losses, list) or len(losses) != steps:
        raise Wrong(f"losses should be a list of {steps} numbers, one for each step, got "
                    f"{losses if not isinstance(losses, list) else f'{len(losses)} of them'}")
    later = _descend(x, W, A, B, scaling, target, lr, steps + 1)[2]
    same(np.array([float(loss) for loss in losses]), np.array(right[2]), "losses", rtol=1e-6,
         hints={"each is the loss after its step; the loss before it is wanted": later[1:],
                "the mean is wanted, not the sum": np.array(right[2]) * target.size,
                "the mean over all entries is wanted": np.array(right[2]) * d})


def adapter_shapes(answer, *, rank=3):
    """5.2: the names and shapes of the tensors that an adapter on some modules has."""
    modules = _llama(2, 12, 20)
    for targets in (["q_proj", "v_proj"], ["layers.1.self_attn.k_proj", "down_proj"]):
        paths = [path for path in modules
                 if any(path == t or path.endswith(f".{t}") for t in targets)]
        want = {_key(path, part): (rank, modules[path][1]) if part == "A"
                else (modules[path][0], rank) for path in paths for part in "AB"}
        got = call(answer, dict(modules), list(targets), rank)
        same_shapes(got, want, f"for target_modules = {targets}")


def same_shapes(got, want: dict, where: str) -> None:
    """Raise Wrong unless `got` has the names of `want` and their shapes, in any order."""
    if not isinstance(got, dict):
        raise Wrong("expected a dictionary {name: shape}, got "
                    + ("None: return it" if got is None else f"a {type(got).__name__}"))
    if missing := sorted(want.keys() - got.keys()):
        extra = sorted(map(str, got.keys() - want.keys()))
        raise Wrong(f"{where}, the name {missing[0]!r} is missing"
                    + (f"; yours are such as {extra[0]!r}." if extra else ".")
                    + _hint_on_key(extra))
    if extra := sorted(map(str, got.keys() - want.keys())):
        raise Wrong(f"{where}, {extra[0]!r} is one name too many: no target names that module")
    for name, shape in want.items():
        found = tuple(got[name]) if isinstance(got[name], (tuple, list)) else got[name]
        if found != tuple(shape):
            raise Wrong(f"{where}, {name!r} has shape {found} and should have {tuple(shape)}."
                        + (" Hint: A is (r, k) and B is (d, r), for a weight (d, k)."
                           if isinstance(found, tuple) and sorted(found) == sorted(shape) else ""))


def train(answer, *, kind="holder", budget=4000, target_quality=0.8, seed=0):
    """5.3: an adapter, trained and saved, that answers held-out questions within a budget."""
    from lora_lib.text import questions
    from lora_lib.torch import exact_match, lora_modules, lora_parameters

    with tempfile.TemporaryDirectory() as name:
        call(answer, Path(name), seed)
        model = fresh_base_with(Path(name))
    size = sum(p.numel() for p in lora_parameters(model))
    if size > budget:
        ranks = sorted({layer.rank for layer in lora_modules(model).values()})
        raise Wrong(f"the adapter has {size:,} numbers, and the budget is {budget:,}. It adapts "
                    f"{len(lora_modules(model))} modules, with rank {ranks}: take a smaller rank "
                    "or fewer modules")
    held_out = questions(200, "visible", [kind], length=(2,))
    quality = exact_match(model, model.tokenizer, held_out)
    if quality < target_quality:
        largest = max(layer.B.abs().max().item() for layer in lora_modules(model).values())
        hint = ("every B is zero, as before the first step: either you saved before training, or "
                "the optimizer does not hold the adapters (build it after inject)"
                if largest == 0 else
                f"no number in B is above {largest:.1g}, so it has hardly moved: is the learning "
                "rate too small, or are the steps too few?" if largest < 0.02 else
                "print the loss of every tenth step: does it fall, and does it stay down?")
        raise Wrong(f"a fresh base with your adapter answers {quality:.0%} of the held-out "
                    f"questions, and should answer {target_quality:.0%}. Hint: {hint}")


def fresh_base_with(folder: Path):
    """A fresh base with the adapter in `folder`, or Wrong, which says why it cannot be loaded."""
    from lora_lib.torch import load_adapter, load_pretrained

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            there = sorted(path.name for path in folder.iterdir())
            raise Wrong(f"{name} is not in the folder that the function was given; there "
                        f"{'is ' + ', '.join(there) if there else 'is nothing'}. Save the adapter "
                        "into that folder; what is printed or returned does not count")
    try:
        return load_adapter(load_pretrained("tales"), folder)
    except Exception as error:
        hint = (" Hint: was the base trained as well? Only A and B are in the folder, so the rest "
                "must be the pretrained model's." if "trained on" in str(error) else "")
        says = str(error).replace(str(folder), "the folder")
        raise Wrong(f"the adapter does not load on a fresh base: {says}.{hint}") from None


def write_adapter(answer, *, rank=3, alpha=6, seed=0):
    """5.4: given tensors, written as PEFT would write them."""
    rng = np.random.default_rng(seed)
    paths = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(4) for p in "qv"]
    layers = _draw({path: (96, 96) for path in paths}, rank, rng)
    with tempfile.TemporaryDirectory() as name:
        call(answer, Path(name), layers, alpha)
        written_as_peft(Path(name), layers, alpha)


def written_as_peft(folder: Path, layers: dict, alpha: float) -> None:
    """Raise Wrong unless `folder` holds the adapter of `layers`, {path: (A, B)}, for any reader."""
    from safetensors.torch import load_file

    from lora_lib.torch import inject, load_pretrained, lora_modules

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise Wrong(f"{name} is not in the folder that the function was given")
    try:
        config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    except Exception as error:
        raise Wrong(f"one of the files cannot be read: {error}") from None
    want = {_key(path, part): pair[part == "B"] for path, pair in layers.items() for part in "AB"}
    same_shapes({name: tuple(t.shape) for name, t in tensors.items()},
                {name: tuple(t.shape) for name, t in want.items()}, f"in {WEIGHTS}")
    for name, tensor in want.items():
        same(tensors[name], tensor, f"in {WEIGHTS}, {name}", rtol=0, atol=0, dtype=True)
    rank = next(iter(layers.values()))[0].shape[0]
    for setting, right in (("peft_type", "LORA"), ("r", rank), ("lora_alpha", alpha)):
        found = config.get(setting) if isinstance(config, dict) else None
        if found != right:
            raise Wrong(f"in {CONFIG}, {setting!r} is {found!r} and should be {right!r}"
                        + (". Hint: this is the scaling; PEFT divides by r itself"
                           if setting == "lora_alpha" and found == alpha / rank else ""))
    targets = config.get("target_modules")
    try:
        reached = lora_modules(inject(load_pretrained("tales"), targets, rank=1)).keys()
    except Exception as error:
        raise Wrong(f"in {CONFIG}, 'target_modules' is {targets!r}: {error}") from None
    if wrong := sorted(reached ^ layers.keys()):
        raise Wrong(f"in {CONFIG}, 'target_modules' {'names' if wrong[0] in reached else 'misses'} "
                    f"{wrong[0]}, and the adapter has {'no' if wrong[0] in reached else 'a'} "
                    "tensor for it. PEFT's rule: a module is meant by its path, or by an end of "
                    "its path that begins after a dot")
    fresh_base_with(folder)


def serve(answer, *, rank=3, alpha=6, seed=0):
    """5.5: one batch, in which each row is answered with an adapter of its own."""
    import torch

    from lora_lib.text import Tokenizer
    from lora_lib.torch import LanguageModel, load_pretrained

    rng = np.random.default_rng(seed)
    tokens = torch.from_numpy(rng.integers(2, len(Tokenizer()), size=(4, 9)))
    which, base = [1, -1, 0, 1], load_pretrained("tales")
    shapes = {name: tuple(m.weight.shape) for name, m in base.named_modules()
              if name.endswith(("q_proj", "v_proj"))}
    adapters = [_draw(shapes, rank, rng) for _ in range(2)]
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        folders = [Path(first), Path(second)]
        for folder, layers in zip(folders, adapters):
            _save(folder, layers, alpha, dropout=0.5)
        got = call(answer, folders, which, tokens)
        again = call(answer, folders, which, tokens)
    s = alpha / rank

    def rows(used, model=base):
        """The logits of each row with `used(w)`, a list of (layers, scaling)."""
        return torch.cat([_logits(model, used(w), row[None]) for w, row in zip(which, tokens)])

    right = rows(lambda w: [] if w < 0 else [(adapters[w], s)])
    is_like(got, right, "the tensor of logits", dtype=True)
    if not torch.equal(got, again):
        raise Wrong("two calls give different logits: dropout is on. Put the model in eval mode")
    untrained = LanguageModel(base.config, seed=0)
    same(got, right, "the logit (row, position, token)", rtol=1e-4, atol=1e-3, hints={
        "these are the base's logits, no adapter is in them": rows(lambda w: []),
        "adapters are used without their scaling":
            rows(lambda w: [] if w < 0 else [(adapters[w], 1.0)]),
        "-1 asks for the base alone; as an index it takes the last folder":
            rows(lambda w: [(adapters[w], s)]),
        "all rows have all adapters in them":
            rows(lambda w: [(layers, s) for layers in adapters]),
        "an adapter stays in the model when the next one is put in":
            rows(lambda w: [(adapters[i], s) for i in range(w + 1)]),
        "all rows have the adapter of the first folder": rows(lambda w: [(adapters[0], s)]),
        "all rows have the adapter of the second folder": rows(lambda w: [(adapters[-1], s)]),
        "the rows come back in another order: sorted by their adapters":
            right[np.argsort(which, kind="stable")],
        "the base is not the pretrained one": rows(
            lambda w: [] if w < 0 else [(adapters[w], s)], untrained)})


EXERCISES = {"5.1": train_layer, "5.2": adapter_shapes, "5.3": train, "5.4": write_adapter,
             "5.5": serve}


def _descend(x, W, A, B, scaling, target, lr, steps, mistake=""):
    """A, B, and the losses of gradient descent; the gradients as chapter 2 derives them."""
    W, A, B, losses, kept = W.copy(), A.copy(), B.copy(), [], [0, 0, 0]
    for _ in range(steps):
        error = x @ W.T + scaling * (x @ A.T) @ B.T - target
        losses.append(float(np.mean(error ** 2)))
        G = 2 * error / error.size
        gradients = G.T @ x, scaling * (G @ B).T @ x, scaling * G.T @ (x @ A.T)
        kept = [g + k for g, k in zip(gradients, kept)] if mistake == "kept" else gradients
        W -= lr * kept[0] if mistake == "W" else 0
        A -= lr * kept[1] if mistake != "no A" else 0
        B -= lr * kept[2] if mistake != "no B" else 0
    return A, B, losses


def _llama(layers, width, inner):
    """The shape of each weight of a Llama by its module's path."""
    square = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    shapes = {**square, "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
              "mlp.down_proj": (width, inner), "input_layernorm": (width,)}
    return {"model.embed_tokens": (50, width),
            **{f"model.layers.{i}.{name}": shape for i in range(layers)
               for name, shape in shapes.items()}, "model.norm": (width,)}


def _key(path, part):
    return f"base_model.model.{path}.lora_{part}.weight"


def _hint_on_key(names):
    if not names:
        return ""
    if not names[0].startswith("base_model.model."):
        return " Hint: PEFT's names begin with 'base_model.model.'."
    if not names[0].endswith((".lora_A.weight", ".lora_B.weight")):
        return " Hint: PEFT's names end in '.lora_A.weight' and '.lora_B.weight'."
    return ""


def _draw(shapes, rank, rng):
    """Random (A, B) of a size that changes the logits, by path."""
    import torch

    def normal(*shape):
        values = rng.normal(size=shape) / np.sqrt(shape[-1])
        return torch.from_numpy(values).float()

    return {path: (normal(rank, k), 0.5 * normal(d, rank)) for path, (d, k) in shapes.items()}


def _save(folder, layers, alpha, dropout):
    import torch

    from lora_lib.torch import inject, load_pretrained, lora_modules, save_adapter

    rank = next(iter(layers.values()))[0].shape[0]
    model = inject(load_pretrained("tales"), list(layers), rank, alpha, dropout)
    with torch.no_grad():
        for path, layer in lora_modules(model).items():
            layer.A.copy_(layers[path][0])
            layer.B.copy_(layers[path][1])
    save_adapter(model, folder)


def _logits(model, used, tokens):
    """Logits with each (layers, scaling) of `used` added to the weights, which are put back."""
    import torch

    weights = {f"{path}.weight": model.get_submodule(path).weight.detach().clone()
               for layers, _ in used for path in layers}
    for layers, scaling in used:
        for path, (A, B) in layers.items():
            weights[f"{path}.weight"] += scaling * B @ A
    with torch.no_grad():
        return torch.func.functional_call(model, weights, (tokens,))
