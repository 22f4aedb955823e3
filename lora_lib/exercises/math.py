"""Visible tests of assignment 2: a LoRA layer forward and backward, a gradient checker, the cost.

Shapes, as in the course: x (..., k), h and g = dL/dh (..., d), W (d, k), A (rank, k), B (d, rank).
"""

import numbers
from collections.abc import Callable

import numpy as np

from lora_lib.exercises.feedback import Wrong, call, same


def forward(answer: Callable, *, d=5, k=4, rank=2, alpha=5.0, seed=0) -> None:
    """2.1: lora_forward(x, W, A, B, scaling) on a batch, and without forming B A."""
    s, (x, W, A, B) = alpha / rank, _normal(seed, (3, k), (d, k), (rank, k), (d, rank))
    frozen, adapter = x @ W.T, (x @ A.T) @ B.T
    h = _call(answer, x=x, W=W, A=A, B=B, scaling=s)
    same(h, frozen + s * adapter, "h", hints={
        "the adapter's path is missing": frozen,
        "the frozen layer's path, x W^T, is missing": s * adapter,
        "the scaling is missing": frozen + adapter,
        "the scaling is applied twice": frozen + s**2 * adapter,
        "the adapter is divided by the scaling": frozen + adapter / s,
        "the scaling belongs to the adapter alone, not to x W^T": s * (frozen + adapter)})
    x, A, B = _extreme(seed, x=(1e-100, (3, k)), A=(1e160, (rank, k)), B=(1e160, (d, rank)))
    h = _call(answer, x=x, W=W, A=A, B=B, scaling=s)
    _finite("B A", h)
    same(h, x @ W.T + s * ((x @ A.T) @ B.T), "h, with A and B near 1e160 and x near 1e-100,")


def gradients(answer: Callable, *, d=5, k=4, rank=2, alpha=5.0, seed=0) -> None:
    """2.2: adapter_gradients(g, x, A, B, scaling) on a batch, without any array of W's shape."""
    s, (g, x, A, B) = alpha / rank, _normal(seed, (3, d), (3, k), (rank, k), (d, rank))
    A_grad, B_grad = _several(_call(answer, g=g, x=x, A=A, B=B, scaling=s), "A_grad", "B_grad")
    if np.shape(A_grad) == B.shape and np.shape(B_grad) == A.shape:
        raise Wrong("the gradients come in the wrong order; return (A_grad, B_grad)")
    for name, got, want in (("A_grad", A_grad, (g @ B).T @ x), ("B_grad", B_grad, g.T @ (x @ A.T))):
        same(got, s * want, name, hints={
            "the scaling is missing": want,
            "the scaling is applied twice": s**2 * want,
            "this is the mean over the rows; g has any such division in it already, so sum":
                s * want / len(x),
            "the sign is wrong; a gradient is not yet a step": -s * want})
    g, x, A, B = _extreme(seed, g=(1e160, (3, d)), x=(1e160, (3, k)),
                          A=(1e-100, (rank, k)), B=(1e-100, (d, rank)))
    got = _several(_call(answer, g=g, x=x, A=A, B=B, scaling=s), "A_grad", "B_grad")
    for name, grad in zip(("A_grad", "B_grad"), got):
        _finite("g^T x", grad, f"in {name} ")


def input_gradient(answer: Callable, *, d=5, k=4, rank=2, alpha=5.0, seed=0) -> None:
    """2.3: input_gradient(g, W, A, B, scaling) on a batch, and without forming B A."""
    s, (g, W, A, B) = alpha / rank, _normal(seed, (3, d), (d, k), (rank, k), (d, rank))
    frozen, adapter = g @ W, (g @ B) @ A
    got = _call(answer, g=g, W=W, A=A, B=B, scaling=s)
    same(got, frozen + s * adapter, "x_grad", hints={
        "this is g W alone; x reaches h through the adapter, too": frozen,
        "the frozen layer's path, g W, is missing": s * adapter,
        "the scaling is missing": frozen + adapter,
        "the scaling is applied twice": frozen + s**2 * adapter,
        "the scaling belongs to the adapter's path alone": s * (frozen + adapter)})
    g, A, B = _extreme(seed, g=(1e-100, (3, d)), A=(1e160, (rank, k)), B=(1e160, (d, rank)))
    _finite("B A", _call(answer, g=g, W=W, A=A, B=B, scaling=s))


def numerical(answer: Callable, *, d=5, k=4, rank=2, alpha=5.0, seed=0) -> None:
    """2.4: numerical_gradients(x, W, A, B, scaling, step) with a step that is not small."""
    s, step = alpha / rank, 0.25
    x, W, A, B = _normal(seed, (3, k), (d, k), (rank, k), (d, rank))
    arrays = dict(x=x, W=W, A=A, B=B)
    got = _several(_call(answer, **arrays, scaling=s, step=step), "A_grad", "B_grad", "x_grad")
    for name, grad, exact in zip("ABx", got, _exact(x, W, A, B, s)):
        up, down, here = (_moved(arrays, name, s, by) for by in (step, -step, 0.0))
        same(grad, (up - down) / (2 * step), f"{name}_grad, with a step of {step},", hints={
            "the two losses are 2 * step apart; divide by that": (up - down) / step,
            "divide the difference of the losses by 2 * step": up - down,
            "this is a one-sided difference; step to both sides": (up - here) / step,
            "this is a one-sided difference; step to both sides, not down alone":
                (here - down) / step,
            "the sign is wrong": (down - up) / (2 * step),
            "this is the derivative itself, or a much smaller step was taken than the one given":
                exact})


