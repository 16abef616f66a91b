from __future__ import annotations

import contextlib
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from mdistiller.data.unpickle import read_pickle
from mdistiller.errors import DataError


class Runs:
    """Pickles to a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("where", ["top", "key value", "list", "array dtype"])
def test_code_is_refused_and_not_run(tmp_path, protocol, where):
    sentinel = tmp_path / "ran"
    evil = Runs(os.mkdir, str(sentinel))
    value = {
        "top": evil,
        "key value": {"data": evil},
        "list": {"data": [1, [evil]]},
        "array dtype": {"data": Runs(np.frombuffer, evil)},
    }[where]
    path = tmp_path / "train"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    with pytest.raises(DataError, match=r"asks for (posix|nt)\.mkdir|asks for numpy.*frombuffer") as error:
        read_pickle(path)
    assert str(path) in str(error.value)
    assert not sentinel.exists()
    pickle.loads(path.read_bytes()) if where != "array dtype" else None
    assert sentinel.exists() or where == "array dtype", "the test's own pickle would have run"


@pytest.mark.parametrize("name", ["eval", "getattr", "exec", "__import__"])
@pytest.mark.parametrize("module", ["builtins", "__builtin__", "numpy", "numpy.core.multiarray", "_codecs"])
def test_other_names_of_allowed_modules_are_refused(tmp_path, module, name):
    (tmp_path / "f").write_bytes(f"c{module}\n{name}\n.".encode())
    with pytest.raises(DataError, match=f"asks for .*{name}"):
        read_pickle(tmp_path / "f")


def test_dotted_names_do_not_reach_through(tmp_path):
    # Protocol 4 resolves "dtype.__class__" by attribute look-ups.
    blob = b"\x80\x04\x8c\x05numpy\x8c\x0fdtype.__class__\x93."
    (tmp_path / "f").write_bytes(blob)
    with pytest.raises(DataError, match=r"dtype\.__class__"):
        read_pickle(tmp_path / "f")


def test_shared_objects_stay_as_they_were(tmp_path):
    # State set on a class that the pickle may name; the next file must read as before.
    (tmp_path / "evil").write_bytes(b"cnumpy\ndtype\nN}Vcode\nI1\ns\x86b.")
    with pytest.raises(DataError):
        read_pickle(tmp_path / "evil")
    array = np.arange(6, dtype=">i4").reshape(2, 3)
    (tmp_path / "good").write_bytes(pickle.dumps({"a": array, "t": (1, "x"), b"n": None}))
    entry = read_pickle(tmp_path / "good")
    assert np.array_equal(entry["a"], array)
    assert entry["a"].dtype == array.dtype
    assert entry["t"] == (1, "x")
    assert entry["n"] is None


@pytest.mark.parametrize(
    "array",
    [np.array([object()], object), np.zeros(2, "U3"), np.zeros(2, [("a", "i4")]), np.zeros(1, "M8[s]")],
)
def test_arrays_of_anything_but_numbers_are_refused(tmp_path, array):
    (tmp_path / "f").write_bytes(pickle.dumps({"data": array}))
    with pytest.raises(DataError):
        read_pickle(tmp_path / "f")


def test_missing_folder_and_empty(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    for name in ("empty", "missing", "."):
        with pytest.raises(DataError, match="cannot be read"):
            read_pickle(tmp_path / name)


def test_huge_memo_index_costs_nothing(tmp_path):
    (tmp_path / "f").write_bytes(b"}r\xff\xff\xff\x7f.")
    with pytest.raises(DataError, match="memo index"):
        read_pickle(tmp_path / "f")


VALID = [
    pickle.dumps({b"data": np.ones((2, 3), np.uint8), b"fine_labels": [1, np.int64(2)]}, protocol=protocol)
    for protocol in range(6)
]


def reads_or_refuses(folder, blob):
    path = folder / "f"
    path.write_bytes(blob)
    # Whatever else it raises fails the test.
    with contextlib.suppress(DataError):
        assert isinstance(read_pickle(path), dict)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=200, deadline=None)
@given(blob=st.binary(max_size=300))
def test_random_bytes(folder, blob):
    reads_or_refuses(folder, blob)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), valid=st.sampled_from(VALID))
def test_damaged_bytes(folder, data, valid):
    blob = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    reads_or_refuses(folder, bytes(blob))


@pytest.mark.parametrize("valid", VALID)
def test_every_truncation_is_refused(folder, valid):
    for length in range(len(valid)):
        (folder / "f").write_bytes(valid[:length])
        with pytest.raises(DataError):
            read_pickle(folder / "f")
