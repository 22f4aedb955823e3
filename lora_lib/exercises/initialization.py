"""Assignment 3, Initialization and scaling: the visible tests on starts and first steps."""

from itertools import product

import numpy as np

from lora_lib.exercises.feedback import Wrong, call, is_like, raises, same

RULES = {"alpha / r": lambda rank: 1 / rank, "alpha / sqrt(r)": lambda rank: rank**-0.5}


def initialize(answer, *, d=8, k=12, rank=3, seed=0):
    """3.1: A (rank, k) with standard deviation 1 / sqrt(k), normal or uniform, and B zero."""
    for kind in ("normal", "uniform"):
        A, B = _start(answer, d, k, rank, seed, kind)
        if not np.array_equal(A, _start(answer, d, k, rank, seed, kind)[0]):
            raise Wrong(f"kind {kind!r}: two calls with one seed give two different A. Draw from "
                        "np.random.default_rng(seed), made inside the function")
        if np.array_equal(A, _start(answer, d, k, rank, seed + 1, kind)[0]):
            raise Wrong(f"kind {kind!r}: the seeds {seed} and {seed + 1} give the same A."
                        + ("" if np.any(A) else " It is zero. With B = 0 this start is dead"))
        if np.any(B):
            raise Wrong(f"kind {kind!r}: B should be zero, so that the layer starts as the "
                        f"pretrained one; its largest entry is {np.max(np.abs(B)):.3g}")
        found = np.linalg.matrix_rank(A)
        if found != rank:
            raise Wrong(f"kind {kind!r}: the rows of A span {found} dimensions, not {rank}. Every "
                        "entry should be drawn on its own")
        _statistics(_start(answer, 40 * d, 100 * k, 10 * rank, seed, kind)[0], 40 * d, kind)
    for dtype in ("float64", "float32"):
        for name, matrix in zip("AB", _start(answer, d, k, rank, seed, "normal", dtype)):
            if matrix.dtype != dtype:
                raise Wrong(f"for dtype {dtype!r}, {name} has dtype {matrix.dtype}")
    for impossible in (0, min(d, k) + 1):
        _refuses(f"d = {d}, k = {k}, rank = {impossible}", answer, d, k, impossible, seed)
    _refuses("kind 'constant'", answer, d, k, rank, seed, "constant")


def reachable_rank(answer, *, d=8, k=12, rank=3, seed=0):
    """3.2: the largest rank that gradient descent can give B A from a start."""
    rng = np.random.default_rng(seed)
    A, B = rng.normal(size=(rank, k)), rng.normal(size=(d, rank))
    equal, first, second = np.repeat(A[:1], rank, axis=0), np.zeros(rank), np.zeros(rank)
    first[0] = second[1] = 1
    cases = {
        "B = 0 and a random A": (A, 0 * B, rank),
        "A = 0 and a random B": (0 * A, B, rank),
        "both zero": (0 * A, 0 * B, 0),
        "B = 0 and an A with equal rows": (equal, 0 * B, 1),
        "a random B and an A with equal rows": (equal, B, rank),
        "random matrices, but for row 0 of A and column 0 of B, which are zero":
            (A * (1 - first)[:, None], B * (1 - first), rank - 1),
        "random matrices, but for row 0 of A and column 1 of B, which are zero":
            (A * (1 - first)[:, None], B * (1 - second), rank),
        "matrices of zeros, but for row 0 of A and column 1 of B, which are random":
            (A * first[:, None], B * second, 2)}
    for case, (A, B, want) in cases.items():
        both = np.hstack([A, B.T])
        rows, columns = np.any(A, axis=1), np.any(B, axis=0)
        same(call(answer, A, B), want, f"for {case}, the rank within reach", hints={
            "this is the rank of B A before the first step; later steps can raise it":
                np.linalg.matrix_rank(B @ A),
            "this is the rank of A alone; a step can move A where B is not zero":
                np.linalg.matrix_rank(A),
            "this is the rank of B alone; a step can move B where A is not zero":
                np.linalg.matrix_rank(B),
            "a row of A that is zero can be moved by its column of B, and the other way round":
                np.sum(rows & columns),
            "two parts that start alike stay alike, since they get the same gradients":
                np.sum(np.any(both, axis=1)),
            "this is the number of rows of A, and not all of them can be put to use here": rank})


