"""Typical wrong submissions of assignment 1, and the test cells that each loses."""

from textwrap import dedent


def both(number):
    return {f"test-{number}", f"hidden-{number}"}


WRONG = {
    "the tolerance is taken for a share of the energy": ({"solution-1-1": dedent('''\
        def thin_factors(M, tolerance):
            U, sigma, Vt = np.linalg.svd(M, full_matrices=False)
            energy = np.cumsum(sigma ** 2)
            rank = int(np.sum(energy < (1 - tolerance) * energy[-1])) + 1
            root = np.sqrt(sigma[:rank])
            return U[:, :rank] * root, root[:, None] * Vt[:rank]
        ''')}, both("1-1")),
    "the size is all in B": ({"solution-1-1": dedent('''\
        def thin_factors(M, tolerance):
            U, sigma, Vt = np.linalg.svd(M, full_matrices=False)
            rank = 0
            while np.linalg.norm(sigma[rank:]) > tolerance * np.linalg.norm(sigma):
                rank += 1
            return U[:, :rank] * sigma[:rank], Vt[:rank]
        ''')}, both("1-1")),
    "columns of V transposed in the place of its rows": ({"solution-1-1": dedent('''\
        def thin_factors(M, tolerance):
            U, sigma, Vt = np.linalg.svd(M, full_matrices=False)
            rank = 0
            while np.linalg.norm(sigma[rank:]) > tolerance * np.linalg.norm(sigma):
                rank += 1
            root = np.sqrt(sigma[:rank])
            return U[:, :rank] * root, (Vt[:, :rank] * root).T
        ''')}, both("1-1")),
    "float64 whatever comes in": ({"solution-1-1": dedent('''\
        def thin_factors(M, tolerance):
            U, sigma, Vt = np.linalg.svd(M.astype(float), full_matrices=False)
            rank = 0
            while np.linalg.norm(sigma[rank:]) > tolerance * np.linalg.norm(sigma):
                rank += 1
            root = np.sqrt(sigma[:rank])
            return U[:, :rank] * root, root[:, None] * Vt[:rank]
        ''')}, {"hidden-1-1"}),
    "rank 0 forgotten": ({"solution-1-1": dedent('''\
        def thin_factors(M, tolerance):
            U, sigma, Vt = np.linalg.svd(M, full_matrices=False)
            for rank in range(1, len(sigma) + 1):
                if np.linalg.norm(sigma[rank:]) <= tolerance * np.linalg.norm(sigma):
                    break
            root = np.sqrt(sigma[:rank])
            return U[:, :rank] * root, root[:, None] * Vt[:rank]
        ''')}, {"hidden-1-1"}),

    "stacked and left as wide as that": ({"solution-1-2": dedent('''\
        def one_adapter(B1, A1, s1, B2, A2, s2):
            return np.hstack([s1 * B1, s2 * B2]), np.vstack([A1, A2])
        ''')}, both("1-2")),
    "the scalings in both factors": ({"solution-1-2": dedent('''\
        def one_adapter(B1, A1, s1, B2, A2, s2):
            Q_B, R_B = np.linalg.qr(np.hstack([s1 * B1, s2 * B2]))
            Q_A, R_A = np.linalg.qr(np.vstack([s1 * A1, s2 * A2]).T)
            U, sigma, Vt = np.linalg.svd(R_B @ R_A.T, full_matrices=False)
            rank = int(np.sum(sigma > 1e-5 * sigma[0]))
            return Q_B @ (U[:, :rank] * sigma[:rank]), Vt[:rank] @ Q_A.T
        ''')}, both("1-2")),
    "B1 scaled in place": ({"solution-1-2": dedent('''\
        def one_adapter(B1, A1, s1, B2, A2, s2):
            B1 *= s1
            B2 *= s2
            Q_B, R_B = np.linalg.qr(np.hstack([B1, B2]))
            Q_A, R_A = np.linalg.qr(np.vstack([A1, A2]).T)
            U, sigma, Vt = np.linalg.svd(R_B @ R_A.T, full_matrices=False)
            rank = int(np.sum(sigma > 1e-5 * sigma[0]))
            return Q_B @ (U[:, :rank] * sigma[:rank]), Vt[:rank] @ Q_A.T
        ''')}, both("1-2")),
    "the sum is formed and decomposed": ({"solution-1-2": dedent('''\
        def one_adapter(B1, A1, s1, B2, A2, s2):
            change = s1 * (B1 @ A1) + s2 * (B2 @ A2)
            U, sigma, Vt = np.linalg.svd(change, full_matrices=False)
            rank = int(np.sum(sigma > 1e-5 * sigma[0]))
            return U[:, :rank] * sigma[:rank], Vt[:rank]
        ''')}, {"hidden-1-2"}),
    "only the rows of A are looked at": ({"solution-1-2": dedent('''\
        def one_adapter(B1, A1, s1, B2, A2, s2):
            B, A = np.hstack([s1 * B1, s2 * B2]), np.vstack([A1, A2])
            U, sigma, Vt = np.linalg.svd(A, full_matrices=False)
            rank = int(np.sum(sigma > 1e-5 * sigma[0]))
            return B @ (U[:, :rank] * sigma[:rank]), Vt[:rank]
        ''')}, {"hidden-1-2"}),

    "a random second adapter, whatever the target": ({"solution-1-3": dedent('''\
        def second_adapter(B1, A1, r2, target):
            return np.random.normal(size=(len(B1), r2)), np.random.normal(size=(r2, A1.shape[1]))
        ''')}, both("1-3")),
    "directions are new or cancel, nothing between": ({"solution-1-3": dedent('''\
        def second_adapter(B1, A1, r2, target):
            r1 = B1.shape[1]
            if not abs(r1 - r2) <= target <= min(r1 + r2, len(B1), A1.shape[1]):
                raise ValueError("impossible")
            rng = np.random.default_rng(0)
            B2, A2 = rng.normal(size=(len(B1), r2)), rng.normal(size=(r2, A1.shape[1]))
            cancel = (r1 + r2 - target) // 2
            B2[:, :cancel], A2[:cancel] = -B1[:, :cancel], A1[:cancel]
            return B2, A2
        ''')}, both("1-3")),
    "directions left at zero": ({"solution-1-3": dedent('''\
        def second_adapter(B1, A1, r2, target):
            r1 = B1.shape[1]
            if not abs(r1 - r2) <= target <= min(r1 + r2, len(B1), A1.shape[1]):
                raise ValueError("impossible")
            rng = np.random.default_rng(0)
            B2, A2 = rng.normal(size=(len(B1), r2)), rng.normal(size=(r2, A1.shape[1]))
            B2[:, max(target - r1, 0):] = 0
            return B2, A2
        ''')}, both("1-3")),
    "the shape of the weight and the least rank forgotten": ({"solution-1-3": dedent('''\
        def second_adapter(B1, A1, r2, target):
            r1 = B1.shape[1]
            if target > r1 + r2:
                raise ValueError("impossible")
            rng = np.random.default_rng(0)
            B2, A2 = rng.normal(size=(len(B1), r2)), rng.normal(size=(r2, A1.shape[1]))
            cancel, double = divmod(r1 + r2 - target, 2)
            old = cancel + double
            B2[:, :cancel] = -B1[:, :cancel]
            B2[:, cancel:old] = B1[:, cancel:old]
            A2[:old] = A1[:old]
            return B2, A2
        ''')}, {"hidden-1-3"}),

    "all numbers of B and A": ({"solution-1-4": dedent('''\
        def movable(B, A):
            return B.size + A.size
        ''')}, both("1-4")),
    "the formula for full rank, everywhere": ({"solution-1-4": dedent('''\
        def movable(B, A):
            (d, r), k = B.shape, A.shape[1]
            return r * (d + k - r)
        ''')}, both("1-4")),
    "full rank and the start, nothing else": ({"solution-1-4": dedent('''\
        def movable(B, A):
            (d, r), k = B.shape, A.shape[1]
            return r * (d + k - r) if B.any() else d * r
        ''')}, {"hidden-1-4"}),

    "keys and values as wide as queries": ({"solution-1-5": dedent('''\
        def largest_rank(config, targets, budget):
            width, inner = config["hidden_size"], config["intermediate_size"]
            heads = config["num_attention_heads"] * config["head_dim"]
            total, limit = 0, width
            for name in targets:
                if name not in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                                "down_proj"):
                    raise ValueError(name)
                other = heads if name[0] in "qkvo" else inner
                total, limit = total + other + width, min(limit, other)
            return min(budget // (total * config["num_hidden_layers"]), limit)
        ''')}, both("1-5")),
    "no limit by the smaller side": ({"solution-1-5": dedent('''\
        def largest_rank(config, targets, budget):
            width, inner = config["hidden_size"], config["intermediate_size"]
            q = config["num_attention_heads"] * config["head_dim"]
            kv = config["num_key_value_heads"] * config["head_dim"]
            other = {"q_proj": q, "k_proj": kv, "v_proj": kv, "o_proj": q, "gate_proj": inner,
                     "up_proj": inner, "down_proj": inner}
            if not set(targets) <= set(other):
                raise ValueError(targets)
            return budget // sum((other[name] + width) * config["num_hidden_layers"]
                                 for name in targets)
        ''')}, {"hidden-1-5"}),
    "an unknown name passed over": ({"solution-1-5": dedent('''\
        def largest_rank(config, targets, budget):
            width, inner = config["hidden_size"], config["intermediate_size"]
            q = config["num_attention_heads"] * config["head_dim"]
            kv = config["num_key_value_heads"] * config["head_dim"]
            other = {"q_proj": q, "k_proj": kv, "v_proj": kv, "o_proj": q, "gate_proj": inner,
                     "up_proj": inner, "down_proj": inner}
            sides = [other[name] for name in targets if name in other]
            each = config["num_hidden_layers"] * sum(side + width for side in sides)
            return min([budget // max(each, 1), width, *sides])
        ''')}, {"hidden-1-5"}),
    "constants for the visible test": ({"solution-1-5": dedent('''\
        def largest_rank(config, targets, budget):
            known = {(2, 2_000_000): 13, (7, 2_000_000): 3}
            one = {2: 143_360, 7: 630_784}[len(targets)]
            return known.get((len(targets), budget), {8 * one: 8, 8 * one - 1: 7}.get(budget, 0))
        ''')}, {"hidden-1-5"}),

    "the columns that move": ({"solution-1-6": dedent('''\
        def shuffle_rank(place):
            return int(np.sum(place != np.arange(len(place))))
        ''')}, both("1-6")),
    "printed, not returned": ({"solution-1-6": dedent('''\
        def shuffle_rank(place):
            seen, rings = set(), 0
            for start in place.tolist():
                rings += start not in seen
                while start not in seen:
                    seen.add(start)
                    start = int(place[start])
            print(len(place) - rings)
        ''')}, both("1-6")),
    "the rank of a matrix as large as n by n": ({"solution-1-6": dedent('''\
        def shuffle_rank(place):
            W = np.eye(len(place))
            return int(np.linalg.matrix_rank(W[:, place] - W))
        ''')}, {"hidden-1-6"}),
    "a function that calls itself along a ring": ({"solution-1-6": dedent('''\
        def shuffle_rank(place):
            seen = set()
            def follow(j):
                if j not in seen:
                    seen.add(j)
                    follow(int(place[j]))
            rings = 0
            for j in range(len(place)):
                rings += j not in seen
                follow(j)
            return len(place) - rings
        ''')}, {"hidden-1-6"}),
}