def checker(answer: Callable, *, d=5, k=4, rank=2, alpha=5.0, seed=0) -> None:
    """2.5: wrong_gradients(x, W, A, B, scaling, A_grad, B_grad, x_grad) on right and wrong ones."""
    s, (x, W, A, B) = alpha / rank, _normal(seed, (3, k), (d, k), (rank, k), (d, rank))
    A_grad, B_grad, x_grad = _exact(x, W, A, B, s)
    g = (x @ (W + s * B @ A).T)**3
    for says, grads, want in (
            ("three right gradients", (A_grad, B_grad, x_grad), []),
            ("an x_grad without the adapter's path", (A_grad, B_grad, g @ W), ["x"]),
            ("an A_grad without the scaling", (A_grad / s, B_grad, x_grad), ["A"]),
            ("gradients of A and B averaged over the rows",
             (A_grad / len(x), B_grad / len(x), x_grad), ["A", "B"])):
        names = ("A_grad", "B_grad", "x_grad")
        got = _call(answer, x=x, W=W, A=A, B=B, scaling=s, **dict(zip(names, grads)))
        if not isinstance(got, (list, tuple)):
            raise Wrong(f"return a list of names, such as {['A', 'x']}; got {got!r}")
        if list(got) != want:
            raise Wrong(f"given {says}, it returns {got!r} and should return {want}")


def break_even(answer: Callable, *, d=5, k=4, **_) -> None:
    """2.6: break_even(d, k, rank) for a large rank, and for one where forming B A never pays."""
    for rank in (min(d, k), 1):
        result = call(answer, d, k, rank)
        case = f"break_even({d}, {k}, {rank})"
        ways = zip(("formed", "merged"), _several(result, "formed", "merged"))
        for place, (way, n) in enumerate(ways):
            what = f"{case}[{place}], for {way!r}, is {n!r}"
            if n is None:
                rows = 10 * d * k * rank
                if _count(way, rows, d, k, rank) < _count("thin", rows, d, k, rank):
                    raise Wrong(f"{what}, but {_compared(way, rows, d, k, rank)}")
                continue
            if not isinstance(n, numbers.Integral) or isinstance(n, bool) or n < 1:
                raise Wrong(f"{what}; it should be a whole number of rows, an int of at least 1, "
                            "or None where there is no such number")
            n = int(n)
            if not _count(way, n, d, k, rank) < _count("thin", n, d, k, rank):
                raise Wrong(f"{what}, but {_compared(way, n, d, k, rank)}, which is not fewer")
            if n > 1 and _count(way, n - 1, d, k, rank) < _count("thin", n - 1, d, k, rank):
                raise Wrong(f"{what}, but already {_compared(way, n - 1, d, k, rank)}")


def _normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in shapes]


def _extreme(seed, **arrays):
    """Positive arrays of such sizes that one product of two of them overflows."""
    rng = np.random.default_rng(seed)
    return [size * rng.uniform(1, 2, shape) for size, shape in arrays.values()]


def _call(function, **arguments):
    """`call` by position, without a word of NumPy's on an overflow: the test says it better."""
    with np.errstate(over="ignore", invalid="ignore"):
        return call(function, *arguments.values())


def _several(result, *names):
    if not isinstance(result, (tuple, list)) or len(result) != len(names):
        got = "None" if result is None else f"a {type(result).__name__}"
        got += f" of {len(result)}" if isinstance(result, (tuple, list)) else ""
        raise Wrong(f"return a tuple ({', '.join(names)}), got {got}")
    return result


def _finite(product, result, where=""):
    """The inputs overflow in `product`, and in nothing that need be computed."""
    if isinstance(result, np.ndarray) and not np.isfinite(result).all():
        raise Wrong(f"an overflow {where}shows that {product}, an array of W's shape, was formed: "
                    f"with these inputs the entries of {product} are beyond the largest float, "
                    "and those of the narrow products are not. Mind the brackets: P @ Q @ R is "
                    "(P @ Q) @ R")


def _exact(x, W, A, B, s):
    """The gradients of sum(h**4) / 4 with respect to A, B and x."""
    g = (x @ (W + s * B @ A).T)**3
    return s * (g @ B).T @ x, s * g.T @ (x @ A.T), g @ (W + s * B @ A)


def _moved(arrays, name, s, by):
    """The loss sum(h**4) / 4 with each entry of one array moved in turn."""
    losses = np.zeros(arrays[name].shape)
    for i in np.ndindex(losses.shape):
        new = {key: array.copy() for key, array in arrays.items()}
        new[name][i] += by
        losses[i] = np.sum((new["x"] @ (new["W"] + s * new["B"] @ new["A"]).T)**4) / 4
    return losses


def _count(way, n, d, k, rank):
    """Multiplications for n rows: thin x W^T + (x A^T) B^T, formed x W^T + x (B A)^T, or merged."""
    return n * d * k + {"thin": n * rank * (d + k), "formed": d * rank * k + n * d * k,
                        "merged": d * rank * k}[way]


def _compared(way, n, d, k, rank):
    return (f"with {n} rows {way!r} takes {_count(way, n, d, k, rank):,} multiplications and "
            f"'thin' {_count('thin', n, d, k, rank):,}")


EXERCISES = {"2.1": forward, "2.2": gradients, "2.3": input_gradient, "2.4": numerical,
             "2.5": checker, "2.6": break_even}
