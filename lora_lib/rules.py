"""What rank, alpha, dropout, and the first A may be: the rules of both implementations."""

import math
import numbers


def check_rank(rank: int, in_features: int, out_features: int) -> int:
    """Return `rank` if it is an integer in 1 .. min(in_features, out_features).

    A rank above min(d, k) adds parameters and no matrix that a smaller rank could not reach.
    Raises TypeError for a non-integer, ValueError outside the range.
    """
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral):
        raise TypeError(f"rank must be an integer, got {rank!r}")
    largest = min(in_features, out_features)
    if not 1 <= rank <= largest:
        raise ValueError(f"rank must be between 1 and min(in_features, out_features) = {largest}, "
                         f"got {rank}")
    return int(rank)


def scaling_of(rank: int, alpha: float, use_rslora: bool = False) -> float:
    """The factor on B A: alpha / rank (Hu et al. 2021, section 4.1), or, with `use_rslora`,
    alpha / sqrt(rank) (Kalajdzievski 2023).

    alpha = 0 is legal and switches the adapter off. Raises TypeError if alpha is no number,
    ValueError if it is not finite. The factor is a Python float, whatever kind of number alpha
    is: NumPy would let a float64 one turn float32 arrays into float64.
    """
    alpha = _real("alpha", alpha)
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}")
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def check_dropout(dropout: float) -> float:
    """Return `dropout`, the probability that an entry is dropped, if it is in 0 .. 1.

    Raises TypeError for what is no number, ValueError outside the range.
    """
    dropout = _real("dropout", dropout)
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be between 0 and 1, got {dropout}")
    return dropout


def init_std_of(init_std: float | None, in_features: int) -> float:
    """The standard deviation of the first A: 1 / sqrt(in_features) unless given.

    With that default A x has, entry by entry, the size of x whatever the width.
    Raises TypeError if `init_std` is no number, ValueError if it is negative or not finite.
    """
    if init_std is None:
        return 1 / math.sqrt(in_features)
    init_std = _real("init_std", init_std)
    if not (math.isfinite(init_std) and init_std >= 0):
        raise ValueError(f"init_std must be finite and not negative, got {init_std}")
    return init_std


def _real(what, value):
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{what} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:                            # an integer of more than 308 digits
        raise ValueError(f"{what} must be finite, got an integer too large for a float") from None