def train_from(answer, *, d=8, k=12, rank=3, alpha=6.0, seed=0, lr=0.01, steps=20):
    """3.3: gradient descent on a linear task from a given start: the losses, A, and B."""
    rng = np.random.default_rng(seed)
    W, x = rng.normal(0, k**-0.5, (d, k)), rng.normal(size=(16, k))
    y = x @ rng.normal(0, k**-0.5, (d, k)).T
    A, B, scaling = rng.normal(0, k**-0.5, (rank, k)), rng.normal(0, 0.1, (d, rank)), alpha / rank
    starts = {"both zero": (0 * A, 0 * B), "B = 0": (A, 0 * B), "A = 0": (0 * A, B),
              "both random": (A, B)}
    for count, (case, start) in product((0, 1, steps), starts.items()):
        given = (*start, W, x, y, scaling, lr)
        what = f"from the start {case}, after {count} step{'s' * (count != 1)}, "
        losses, A_end, B_end = _parts(call(answer, *given, count), "losses", "A", "B")
        want = _descend(*given, count)
        mistakes = {
            "the gradient of A was taken after B had moved; take both gradients, then both steps":
                _descend(*given, count, order="B first"),
            "the gradient of B was taken after A had moved; take both gradients, then both steps":
                _descend(*given, count, order="A first"),
            "the scaling is missing in the gradients": _descend(*given, count, slope=1.0),
            "the scaling is missing throughout": _descend(*start, W, x, y, 1.0, lr, count),
            "the gradient of a mean over the rows has a factor 1 / n":
                _descend(*given[:-1], lr * len(x), count),
            "this goes uphill; a step goes against the gradient":
                _descend(*given[:-1], -lr, count),
            "A does not move": _descend(*given, count, moves="B"),
            "B does not move": _descend(*given, count, moves="A"),
            "the frozen W was trained, too": _descend(*given, count, moves="ABW"),
            "this is the start itself": (want[0][:1], *start)}
        loss_hints = {
            "the loss has a factor 1/2": 2 * want[0],
            "sum over the outputs, and average over the rows alone": want[0] / d,
            "sum over the outputs, average over the rows alone, and divide by 2": 2 * want[0] / d,
            "average over the rows": len(x) * want[0]}
        hints = [{hint: parts[i] for hint, parts in mistakes.items()} for i in range(3)]
        is_like(losses, want[0], what + "losses (one before each step and one at the end)")
        same(losses[:1], want[0][:1], what + "the first loss", hints={
            hint: value[:1] for hint, value in (loss_hints | hints[0]).items()})
        for name, i, got in (("A", 1, A_end), ("B", 2, B_end), ("losses", 0, losses)):
            is_like(got, want[i], what + name)
            moved = np.max(np.abs(got - (start[i - 1] if i else losses[0])))
            if case == "both zero" and moved:
                raise Wrong(f"{what}{name} should be what it was, bit for bit; it moves by "
                            f"{moved:.2g}" + (
                                "" if i else ", though A and B do not. Was W trained, too?"))
            same(got, want[i], what + name, hints=hints[i])


