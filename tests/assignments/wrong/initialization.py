"""Typical wrong submissions of assignment 3, and the test cells that each loses."""

INITIALIZE = '''
def initialize(d, k, rank, seed, kind="normal", dtype="float64"):
    if not 1 <= rank <= min(d, k):
        raise ValueError("rank")
    if kind not in ("normal", "uniform"):
        raise ValueError("kind")
    rng = np.random.default_rng(seed)
    if kind == "normal":
        A = rng.normal(0, 1 / np.sqrt(k), (rank, k))
    else:
        A = rng.uniform(-np.sqrt(3 / k), np.sqrt(3 / k), (rank, k))
    return A.astype(dtype), np.zeros((d, rank), dtype)
'''

TRAIN = '''
def train_from(A, B, W, x, y, scaling, lr, steps):
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    losses = []
    for step in range(steps + 1):
        error = x @ W.T + scaling * (x @ A.T) @ B.T - y
        losses.append(0.5 * np.sum(error**2) / len(x))
        if step == steps:
            break
        g = error / len(x)
        dA = scaling * (g @ B).T @ x
        dB = scaling * g.T @ (x @ A.T)
        A = A - lr * dA
        B = B - lr * dB
    return np.array(losses), A, B
'''

FIRST_STEP = '''
def first_step(starts, x, g, probe, alpha, rule, optimizer, lr):
    if rule not in ("alpha / r", "alpha / sqrt(r)") or optimizer not in ("SGD", "Adam"):
        raise ValueError("rule or optimizer")
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    ranks = np.array([len(A) for A in starts])
    sizes = []
    for A, r in zip(starts, ranks):
        s = alpha / r if rule == "alpha / r" else alpha / np.sqrt(r)
        dB = s * g.T @ (x @ A.T)
        B = -lr * (np.sign(dB) if optimizer == "Adam" else dB)
        sizes.append(np.sqrt(np.mean((s * (probe @ A.T) @ B.T) ** 2)))
    power = np.polyfit(np.log(ranks), np.log(sizes), 1)[0]
    return np.array(sizes), power
'''

CARRY = '''
def carry_alpha(alpha, rank, new_rank, rule, new_rule, keep):
    rules = {"alpha / r": 1, "alpha / sqrt(r)": 0.5}
    if rank < 1 or new_rank < 1 or rule not in rules or new_rule not in rules:
        raise ValueError("rank or rule")
    s = alpha / rank ** rules[rule]
    if keep == "product":
        new_s = s
    elif keep == "Adam":
        new_s = s * rank / new_rank
    elif keep == "SGD":
        new_s = s * np.sqrt(rank / new_rank)
    else:
        raise ValueError("keep")
    return new_s * new_rank ** rules[new_rule]
'''


def _changed(code, *changes):
    """A right solution with a few lines replaced by typical wrong ones."""
    for right, wrong in changes:
        assert code.count(right) == 1, (right, code.count(right))
        code = code.replace(right, wrong)
    return code


def _initialize(*changes):
    return {"solution-3-1": _changed(INITIALIZE, *changes)}


def _train(*changes):
    return {"solution-3-3": _changed(TRAIN, *changes)}


def _first_step(*changes):
    return {"solution-3-4": _changed(FIRST_STEP, *changes)}


def _carry(*changes):
    return {"solution-3-5": _changed(CARRY, *changes)}


def _reachable(body):
    return {"solution-3-2": f"def reachable_rank(A, B):\n    {body}"}


ALL_1, ALL_2, ALL_3, ALL_4, ALL_5 = ({f"test-3-{i}", f"hidden-3-{i}"} for i in range(1, 6))
ZEROS = "np.zeros((d, rank), dtype)"
NORMAL = "rng.normal(0, 1 / np.sqrt(k), (rank, k))"
SCALE = 's = alpha / r if rule == "alpha / r" else alpha / np.sqrt(r)'

