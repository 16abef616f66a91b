"""Formats in which a teacher's outputs for an image are stored: half precision, or int8."""

from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

LARGEST = 65504.0  # of half precision

Bytes = npt.NDArray[np.uint8]
Values = npt.NDArray[np.float32]
Format = Literal["int8", "fp16"]


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


def row_format(size: int, name: Format) -> RowFormat:
    """Returns the encoding of vectors of a size, by its name."""
    return Int8(size) if name == "int8" else Half(size)
