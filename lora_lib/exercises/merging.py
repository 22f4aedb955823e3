"""The visible tests of assignment 4: merging, stacking, un-merging, and the 16-bit trap.

Weights are W (d, k), adapters A (r, k) and B (d, r), and an update is scaling * B @ A. The truth is
computed in float64 here, from the very numbers that the answer is given.
"""

import numpy as np

from lora_lib.exercises.feedback import Wrong, call, is_like, same

OFTEN = ("it was rounded on the way: compute product and sum in float32, or in W's dtype where "
         "that is more exact, and round at the end")


def rounded_once(got, exact, like, what: str = "the result", hints: dict | None = None, *,
                 size: float = 0.0) -> None:
    """Raise Wrong unless `got` holds the `exact` numbers, rounded once to the dtype of `like`.

    `exact` is float64, NumPy or torch as `like` is. Work in float32 is exact enough for every
    result but float64. `size` is that of the largest number on the way, if it is larger than the
    result. `hints` maps an explanation to what a typical mistake would give.
    """
    nearest = exact.astype(like.dtype) if isinstance(like, np.ndarray) else exact.to(like.dtype)
    is_like(got, nearest, what, dtype=True)
    name = str(nearest.dtype).removeprefix("torch.")
    found, right, best = map(_wide, (got, exact, nearest))
    size, off = np.abs(right).max(initial=size), np.abs(found - right)
    slack = size * 2.0 ** {"float64": -49, "float32": -20}.get(name, -21)
    worse = off > np.abs(best - right) + slack
    if not worse.any():
        return
    far = size * 2.0 ** {"float16": -8, "bfloat16": -5}.get(name, -17)
    if off.max() > far:
        same(found, right, what, rtol=0, atol=far, hints=hints)
    at = np.unravel_index(np.argmax(off - np.abs(best - right)), off.shape)
    message = (f"{what} is nearly right: {found[at]:.9g} at {tuple(map(int, at))}, where the exact "
               f"value is {right[at]:.9g} and the nearest {name} number {best[at]:.9g}. "
               f"{worse.mean():.1%} of the entries are not the nearest. Hint: ")
    for hint, mistake in (hints or {}).items():
        if np.abs(found - _wide(mistake)).max() <= slack:
            raise Wrong(f"{message}{hint}.")
    raise Wrong(f"{message}{OFTEN}.")


def merge(answer, *, d=24, k=16, rank=3, scaling=4.0, seed=0) -> None:
    """4.1: W + scaling * B @ A in W's dtype, for float32 and float16 weights."""
    rng = np.random.default_rng(seed)
    for dtype in (np.float32, np.float16):
        W, A, B = _layer(rng, d, k, rank, scaling, dtype)
        delta = _update(A, B, scaling)
        in_dtype = _update(A.astype(dtype), B.astype(dtype), dtype(scaling), np.float64)
        rounded_once(call(answer, W, A, B, scaling), W + delta, W,
                     f"merge(W, A, B, scaling) for a {W.dtype} W", {
            "W came back as it was": W,
            "the scaling is missing": W + delta / scaling,
            "the update is in there twice": W + 2 * delta,
            "this is the update alone, without W": delta,
            "the update was subtracted": W - delta,
            "divided by the scaling": W + delta / scaling**2,
            f"A and B were rounded to {W.dtype} before the product": (W + in_dtype).astype(dtype),
            f"the update was rounded to {W.dtype} before it was added": W + delta.astype(dtype)})


def times_merged(answer, *, d=24, k=16, rank=3, scaling=4.0, seed=0) -> None:
    """4.2: how many times the update is in a float32 weight: 0, 1, 2, and -1."""
    rng = np.random.default_rng(seed)
    base, A, B = _layer(rng, d, k, rank, scaling, np.float32)
    for times in (0, 1, 2, -1):
        W = (base + times * _update(A, B, scaling)).astype(np.float32)
        got = call(answer, W, base, A, B, scaling)
        is_like(got, times, "the number of times")
        if got != times:
            hint = ("" if round(got) != times else " Give the nearest whole number.")
            if got == -times:
                hint = " Hint: a norm has no sign, and an update can be missing, too."
            elif times and round(got / scaling) == times:
                hint = " Hint: the scaling is missing in the update that you compare with."
            raise Wrong(f"the number of times is {got}, for a weight that is base "
                        f"{times:+d} * scaling * B @ A.{hint}")


