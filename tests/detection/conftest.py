import pytest
from tiny_detectors import write_set


@pytest.fixture
def squares(tmp_path):
    """A folder with both splits of a set of coloured squares."""
    write_set(tmp_path, 8)
    write_set(tmp_path, 4, "instances_val.json", seed=1)
    return tmp_path
