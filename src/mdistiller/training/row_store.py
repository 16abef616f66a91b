"""Rows of one size in one sparse file, which several processes read and write at once, and their formats."""

import os
import weakref
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

_WORD = 4  # bytes that a coefficient of the checksum weighs
_CHECKSUM, _PAD = 8, 4

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]
Format = str
"""`fp16`, `int8` for logits, or `int8/C` for tokens of C channels."""

LARGEST = 65504.0  # of half precision


class RowStore:
    """Rows of `row_bytes` bytes in a file, by number from 0.

    Each row is followed by a checksum of its bytes, its number and `salt`. A row is there if its checksum is
    right. So a row that was never written, was written in part when the process was killed, was written by
    two processes at once, is damaged, or is of another salt is missing, and can be written again.

    System calls read and write: through mapped memory, a full disk or a shortened file would be a signal.

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
        if writable and os.fstat(self._file).st_size < self.total_bytes:
            # The last byte belongs to no row. `truncate` would shorten a file that has grown in between.
            os.pwrite(self._file, b"\0", self.total_bytes - 1)

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
        read = partial(os.pread, self._file, self.stride)
        # A row beyond the file's end is short.
        content = [read(number * self.stride).ljust(self.stride, b"\0") for number in numbers.tolist()]
        found = np.frombuffer(bytearray().join(content), np.uint8).reshape(-1, self.stride)
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


class RowFormat(Protocol):
    """Encoding of vectors as rows of bytes; `decode(encode(values))` is the same on every machine."""

    row_bytes: int
    """Bytes of a row, a multiple of four."""

    def encode(self, values: Values) -> Bytes:
        """Encodes vectors, float32 [B, D], all finite and at most `LARGEST`, as uint8 [B, row_bytes]."""

    def decode(self, rows: Bytes) -> Values:
        """Decodes rows, uint8 [B, row_bytes], as float32 [B, D]."""


class Half(RowFormat):
    """Vectors in half precision."""

    def __init__(self, size: int) -> None:
        self.size, self.row_bytes = size, 4 * -(-size // 2)

    def encode(self, values: Values) -> Bytes:
        rows = np.zeros((len(values), self.row_bytes // 2), "<f2")
        rows[:, : self.size] = values
        return rows.view(np.uint8)

    def decode(self, rows: Bytes) -> Values:
        return np.ascontiguousarray(rows).view("<f2")[:, : self.size].astype(np.float32)


class Int8(RowFormat):
    """Logits in one byte each, with an offset and a scale a row, and the two largest in half precision.

    The two largest carry most of the probability, and their gap is far larger than that of the others, so the
    scale is that of the others alone. A row has the offset, the scale, the two largest, their classes, and
    the bytes of all classes.
    """

    def __init__(self, size: int) -> None:
        self.size, self.row_bytes = size, 4 * -(-(8 + 4 + 8 + size) // 4)
        self.top = min(2, size)

    def encode(self, values: Values) -> Bytes:
        rows = np.zeros((len(values), self.row_bytes), np.uint8)
        ordered = np.argpartition(values, range(-min(3, self.size), 0), 1)
        top = ordered[:, -self.top :]
        low = values.min(1, keepdims=True)
        third = ordered[:, -3:-2] if self.size > 2 else ordered[:, :1]
        scale = (np.take_along_axis(values, third, 1) - low) / np.float32(255)
        scale[scale < 0] = 0
        levels = np.divide(values - low, scale, out=np.zeros_like(values), where=scale > 0)
        rows[:, 0:8] = np.concatenate([low, scale], 1).astype("<f4").view(np.uint8)
        rows[:, 8 : 8 + 2 * self.top] = np.take_along_axis(values, top, 1).astype("<f2").view(np.uint8)
        rows[:, 12 : 12 + 4 * self.top] = np.ascontiguousarray(top).astype("<i4").view(np.uint8)
        rows[:, 20 : 20 + self.size] = np.clip(np.rint(levels), 0, 255)
        return rows

    def decode(self, rows: Bytes) -> Values:
        low, scale = np.ascontiguousarray(rows[:, 0:8]).view("<f4").astype(np.float32).T[..., None]
        values: Values = rows[:, 20 : 20 + self.size].astype(np.float32)
        values *= scale
        values += low
        largest = np.ascontiguousarray(rows[:, 8 : 8 + 2 * self.top]).view("<f2").astype(np.float32)
        top = np.ascontiguousarray(rows[:, 12 : 12 + 4 * self.top]).view("<i4")
        np.put_along_axis(values, top.astype(np.int64), largest, 1)
        return values


class Int8Tokens(RowFormat):
    """Tokens in one byte a number, with an offset and a scale for each channel of a row."""

    def __init__(self, size: int, channels: int) -> None:
        self.size, self.shape = size, (size // channels, channels)
        self.head = 8 * channels
        self.row_bytes = 4 * -(-(self.head + size) // 4)

    def encode(self, values: Values) -> Bytes:
        tokens = values.reshape(-1, *self.shape)
        low = tokens.min(1, keepdims=True)
        scale = (tokens.max(1, keepdims=True) - low) / np.float32(255)
        levels = np.divide(tokens - low, scale, out=np.zeros_like(tokens), where=scale > 0)
        rows = np.zeros((len(values), self.row_bytes), np.uint8)
        rows[:, : self.head] = np.concatenate([low, scale], 2).astype("<f4")[:, 0].view(np.uint8)
        rows[:, self.head : self.head + self.size] = np.rint(levels).reshape(values.shape)
        return rows

    def decode(self, rows: Bytes) -> Values:
        head = np.ascontiguousarray(rows[:, : self.head]).view("<f4").astype(np.float32)
        low, scale = np.split(head[:, None], 2, 2)
        levels = rows[:, self.head : self.head + self.size].astype(np.float32)
        values: Values = levels.reshape(-1, *self.shape) * scale + low
        return values.reshape(levels.shape)


def row_format(size: int, name: Format) -> RowFormat:
    """Returns the encoding of vectors of a size, by its name."""
    if name.startswith("int8/"):
        return Int8Tokens(size, int(name.removeprefix("int8/")))
    return Int8(size) if name == "int8" else Half(size)
