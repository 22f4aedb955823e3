"""What tests of several folders share."""

import pytest


@pytest.fixture(scope="module")
def one_thread():
    """On tensors this small, threads only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
