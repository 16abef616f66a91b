import pytest
import torch
from masked_squares import write_squares


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models this small lose more by a second thread than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def squares(tmp_path_factory):
    """A folder with both splits of a set of colored squares."""
    root = tmp_path_factory.mktemp("squares")
    write_squares(root, "train", 8)
    write_squares(root, "val", 4, seed=1)
    return root
