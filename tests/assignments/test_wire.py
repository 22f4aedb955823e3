"""Values go to the sandbox and back as they are; what is no message is an error, never code."""

import pickle

import numpy as np
import pytest
import torch

from grading.wire import pack, read_folder, unpack, write_back

VALUES = [None, True, 3, -2.5, float("inf"), "text\n", b"\0bytes", [1, [2, "x"]], (1, (2,)),
          {"a": [1], 2: None, (1, 2): "key"}, 10**30]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_plain_values_come_back(value):
    back = unpack(pack(value))
    assert back == value and type(back) is type(value)


@pytest.mark.parametrize("array", [
    np.float32(1.5), np.zeros(0), np.arange(6).reshape(2, 3).T, np.array(3), np.array([True]),
    np.linspace(0, 1, 4, dtype=np.float16), np.ones((2, 1, 3), np.int8)], ids=repr)
def test_arrays_keep_shape_dtype_and_values(array):
    back = unpack(pack({"x": array}))["x"]
    assert back.dtype == array.dtype and back.shape == array.shape
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tensors_keep_shape_dtype_and_values(dtype):
    tensor = torch.arange(6).reshape(2, 3).to(dtype).T
    back = unpack(pack([tensor, tensor]))[1]
    assert back.dtype == dtype and torch.equal(back, tensor)


@pytest.mark.parametrize("value", [object(), {1, 2}, np.array([object()]), np.array(["a"]), int,
                                   (x for x in "a"), len], ids=lambda v: type(v).__name__)
def test_what_cannot_be_sent_is_named(value):
    with pytest.raises(TypeError):
        pack([value])


@pytest.mark.parametrize("data", [b"", b"short", pickle.dumps([1]), pack([np.ones(3)])[:-1],
                                  pack("x").replace(b"plain", b"other"), b"\xff" * 100])
def test_what_is_no_message_is_a_value_error(data):
    with pytest.raises(ValueError, match="not a message"):
        unpack(data)


def test_functions_are_sent_by_number():
    data = pack([len], keep=lambda function: 7)
    assert unpack(data, function=lambda number, name: (number, name)) == [(7, "len")]
    with pytest.raises(ValueError):
        unpack(data)                                 # nobody there to stand for it


def test_folders_hold_regular_files_only(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "link").symlink_to("/etc/hostname")
    (tmp_path / "below").mkdir()
    assert read_folder(tmp_path) == {"a.txt": b"a"} == unpack(pack(tmp_path))


def test_changes_are_written_back_in_place(tmp_path):
    array, items, named = np.ones(3), [1, np.zeros(2)], {"gone": 1, "kept": np.zeros(1)}
    (tmp_path / "old").write_text("old")
    before = (array, items, named, tmp_path)
    write_back(before, (np.arange(3.0), [2, np.ones(2), "new"], {"kept": np.ones(1), "more": 3},
                        {"new": b"new"}))
    np.testing.assert_array_equal(array, [0, 1, 2])
    assert items[0] == 2 and items[1].tolist() == [1, 1] and items[2] == "new"
    assert named.keys() == {"kept", "more"} and named["kept"][0] == 1
    assert read_folder(tmp_path) == {"new": b"new"}


@pytest.mark.parametrize("name", ["../up", "/etc/x", "a/b", "", ".."])
def test_a_file_cannot_leave_its_folder(tmp_path, name):
    with pytest.raises(ValueError, match="not a file's name"):
        write_back(tmp_path, {name: b"x"})
    assert not (tmp_path.parent / "up").exists()
