"""Rows of one size in one sparse file, which several processes read and write at once, and their formats."""

import hashlib
import os
import weakref
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import numpy.typing as npt

_CHECKSUM, _PAD = 8, 4  # bytes behind a row

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]
Records = npt.NDArray[np.void]
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
        row_bytes: bytes of a row.
        rows: number of rows.
        salt: 64 bits that name the content.
        writable: open the file for writing.

    Raises:
        OSError: the file cannot be opened, made or extended.
    """

    def __init__(self, path: Path, row_bytes: int, rows: int, salt: int, *, writable: bool = True) -> None:
        assert rows > 0
        self.path, self.row_bytes, self.rows = path, row_bytes, rows
        self.stride = self.stride_of(row_bytes)
        self._salt = salt.to_bytes(8, "little")
        self._file = os.open(path, os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY, 0o666)
        weakref.finalize(self, os.close, self._file)
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
        """Returns the rows, uint8 [B, row_bytes], and whether each is there; the others are zero."""
        rows = np.zeros((len(numbers), self.row_bytes), np.uint8)
        there = np.zeros(len(numbers), np.bool_)
        for i, number in enumerate(numbers.tolist()):
            # A row beyond the file's end is short.
            row = os.pread(self._file, self.row_bytes + _CHECKSUM, number * self.stride)
            content, checksum = row[: self.row_bytes], row[self.row_bytes :]
            if checksum == self._checksum(content, number):
                rows[i], there[i] = np.frombuffer(content, np.uint8), True
        return rows, there

    def write(self, numbers: Numbers, rows: Bytes) -> None:
        """Writes rows, uint8 [B, row_bytes].

        Raises:
            OSError: the disk is full, or fails. Rows may have been written in part, and are then missing.
        """
        for number, row in zip(numbers.tolist(), rows, strict=True):
            content = row.tobytes()
            content += self._checksum(content, number)
            if os.pwrite(self._file, content, number * self.stride) < len(content):
                raise OSError(f"{self.path}: a row was written in part; the disk may be full")

    def _checksum(self, row: bytes, number: int) -> bytes:
        content = number.to_bytes(8, "little") + row
        return hashlib.blake2b(content, digest_size=_CHECKSUM, key=self._salt).digest()


class RowFormat(ABC):
    """Encoding of vectors as records; `decode(encode(values))` is the same on every machine.

    Args:
        fields: names, types and shapes of a record's fields, without gaps.
    """

    def __init__(self, *fields: tuple[str, str, tuple[int, ...]]) -> None:
        self.record = np.dtype([*fields])
        self.row_bytes = self.record.itemsize

    def encode(self, values: Values) -> Bytes:
        """Encodes vectors, float32 [B, D], all finite and at most `LARGEST`, as uint8 [B, row_bytes]."""
        records = np.zeros(len(values), self.record)
        self._write(records, values)
        return records.view(np.uint8).reshape(len(values), self.row_bytes)

    def decode(self, rows: Bytes) -> Values:
        """Decodes rows, uint8 [B, row_bytes], as float32 [B, D]."""
        return self._read(rows.view(self.record)[:, 0])

    @abstractmethod
    def _write(self, records: Records, values: Values) -> None: ...

    @abstractmethod
    def _read(self, records: Records) -> Values: ...


class Half(RowFormat):
    """Vectors in half precision."""

    def __init__(self, size: int) -> None:
        super().__init__(("values", "<f2", (size,)))

    def _write(self, records: Records, values: Values) -> None:
        records["values"] = values

    def _read(self, records: Records) -> Values:
        return records["values"].astype(np.float32)


class Int8(RowFormat):
    """Vectors in one byte a number, with an offset and a scale for each channel of a row.

    Logits are one channel, whose two largest are kept in half precision: they carry most of the probability,
    and their gap is far larger than that of the others, so the scale is that of the others alone.

    Args:
        size: numbers in a vector.
        channels: channels of tokens. None: the vector is logits.
    """

    def __init__(self, size: int, channels: int | None = None) -> None:
        self.size, self.top = size, 0 if channels else min(2, size)
        width, pair = channels or 1, (self.top,)
        super().__init__(
            *(("low", "<f4", (1, width)), ("scale", "<f4", (1, width))),
            *(("top", "<f2", pair), ("classes", "<i4", pair), ("levels", "u1", (size // width, width))),
        )

    def _write(self, records: Records, values: Values) -> None:
        tokens = values.reshape(records["levels"].shape)
        records["low"] = low = tokens.min(1, keepdims=True)
        high = tokens.max(1, keepdims=True)
        if self.top:
            third = -min(3, self.size)
            ordered = np.argpartition(values, range(third, 0), 1)
            records["classes"] = top = ordered[:, -self.top :]
            records["top"] = np.take_along_axis(values, top, 1)
            high = np.take_along_axis(tokens, ordered[:, third, None, None], 1)
        records["scale"] = scale = np.maximum((high - low) / np.float32(255), 0)
        levels = np.divide(tokens - low, scale, out=np.zeros_like(tokens), where=scale > 0)
        records["levels"] = np.clip(np.rint(levels), 0, 255)

    def _read(self, records: Records) -> Values:
        numbers = records["levels"] * records["scale"] + records["low"]
        values: Values = numbers.reshape(len(records), self.size)
        np.put_along_axis(values, records["classes"].astype(np.int64), records["top"].astype(np.float32), 1)
        return values


def row_format(size: int, name: Format) -> RowFormat:
    """Returns the encoding of vectors of a size, by its name."""
    if name.startswith("int8/"):
        return Int8(size, int(name.removeprefix("int8/")))
    return Int8(size) if name == "int8" else Half(size)