def compose(answer, *, d=24, k=16, rank=3, scaling=4.0, seed=0) -> None:
    """4.3: some of three adapters with weights on float32, and a swap of two on float16."""
    rng = np.random.default_rng(seed)
    scalings = {"legal": scaling, "medical": scaling + 1, "polite": scaling / 2 + 4}
    shelf, delta = {}, {}
    for extra, (name, s) in enumerate(scalings.items()):
        W, A, B = _layer(rng, d, k, rank + extra, s, np.float32)
        shelf[name], delta[name] = (A, B, s), _update(A, B, s)
    legal, medical, polite = delta.values()
    given = {"legal": 1.0, "polite": 0.5}
    rounded_once(call(answer, W, shelf, given), W + legal + 0.5 * polite, W,
                 f"compose(W, adapters, {given})", {
        "the weights are not used": W + legal + polite,
        "an adapter that is not named in the weights is merged as well":
            W + legal + medical + 0.5 * polite,
        "each adapter's own scaling is missing":
            W + legal / scaling + 0.5 * polite / scalings["polite"],
        "only the first adapter is in it": W + legal,
        "only the last adapter is in it": W + 0.5 * polite,
        "this is the sum of the updates, without W": legal + 0.5 * polite,
        "the weights were divided by their sum; take them as they are":
            W + (legal + 0.5 * polite) / 1.5})

    W = (W + legal).astype(np.float16)
    between = (W - legal).astype(np.float16)
    rounded_once(call(answer, W, shelf, {"legal": -1.0, "polite": 1.0}), W - legal + polite, W,
                 'the swap compose(W, adapters, {"legal": -1, "polite": 1}) for a float16 W', {
        "a weight of -1 must subtract": W + legal + polite,
        "the adapter with weight -1 was left out": W + polite,
        "it was rounded after each adapter": (between + polite).astype(np.float16)})


def half_gaps(answer, *, d=24, k=16, seed=0) -> None:
    """4.4: the smallest updates up and down that change the entries of a float16 weight."""
    W = _ordinary(np.random.default_rng(seed).normal(size=(d, k)).astype(np.float16))
    got = _two(call(answer, W), "half_gaps(W)", "up and down")
    wide = W.astype(np.float64)
    gap = np.spacing(np.abs(W)).astype(np.float64)
    hints = {"this is the whole gap to the next number; half of it is enough": gap,
             "a distance is positive, also where the entry is negative": np.sign(wide) * gap / 2,
             "u times the number itself is not the gap: the gap is the same from one power of two "
             "to the next": np.abs(wide) * 2.0**-11,
             "the gap is not the same everywhere, it grows with the number": gap * 0 + 2.0**-11,
             "this is the next number, not the distance to it": wide + gap}
    for name, found, side in zip(("up", "down"), got, (np.inf, -np.inf)):
        beyond = np.nextafter(W, np.float16(side)).astype(np.float64)
        same(found, np.abs(beyond - wide) / 2, f"`{name}`, for a W of {d} x {k} float16 numbers,",
             rtol=1e-6, atol=0, hints=hints)


