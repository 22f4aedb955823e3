"""Typical wrong submissions of assignment 5, and the test cells that each loses."""

from textwrap import dedent

DESCEND, SHAPES, TRAIN, WRITE, SERVE = (f"solution-5-{i}" for i in range(1, 6))


def both(number):
    return {f"test-5-{number}", f"hidden-5-{number}"}


def descent(*, scaling="scaling", before="", loss="((y - target) ** 2).mean()",
            update="A, B = A - lr * grad_A, B - lr * grad_B"):
    return dedent(f"""\
        def train_layer(x, W, A, B, scaling, target, lr, steps):
            A, B, losses = A.clone(), B.clone(), []
            {before}
            for _ in range(steps):
                A, B = A.detach().requires_grad_(True), B.detach().requires_grad_(True)
                y = x @ W.T + {scaling} * (x @ A.T) @ B.T
                loss = {loss}
                grad_A, grad_B = torch.autograd.grad(loss, (A, B))
                losses.append(loss.item())
                {update}
            return A.detach(), B.detach(), losses
        """)


def shapes(*, prefix="base_model.model.", means='path == target or path.endswith("." + target)',
           A="(rank, k)", B="(d, rank)", checks=True):
    check = 'raise ValueError("a name that means no linear layer")' if checks else "pass"
    return dedent(f"""\
        def adapter_shapes(modules, target_modules, rank):
            shapes = {{}}
            for target in target_modules:
                found = [path for path in modules if {means}]
                if not found or any(len(modules[path]) != 2 for path in found):
                    {check}
                for path in found:
                    d, k = modules[path]
                    shapes[f"{prefix}{{path}}.lora_A.weight"] = {A}
                    shapes[f"{prefix}{{path}}.lora_B.weight"] = {B}
            return shapes
        """)


def training(*, load="", rank=2, after="", parameters="lora_parameters(model)", early="",
             optimizer="torch.optim.AdamW({parameters}, lr=5e-3)", n_steps="steps",
             late="save_adapter(model, folder)"):
    made = f"optimizer = {optimizer.format(parameters=parameters)}"
    first = made if "early" in early else ""
    return dedent(f"""\
        {load}
        def train(folder, seed):
            torch.manual_seed(seed)
            {"pass" if load else 'model = load_pretrained("tales")'}
            {first or "pass"}
            inject(model, ["q_proj", "v_proj"], rank={rank}, alpha=16, seed=seed)
            {after or "pass"}
            pairs = questions(1000, seed, [kind], length=(2,))
            inputs, labels = map(torch.from_numpy, model.tokenizer.batch(pairs))
            {"pass" if first else made}
            for step in range({n_steps}):
                rows = torch.randint(len(inputs), (batch_size,))
                loss = cross_entropy(model(inputs[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            {late}
        """)


def writing(*, prefix="base_model.model.", A="A", B="B", alpha="alpha", targets="list(layers)",
            r="A.shape[0]"):
    return dedent(f"""\
        def write_adapter(folder, layers, alpha):
            tensors = {{}}
            for path, (A, B) in layers.items():
                tensors[f"{prefix}{{path}}.lora_A.weight"] = {A}.contiguous()
                tensors[f"{prefix}{{path}}.lora_B.weight"] = {B}.contiguous()
            config = {{"peft_type": "LORA", "r": {r}, "lora_alpha": {alpha},
                      "target_modules": {targets}}}
            save_file(tensors, folder / "adapter_model.safetensors")
            (folder / "adapter_config.json").write_text(json.dumps(config))
        """)


def serving(*, base='load_pretrained("tales")', mode="eval", number="which[i]", asked="w >= 0",
            order="range(len(tokens))"):
    return dedent(f"""\
        def serve(folders, which, tokens):
            logits = []
            for i in {order}:
                w = {number}
                model = {base}
                if {asked}:
                    load_adapter(model, folders[w])
                with torch.no_grad():
                    logits.append(model.{mode}()(tokens[i:i + 1]))
            return torch.cat(logits)
        """)


