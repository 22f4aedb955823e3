"""A file is the old one or the new one, whatever happens in between."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_lib.files import atomic

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("kind", [str, Path])
def test_a_new_file_and_one_in_the_place_of_another(tmp_path, kind):
    path = tmp_path / "data.bin"
    for content in (b"first", b"second, and longer", b""):
        with atomic(kind(path)) as temporary:
            assert temporary.parent == tmp_path and temporary != path
            temporary.write_bytes(content)
        assert path.read_bytes() == content
        assert list(tmp_path.iterdir()) == [path]


def test_until_the_end_the_old_one_is_there(tmp_path):
    path = tmp_path / "data.bin"
    path.write_bytes(b"old")
    with atomic(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("old", [None, b"old"])
def test_an_error_leaves_everything_as_it_was(tmp_path, error, old):
    path = tmp_path / "data.bin"
    if old:
        path.write_bytes(old)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(error), atomic(path) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_place_that_cannot_be_taken(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError), atomic(tmp_path / "folder") as temporary:
        temporary.write_bytes(b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(FileNotFoundError), atomic(tmp_path / "missing" / "data.bin"):
        pass


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_it_has_the_permissions_of_any_new_file(tmp_path, umask):
    kept = os.umask(umask)
    try:
        with atomic(tmp_path / "data.bin") as temporary:
            temporary.write_bytes(b"new")
    finally:
        assert os.umask(kept) == umask                           # and the umask is as it was
    assert (tmp_path / "data.bin").stat().st_mode & 0o777 == 0o666 & ~umask


def test_two_files_are_both_written_before_either_is_replaced(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"old")
    with pytest.raises(OSError), atomic(one) as a, atomic(two) as b:
        a.write_bytes(b"new")
        b.write_bytes(b"half")
        raise OSError("disk full")
    assert one.read_bytes() == b"old" and list(tmp_path.iterdir()) == [one]


def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "data.bin"
    path.write_bytes(b"old")
    code = ("import os, signal, sys; from lora_lib.files import atomic\n"
            "with atomic(sys.argv[1]) as temporary:\n"
            "    temporary.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)")
    run = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT)
    assert run.returncode == -9 and path.read_bytes() == b"old"
