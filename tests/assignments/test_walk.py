"""The whole way once: release, a learner in a real notebook server, collect, grade, feedback."""

import json
import re
import socket
import subprocess
import sys
import time
import uuid
from urllib.request import Request, urlopen

import nbformat
import pytest
import websocket                                     # comes with the notebook server

from grading.sandbox import problem
from tests.assignments.conftest import copy_course, marks, run

pytestmark = pytest.mark.skipif(problem() is not None, reason=f"no isolation here: {problem()}")


class NotebookServer:
    """A Jupyter server, spoken to as the notebook page in a browser does."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jupyter_server", f"--port={self.port}", "--no-browser",
             "--IdentityProvider.token=secret", "--allow-root", f"--ServerApp.root_dir={folder}"],
            cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(300):
            try:
                self("GET", "status")
                return
            except OSError:
                time.sleep(0.1)
        raise TimeoutError("the notebook server did not start in 30 s")

    def __call__(self, method, address, **body):
        request = Request(f"http://127.0.0.1:{self.port}/api/{address}", method=method,
                          data=json.dumps(body).encode() if body else None,
                          headers={"Authorization": "token secret"})
        with urlopen(request, timeout=30) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def open(self, name):
        """The notebook, and a kernel for it."""
        content = self("GET", f"contents/{name}")["content"]
        kernel = self("POST", "sessions", path=name, name=name, type="notebook",
                      kernel={"name": "python3"})["kernel"]["id"]
        channel = websocket.create_connection(
            f"ws://127.0.0.1:{self.port}/api/kernels/{kernel}/channels?token=secret", timeout=60)
        return nbformat.from_dict(content), channel

    def save(self, name, notebook):
        self("PUT", f"contents/{name}", type="notebook", content=notebook)

    def close(self):
        self.process.terminate()
        self.process.wait(20)


def press_run(channel, cell):
    """Run one cell; its outputs are put below it, and their text is returned."""
    message = uuid.uuid4().hex
    channel.send(json.dumps({
        "header": {"msg_id": message, "msg_type": "execute_request", "version": "5.3",
                   "username": "", "session": "page", "date": ""},
        "parent_header": {}, "metadata": {}, "channel": "shell",
        "content": {"code": cell.source, "silent": False, "store_history": True,
                    "user_expressions": {}, "allow_stdin": False, "stop_on_error": False}}))
    cell.outputs = []
    while True:
        reply = json.loads(channel.recv())
        if reply["parent_header"].get("msg_id") != message:
            continue
        kind, content = reply["msg_type"], reply["content"]
        if kind == "status" and content["execution_state"] == "idle":
            break
        if kind in ("stream", "error", "execute_result", "display_data"):
            content.pop("transient", None)
            cell.outputs.append(nbformat.from_dict({"output_type": kind, **content}))
    return "".join(o.get("text", "") + "\n".join(o.get("traceback", [])) for o in cell.outputs)


def test_from_release_to_feedback(tmp_path):
    course = copy_course(tmp_path / "course", with_source=True)
    released = run(course, "release.py", "02_math")                     # the instructor, Monday
    assert released.returncode == 0, released.stderr
    home = tmp_path / "home"
    home.mkdir()
    handed_out = course / "release" / "02_math" / "02_math.ipynb"
    (home / "02_math.ipynb").write_bytes(handed_out.read_bytes())

    server = NotebookServer(home)                                       # the learner
    try:
        notebook, channel = server.open("02_math.ipynb")
        cells = {c.metadata.get("nbgrader", {}).get("grade_id"): c for c in notebook.cells}
        press_run(channel, cells["numbers"])
        press_run(channel, cells["solution-2-1"])
        assert "not written yet" in press_run(channel, cells["test-2-1"])
        line = "    # YOUR CODE HERE\n    raise NotImplementedError()"
        assert line in cells["solution-2-1"].source
        stub = cells["solution-2-1"].source
        cells["solution-2-1"].source = stub.replace(line, "    return x @ W.T + x @ A.T @ B.T")
        press_run(channel, cells["solution-2-1"])
        assert "the scaling is missing" in press_run(channel, cells["test-2-1"])
        cells["solution-2-1"].source = stub.replace(
            line, "    return x @ W.T + scaling * (x @ A.T @ B.T)")
        press_run(channel, cells["solution-2-1"])
        said = press_run(channel, cells["test-2-1"])
        assert "visible tests pass" in said and "Not right" not in said
        server.save("02_math.ipynb", notebook)
        channel.close()
    finally:
        server.close()

    box = tmp_path / "collected"                                        # the instructor, Friday
    box.mkdir()
    (home / "02_math.ipynb").rename(box / "ann_02_math.ipynb")
    done = run(course, "grade.py", box)
    assert done.returncode == 0, done.stderr
    assert marks(course)["ann", "02_math"] == {
        "learner": "ann", "assignment": "02_math", "points": "3", "of": "20", "remarks": ""}
    page = (course / "feedback" / "ann.html").read_text()
    assert re.search(r"test-2-1</td><td>1 of 1</td><td>passed", page)
    assert re.search(r"test-2-3</td><td>0 of 1</td><td>.*not written yet", page)
    assert (course / "feedback" / "ann" / "02_math" / "02_math.html").exists()
