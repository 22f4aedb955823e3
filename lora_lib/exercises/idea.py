"""Assignment 1, The idea: the visible tests on rank, thin factors, and counts of parameters."""

import tracemalloc

import numpy as np

from lora_lib.exercises.feedback import Wrong, call, is_like, raises, same

QWEN3 = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
         "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}


def thin_factors(answer, *, d=12, k=9, tolerance=0.3, seed=0):
    """1.1: the thinnest B (d, r) and A (r, k) whose product is within `tolerance` of M."""
    rng = np.random.default_rng(seed)
    M = rng.normal(size=(d, k)) * np.geomspace(1, 0.05, k)
    U, sigma, Vt = np.linalg.svd(M, full_matrices=False)
    left = _left_over(sigma ** 2)
    rank = int(np.sum(left > tolerance ** 2))
    B, A = _pair(call(answer, M, tolerance), d, k)
    if B.shape[1] != rank:
        mistakes = {
            "a relative error of e loses the share e ** 2 of the energy, not the share e":
                int(np.sum(left > tolerance)),
            "the error adds up the squares of the singular values, not the values":
                int(np.sum(_left_over(sigma) > tolerance)),
            "each singular value was compared by itself; the error sums up all that are dropped":
                int(np.sum(sigma > tolerance * sigma[0])),
            "this is one too few, so the error is above the tolerance": rank - 1,
            "this is one too many, a smaller one is within the tolerance": rank + 1,
            "all singular values are kept": min(d, k)}
        raise Wrong(f"for tolerance {tolerance} the factors have rank {B.shape[1]} and should "
                    f"have {rank}." + _hint(mistakes, B.shape[1]))
    root = np.sqrt(sigma[:rank])
    same(B @ A, (U[:, :rank] * sigma[:rank]) @ Vt[:rank], "B @ A", hints={
        "the singular values are missing": U[:, :rank] @ Vt[:rank],
        "the singular values are in both factors; their square roots should be":
            (U[:, :rank] * sigma[:rank] ** 2) @ Vt[:rank],
        "the square root is in one factor only": (U[:, :rank] * root) @ Vt[:rank],
        "np.linalg.svd returns V transposed; its first rows are wanted, not its first columns":
            (U[:, :rank] * sigma[:rank]) @ Vt[:, :rank].T if d >= k else np.nan,
        "the smallest singular values were kept, not the largest":
            (U[:, -rank:] * sigma[-rank:]) @ Vt[-rank:]})
    same(B.T @ B, A @ A.T, "the product is right, but B and A are not balanced: B.T @ B", hints={
        "all of the singular values are in B": np.diag(sigma[:rank] ** 2),
        "all of the singular values are in A": np.eye(rank)})


def one_adapter(answer, *, d=12, k=9, r1=3, r2=2, seed=0):
    """1.2: two adapters with their scalings as one (B, A), as thin as the sum's rank allows."""
    rng = np.random.default_rng(seed)
    s1, s2 = 0.5, 3.0
    for case, shared in (("adapters that have nothing in common", 0),
                         ("adapters whose first rows of A are parallel", 1)):
        B1, A1 = rng.normal(size=(d, r1)), rng.normal(size=(r1, k))
        B2, A2 = rng.normal(size=(d, r2)), rng.normal(size=(r2, k))
        A2[:shared] = -1.5 * A1[:shared]
        B, A = _pair(call(answer, B1, A1, s1, B2, A2, s2), d, k)
        one, two = B1 @ A1, B2 @ A2
        same(B @ A, s1 * one + s2 * two, f"for {case}, B @ A", hints={
            "the scalings are missing": one + two,
            "each scaling is in both factors, so it is squared": s1**2 * one + s2**2 * two,
            "the two scalings are exchanged": s2 * one + s1 * two,
            "only the first adapter is in it": s1 * one,
            "only the second adapter is in it": s2 * two,
            "the product of the sums is not the sum of the products":
                (s1 * B1 + s2 * B2) @ (A1 + A2) if r1 == r2 else np.nan})
        rank = min(r1 + r2 - shared, d, k)
        if B.shape[1] != rank:
            raise Wrong(f"for {case}, the sum has rank {rank}, but your adapter has rank "
                        f"{B.shape[1]}." + _hint({
                            "stacked side by side, they compute the right sum; now make the "
                            "result thinner": r1 + r2}, B.shape[1]))
    _note_on_memory(answer, r1, r2, rng)