def first_step(answer, *, d=8, k=12, alpha=6.0, seed=0, lr=0.01):
    """3.4: how far one step moves the output, for starts of several ranks, and the power of r."""
    rng = np.random.default_rng(seed)
    d, k = 12 * d, 12 * k
    x = rng.normal(size=k) + rng.normal(0, 0.3, (4, k))
    g = rng.normal(size=(4, d)) / 4
    basis = np.linalg.qr(x.T)[0]
    unrelated = rng.normal(size=(6, k))
    unrelated -= unrelated @ basis @ basis.T
    probes = {"probe = x": x, "a probe at right angles to x": unrelated}
    starts = [rng.normal(0, k**-0.5, (rank, k)) for rank in (8, 16, 32, 64) for _ in range(12)]
    ranks, measured = np.array([len(A) for A in starts]), []
    unit = {(case, optimizer): lr * _unit_sizes(starts, x, g, probe, optimizer)
            for case, probe in probes.items() for optimizer in ("Adam", "SGD")}
    for (case, optimizer), rule in product(unit, RULES):
        what = f"for {optimizer}, {rule}, and {case}, "
        sizes, power = _parts(call(answer, starts, x, g, probes[case], alpha, rule, optimizer, lr),
                              "sizes", "power")
        s, here = alpha * RULES[rule](ranks), unit[case, optimizer]
        feels = 1 if optimizer == "SGD" else 0               # a sign does not feel the scaling
        want = s * s**feels * here
        same(sizes, want, what + "sizes", rtol=1e-4, hints={
            "the scaling is missing in the gradient of B": s * here,
            "the scaling is missing in the output, scaling * B A x": s**feels * here,
            "the scaling is missing": here,
            "this is alpha * r": (alpha * ranks) ** (1 + feels) * here,
            "this is alpha / r; the square root is missing":
                (alpha / ranks) ** (1 + feels) * here,
            "this is alpha / sqrt(r)": (alpha * ranks**-0.5) ** (1 + feels) * here,
            "this is alpha * sqrt(r)": (alpha * ranks**0.5) ** (1 + feels) * here,
            "Adam's first step goes by the sign of the gradient": s * s * unit[case, "SGD"],
            "SGD goes by the gradient itself": s * unit[case, "Adam"],
            "the change was measured at x and should be at probe":
                s * s**feels * unit["probe = x", optimizer],
            "this is the norm; take the mean of the squares, not their sum":
                want * np.sqrt(len(probes[case]) * d),
            "this is the mean of the squares without its root": want**2,
            "the learning rate is missing": want / lr})
        log_r, log_size = np.log(ranks), np.log(want)
        counted = {"Adam": (0, 0.5), "SGD": (-1, 0)}[optimizer][list(RULES).index(rule)]
        same(power, np.polyfit(log_r, log_size, 1)[0], what + "power", rtol=1e-5, atol=1e-6,
             hints={
                 "this is the power that the chapter counts; the line through these sizes has "
                 "another": counted,
                 "this is the slope of sizes over ranks; a power is a slope between logarithms":
                     np.polyfit(ranks, want, 1)[0],
                 "the ranks need a logarithm, too": np.polyfit(ranks, log_size, 1)[0],
                 "the sizes need a logarithm, too": np.polyfit(log_r, want, 1)[0],
                 "the two are exchanged; the rank is the cause and the size the effect":
                     np.polyfit(log_size, log_r, 1)[0],
                 "np.polyfit gives the highest power first; this is the constant":
                     np.polyfit(log_r, log_size, 1)[1]})
        measured.append(float(power))
    for rule, optimizer in (("alpha * r", "Adam"), ("alpha / r", "Lion")):
        _refuses(f"rule {rule!r} and optimizer {optimizer!r}", answer, starts, x, g, x, alpha, rule,
                 optimizer, lr)
    print("The power of r that you measured        at x    at right angles to x")
    for row, (optimizer, rule) in enumerate(product(("Adam", "SGD"), RULES)):
        print(f"{optimizer:8}{rule:27}{measured[row]:9.2f}{measured[row + 4]:18.2f}")


def carry_alpha(answer, *, alpha=6.0, rank=3):
    """3.5: the alpha that at a new rank, perhaps under another rule, keeps what is asked."""
    for new_rank, old, new, keep in product((4 * rank, 5 * rank), RULES, RULES,
                                            ("product", "Adam", "SGD")):
        ratio, s = new_rank / rank, alpha * RULES[old](rank)
        scalings = {"product": s, "Adam": s / ratio, "SGD": s * ratio**-0.5}
        alphas = {name: value / RULES[new](new_rank) for name, value in scalings.items()}
        factor = scalings[keep] / s
        hints = {"this is the alpha that was given": alpha} if keep == "product" else {}
        hints |= {
            "this is the new scaling, and alpha was asked for": scalings[keep],
            "this keeps the scaling, but the sum has more terms now": alphas["product"],
            "this is right for Adam, and the scaling is in SGD's gradient, too": alphas["Adam"],
            "this is right for SGD, and Adam does not feel the scaling in the gradient":
                alphas["SGD"],
            f"this is right for {old} at the new rank, where the rule is {new}":
                s * factor / RULES[old](new_rank),
            f"this is right for {new} at the old rank, where the rule was {old}":
                alpha * RULES[new](rank) * factor / RULES[new](new_rank),
            "the two rules are exchanged":
                alpha * RULES[new](rank) * factor / RULES[old](new_rank),
            "it should move the other way": s / factor / RULES[new](new_rank),
            "the two ranks are exchanged":
                alpha * RULES[old](new_rank) / factor / RULES[new](rank),
            "both rules divide alpha, they do not multiply it":
                alpha / RULES[old](rank) * factor / RULES[new](new_rank)}
        same(call(answer, alpha, rank, new_rank, old, new, keep), alphas[keep],
             f"for alpha {alpha}, from rank {rank} with {old} to rank {new_rank} with {new}, and "
             f"keep {keep!r}, the new alpha", hints=hints)
    plain = ("alpha / r", "alpha / r", "Adam")
    for ranks, names in (((0, rank), plain), ((rank, 0), plain),
                         ((rank, 2 * rank), ("alpha * r", "alpha / r", "Adam")),
                         ((rank, 2 * rank), ("alpha / r", "alpha * r", "Adam")),
                         ((rank, 2 * rank), ("alpha / r", "alpha / r", "Lion"))):
        _refuses(f"ranks {ranks}, rules {names[:2]}, and keep {names[2]!r}", answer, alpha, *ranks,
                 *names)


