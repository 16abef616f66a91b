import pytest
import torch
from tiny_detectors import write_set


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Detectors this small lose more by a second thread than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def squares(tmp_path):
    """A folder with both splits of a set of colored squares."""
    write_set(tmp_path, 8)
    write_set(tmp_path, 4, "instances_val.json", seed=1)
    return tmp_path
