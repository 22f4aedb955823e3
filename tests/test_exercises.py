"""What a learner is told: the kind of mistake, where, and by how much."""

import numpy as np
import pytest
import torch

from lora_lib.exercises import Wrong, call, check, is_like, raises, same

A = np.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize("got, want", [(A, A.copy()), (3, 3.0), (np.float32(2), 2), ("a", "b"),
                                       (torch.ones(2), torch.ones(2)), (np.array(2.0), 2),
                                       (A + 1e-12, A)])
def test_what_is_right_passes(got, want):
    (is_like if isinstance(want, str) else same)(got, want)


@pytest.mark.parametrize("got, want, says", [
    (None, A, "None; return the value, printing it is not enough"),
    (A.tolist(), A, "should be a NumPy array, got a list: "),
    (torch.ones(2, 3), A, "should be a NumPy array, got a torch tensor"),
    ("3", 3, "should be a number, got a string"),
    (True, 1, "should be a number, got a bool"),
    (np.array([["a"]]), A, "should be a NumPy array, got an array of <U1"),
    (A.T, A, r"shape \(3, 2\) and should have \(2, 3\). Is it transposed"),
    (A[0], A, r"shape \(3,\) and should have \(2, 3\)\.$"),
    (A + np.eye(2, 3), A, r"is 1 at \(0, 0\) and should be 0; the difference is 1, 33% of"),
    (A * np.nan, A, "holds nan"), (np.inf, 1.0, "holds inf"),
    (2.5, 2, "is 2.5 and should be 2; the difference is 0.5.$"),
])
def test_what_is_wrong_is_said(got, want, says):
    with pytest.raises(Wrong, match=says):
        same(got, want)


def test_a_dtype_is_compared_when_asked():
    same(A.astype(np.float32), A)
    with pytest.raises(Wrong, match="dtype float32 and should have float64"):
        same(A.astype(np.float32), A, dtype=True)


def test_a_known_mistake_gets_its_hint():
    hints = {"divide by two": 2 * A, "the sign is wrong": -A}
    with pytest.raises(Wrong, match="Hint: the sign is wrong"):
        same(-A, A, hints=hints)
    with pytest.raises(Wrong) as error:
        same(3 * A, A, hints=hints)
    assert "Hint" not in str(error.value)


def fails(x):
    return x @ np.ones((9, 9))


def changes(x):
    x += 1
    return x


@pytest.mark.parametrize("function, says", [
    (3, "expected a function, got a number: 3"),
    (fails, r"fails raised ValueError: .*the shapes \(2, 3\)"),
    (changes, r"changes changed an argument of shape \(2, 3\) in place"),
])
def test_a_call_says_what_went_wrong(function, says):
    with pytest.raises(Wrong, match=says):
        call(function, A.copy())


def test_a_change_in_place_may_be_meant():
    x = A.copy()
    assert call(changes, x, may_change=True) is x


def test_a_missing_answer_is_not_an_error_of_python():
    def todo():
        raise NotImplementedError()
    with pytest.raises(Wrong, match="todo is not written yet"):
        call(todo)


def test_expected_exceptions():
    raises(ZeroDivisionError, lambda: 1 / 0)
    for function, says in ((lambda: 3, "it returned a number: 3"), (lambda: {}["a"], "KeyError")):
        with pytest.raises(Wrong, match=says):
            raises(ZeroDivisionError, function)


def test_unknown_exercises_and_no_answers():
    with pytest.raises(ValueError, match="no exercise '9.9'; the exercises are: 1.1, "):
        check("9.9", 1)
    with pytest.raises(ValueError, match="no exercise 'x'"):
        check("x", 1)
    for nothing in (None, ...):
        with pytest.raises(Wrong, match="Exercise 1.1 has no answer yet"):
            check("1.1", nothing)


def test_a_notebook_shows_the_message_alone():
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    shell = InteractiveShell.instance()
    with capture_output() as captured:
        shell.run_cell('from lora_lib.exercises import check\ncheck("2.1", 3)')
    assert "Not right yet. Exercise 2.1" in captured.stdout
    assert "Traceback" not in captured.stdout + captured.stderr
    InteractiveShell.clear_instance()