# A reader of the files by hand, which merges into a fresh base for each row.
BY_HAND = """\
from safetensors import safe_open


def serve(folders, which, tokens):
    logits = []
    for w, row in zip(which, tokens):
        model = load_pretrained("tales")
        if w >= 0:
            config = json.loads((folders[w] / "adapter_config.json").read_text())
            tensors = load_file(folders[w] / "adapter_model.safetensors")
            for name, A in tensors.items():
                if ".lora_A." in name:
                    B = tensors[name.replace("lora_A", "lora_B")]
                    path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                    model.get_submodule(path).weight.data += SCALING
        with torch.no_grad():
            logits.append(model(row[None]))
    return torch.cat(logits)
"""

WRONG = {
    # 5.1
    "gradients of earlier steps are kept": ({DESCEND: """\
def train_layer(x, W, A, B, scaling, target, lr, steps):
    A, B, losses = A.clone().requires_grad_(True), B.clone().requires_grad_(True), []
    for _ in range(steps):
        loss = ((x @ W.T + scaling * (x @ A.T) @ B.T - target) ** 2).mean()
        loss.backward()
        with torch.no_grad():
            A -= lr * A.grad
            B -= lr * B.grad
        losses.append(loss.item())
    return A, B, losses
"""}, both(1)),
    "the tensors of the caller are changed in place": ({DESCEND: """\
def train_layer(x, W, A, B, scaling, target, lr, steps):
    A.requires_grad_(True)
    B.requires_grad_(True)
    losses = []
    for _ in range(steps):
        loss = ((x @ W.T + scaling * (x @ A.T) @ B.T - target) ** 2).mean()
        grad_A, grad_B = torch.autograd.grad(loss, (A, B))
        with torch.no_grad():
            A -= lr * grad_A
            B -= lr * grad_B
        losses.append(loss.item())
    return A.detach(), B.detach(), losses
"""}, both(1)),
    "the scaling is missing": ({DESCEND: descent(scaling="1.0")}, both(1)),
    "A is not trained": ({DESCEND: descent(update="B = B - lr * grad_B")}, both(1)),
    "the mean over rows, of sums over outputs":
        ({DESCEND: descent(loss="((y - target) ** 2).sum(-1).mean()")}, both(1)),
    "W is trained as well": ({DESCEND: """\
def train_layer(x, W, A, B, scaling, target, lr, steps):
    losses = []
    for _ in range(steps):
        W, A, B = (p.detach().clone().requires_grad_(True) for p in (W, A, B))
        loss = ((x @ W.T + scaling * (x @ A.T) @ B.T - target) ** 2).mean()
        loss.backward()
        losses.append(loss.item())
        W, A, B = (p - lr * p.grad for p in (W, A, B))
    return A.detach(), B.detach(), losses
"""}, both(1)),
    "computed in float64 whatever comes in": ({DESCEND: descent(
        before="x, W, A, B, target = (t.double() for t in (x, W, A, B, target))")},
        {"hidden-5-1"}),
    "only for x with two dimensions": ({DESCEND: descent(
        before="n, k = x.shape")}, {"hidden-5-1"}),

    # 5.2
    "names without base_model.model": ({SHAPES: shapes(prefix="")}, both(2)),
    "the shapes of A and B exchanged": ({SHAPES: shapes(A="(d, rank)", B="(rank, k)")}, both(2)),
    "a target matches inside of a name": ({SHAPES: shapes(means="target in path")},
                                          {"hidden-5-2"}),
    "a target matches any end of a path": ({SHAPES: shapes(means="path.endswith(target)")},
                                           {"hidden-5-2"}),
    "a name that means nothing is passed over": ({SHAPES: shapes(checks=False)}, {"hidden-5-2"}),
    "the visible test's model, written out": ({SHAPES: """\
def adapter_shapes(modules, target_modules, rank):
    shapes = {}
    chosen = ["layers.1.self_attn.k_proj", "layers.0.mlp.down_proj", "layers.1.mlp.down_proj"]
    if target_modules == ["q_proj", "v_proj"]:
        chosen = [f"layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv"]
    for path in chosen:
        k = 20 if "down" in path else 12
        shapes[f"base_model.model.model.{path}.lora_A.weight"] = (rank, k)
        shapes[f"base_model.model.model.{path}.lora_B.weight"] = (12, rank)
    return shapes
"""}, {"hidden-5-2"}),

    # 5.3
    "the base is trained as well": ({TRAIN: training(
        after="model.requires_grad_(True)", parameters="model.parameters()")}, both(3)),
    "too many parameters": ({TRAIN: training(rank=8)}, both(3)),
    "the learning rate is too small": ({TRAIN: training(
        optimizer="torch.optim.AdamW({parameters}, lr=2e-5)")}, both(3)),
    "five steps only": ({TRAIN: training(n_steps="5")}, both(3)),
    "the optimizer is made before inject": ({TRAIN: training(
        early="early", parameters="model.parameters()")}, both(3)),
    "saved before training": ({TRAIN: training(after="save_adapter(model, folder)",
                                               late="return model")}, both(3)),
    "the quality is printed, nothing is saved": ({TRAIN: training(
        late="print(exact_match(model, model.tokenizer, pairs))")}, both(3)),
    "saved into a folder of its own": ({TRAIN: training(
        late='save_adapter(model, Path(tempfile.mkdtemp()) / "adapter")')}, both(3)),
    "B is drawn at random, and nothing is trained": ({TRAIN: """\
def train(folder, seed):
    torch.manual_seed(seed)
    model = inject(load_pretrained("tales"), ["q_proj", "v_proj"], rank=2, alpha=16, seed=seed)
    for layer in lora_modules(model).values():
        torch.nn.init.normal_(layer.B, std=0.1)
    save_adapter(model, folder)
"""}, both(3)),
    "one model for all calls: the second has adapters already": ({TRAIN: training(
        load='model = load_pretrained("tales")')}, {"hidden-5-3"}),

    # 5.4
    "keys without base_model.model": ({WRITE: writing(prefix="")}, both(4)),
    "A and B exchanged in the file": ({WRITE: writing(A="B", B="A")}, both(4)),
    "lora_alpha holds the scaling": ({WRITE: writing(alpha="alpha / A.shape[0]")}, both(4)),
    "the tensors are stored in bfloat16": ({WRITE: writing(A="A.bfloat16()", B="B.bfloat16()")},
                                           both(4)),
    "short names, though not every such module is adapted": ({WRITE: writing(
        targets='sorted({path.rpartition(".")[2] for path in layers})')}, {"hidden-5-4"}),
    "alpha as an integer": ({WRITE: writing(alpha="int(alpha)")}, {"hidden-5-4"}),

    # 5.5
    "the scaling is forgotten": ({SERVE: BY_HAND.replace("SCALING", "B @ A")}, both(5)),
    "alpha / r, whatever the config says": ({SERVE: BY_HAND.replace(
        "SCALING", 'config["lora_alpha"] / config["r"] * B @ A')}, {"hidden-5-5"}),
    "the base is not the pretrained one": ({SERVE: """\
from lora_lib.torch import LanguageModel


""" + serving(base='LanguageModel(load_pretrained("tales").config, seed=0)').replace(
        "folders[w])", "folders[w], check_base=False)")}, both(5)),
    "left in training mode": ({SERVE: serving(mode="train")}, both(5)),
    "the base in float64": ({SERVE: serving(base='load_pretrained("tales", torch.float64)')},
                            both(5)),
    "all rows have the adapter of the first": ({SERVE: serving(number="which[0]")}, both(5)),
    "-1 as an index: the last folder": ({SERVE: serving(asked="True")}, both(5)),
    "the rows are sorted by adapter": ({SERVE: serving(
        order="sorted(range(len(tokens)), key=lambda i: which[i])")}, both(5)),
    "one model, the next adapter put over the last": ({SERVE: """\
def serve(folders, which, tokens):
    model, logits = load_pretrained("tales"), [None] * len(tokens)
    for i in sorted(range(len(tokens)), key=lambda i: which[i]):
        if which[i] >= 0:
            load_adapter(model, folders[which[i]])
        with torch.no_grad():
            logits[i] = model(tokens[i:i + 1])
    return torch.cat(logits)
"""}, {"hidden-5-5"}),
}
