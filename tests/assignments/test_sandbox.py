"""What code in the sandbox can do, and what it cannot."""

import os
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from grading.sandbox import Died, Failed, Sandbox, problem

pytestmark = pytest.mark.skipif(problem() is not None, reason=f"no isolation here: {problem()}")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sandbox():
    with Sandbox(seconds=250) as sandbox:             # for a busy machine; no test waits for it
        yield sandbox


def test_cells_share_names_and_show_their_text(sandbox):
    assert sandbox.run("import numpy as np\nx = np.ones(3)\nprint('a')") == ("a\n", None)
    assert sandbox.run("x.sum()")[0]== "np.float64(3.0)\n"
    text, error = sandbox.run("print('before')\n1 / 0")
    assert error == "ZeroDivisionError: division by zero" and text.startswith("before")
    assert sandbox.run("a b")[1].startswith("SyntaxError")


def test_values_and_functions_are_fetched(sandbox):
    sandbox.run("import numpy as np\ncount, module = 3, np\ndef f(x, *, by=2): x += 1; return by * x")
    found = sandbox.fetch(["count", "f", "module", "missing"])
    assert found["count"] == 3 and found.keys() == {"count", "f"}
    x = np.zeros(2)
    assert found["f"](x, by=3).tolist() == [3, 3]
    assert x.tolist() == [1, 1]                      # what it changed there is changed here


def test_exceptions_keep_their_name(sandbox):
    sandbox.run("class Mine(Exception): pass\ndef f(kind):\n    if kind: raise Mine('a')\n"
                "    raise ValueError('b')\ndef g(): raise SystemExit(0)")
    f, g = sandbox.fetch(["f", "g"]).values()
    with pytest.raises(ValueError, match="b"):
        f(False)
    with pytest.raises(Failed, match="a") as caught:
        f(True)
    assert type(caught.value).__name__ == "Mine"
    with pytest.raises(Failed):
        g()


def test_a_folder_goes_there_and_back(sandbox, tmp_path):
    (tmp_path / "old").write_text("old")
    sandbox.run("def f(folder):\n    (folder / 'new').write_text((folder / 'old').read_text() * 2)\n"
                "    (folder / 'old').unlink()\n    (folder / 'link').symlink_to('/etc/hostname')")
    sandbox.fetch(["f"])["f"](tmp_path)
    assert os.listdir(tmp_path) == ["new"] and (tmp_path / "new").read_text() == "oldold"


def test_nothing_can_be_written_outside_and_little_read(sandbox, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("s")
    text, error = sandbox.run(f"""
import os, pathlib, shutil
for path in ("/usr/x", {str(ROOT / 'lora_lib' / 'x')!r}, "/x", "/etc/x", {str(tmp_path / 'x')!r}):
    try:
        pathlib.Path(path).write_text("x")
        print("wrote", path)
    except OSError:
        pass
shutil.rmtree("/", ignore_errors=True)
print(os.path.exists({str(secret)!r}), os.path.exists({str(ROOT / 'assignments' / 'source')!r}),
      os.path.exists({str(ROOT / 'book')!r}), os.path.exists({str(ROOT / '.git')!r}))""")
    assert text.split() == ["False"] * 4, (text, error)
    assert secret.read_text() == "s" and (ROOT / "lora_lib" / "rules.py").exists()


def test_there_is_no_network_and_no_other_process(sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server:
        text, _ = sandbox.run(f"""
import os, socket, signal
try:
    socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), 2)
    print("connected")
except OSError:
    print("no network")
print(len([p for p in os.listdir("/proc") if p.isdigit()]) <= 3)
print(os.path.exists("/proc/{os.getpid()}/environ") and b"PYTEST" in open("/proc/{os.getpid()}/environ", "rb").read())
print([k for k in os.environ if "PYTEST" in k])""")
    assert text.split("\n")[:4] == ["no network", "True", "False", "[]"]


def test_threads_may_be_started_processes_may_not(sandbox):
    text, _ = sandbox.run("""
import os, subprocess, threading
for start in (os.fork, lambda: subprocess.run(["true"]), lambda: os.posix_spawn("/bin/true", ["true"], {})):
    try:
        start()
        print("started")
    except OSError as error:
        print("refused")
threading.Thread(target=print, args=["thread"]).start()""")
    assert text.split() == ["refused"] * 3 + ["thread"]


def test_memory_is_limited(sandbox):
    _, error = sandbox.run("x = bytearray(100 * 2**30)")
    assert error.startswith("MemoryError")
    assert sandbox.run("1")[1] is None


def test_files_are_limited(sandbox):
    _, error = sandbox.run("for i in range(9):\n    open(str(i), 'wb').write(b'x' * 2**26)")
    assert error.startswith("OSError")


def test_output_is_cut(sandbox):
    text, _ = sandbox.run("print('x' * 10**6)")
    assert len(text) < 10**5 and "characters more" in text


@pytest.mark.parametrize("source", [
    "while True: pass",
    "import time\nwhile True:\n    try: time.sleep(9)\n    except BaseException: pass",
    "import os, signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n"
    "    except OSError: pass\nwhile True: pass",
], ids=["busy", "swallows exceptions", "ignores signals"])
def test_an_endless_loop_is_ended(source):
    start = time.monotonic()
    with Sandbox(seconds=1) as sandbox, pytest.raises(Died, match="no answer after 1 s"):
        sandbox.run(source)
    assert time.monotonic() - start < 10
    assert sandbox.process.returncode is not None


def test_a_late_answer_is_not_taken_for_the_next():
    with Sandbox(seconds=5) as sandbox:
        sandbox.run("import time\ndef f(): time.sleep(2)\ng = 1")
        f = sandbox.fetch(["f"])["f"]
        sandbox.seconds = 1
        with pytest.raises(Died, match="no answer after 1 s"):
            f()
        time.sleep(2)
        with pytest.raises(Died, match="has ended"):
            sandbox.fetch(["g"])


@pytest.mark.parametrize("source", [
    "import os; os._exit(0)",
    "import ctypes; ctypes.string_at(0)",
    "import os\nfor fd in range(3, 50):\n    try: os.close(fd)\n    except OSError: pass",
])
def test_a_process_that_ends_is_reported(source):
    with Sandbox(seconds=10) as sandbox, pytest.raises(Died, match="process"):
        sandbox.run(source)
        sandbox.run("1")


def test_forged_answers_are_no_more_than_wrong_answers():
    with Sandbox(seconds=10) as sandbox, pytest.raises(Died, match="protocol|MB"):
        sandbox.run("import os\nfor fd in range(3, 20):\n    try: os.write(fd, b'\\0' * 7 + b'\\x40' + b'x' * 64)\n"
                    "    except OSError: pass")
        sandbox.run("1")


def test_sandboxes_run_side_by_side():
    results = []

    def work(i):
        with Sandbox(seconds=20) as sandbox:
            sandbox.run(f"x = {i}")
            results.append(sandbox.fetch(["x"])["x"] == i)

    threads = [threading.Thread(target=work, args=[i]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4