WRONG = {
    # 3.1
    "random B": (_initialize(
        (ZEROS, "rng.normal(0, 1 / np.sqrt(rank), (d, rank)).astype(dtype)")), ALL_1),
    "A is zero as well, a dead start": (_initialize(
        ("A.astype(dtype)", "np.zeros((rank, k), dtype)")), ALL_1),
    "A and B exchanged": (_initialize(
        (f"A.astype(dtype), {ZEROS}", f"{ZEROS}, A.astype(dtype)")), ALL_1),
    "A and B transposed": (_initialize(
        ("A.astype(dtype)", "A.T.astype(dtype)"), (ZEROS, "np.zeros((rank, d), dtype)")), ALL_1),
    "the variance in place of the standard deviation": (_initialize(
        (NORMAL, "rng.normal(0, 1 / k, (rank, k))")), ALL_1),
    "1 / sqrt(r) in place of 1 / sqrt(k)": (_initialize(
        (NORMAL, "rng.normal(0, 1 / np.sqrt(rank), (rank, k))")), ALL_1),
    "1 / sqrt(d) in place of 1 / sqrt(k)": (_initialize(
        (NORMAL, "rng.normal(0, 1 / np.sqrt(d), (rank, k))")), ALL_1),
    "uniform between -1 / sqrt(k) and 1 / sqrt(k)": (_initialize(
        ("rng.uniform(-np.sqrt(3 / k), np.sqrt(3 / k), (rank, k))",
         "rng.uniform(-1 / np.sqrt(k), 1 / np.sqrt(k), (rank, k))")), ALL_1),
    "uniform between 0 and the edge": (_initialize(
        ("rng.uniform(-np.sqrt(3 / k)", "rng.uniform(0")), ALL_1),
    "global randomness without a seed": (_initialize(
        ("np.random.default_rng(seed)", "np.random")), ALL_1),
    "one seed for all": (_initialize(("default_rng(seed)", "default_rng(0)")), ALL_1),
    "one row, copied": (_initialize(
        (NORMAL, "np.repeat(rng.normal(0, 1 / np.sqrt(k), (1, k)), rank, axis=0)")), ALL_1),
    "always float64": (_initialize(
        ("A.astype(dtype)", "A"), (ZEROS, "np.zeros((d, rank))")), ALL_1),
    "printing A and B": (_initialize(
        (f"return A.astype(dtype), {ZEROS}", f"print(A.astype(dtype), {ZEROS})")), ALL_1),
    "the standard deviation of the visible test's layer, as a number": (_initialize(
        (NORMAL, "rng.normal(0, 1 / np.sqrt(1200), (rank, k))"),
        ("rng.uniform(-np.sqrt(3 / k), np.sqrt(3 / k), (rank, k))",
         "rng.uniform(-0.05, 0.05, (rank, k))")), {"hidden-3-1"}),
    "only a rank above d is refused": (_initialize(
        ("1 <= rank <= min(d, k)", "1 <= rank <= d")), {"hidden-3-1"}),
    "only rank 0 is refused, not a negative one": (_initialize(
        ("not 1 <= rank <= min(d, k)", "rank == 0 or rank > min(d, k)"),
        ("(rank, k))\n    else", "(abs(rank), k))\n    else"),
        ("3 / k), (rank, k)", "3 / k), (abs(rank), k)"),
        (ZEROS, "np.zeros((d, abs(rank)), dtype)")), {"hidden-3-1"}),

    # 3.2
    "the rank of A": (_reachable("return int(np.linalg.matrix_rank(A))"), ALL_2),
    "the rank of B A at the start": (_reachable("return int(np.linalg.matrix_rank(B @ A))"), ALL_2),
    "the larger of the two ranks": (_reachable(
        "return int(max(np.linalg.matrix_rank(A), np.linalg.matrix_rank(B)))"), ALL_2),
    "the sum of the two ranks, at most r": (_reachable(
        "return int(min(len(A), np.linalg.matrix_rank(A) + np.linalg.matrix_rank(B)))"), ALL_2),
    "the number of pairs that are not zero": (_reachable(
        "return int(np.sum(A.any(axis=1) | B.any(axis=0)))"), ALL_2),
    "the printed rank": (_reachable("print(np.linalg.matrix_rank(np.hstack([A, B.T])))"), ALL_2),
    "pairs that are equal, but not those that depend on others": (_reachable(
        "pairs = np.unique(np.hstack([A, B.T]), axis=0)\n"
        "    return int(np.sum(pairs.any(axis=1)))"), {"hidden-3-2"}),
    "an absolute tolerance": (_reachable(
        "return int(np.linalg.matrix_rank(np.hstack([A, B.T]), tol=1e-6))"), {"hidden-3-2"}),

    # 3.3
    "B moves before the gradient of A is taken": (_train(
        ("        dA = scaling * (g @ B).T @ x\n", ""),
        ("        A = A - lr * dA\n        B = B - lr * dB\n",
         "        B = B - lr * dB\n        A = A - lr * scaling * (g @ B).T @ x\n")), ALL_3),
    "the scaling is missing in the gradients": (_train(
        ("dA = scaling * ", "dA = "), ("dB = scaling * ", "dB = ")), ALL_3),
    "the gradient is not averaged over the rows": (_train(("g = error / len(x)", "g = error")),
                                                   ALL_3),
    "uphill": (_train(("A - lr", "A + lr"), ("B - lr", "B + lr")), ALL_3),
    "A stays frozen": (_train(("        A = A - lr * dA\n", "")), ALL_3),
    "W is trained, too": (_train(
        ("        B = B - lr * dB\n", "        B = B - lr * dB\n        W = W - lr * g.T @ x\n")),
        ALL_3),
    "A and B are changed in place": (_train(
        ("A = A - lr * dA", "A -= lr * dA"), ("B = B - lr * dB", "B -= lr * dB")), ALL_3),
    "one loss too few": (_train(("np.array(losses)", "np.array(losses[1:])")), ALL_3),
    "a nudge out of the dead start": (_train(
        ("    losses = []\n", "    losses = []\n    B = B if B.any() else B + 1e-9\n")), ALL_3),
    "the loss is averaged over the outputs, too": (_train(
        ("0.5 * np.sum(error**2) / len(x)", "0.5 * np.mean(error**2)")), ALL_3),
    "only one leading dimension": (_train(
        ("    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])\n", "")),
        {"hidden-3-3"}),
    "everything in float64": (_train(
        ("    losses = []\n", "    losses = []\n    A, B = A.astype(float), B.astype(float)\n")),
        {"hidden-3-3"}),
    "the number of rows of the visible test": (_train(("g = error / len(x)", "g = error / 16")),
                                               {"hidden-3-3"}),

    # 3.4
    "alpha * r": (_first_step((SCALE, "s = alpha * r")), ALL_4),
    "the square root is missing": (_first_step((SCALE, "s = alpha / r")), ALL_4),
    "the scaling is missing in the output": (_first_step(("(s * (probe", "((probe")), ALL_4),
    "the scaling is missing in the gradient": (_first_step(("dB = s * ", "dB = ")), ALL_4),
    "Adam steps by the gradient": (_first_step(
        ('(np.sign(dB) if optimizer == "Adam" else dB)', "dB")), ALL_4),
    "the change at x, whatever the probe": (_first_step(("(probe @ A.T)", "(x @ A.T)")), ALL_4),
    "a norm in place of the root mean square": (_first_step(
        ("np.sqrt(np.mean((s * (probe @ A.T) @ B.T) ** 2))",
         "np.linalg.norm(s * (probe @ A.T) @ B.T)")), ALL_4),
    "a line without logarithms": (_first_step(
        ("np.polyfit(np.log(ranks), np.log(sizes), 1)", "np.polyfit(ranks, sizes, 1)")), ALL_4),
    "the constant of the fit": (_first_step(
        ("np.log(sizes), 1)[0]", "np.log(sizes), 1)[1]")), ALL_4),
    "the powers of the chapter, put in": (_first_step(
        ("np.polyfit(np.log(ranks), np.log(sizes), 1)[0]",
         '{"SGD": -1.0, "Adam": 0.0}[optimizer] + (0.5 if "sqrt" in rule and optimizer == "Adam" '
         'else 1.0 if "sqrt" in rule else 0.0)')), ALL_4),
    "each rank counts once in the fit, however many starts it has": (_first_step(
        ("np.polyfit(np.log(ranks), np.log(sizes), 1)[0]",
         "np.polyfit(np.log(np.unique(ranks)), "
         "[np.mean(np.log(np.array(sizes)[ranks == r])) for r in np.unique(ranks)], 1)[0]")),
        {"hidden-3-4"}),
    "only one leading dimension in the step": (_first_step(
        ("    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])\n", "")),
        {"hidden-3-4"}),
    "the sign as a quotient": (_first_step(("np.sign(dB)", "dB / np.abs(dB)")), {"hidden-3-4"}),

    # 3.5
    "alpha stays what it was": (_carry(
        ("return new_s * new_rank ** rules[new_rule]", "return alpha")), ALL_5),
    "the scaling in place of alpha": (_carry(
        ("return new_s * new_rank ** rules[new_rule]", "return new_s")), ALL_5),
    "the scaling is kept, whatever the optimizer": (_carry(
        ("s * rank / new_rank", "s"), ("s * np.sqrt(rank / new_rank)", "s")), ALL_5),
    "SGD is taken for Adam": (_carry(
        ("s * np.sqrt(rank / new_rank)", "s * rank / new_rank")), ALL_5),
    "the square root of the rule is missing": (_carry(
        ('"alpha / sqrt(r)": 0.5', '"alpha / sqrt(r)": 1')), ALL_5),
    "alpha * r in place of alpha / r": (_carry(
        ("s = alpha / rank", "s = alpha * rank")), ALL_5),
    "printing the answer": (_carry(
        ("return new_s * new_rank ** rules[new_rule]",
         "print(new_s * new_rank ** rules[new_rule])")), ALL_5),
    "only rank 0 is refused": (_carry(
        ("rank < 1 or new_rank < 1", "rank == 0 or new_rank == 0")), {"hidden-3-5"}),
    "right for the visible test's ratios of the ranks only": (_carry(
        ("new_s = s * np.sqrt(rank / new_rank)",
         "new_s = s / {4: 2.0, 5: 5**0.5}.get(new_rank / rank, 2.0)")), {"hidden-3-5"}),
}
