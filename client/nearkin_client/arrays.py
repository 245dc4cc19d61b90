"""Rows in: NumPy arrays and torch tensors (on any device) as wire bytes, converted a chunk at a time.

torch is never imported here: a tensor brings it along.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nearkin_client.errors import invalid

WIRE_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_TAKEN = (*WIRE_DTYPES, "float64")


class Rows(Protocol):
    """Rows to be sent. `count` rows of `shape`, in the wire dtype `dtype`, of `row_bytes` bytes each."""

    @property
    def count(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def row_bytes(self) -> int: ...
    def payload(self, start: int, stop: int) -> memoryview:
        """The bytes of rows start..stop-1: in place where they lie as the wire wants them."""

    def copy_into(self, out: NDArray[np.uint8], start: int, stop: int) -> None:
        """Copies rows start..stop-1 there, converted on the way; from a device too."""


def as_rows(field: str, values: Any, wire_dtype: str | None) -> Rows:
    """Check and wrap `values` [n, D] or [n, C, H, W]; anything that is not a tensor goes through NumPy.

    float64 is sent as float32 unless `wire_dtype` says otherwise: the service computes in float32.
    """
    tensor = _is_tensor(values)
    array = values.detach() if tensor else np.asarray(values)
    name = str(array.dtype).removeprefix("torch.") if tensor else array.dtype.name
    if name not in _TAKEN:
        invalid(f"{field}.dtype", name, f"is not one of {', '.join(_TAKEN)}")
    shape = tuple(int(size) for size in array.shape)
    if len(shape) not in (2, 4) or 0 in shape[1:]:
        invalid(f"{field}.shape", shape, "is neither [n, D] nor [n, C, H, W] with rows that are not empty")
    target = wire_dtype or (name if name in WIRE_DTYPES else "float32")
    if target not in WIRE_DTYPES:
        invalid("wire_dtype", wire_dtype, f"is not one of {', '.join(WIRE_DTYPES)}")
    return (_TensorRows if tensor else _ArrayRows)(array, shape[0], shape[1:], target)


def _is_tensor(values: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(values, torch.Tensor)


@dataclass(frozen=True, slots=True)
class _Described:
    values: Any
    count: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * WIRE_DTYPES[self.dtype].itemsize


class _ArrayRows(_Described):
    __slots__ = ()

    def payload(self, start: int, stop: int) -> memoryview:
        with np.errstate(over="ignore"):  # what overflows float16 becomes Inf, which the service names by row
            chunk = np.ascontiguousarray(self.values[start:stop], WIRE_DTYPES[self.dtype])
        return _bytes_of(chunk)

    def copy_into(self, out: NDArray[np.uint8], start: int, stop: int) -> None:
        with np.errstate(over="ignore"):
            goal = out.view(WIRE_DTYPES[self.dtype]).reshape(stop - start, *self.shape)
            np.copyto(goal, self.values[start:stop], casting="unsafe")


class _TensorRows(_Described):
    __slots__ = ()

    def payload(self, start: int, stop: int) -> memoryview:
        torch = sys.modules["torch"]
        chunk = self.values[start:stop].to(getattr(torch, self.dtype))  # on its device: fewer bytes come over
        chunk = chunk.cpu().contiguous()
        if self.dtype == "bfloat16":  # NumPy has no such dtype of its own; only the bytes matter
            chunk = chunk.view(torch.int16)
        return _bytes_of(chunk.numpy())

    def copy_into(self, out: NDArray[np.uint8], start: int, stop: int) -> None:
        torch = sys.modules["torch"]
        goal = torch.frombuffer(out, dtype=getattr(torch, self.dtype)).view(stop - start, *self.shape)
        chunk = self.values[start:stop]
        goal.copy_(chunk if chunk.device.type == "cpu" else chunk.to(goal.dtype))


def _bytes_of(contiguous: NDArray[Any]) -> memoryview:
    return contiguous.reshape(-1).view(np.uint8).data
