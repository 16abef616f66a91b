"""Rows on disk: no kill, no second writer, no damage and no full disk yields a wrong row."""

import contextlib
import hashlib
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mdistiller.training import row_store
from mdistiller.training.row_store import RowStore

WIDTH, ROWS, SALT = 40, 300, 0x0123456789ABCDEF
ALL = np.arange(ROWS)


def truth(numbers, width=WIDTH):
    """The right bytes of rows; equal for every process."""
    words = (numbers[:, None] * 2654435761 + np.arange(width // 4) * 40503 + 1) % 2**32
    return words.astype("<u4").view(np.uint8)


def store(folder, rows=ROWS, salt=SALT, **options):
    return RowStore(folder / "a.rows", WIDTH, rows, salt, **options)


def assert_true(folder, rows=ROWS):
    """Every row that is there is the right one; returns which are there."""
    found, there = store(folder, rows, writable=False).read(np.arange(rows))
    assert np.array_equal(found[there], truth(np.arange(rows)[there]))
    return there


def test_rows_come_back_and_others_are_missing(tmp_path):
    a = store(tmp_path)
    assert not a.read(ALL)[1].any()
    some = np.array([7, 0, 299, 4])
    a.write(some, truth(some))
    found, there = a.read(np.array([4, 5, 0, 299, 7]))
    assert there.tolist() == [True, False, True, True, True]
    assert np.array_equal(found[there], truth(np.array([4, 0, 299, 7])))
    assert set(np.flatnonzero(assert_true(tmp_path))) == {0, 4, 7, 299}
    assert (a.total_bytes, os.path.getsize(a.path)) == (ROWS * (WIDTH + 12),) * 2


def test_a_sparse_file_takes_no_room(tmp_path):
    a = store(tmp_path, rows=1_000_000)
    assert os.path.getsize(a.path) == a.total_bytes == 52_000_000
    assert a.used_bytes() < 100_000
    a.write(np.array([999_999]), truth(np.array([999_999])))
    assert a.read(np.array([999_999]))[1].all()
    assert a.used_bytes() < 100_000


def test_rows_of_zeros_count_once_they_are_written(tmp_path):
    a = store(tmp_path)
    zeros = np.zeros((ROWS, WIDTH), np.uint8)
    a.write(ALL, zeros)
    found, there = a.read(ALL)
    assert there.all()
    assert not found.any()


def test_the_checksum_is_blake2b_of_number_and_row(tmp_path):
    a = store(tmp_path)
    numbers = np.array([0, 5, 299])
    a.write(numbers, truth(numbers))
    content, key = a.path.read_bytes(), SALT.to_bytes(8, "little")
    for number in numbers.tolist():
        row = content[number * a.stride :][:WIDTH]
        expected = hashlib.blake2b(number.to_bytes(8, "little") + row, digest_size=8, key=key).digest()
        assert content[number * a.stride + WIDTH :][:8] == expected


def test_a_row_belongs_to_its_number_and_its_salt(tmp_path):
    a = store(tmp_path)
    a.write(ALL, truth(ALL))
    content = bytearray(a.path.read_bytes())
    stride = a.stride
    content[:stride], content[stride : 2 * stride] = content[stride : 2 * stride], content[:stride]
    a.path.write_bytes(content)
    assert np.flatnonzero(~store(tmp_path).read(ALL)[1]).tolist() == [0, 1]
    assert not store(tmp_path, salt=SALT + 1).read(ALL)[1].any()


@pytest.mark.parametrize("seed", range(20))
def test_damage_is_noticed_and_repaired(tmp_path, seed):
    a = store(tmp_path)
    a.write(ALL, truth(ALL))
    random = np.random.default_rng(seed)
    content = np.frombuffer(a.path.read_bytes(), np.uint8).copy()
    before = content.copy()
    kind = seed % 4
    start = int(random.integers(len(content) - 600))
    if kind == 0:  # single bits
        where = random.integers(len(content), size=30)
        content[where] ^= (1 << random.integers(8, size=30)).astype(np.uint8)
    elif kind == 1:  # noise, as of a bad block
        content[start : start + 512] = random.integers(256, size=512)
    elif kind == 2:  # a hole
        content[start : start + 512] = 0
    else:  # shifted by a byte
        content[start : start + 512] = content[start + 1 : start + 513]
    a.path.write_bytes(content)
    changed = (content != before).reshape(ROWS, a.stride)[:, : WIDTH + 8].any(1)
    again = store(tmp_path)
    assert np.array_equal(~again.read(ALL)[1], changed)
    again.write(ALL[changed], truth(ALL[changed]))
    assert assert_true(tmp_path).all()


def test_a_file_that_somebody_shortens_is_no_signal(tmp_path):
    a = store(tmp_path, rows=100_000)
    numbers = np.arange(100_000)
    a.write(numbers[-10:], truth(numbers[-10:]))
    os.truncate(a.path, 1000)
    assert not a.read(numbers)[1].any()
    a.write(numbers[-10:], truth(numbers[-10:]))
    assert a.read(numbers)[1].sum() == 10


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's list of mapped files")
def test_no_file_is_mapped(tmp_path):
    """A mapped page that a full disk cannot provide, or that was cut off, ends the process with a signal."""
    a = store(tmp_path)
    a.write(ALL, truth(ALL))
    assert a.read(ALL)[1].all()
    assert str(a.path) not in Path("/proc/self/maps").read_text()


def test_more_rows_extend_a_file_and_fewer_leave_it(tmp_path):
    small = store(tmp_path)
    small.write(ALL, truth(ALL))
    large = store(tmp_path, rows=2 * ROWS)
    more = np.arange(2 * ROWS)
    large.write(more[ROWS:], truth(more[ROWS:]))
    size = os.path.getsize(large.path)
    store(tmp_path)
    store(tmp_path, rows=10)
    assert os.path.getsize(large.path) == size
    assert large.read(more)[1].all()
    assert store(tmp_path, rows=3 * ROWS).read(np.arange(3 * ROWS))[1].sum() == 2 * ROWS


def test_a_file_grows_though_another_process_extends_it_in_between(tmp_path, monkeypatch):
    """The other one comes after the look at the size; `truncate` would have cut its rows off."""
    fstat, more = os.fstat, np.arange(2 * ROWS)

    def late(handle):
        found = fstat(handle)
        monkeypatch.undo()
        other = store(tmp_path, rows=2 * ROWS)
        other.write(more, truth(more))
        return found

    monkeypatch.setattr(row_store.os, "fstat", late)
    store(tmp_path)
    assert store(tmp_path, rows=2 * ROWS).read(more)[1].all()


def test_a_shorter_file_is_read_as_far_as_it_goes(tmp_path):
    store(tmp_path).write(ALL, truth(ALL))
    reader = store(tmp_path, rows=2 * ROWS, writable=False)
    assert reader.read(np.arange(2 * ROWS))[1].sum() == ROWS
    with pytest.raises(FileNotFoundError):
        RowStore(tmp_path / "none.rows", WIDTH, ROWS, SALT, writable=False)
    (tmp_path / "empty.rows").touch()
    assert not RowStore(tmp_path / "empty.rows", WIDTH, ROWS, SALT, writable=False).read(ALL)[1].any()


# Other processes

WRITER = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from pathlib import Path
import numpy as np
from test_row_store import WIDTH, SALT, truth
from mdistiller.training.row_store import RowStore
folder, rows, width, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
a = RowStore(folder / "a.rows", width, rows, SALT)
random = np.random.default_rng(seed)
print("ready", flush=True)
for i in range(int(sys.argv[5])):
    numbers = random.permutation(rows)[:64]
    a.write(numbers, truth(numbers, width))
    if i < 8:
        print("written", flush=True)
"""


def writer(folder, rows, width, seed, times):
    argv = [sys.executable, "-c", WRITER, str(folder), *map(str, (rows, width, seed, times))]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_kills_while_writing_leave_right_rows(tmp_path):
    """Rows of many pages, so that a kill can come within one; each after some whole writes."""
    width, rows = 200_000, 40
    for i in range(6):
        process = writer(tmp_path, rows, width, i, 10**9)
        assert [process.stdout.readline() for _ in range(i + 1)] == ["written\n"] * (i + 1)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert process.returncode == -signal.SIGKILL
        found, there = RowStore(tmp_path / "a.rows", width, rows, SALT).read(np.arange(rows))
        assert np.array_equal(found[there], truth(np.arange(rows)[there], width))
        assert there.sum() >= rows - 1
    last = RowStore(tmp_path / "a.rows", width, rows, SALT)
    last.write(np.arange(rows), truth(np.arange(rows), width))
    assert last.read(np.arange(rows))[1].all()


def test_two_processes_write_and_a_third_reads(tmp_path):
    rows = 2000
    both = [writer(tmp_path, n, WIDTH, i, 400) for i, n in enumerate((rows, rows // 2))]
    reader = store(tmp_path, rows=rows)
    while any(process.poll() is None for process in both):
        found, there = reader.read(np.arange(rows))
        assert np.array_equal(found[there], truth(np.arange(rows)[there]))
    assert [process.wait() for process in both] == [0, 0]
    for process in both:
        process.stdout.close()
    assert assert_true(tmp_path, rows).mean() > 0.9


@contextlib.contextmanager
def largest_file(size):
    """The system's own limit: a write beyond it is short, or fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_an_error_and_no_wrong_row(tmp_path):
    a = store(tmp_path)
    with largest_file(a.stride * 100 + 17), pytest.raises(OSError, match=r"written in part|too large"):
        a.write(ALL, truth(ALL))
    assert np.flatnonzero(assert_true(tmp_path)).tolist() == list(range(100))
    last = np.array([150])
    with largest_file(a.stride * 150 + 17), pytest.raises(OSError, match="a row was written in part"):
        a.write(last, truth(last))
    assert not a.read(last)[1].any()
    with largest_file(1000), pytest.raises(OSError, match="too large"):
        RowStore(tmp_path / "b.rows", WIDTH, ROWS, SALT)
