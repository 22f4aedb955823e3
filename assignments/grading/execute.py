"""Running a submission for nbgrader: its own cells in the sandbox, the tests here.

nbgrader gives a test cell its points when the cell ends without an error. In nbgrader itself the
test runs in the learner's process, where the learner's code may change what a test is. Here a
test runs in the grader's process and sees the learner's answers from outside: values, and functions
that are called in the sandbox.
"""

import builtins
import contextlib
import io
import time
import types

from IPython.core.inputtransformer2 import TransformerManager
from nbformat.v4 import new_output
from nbgrader.preprocessors import NbGraderPreprocessor
from nbgrader.utils import is_grade, is_locked, is_solution
from traitlets import Bool, Float

from grading.sandbox import Died, Sandbox, problem


class IsolatedExecute(NbGraderPreprocessor):
    """Takes the place of nbgrader's Execute in `Autograde.autograde_preprocessors`."""

    seconds = Float(60, help="the longest that a cell, or one call by a test, may take").tag(
        config=True)
    seconds_in_all = Float(240, help="the longest that a whole notebook may take").tag(config=True)
    isolated = Bool(True, help="whether to use bubblewrap; without it, trust every learner").tag(
        config=True)

    def preprocess(self, nb, resources):
        """Run every code cell of `nb`, in place. Raises RuntimeError where isolation fails."""
        if self.isolated and (why := problem()):
            raise RuntimeError(f"submissions cannot be isolated on this machine: {why}")
        self.ends = time.monotonic() + self.seconds_in_all
        self.sandbox, self.ran, self.trusted = None, [], {"__name__": "__main__"}
        try:
            for cell in nb.cells:
                if cell.cell_type == "code":
                    test = is_grade(cell) and not is_solution(cell)
                    with self._reporting(cell):
                        text = self._test(cell) if test else self._run(cell)
                        if text:
                            cell.outputs.insert(0, new_output("stream", text=text))
        finally:
            if self.sandbox is not None:
                self.sandbox.close()
        return nb, resources

    @contextlib.contextmanager
    def _reporting(self, cell):
        """Whatever ends the cell becomes its output."""
        cell.outputs, cell.execution_count = [], None
        try:
            yield
        except Died as died:
            cell.outputs.append(_error("Stopped", died))
        except Exception as error:
            cell.outputs.append(_error(type(error).__name__, error))

    def _run(self, cell):
        """Run a cell of the learner's; one that the instructor locked also runs for the tests."""
        if is_locked(cell):
            with contextlib.redirect_stdout(io.StringIO()):
                exec(_compiled(cell), self.trusted)
        text, error = self._ready().run(cell.source)
        self.ran.append(cell.source)
        if error:
            cell.outputs.append(_error(*error.split(": ", 1), text=text))
            return ""
        return text

    def _test(self, cell):
        """Run a test here, with the learner's values for the names that it uses."""
        code = _compiled(cell)
        names = sorted(_names(code) - self.trusted.keys() - vars(builtins).keys())
        answers, text = self._ready().fetch(names), io.StringIO()
        with contextlib.redirect_stdout(text):
            exec(code, answers | self.trusted)
        return text.getvalue()

    def _ready(self):
        """The sandbox, started again after a death, with what had run in it run once more.

        Neither counts as time of the cell that comes next: a start is slow on a busy machine.
        """
        if self.sandbox is None or self.sandbox.closed:
            self.sandbox = Sandbox(self.isolated, self._left())
            for source in ["", *self.ran]:
                self.sandbox.run(source)
        self.sandbox.seconds = min(self.seconds, self._left())
        return self.sandbox

    def _left(self):
        left = self.ends - time.monotonic()
        if left <= 0:
            raise Died(f"the time for the whole notebook, {self.seconds_in_all:.0f} s, is over")
        return left


def _compiled(cell):
    source = TransformerManager().transform_cell(cell.source)
    return compile(source, cell.metadata.nbgrader.grade_id, "exec")


def _names(code):
    """Every name that the code, or a function in it, looks up outside of itself."""
    inner = [_names(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*inner)


def _error(name, says="", text=None):
    message = text or f"{name}: {says}"
    return new_output("error", ename=name, evalue=str(says), traceback=message.split("\n"))