EXERCISES = {"3.1": initialize, "3.2": reachable_rank, "3.3": train_from, "3.4": first_step,
             "3.5": carry_alpha}


def _parts(result, *names):
    """The parts of an answer of several values."""
    if result is None:
        raise Wrong(f"the result is None; return {', '.join(names)}, printing is not enough")
    if not isinstance(result, (tuple, list)) or len(result) != len(names):
        many = f" of {len(result)}" if isinstance(result, (tuple, list)) else ""
        raise Wrong(f"expected the {len(names)} values {', '.join(names)}, got a "
                    f"{type(result).__name__}{many}")
    return result


def _refuses(case, answer, *arguments):
    """Raise Wrong, and name the case, unless the call raises ValueError."""
    try:
        raises(ValueError, answer, *arguments)
    except Wrong as wrong:
        raise Wrong(f"for {case}, {wrong}") from None


def _start(answer, d, k, rank, seed, kind, dtype="float64"):
    A, B = _parts(call(answer, d, k, rank, seed, kind, dtype), "A", "B")
    if np.shape(A) == (d, rank) and np.shape(B) == (rank, k):
        raise Wrong("A and B are exchanged: A is (rank, k) and comes first, B is (d, rank)")
    is_like(A, np.empty((rank, k)), "A")
    is_like(B, np.empty((d, rank)), "B")
    return A, B


def _statistics(A, d, kind):
    """Raise Wrong unless the entries of A have mean 0, standard deviation 1 / sqrt(k), and are
    spread as `kind` says.
    """
    rank, k = A.shape
    std, right, layer = np.std(A), k**-0.5, f"kind {kind!r}, d = {d}, k = {k}, rank = {rank}: "
    if abs(np.mean(A)) > 5 * std / np.sqrt(A.size):
        raise Wrong(f"{layer}the mean of A is {np.mean(A):.3g}, {abs(np.mean(A)) / std:.2g} times "
                    "its standard deviation, and should be zero")
    if abs(std / right - 1) > 0.03:
        mistakes = {
            "1 / sqrt(k) should be the standard deviation, not the variance": right**0.5,
            "this is 1 / k, the variance; the functions of NumPy ask for the standard deviation":
                1 / k,
            "this is 1 / sqrt(rank)": rank**-0.5, "this is 1 / sqrt(d)": d**-0.5,
            "nothing was scaled": 1.0, "this is sqrt(2 / k)": (2 / k) ** 0.5,
            "this is 1 / sqrt(3 k). A uniform variable between -c and c has standard deviation "
            "c / sqrt(3)": (3 * k) ** -0.5,
            "a uniform variable between 0 and c is not centred": right / 12**0.5}
        hint = next((f" Hint: {hint}." for hint, value in mistakes.items()
                     if abs(std / value - 1) < 0.03), "")
        raise Wrong(f"{layer}the standard deviation of A is {std:.4g} and should be "
                    f"{right:.4g}.{hint}")
    near = np.mean(np.abs(A) < right)
    expected = {"normal": 0.683, "uniform": 0.577}[kind]
    if abs(near - expected) > 0.03:
        raise Wrong(f"{layer}{near:.0%} of the entries of A are within one standard deviation "
                    f"of zero; for a {kind} distribution it is {expected:.0%}")


def _descend(A, B, W, x, y, scaling, lr, steps, *, slope=None, order="", moves="AB"):
    """The right answer to 3.3, and typical wrong ones."""
    slope = scaling if slope is None else slope
    losses = []
    with np.errstate(all="ignore"):                          # a mistake may well diverge
        for step in range(steps + 1):
            error = x @ (W + scaling * B @ A).T - y
            losses.append(np.sum(error**2) / (2 * len(x)))
            if step == steps:
                return np.array(losses), A, B
            G = error.T @ x / len(x)                         # (d, k): the gradient of W
            A_next, B_next = A - lr * slope * B.T @ G, B - lr * slope * G @ A.T
            if order == "B first":
                A_next = A - lr * slope * B_next.T @ G
            if order == "A first":
                B_next = B - lr * slope * G @ A_next.T
            A, B = A_next if "A" in moves else A, B_next if "B" in moves else B
            W = W - lr * G if "W" in moves else W


def _unit_sizes(starts, x, g, probe, optimizer):
    """The right sizes of 3.4 for lr = 1 and scaling = 1: a scaling s multiplies those of Adam by s,
    and those of SGD by s once more.
    """
    G, sizes = g.T @ x, []
    for A in starts:
        B = np.sign(G @ A.T) if optimizer == "Adam" else G @ A.T
        sizes.append(np.sqrt(np.mean((probe @ A.T @ B.T) ** 2)))
    return np.array(sizes)
