"""How a test speaks to a learner: what was expected, what came, and the mistake it looks like.

Every function raises `Wrong`, and nothing else, whatever the learner's code returns or raises.
"""

import copy
import numbers
from collections.abc import Callable, Mapping

import numpy as np


class Wrong(AssertionError):
    """An answer is not right; the message is written for the learner.

    A notebook shows the message alone, without the traceback of the test.
    """

    def _render_traceback_(self):                     # IPython asks for it
        return [f"Not right yet. {self}"]


def call(function: Callable, *arguments, may_change: bool = False, **named):
    """function(*arguments, **named), with every exception turned into a `Wrong`.

    Unless `may_change`, an array among the arguments that the function changed is wrong, too.
    """
    name = getattr(function, "__name__", "the answer")
    if not callable(function):
        raise Wrong(f"expected a function, got {_brief(function)}")
    before = copy.deepcopy((arguments, named))
    try:
        result = function(*arguments, **named)
    except NotImplementedError:
        raise Wrong(f"{name} is not written yet") from None
    except Exception as error:
        shapes = [str(array.shape) for array in _arrays(before)]
        given = f"; the arrays that it was given have the shapes {', '.join(shapes)}" * bool(shapes)
        raise Wrong(f"{name} raised {type(error).__name__}: {error}{given}") from None
    if not may_change:
        for old, new in zip(_arrays(before), _arrays((arguments, named))):
            if old.shape != new.shape or not np.array_equal(old, new, equal_nan=True):
                raise Wrong(f"{name} changed an argument of shape {old.shape} in place; compute a "
                            "new array and leave what you were given as it was")
    return result


def same(got, want, what: str = "the result", *, rtol: float = 1e-7, atol: float = 1e-9,
         hints: Mapping[str, object] | None = None, dtype: bool = False) -> None:
    """Raise Wrong unless `got` has the shape of `want` and its values, within the tolerances.

    `want` is a number, a NumPy array, or a torch tensor; an array must be answered by an array of
    the same library. `hints` maps an explanation to the value that a typical mistake would give:
    when `got` is that value, the message says so. With `dtype` the dtypes must agree too.
    """
    is_like(got, want, what, dtype=dtype)
    found, right = _numeric(got), _numeric(want)
    if _close(found, right, rtol, atol):
        return
    off = np.abs(found - right)
    at = np.unravel_index(np.nanargmax(np.where(np.isfinite(off), off, np.inf)), off.shape)
    where = f" at {tuple(int(i) for i in at)}" if at else ""
    share = np.mean(~np.isclose(found, right, rtol=rtol, atol=atol))
    many = f", {share:.0%} of the entries differ" if at else ""
    message = (f"{what} is {found[at]:.6g}{where} and should be {right[at]:.6g}; "
               f"the difference is {off[at]:.2g}{many}.")
    for hint, mistake in (hints or {}).items():
        mistaken = _numeric(mistake)
        if mistaken.shape == found.shape and _close(found, mistaken, rtol, atol):
            message += f" Hint: {hint}" + ("" if hint.endswith(("?", ".")) else ".")
            break
    raise Wrong(message)


def is_like(got, want, what: str = "the result", *, dtype: bool = False) -> None:
    """Raise Wrong unless `got` is of the kind, the shape, and, with `dtype`, the dtype of `want`.

    The kinds are: a number, a string, a NumPy array, a torch tensor. NaN and infinity are wrong.
    """
    if got is None:
        raise Wrong(f"{what} is None; return the value, printing it is not enough")
    if _kind(got) != _kind(want):
        raise Wrong(f"{what} should be {_kind(want)}, got {_brief(got)}")
    if _kind(want) == "a string":
        return
    if np.shape(got) != np.shape(want):
        turned = np.shape(got) == np.shape(want)[::-1]
        raise Wrong(f"{what} has shape {tuple(np.shape(got))} and should have "
                    f"{tuple(np.shape(want))}." + (" Is it transposed?" if turned else ""))
    if dtype and hasattr(want, "dtype") and got.dtype != want.dtype:
        raise Wrong(f"{what} has dtype {got.dtype} and should have {want.dtype}")
    values = _numeric(got)
    if not np.isfinite(values).all():
        raise Wrong(f"{what} holds {values[~np.isfinite(values)][0]}")


def raises(kind: type[Exception], function: Callable, *arguments, **named) -> None:
    """Raise Wrong unless the call raises an exception of the given kind."""
    name = getattr(function, "__name__", "the answer")
    try:
        result = function(*arguments, **named)
    except kind:
        return
    except Exception as error:
        raise Wrong(f"{name} should raise {kind.__name__}, it raised {type(error).__name__}: "
                    f"{error}") from None
    raise Wrong(f"{name} should raise {kind.__name__}, it returned {_brief(result)}")


def _close(a, b, rtol, atol):
    return np.allclose(a, b, rtol=rtol, atol=atol)


def _kind(value):
    if isinstance(value, str):
        return "a string"
    if isinstance(value, np.ndarray) and value.dtype.kind not in "biufc":
        return f"an array of {value.dtype}"
    if isinstance(value, np.ndarray) and value.shape:
        return "a NumPy array"
    if type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach"):
        return "a torch tensor"
    if isinstance(value, (numbers.Number, np.generic, np.ndarray)) and not isinstance(value, bool):
        return "a number"
    return f"a {type(value).__name__}"


def _numeric(value):
    """A float64 NumPy array of the values, whatever holds them."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.complex128 if np.iscomplexobj(value) else np.float64)


def _arrays(values):
    """Every array and tensor in nested tuples, lists, and dictionaries, as NumPy arrays."""
    if isinstance(values, (tuple, list)):
        return [array for value in values for array in _arrays(value)]
    if isinstance(values, Mapping):
        return [array for value in values.values() for array in _arrays(value)]
    return [_numeric(values)] if hasattr(values, "dtype") and hasattr(values, "shape") else []


def _brief(value):
    text = " ".join(repr(value).split())
    return f"{_kind(value)}: {text if len(text) <= 80 else text[:77] + '...'}"
