"""Rows of one size in one sparse file, which several processes read and write at once."""

import os
import weakref
from pathlib import Path

import numpy as np
import numpy.typing as npt

_WORD = 4  # bytes that a coefficient of the checksum weighs
_CHECKSUM, _PAD = 8, 4

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]


class RowStore:
    """Rows of `row_bytes` bytes in a file, by number from 0.

    Each row is followed by a checksum of its bytes, its number and `salt`. A row is there if its checksum is
    right. So a row that was never written, was written in part when the process was killed, was written by
    two processes at once, is damaged, or is of another salt is missing, and can be written again.

    The file is read through memory and written by system calls, since a write through memory to a full disk
    would be a signal. The file only grows: a shorter one would be a signal in a process that reads it.

    Args:
        path: the file; it is made if it does not exist.
        row_bytes: bytes of a row, a multiple of four.
        rows: number of rows.
        salt: 64 bits that name the content.
        writable: open the file for writing.

    Raises:
        OSError: the file cannot be opened, made or extended.
    """

    def __init__(self, path: Path, row_bytes: int, rows: int, salt: int, *, writable: bool = True) -> None:
        assert row_bytes % _WORD == 0
        assert rows > 0
        self.path, self.row_bytes, self.rows = path, row_bytes, rows
        self.stride = self.stride_of(row_bytes)
        # Weights of the words, of the row's number and a constant, for each half of the checksum.
        weights = np.random.SeedSequence(salt).generate_state(2 * (row_bytes // _WORD + 3), np.uint64)
        self._weights = weights.reshape(2, -1)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY, 0o666)
        weakref.finalize(self, os.close, self._file)
        self._writable = writable
        self._map()

    @staticmethod
    def stride_of(row_bytes: int) -> int:
        """Returns the bytes from one row to the next."""
        return row_bytes + _CHECKSUM + _PAD

    @property
    def total_bytes(self) -> int:
        """Size of the file with all rows."""
        return self.rows * self.stride

    def used_bytes(self) -> int:
        """Returns the bytes that the file takes on the disk, without its holes."""
        found = os.fstat(self._file)
        return getattr(found, "st_blocks", found.st_size // 512) * 512

    def read(self, numbers: Numbers) -> tuple[Bytes, npt.NDArray[np.bool_]]:
        """Returns the rows, uint8 [B, row_bytes], and whether each is there; the others hold no meaning."""
        if os.fstat(self._file).st_size < len(self._rows) * self.stride:
            self._map()  # somebody has shortened the file
        found = np.zeros((len(numbers), self.stride), np.uint8)
        inside = numbers < len(self._rows)
        found[inside] = self._rows[numbers[inside]]  # a copy, which no other process changes
        rows = found[:, : self.row_bytes]
        stored = found[:, self.row_bytes : self.row_bytes + _CHECKSUM]
        return rows, (stored == self._checksum(rows, numbers)).all(1)

    def write(self, numbers: Numbers, rows: Bytes) -> None:
        """Writes rows, uint8 [B, row_bytes].

        Raises:
            OSError: the disk is full, or fails. Rows may have been written in part, and are then missing.
        """
        assert self._writable
        whole = np.concatenate([rows, self._checksum(rows, numbers)], 1)
        for number, row in zip(numbers.tolist(), whole, strict=True):
            content = row.tobytes()
            if os.pwrite(self._file, content, number * self.stride) < len(content):
                raise OSError(f"{self.path}: a row was written in part; the disk may be full")

    def _map(self) -> None:
        """Extends the file to its size, if it may be written, and maps its whole rows into memory."""
        if self._writable and os.fstat(self._file).st_size < self.total_bytes:
            # The last byte belongs to no row. `truncate` would shorten a file that has grown in between.
            os.pwrite(self._file, b"\0", self.total_bytes - 1)
        rows = min(self.rows, os.fstat(self._file).st_size // self.stride)
        self._rows = np.empty((0, self.stride), np.uint8)
        if rows:
            with open(self._file, "rb", closefd=False) as file:
                self._rows = np.memmap(file, np.uint8, "r", shape=(rows, self.stride))

    def _checksum(self, rows: Bytes, numbers: Numbers) -> Bytes:
        """Computes the checksums of rows as bytes, uint8 [B, 8]; none is zero, which a hole holds.

        Each half is the upper half of a sum of the row's 32-bit words, weighed by random 64-bit numbers
        (multilinear hashing: Lemire and Kaser, "Strongly universal string hashing is fast", 2014). Two
        different rows have the same half with a chance of 2⁻³², and the same checksum with 2⁻⁶⁴.
        """
        words = np.ascontiguousarray(rows).view("<u4").astype(np.uint64)
        number = numbers.astype(np.uint64)
        half = np.uint64(32)
        sums = [
            words @ w[3:] + (number & np.uint64(0xFFFFFFFF)) * w[0] + (number >> half) * w[1] + w[2]
            for w in self._weights
        ]
        checksum = (sums[0] >> half << half) | (sums[1] >> half)
        checksum[checksum == 0] = 1
        return checksum.astype("<u8").view(np.uint8).reshape(-1, _CHECKSUM)
