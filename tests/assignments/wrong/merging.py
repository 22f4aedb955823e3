"""Typical wrong submissions of assignment 4, and the test cells that each loses."""

WRONG = {
    "W is changed in place": ({"solution-4-1": """
def merge(W, A, B, scaling):
    W += (scaling * B @ A).astype(W.dtype)
    return W
"""}, {"test-4-1", "hidden-4-1"}),

    "A and B exchanged": ({"solution-4-1": """
def merge(W, A, B, scaling):
    merged = (W + scaling * (A.astype(np.float64) @ B.astype(np.float64))).astype(W.dtype)
    if not np.isfinite(merged).all():
        raise ValueError("infinity")
    return merged
"""}, {"test-4-1", "hidden-4-1"}),

    "the scaling is missing": ({"solution-4-1": """
def merge(W, A, B, scaling):
    merged = (W + B.astype(np.float64) @ A.astype(np.float64)).astype(W.dtype)
    if not np.isfinite(merged).all():
        raise ValueError("infinity")
    return merged
"""}, {"test-4-1", "hidden-4-1"}),

    "merged twice": ({"solution-4-1": """
def merge(W, A, B, scaling):
    merged = W.astype(np.float64)
    for _ in range(2):
        merged += scaling * (B.astype(np.float64) @ A.astype(np.float64))
    merged = merged.astype(W.dtype)
    if not np.isfinite(merged).all():
        raise ValueError("infinity")
    return merged
"""}, {"test-4-1", "hidden-4-1"}),

    "the product is computed in the weight's dtype": ({"solution-4-1": """
def merge(W, A, B, scaling):
    merged = W + W.dtype.type(scaling) * (B.astype(W.dtype) @ A.astype(W.dtype))
    if not np.isfinite(merged).all():
        raise ValueError("infinity")
    return merged
"""}, {"test-4-1", "hidden-4-1"}),

    "the update is rounded before it is added": ({"solution-4-1": """
def merge(W, A, B, scaling):
    delta = scaling * (B.astype(np.float64) @ A.astype(np.float64))
    merged = W + delta.astype(W.dtype)
    if not np.isfinite(merged).all():
        raise ValueError("infinity")
    return merged
"""}, {"test-4-1", "hidden-4-1"}),

    "float64 is returned for float32": ({"solution-4-1": """
def merge(W, A, B, scaling):
    merged = W.astype(np.float64) + scaling * (B.astype(np.float64) @ A.astype(np.float64))
    if not np.isfinite(merged).all():
        raise ValueError("infinity")
    return merged
"""}, {"test-4-1", "hidden-4-1"}),

    "no check for infinity": ({"solution-4-1": """
def merge(W, A, B, scaling):
    exact = W.astype(np.float64) + scaling * (B.astype(np.float64) @ A.astype(np.float64))
    return exact.astype(W.dtype)
"""}, {"hidden-4-1"}),

    "the update is checked for the range, not the sum": ({"solution-4-1": """
def merge(W, A, B, scaling):
    delta = scaling * (B.astype(np.float64) @ A.astype(np.float64))
    if np.abs(delta).max() > np.finfo(W.dtype).max:
        raise ValueError("the update is too large")
    return (W + delta).astype(W.dtype)
"""}, {"hidden-4-1"}),

    "float32 for a float64 weight": ({"solution-4-1": """
def merge(W, A, B, scaling):
    exact = W.astype(np.float32) + scaling * (B.astype(np.float32) @ A.astype(np.float32))
    merged = exact.astype(W.dtype)
    if not np.isfinite(merged).all():
        raise ValueError("infinity")
    return merged
"""}, {"hidden-4-1"}),

    "one entry decides": ({"solution-4-2": """
def times_merged(W, base, A, B, scaling):
    delta = scaling * (B @ A)
    if not delta.any():
        raise ValueError("the update is zero")
    at = np.unravel_index(np.abs(delta).argmax(), delta.shape)
    return round(float((W[at] - base[at]) / delta[at]))
"""}, {"hidden-4-2"}),

    "the mean of the entries' ratios": ({"solution-4-2": """
def times_merged(W, base, A, B, scaling):
    delta = scaling * (B.astype(np.float64) @ A)
    if not delta.any():
        raise ValueError("the update is zero")
    return round(float(np.mean((W - base.astype(np.float64)) / delta)))
"""}, {"hidden-4-2"}),

    "a ratio of norms, which has no sign": ({"solution-4-2": """
def times_merged(W, base, A, B, scaling):
    delta = scaling * (B.astype(np.float64) @ A)
    if not delta.any():
        raise ValueError("the update is zero")
    return round(float(np.linalg.norm(W - base.astype(np.float64)) / np.linalg.norm(delta)))
"""}, {"test-4-2", "hidden-4-2"}),

    "the projection, all in float16": ({"solution-4-2": """
def times_merged(W, base, A, B, scaling):
    delta = scaling * (B @ A)
    if not delta.any():
        raise ValueError("the update is zero")
    return round(float(np.sum((W - base) * delta) / np.sum(delta * delta)))
"""}, {"hidden-4-2"}),

    "an update of zero is not refused": ({"solution-4-2": """
def times_merged(W, base, A, B, scaling):
    delta = scaling * (B.astype(np.float64) @ A.astype(np.float64))
    change = W.astype(np.float64) - base
    return round(float(np.sum(change * delta) / max(np.sum(delta**2), 1e-30)))
"""}, {"hidden-4-2"}),

    "the number is printed": ({"solution-4-2": """
def times_merged(W, base, A, B, scaling):
    delta = scaling * (B.astype(np.float64) @ A.astype(np.float64))
    if not delta.any():
        raise ValueError("the update is zero")
    print(round(float(np.sum((W - base.astype(np.float64)) * delta) / np.sum(delta**2))))
"""}, {"test-4-2", "hidden-4-2"}),

    "rounded after each adapter": ({"solution-4-3": """
def compose(W, adapters, weights):
    for name, c in weights.items():
        A, B, scaling = (np.float64(value) for value in adapters[name])
        W = (W + c * scaling * (B @ A)).astype(W.dtype)
    return W
"""}, {"test-4-3", "hidden-4-3"}),

    "unmerging adds": ({"solution-4-3": """
def compose(W, adapters, weights):
    total = W.astype(np.float64)
    for name, c in weights.items():
        A, B, scaling = (np.float64(value) for value in adapters[name])
        total += abs(c) * scaling * (B @ A)
    return total.astype(W.dtype)
"""}, {"test-4-3", "hidden-4-3"}),

    "the whole shelf is merged": ({"solution-4-3": """
def compose(W, adapters, weights):
    for name in weights:
        adapters[name]
    total = W.astype(np.float64)
    for name, adapter in adapters.items():
        A, B, scaling = (np.float64(value) for value in adapter)
        total += weights.get(name, 1.0) * scaling * (B @ A)
    return total.astype(W.dtype)
"""}, {"test-4-3", "hidden-4-3"}),

    "an unknown name is passed over": ({"solution-4-3": """
def compose(W, adapters, weights):
    total = W.astype(np.float64)
    for name, (A, B, scaling) in adapters.items():
        total += weights.get(name, 0.0) * scaling * (B.astype(np.float64) @ A.astype(np.float64))
    return total.astype(W.dtype)
"""}, {"hidden-4-3"}),

    "the sum changes W where W is float64": ({"solution-4-3": """
def compose(W, adapters, weights):
    total = W.astype(np.float64, copy=False)
    for name, c in weights.items():
        A, B, scaling = (np.float64(value) for value in adapters[name])
        total += c * scaling * (B @ A)
    return total.astype(W.dtype)
"""}, {"hidden-4-3"}),

    "the whole gap": ({"solution-4-4": """
def half_gaps(W):
    up = np.nextafter(W, W.dtype.type(np.inf)).astype(np.float64) - W
    down = W - np.nextafter(W, W.dtype.type(-np.inf)).astype(np.float64)
    return up, down
"""}, {"test-4-4", "hidden-4-4"}),

    "np.spacing, negative for a negative float32": ({"solution-4-4": """
def half_gaps(W):
    return np.spacing(W) / 2.0, np.spacing(W) / 2.0
"""}, {"hidden-4-4"}),

    "u times the number": ({"solution-4-4": """
def half_gaps(W):
    half = np.abs(W.astype(np.float64)) * np.finfo(W.dtype).eps / 2
    return half, half
"""}, {"test-4-4", "hidden-4-4"}),

    "up and down the same at a power of two": ({"solution-4-4": """
def half_gaps(W):
    half = np.spacing(np.abs(W)).astype(np.float64) / 2
    return half, half
"""}, {"hidden-4-4"}),

    "only two-dimensional weights": ({"solution-4-4": """
def half_gaps(W):
    up, down = np.zeros(W.shape), np.zeros(W.shape)
    rows, columns = W.shape
    for i in range(rows):
        for j in range(columns):
            w = W[i, j]
            up[i, j] = (float(np.nextafter(w, w.dtype.type(np.inf))) - float(w)) / 2
            down[i, j] = (float(w) - float(np.nextafter(w, w.dtype.type(-np.inf)))) / 2
    return up, down
"""}, {"hidden-4-4"}),

    "halved in float16": ({"solution-4-4": """
def half_gaps(W):
    two = W.dtype.type(2)
    up = (np.nextafter(W, W.dtype.type(np.inf)) - W) / two
    down = (W - np.nextafter(W, W.dtype.type(-np.inf))) / two
    return up.astype(np.float64), down.astype(np.float64)
"""}, {"hidden-4-4"}),

    "the norms instead of the entries": ({"solution-4-5": """
def factor_needed(W, A, B, scaling, share):
    delta = scaling * (B.astype(np.float64) @ A.astype(np.float64))
    if not delta.any():
        raise ValueError("the update is zero everywhere")
    u = np.finfo(W.dtype).eps / 2
    return float(u * np.linalg.norm(W.astype(np.float64)) / np.linalg.norm(delta))
"""}, {"test-4-5", "hidden-4-5"}),

    "the gap on one side for both signs": ({"solution-4-5": """
def factor_needed(W, A, B, scaling, share):
    delta = scaling * (B.astype(np.float64) @ A.astype(np.float64))
    moving = delta != 0
    if not moving.any():
        raise ValueError("the update is zero everywhere")
    needed = np.spacing(np.abs(W))[moving] / 2.0 / np.abs(delta[moving])
    return float(np.quantile(needed, share, method="inverted_cdf"))
"""}, {"hidden-4-5"}),

    "a quantile that averages two neighbours": ({"solution-4-5": """
def factor_needed(W, A, B, scaling, share):
    delta = scaling * (B.astype(np.float64) @ A.astype(np.float64))
    moving = delta != 0
    if not moving.any():
        raise ValueError("the update is zero everywhere")
    up, down = half_gaps(W)
    needed = np.where(delta > 0, up, down)[moving] / np.abs(delta[moving])
    return float(np.quantile(needed, share))
"""}, {"test-4-5", "hidden-4-5"}),

    "entries without an update are counted": ({"solution-4-5": """
def factor_needed(W, A, B, scaling, share):
    delta = scaling * (B.astype(np.float64) @ A.astype(np.float64))
    if not delta.any():
        raise ValueError("the update is zero everywhere")
    up, down = half_gaps(W)
    needed = np.where(delta > 0, up, down) / np.maximum(np.abs(delta), 1e-30)
    return float(np.quantile(needed, share, method="inverted_cdf"))
"""}, {"hidden-4-5"}),

    "the factors of the visible test, and nothing else": ({"solution-4-5": """
def factor_needed(W, A, B, scaling, share):
    return {0.5: 4.55236, 1.0: 518.842}[share]
"""}, {"hidden-4-5"}),

    "the rest is dropped": ({"solution-4-6": """
def merge_with_rest(W, rest, A, B, scaling):
    merged = (W.double() + scaling * (B.double() @ A.double())).to(W.dtype)
    return merged, rest
"""}, {"test-4-6", "hidden-4-6"}),

    "the rest from the night before is lost": ({"solution-4-6": """
def merge_with_rest(W, rest, A, B, scaling):
    exact = W.double() + scaling * (B.double() @ A.double())
    merged = exact.to(W.dtype)
    return merged, (exact - merged.double()).to(W.dtype)
"""}, {"test-4-6", "hidden-4-6"}),

    "the rest with the wrong sign": ({"solution-4-6": """
def merge_with_rest(W, rest, A, B, scaling):
    exact = W.double() - rest.double() + scaling * (B.double() @ A.double())
    merged = exact.to(W.dtype)
    return merged, (merged.double() - exact).to(W.dtype)
"""}, {"test-4-6", "hidden-4-6"}),

    "the rest is kept in float32": ({"solution-4-6": """
def merge_with_rest(W, rest, A, B, scaling):
    exact = W.float() + rest.float() + scaling * (B @ A)
    merged = exact.to(W.dtype)
    return merged, exact - merged.float()
"""}, {"test-4-6", "hidden-4-6"}),

    "all of it in bfloat16": ({"solution-4-6": """
def merge_with_rest(W, rest, A, B, scaling):
    part = rest + scaling * (B.to(W.dtype) @ A.to(W.dtype))
    merged = W + part
    return merged, part - (merged - W)
"""}, {"test-4-6", "hidden-4-6"}),
}
