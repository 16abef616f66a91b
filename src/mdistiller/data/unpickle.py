"""Unpickling of plain containers and number arrays without running code from the file.

A pickle can name any importable callable. A stand-in that only stores its arguments replaces each name that
number arrays need; every other name is refused. NumPy's own constructors are not used, because they write
to shared objects and trust the sizes in the file.
"""

import io
import pickle
import pickletools
from pathlib import Path

import numpy as np

from mdistiller.errors import DataError

_NUMBERS = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8"}


def _text(value: object) -> str:
    # Python 2 wrote byte strings instead of text.
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


class _StandIn:
    # On the class itself, which a pickle can also name, this call is a TypeError.
    def __setstate__(self, state: tuple) -> None:
        raise pickle.UnpicklingError(f"state for {type(self).__name__}")


class _DType(_StandIn):
    def __init__(self, code: object, *_: object) -> None:
        self.code, self.order = _text(code), "|"

    def __setstate__(self, state: tuple) -> None:
        self.order = _text(state[1])

    def numpy(self) -> np.dtype:
        if self.code not in _NUMBERS or self.order not in ("|", "<", ">", "="):
            raise pickle.UnpicklingError(f"array of type {self.order + self.code!r}")
        return np.dtype(self.order + self.code)


class _Array(_StandIn):
    def __init__(self, *_: object) -> None:
        self.value: np.ndarray = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = np.frombuffer(raw, dtype.numpy()).reshape(shape, order="F" if fortran else "C")


class _FromBuffer(_StandIn):
    def __new__(cls, raw: bytes, dtype: _DType, shape: tuple, order: str) -> _Array:  # type: ignore[misc]
        array = _Array()
        array.__setstate__((1, shape, dtype, order == "F", raw))
        return array


class _Scalar(_StandIn):
    def __new__(cls, dtype: _DType, raw: bytes) -> int | float:  # type: ignore[misc]
        return np.frombuffer(raw, dtype.numpy(), count=1)[0].item()


class _Encode(_StandIn):
    def __new__(cls, text: str, encoding: str = "latin1") -> bytes:  # type: ignore[misc]
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"bytes in encoding {encoding!r}")
        return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], type] = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    ("_codecs", "encode"): _Encode,  # bytes in protocols 0 to 2
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): _Scalar,
    ("numpy.core.numeric", "_frombuffer"): _FromBuffer,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        key = module.replace("numpy._core.", "numpy.core."), name  # NumPy 2 and 1
        if key not in _ALLOWED:
            raise DataError(f"it asks for {module}.{name}, which no array of numbers needs; not run")
        return _ALLOWED[key]


def _check_memo(data: bytes) -> None:
    # At a damaged memo index, the unpickler would allocate a table of that length before it fails.
    for count, (opcode, arg, _) in enumerate(pickletools.genops(data)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= int(arg or 0) <= count:
            raise pickle.UnpicklingError(f"memo index {arg} at instruction {count}")


def read_pickle(path: Path) -> dict[str, object]:
    """Reads the dict in a pickle file: text keys; plain containers, numbers and NumPy arrays as values.

    A file that cannot be read, is damaged, holds no dict or names any other callable is a DataError.
    """
    try:
        data = path.read_bytes()
        _check_memo(data)
        entry = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        if not isinstance(entry, dict):
            raise DataError(f"got {type(entry).__name__}, need dict")
        return {_text(k): v.value if isinstance(v, _Array) else v for k, v in entry.items()}
    except Exception as error:  # a damaged pickle may fail in any way
        line = " ".join(str(error).split())
        if isinstance(error, DataError):
            raise DataError(f"{path} is refused: {line}") from None
        raise DataError(f"{path} cannot be read as a pickle: {type(error).__name__}: {line}") from error