def second_adapter(answer, *, d=12, k=9, r1=3, r2=2, seed=0):
    """1.3: an adapter of rank r2 that makes the sum with the first one have a chosen rank."""
    rng = np.random.default_rng(seed)
    B1, A1 = rng.normal(size=(d, r1)), rng.normal(size=(r1, k))
    first = B1 @ A1
    targets = range(abs(r1 - r2), min(r1 + r2, d, k) + 1)
    for target in targets:
        B2, A2 = _pair(call(answer, B1, A1, r2, target), d, k, ("B2", "A2"))
        is_like(B2, np.empty((d, r2)), "B2")
        is_like(A2, np.empty((r2, k)), "A2")
        second = B2 @ A2
        size = np.linalg.norm(first) + np.linalg.norm(second)
        own = _rank(second, np.linalg.norm(second))
        if own != r2:
            raise Wrong(f"for r1 = {r1}, r2 = {r2} and target {target}, B2 @ A2 has rank {own} and "
                        f"should have rank {r2}. Hint: no direction of the second adapter may be "
                        "zero, or a mixture of its other ones.")
        found = _rank(first + second, size)
        if found != target:
            raise Wrong(f"for r1 = {r1}, r2 = {r2} and target {target}, the sum has rank {found}."
                        + _hint({
                            "all directions of the second adapter are new to the first":
                                min(r1 + r2, d, k),
                            "a direction that cancels one of the first adapter's lowers the rank "
                            "twice: it adds none and takes one away. Find a direction that does "
                            "neither": target + 1,
                            "one direction too many cancels one of the first adapter's, or "
                            "doubles it": target - 1}, found))
    raises(ValueError, answer, B1, A1, r2, r1 + r2 + 1)


def movable(answer, *, d=12, k=9, rank=3, seed=0):
    """1.4: in how many independent ways a small step can move B A."""
    rng = np.random.default_rng(seed)
    B, A = rng.normal(size=(d, rank)), rng.normal(size=(rank, k))
    hints = {
        "these are all the numbers in B and A, but different steps of B and A can move the "
        "product alike": rank * (d + k),
        "these are the numbers in the product; it cannot move in all of these ways": d * k,
        "this is the rank of the product": rank,
        "what B and A can do alike was taken away twice": rank * (d + k - 2 * rank),
        "these are the moves that B makes by itself": rank * d,
        "these are the moves that A makes by itself": rank * k}
    with_both = f"for random B ({d}, {rank}) and A ({rank}, {k}), the number of moves"
    same(call(answer, B, A), _moves(B, A), with_both, hints=hints)
    at_start = (f"for B = 0 ({d}, {rank}), as LoRA starts, and random A ({rank}, {k}), "
                "the number of moves")
    same(call(answer, 0 * B, A), _moves(0 * B, A), at_start, hints={
        "this is right for a B of full rank; here a step of A changes nothing, since B dA = 0":
            rank * (d + k - rank),
        "this is what a step of A can move, but B dA = 0; see what a step of B can move": rank * k,
        "the product is zero, but it need not stay so: look at dB A": 0, **hints})


