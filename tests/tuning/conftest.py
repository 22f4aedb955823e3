"""On tensors this small, threads only wait for each other."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def torch_on_one_thread(one_thread):
    pass