def factor(answer, *, d=24, k=16, rank=3, scaling=4.0, seed=0) -> None:
    """4.5: the smallest factor that moves half, and all, of the entries of a float16 weight."""
    W, A, B = _layer(np.random.default_rng(seed), d, k, rank, scaling, np.float16, 1e-4)
    W, A, B = _ordinary(W), A.astype(np.float64), B.astype(np.float64)
    delta = _update(A, B, scaling)
    for share in (0.5, 1.0):
        got = call(answer, W, A, B, scaling, share)
        is_like(got, 1.0, f"the factor for share {share}")
        more, less = (float(np.mean((W + c * got * delta).astype(W.dtype) != W))
                      for c in (1.001, 0.999))
        if more >= share > less:
            continue
        half = np.spacing(np.abs(W)) / 2.0
        hint = next((f" Hint: {text}." for text, value in {
            "the scaling is missing": _first(half / np.abs(delta / scaling), share),
            "it is the whole gap that you compare with; half of it is enough":
                _first(2 * half / np.abs(delta), share),
            "np.quantile and np.median average two neighbours by default":
                np.quantile(half / np.abs(delta), share),
            "the share is of the entries that move, not of those that stay":
                _first(half / np.abs(delta), 1 - share),
            "divide the other way round": 1 / _first(half / np.abs(delta), share),
            "the norms tell nothing about single entries":
                np.linalg.norm(W.astype(np.float64)) * 2.0**-11 / np.linalg.norm(delta),
            }.items() if np.isclose(got, value, rtol=1e-3)), "")
        says = (f"is too small: even 1.001 times as much moves {more:.1%} of the entries"
                if more < share else
                f"is not the smallest: 0.999 times as much still moves {less:.1%} of the entries")
        raise Wrong(f"the factor {got:.6g} for share {share} {says}.{hint}")


def merge_with_rest(answer, *, d=24, k=16, rank=3, scaling=4.0, nights=64, seed=0) -> None:
    """4.6: `nights` small merges into bfloat16, with what is rounded off kept for the next."""
    import torch

    rng = np.random.default_rng(seed)
    W, A, B = map(torch.from_numpy, _layer(rng, d, k, rank, scaling, np.float32, 0.1))
    base, B = W.bfloat16(), B / nights
    part = scaling * (B.double() @ A.double())
    W, rest = base, torch.zeros_like(base)
    for night in range(1, nights + 1):
        new = _two(call(answer, W, rest, A, B, scaling), "the result", "W and rest")
        exact = W.double() + rest.double() + part
        where = f"after {night} nights" if night > 1 else "after the first night"
        rounded_once(new[0], exact, base, f"W {where}", {
            "the rest from the night before is not added": (W.double() + part).bfloat16(),
            "the rest must be added, it was subtracted": (exact - 2 * rest.double()).bfloat16(),
            "the scaling is missing": (exact - part + part / scaling).bfloat16()})
        missed = exact - new[0].double()
        rounded_once(new[1], missed, base, f"rest {where}", {
            "rest has the wrong sign": -missed.bfloat16(),
            "what was rounded off is dropped": torch.zeros_like(base),
            "the rest from the night before is lost": (missed - rest.double()).bfloat16()},
            size=float(exact.abs().max()))
        W, rest = new


def _wide(values):
    """The values of a NumPy array or a torch tensor as a float64 array."""
    return np.asarray(values.detach().double() if hasattr(values, "detach") else values, np.float64)


def _layer(rng, d, k, rank, scaling, dtype, size=1.0):
    """W with entries of size 1, and A, B in float32 whose update has entries of size `size`."""
    W, A, B = (rng.normal(size=shape) for shape in ((d, k), (rank, k), (d, rank)))
    B *= size / np.sqrt(np.mean((scaling * B @ A)**2))
    return W.astype(dtype), A.astype(np.float32), B.astype(np.float32)


def _update(A, B, scaling, dtype=np.float64):
    return scaling * (B.astype(dtype) @ A.astype(dtype))


def _first(values, share):
    """The smallest value that at least a `share` of the values do not exceed."""
    return np.quantile(values, share, method="inverted_cdf")


def _ordinary(W):
    """W with 5 in the place of 0 and of every power of two: the gaps on both sides are equal."""
    return np.where(np.isin(np.abs(np.frexp(W)[0]), (0, 0.5)), W.dtype.type(5), W)


def _two(result, what, names):
    if not isinstance(result, (tuple, list)):
        raise Wrong(f"{what} should be two results, {names}; got one {type(result).__name__}")
    if len(result) != 2:
        raise Wrong(f"{what} should be two results, {names}; got {len(result)}")
    return result


EXERCISES = {"4.1": merge, "4.2": times_merged, "4.3": compose, "4.4": half_gaps, "4.5": factor,
             "4.6": merge_with_rest}