def largest_rank(answer, *, config=QWEN3, budget=2_000_000):
    """1.5: the largest rank whose adapters fit into a budget of numbers."""
    attention = ("q_proj", "v_proj")
    everywhere = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    mistakes = {
        "keys and values have num_key_value_heads heads, fewer than the queries":
            {**config, "num_key_value_heads": heads},
        "head_dim is given; here it is not hidden_size / num_attention_heads":
            {**config, "head_dim": config["hidden_size"] // heads},
        "every layer has adapters of its own": {**config, "num_hidden_layers": 1}}
    for targets in (attention, everywhere):
        one = layers * sum(d + k for d, k in _shapes(config, targets))
        for most in (budget, 8 * one, 8 * one - 1, one - 1):
            hints = {mistake: most // (wrong["num_hidden_layers"] * sum(
                d + k for d, k in _shapes(wrong, targets))) for mistake, wrong in mistakes.items()}
            hints["the numbers come to more than the budget; round down"] = -(-most // one)
            hints["an adapter of exactly the budget's size fits"] = (most - 1) // one
            hints["an adapter of rank r has r (d + k) numbers, not r d k"] = (
                most // (layers * sum(d * k for d, k in _shapes(config, targets))))
            same(call(answer, config, list(targets), most), most // one,
                 f"for {', '.join(targets)} and a budget of {most:,}, the largest rank",
                 hints=hints)


def shuffle_rank(answer, *, n=12, seed=0):
    """1.6: the rank of W[:, place] - W for an invertible W."""
    rng = np.random.default_rng(seed)
    turned = np.rot90(np.arange(64).reshape(8, 8)).ravel()
    swap = np.arange(n)
    swap[[0, n // 2]] = swap[[n // 2, 0]]
    mixed = rng.permutation(n)
    cases = {"every column moved on by one": np.roll(np.arange(n), 1),
             "two columns exchanged": swap, "no column moved": np.arange(n),
             "the pixels of an image of 8 by 8 turned by 90 degrees": turned,
             f"the shuffle {mixed.tolist()}": mixed}
    for case, place in cases.items():
        rings = _rings(place)
        same(call(answer, place), len(place) - len(rings), f"for {case}, the rank", hints={
            "this counts the columns that move; some of their differences depend on others":
                int(np.sum(place != np.arange(len(place)))),
            "every ring costs one, not only one of them": len(place) - 1,
            "this is the number of rings": len(rings),
            "this is the number of rings of two or more":
                sum(len(ring) > 1 for ring in rings),
            "this is the number of columns; a ring of columns has differences that add up to 0":
                len(place),
            "a column that stays is a ring, too, a ring of one":
                len(place) - sum(len(ring) > 1 for ring in rings)})


EXERCISES = {"1.1": thin_factors, "1.2": one_adapter, "1.3": second_adapter, "1.4": movable,
             "1.5": largest_rank, "1.6": shuffle_rank}


def _pair(result, d, k, names=("B", "A")):
    """The two factors of an answer, after a look at their kinds and shapes."""
    B_name, A_name = names
    if result is None:
        raise Wrong(f"the result is None; return {B_name} and {A_name}, printing is not enough")
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        found = (f"one array of shape {result.shape}" if isinstance(result, np.ndarray)
                 else f"a {type(result).__name__}")
        raise Wrong(f"expected the two matrices {B_name} and {A_name}, got {found}")
    B, A = result
    for name, matrix, shape in ((B_name, B, f"({d}, r)"), (A_name, A, f"(r, {k})")):
        if not isinstance(matrix, np.ndarray):
            raise Wrong(f"{name} should be a NumPy array, got a {type(matrix).__name__}")
        if matrix.ndim != 2:
            raise Wrong(f"{name} has shape {matrix.shape} and should have {shape}")
    if B.shape[0] != d or A.shape[1] != k or B.shape[1] != A.shape[0]:
        guess = (" Are they exchanged?" if (A.shape[0], B.shape[1]) == (d, k) else
                 " Are they transposed?" if (B.shape[1], A.shape[0]) == (d, k) else "")
        raise Wrong(f"{B_name} has shape {B.shape} and {A_name} has {A.shape}; they should have "
                    f"({d}, r) and (r, {k}).{guess}")
    return B, A


def _hint(mistakes, found):
    return next((f" Hint: {hint}." for hint, value in mistakes.items() if value == found), "")


def _left_over(values):
    """The share of the sum that is dropped when the first 0, 1, ... values are kept."""
    return 1 - np.concatenate([[0], np.cumsum(values)]) / np.sum(values)


def _rank(M, size):
    return int(np.sum(np.linalg.svd(M, compute_uv=False) > 1e-9 * size))


def _moves(B, A):
    """The rank of the derivative of B A, the matrix that takes (dB, dA) to dB A + B dA."""
    (d, _), (_, k) = B.shape, A.shape
    return int(np.linalg.matrix_rank(np.hstack([np.kron(np.eye(d), A.T), np.kron(B, np.eye(k))])))


def _shapes(config, targets):
    """(d, k) of each target in one layer of a Llama."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes = {"q_proj": (q, width), "k_proj": (kv, width), "v_proj": (kv, width),
              "o_proj": (width, q), "gate_proj": (inner, width), "up_proj": (inner, width),
              "down_proj": (width, inner)}
    return [shapes[name] for name in targets]


def _rings(place):
    rings, seen = [], set()
    for start in map(int, range(len(place))):
        ring, at = [], start
        while at not in seen:
            seen.add(at)
            ring.append(at)
            at = int(place[at])
        if ring:
            rings.append(ring)
    return rings


def _note_on_memory(answer, r1, r2, rng, side=500):
    """Say so if a (d, k) product seems to be formed. Memory is seen in the same process only."""
    B1, B2 = rng.normal(size=(side, r1)), rng.normal(size=(side, r2))
    tracing = tracemalloc.is_tracing()
    tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        call(answer, B1, B1.T.copy(), 1.0, B2, B2.T.copy(), 1.0)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        if not tracing:
            tracemalloc.stop()
    if peak > 8 * side * side // 2:
        print(f"Note: for d = k = {side} your function took {peak / 1e6:.1f} MB at once, and a "
              f"(d, k) product takes {8 * side * side / 1e6:.1f} MB. The hidden tests have weights "
              "for which no machine has the memory.")
