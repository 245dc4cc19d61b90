"""Rows in: NumPy arrays and torch tensors (on any device) as wire bytes, converted a chunk at a time.

torch is never imported here: a tensor brings it along.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from nearkin.v1.soundness import all_finite, zero_rows
from numpy.typing import NDArray

from nearkin_client.errors import InvalidArgument, invalid

WIRE_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
PIECE_BYTES = 6 << 20
"""Stays in cache between being read, looked at, summed and written. Others take longer: docs/LOG.md."""
_CONVERTED_BYTES = 2 << 20
"""What is converted at a time."""
_DEVICE_BLOCK_BYTES = 4 << 20
"""What comes over from a device at a time: enough for its bus."""
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
    @property
    def in_place(self) -> bool:
        """Whether their bytes are the caller's own, which stay as they are until all is sent."""

    def payload(self, start: int, stop: int) -> memoryview:
        """The bytes of rows start..stop-1, in place if they can be; valid until this thread's next."""

    def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        """The same bytes in pieces that stay in a core's cache, each valid until this thread's next."""


def as_rows(field: str, values: Any, wire_dtype: str | None) -> Rows:
    """Check and wrap `values` [n, D] or [n, C, H, W]; anything that is not a tensor goes through NumPy.

    float64 is sent as float32 unless `wire_dtype` says otherwise: the service computes in float32.
    """
    tensor = _is_tensor(values)
    array: Any = _plain_tensor(field, values) if tensor else _plain_array(field, values)
    name = str(array.dtype).removeprefix("torch.") if tensor else array.dtype.name
    if name not in _TAKEN:
        invalid(f"{field}.dtype", name, f"is not one of {', '.join(_TAKEN)}")
    shape = tuple(int(size) for size in array.shape)
    if len(shape) not in (2, 4) or 0 in shape[1:]:
        invalid(f"{field}.shape", shape, "is neither [n, D] nor [n, C, H, W] with rows that are not empty")
    target = wire_dtype or (name if name in WIRE_DTYPES else "float32")
    if target not in WIRE_DTYPES:
        invalid("wire_dtype", wire_dtype, f"is not one of {', '.join(WIRE_DTYPES)}")
    if tensor and array.device.type == "cpu" and target == name:
        array, tensor = _seen_by_numpy(array), False
    elif not tensor and _torch_is_quicker(array, target):
        array, tensor = sys.modules["torch"].from_numpy(array), True
    return (_TensorRows if tensor else _ArrayRows)(array, shape[0], shape[1:], target)


def _plain_tensor(field: str, values: Any) -> Any:
    """The numbers alone: no gradients, no view that conjugates or negates when it is read."""
    torch = sys.modules["torch"]
    if values.is_nested or values.layout is not torch.strided:
        kind = "nested" if values.is_nested else str(values.layout).removeprefix("torch.")
        invalid(f"{field}.layout", kind, "is not that of whole rows; use to_dense() or to_padded_tensor()")
    if values.device.type == "meta":
        invalid(f"{field}.device", "meta", "is where tensors have no values")
    return values.detach().resolve_neg()


def _plain_array(field: str, values: Any) -> NDArray[Any]:
    if np.ma.is_masked(values):
        raise InvalidArgument(
            f"{field}: holds masked values; fill them, or name classes without an embedding in absent=",
            field=field,
        )
    try:
        return np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise InvalidArgument(f"{field}: {error}", field=field) from error


def _seen_by_numpy(tensor: Any) -> NDArray[Any]:
    """The same memory; NumPy has no bfloat16 of its own."""
    torch = sys.modules["torch"]
    if tensor.dtype is not torch.bfloat16:
        array: NDArray[Any] = tensor.numpy()
        return array
    return tensor.view(torch.int16).numpy().view(WIRE_DTYPES["bfloat16"])  # type: ignore[no-any-return]


def _torch_is_quicker(array: NDArray[Any], target: str) -> bool:
    """From float32 to 16 bits: it rounds to the same ones, in a fraction of the time."""
    taken = array.dtype == np.float32 and array.flags.writeable and min(array.strides) >= 0
    return taken and target != "float32" and "torch" in sys.modules


def _is_tensor(values: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(values, torch.Tensor)


class _Described:
    def __init__(self, values: Any, count: int, shape: tuple[int, ...], dtype: str) -> None:
        self.values = values
        self.count = count
        self.shape = shape
        self.dtype = dtype
        self.row_bytes = int(np.prod(shape, dtype=np.int64)) * WIRE_DTYPES[dtype].itemsize

    @property
    def in_place(self) -> bool:
        return False

    def payload(self, start: int, stop: int) -> memoryview:
        raise NotImplementedError

    def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        step = max(1, self._block_bytes() // self.row_bytes)
        for at in range(start, stop, step):
            yield from in_pieces(self.payload(at, min(at + step, stop)), self.row_bytes, PIECE_BYTES)

    def _block_bytes(self) -> int:
        return PIECE_BYTES if self.in_place else _CONVERTED_BYTES


class _ArrayRows(_Described):
    @property
    def in_place(self) -> bool:
        return bool(self.values.flags.c_contiguous and self.values.dtype == WIRE_DTYPES[self.dtype])

    def payload(self, start: int, stop: int) -> memoryview:
        with np.errstate(over="ignore"):  # what overflows float16 becomes Inf, which the service names by row
            chunk = np.ascontiguousarray(self.values[start:stop], WIRE_DTYPES[self.dtype])
        return _bytes_of(chunk)


class _TensorRows(_Described):
    """Converted by torch, on the tensor's device: fewer bytes come over."""

    def __init__(self, values: Any, count: int, shape: tuple[int, ...], dtype: str) -> None:
        super().__init__(values, count, shape, dtype)
        self._torch = sys.modules["torch"]
        self._mine = threading.local()

    def payload(self, start: int, stop: int) -> memoryview:
        torch = self._torch
        chunk = self.values[start:stop].to(getattr(torch, self.dtype)).contiguous()
        if self.dtype == "bfloat16":  # only the bytes matter
            chunk = chunk.view(torch.int16)
        if chunk.device.type == "cuda":
            chunk = self._through_pinned_memory(chunk)
        return _bytes_of(chunk.cpu().numpy())

    def _through_pinned_memory(self, chunk: Any) -> Any:
        """A device copies into pinned memory about twice as fast, and nothing is allocated for it."""
        pinned = getattr(self._mine, "pinned", None)
        if pinned is None or pinned.numel() < chunk.numel():
            pinned = self._mine.pinned = self._torch.empty(chunk.numel(), dtype=chunk.dtype, pin_memory=True)
        host = pinned[: chunk.numel()].view(chunk.shape)
        host.copy_(chunk)
        return host

    def _block_bytes(self) -> int:
        return _DEVICE_BLOCK_BYTES if self.values.device.type != "cpu" else _CONVERTED_BYTES


def in_pieces(data: memoryview, row_bytes: int, most: int) -> Iterator[memoryview]:
    """Whole rows in pieces of at most so many bytes, of whole rows or of one row."""
    step = max(row_bytes, most // row_bytes * row_bytes)
    for at in range(0, len(data), step):
        block = data[at : at + step]
        for begin in range(0, len(block), most):
            yield block[begin : begin + most]


def sound(piece: memoryview, rows: Rows) -> bool:
    """Whether all of a piece is finite and no row in it is all zero, as far as one quick look can tell."""
    width, dtype = min(rows.row_bytes, len(piece)), WIRE_DTYPES[rows.dtype]
    bits = np.frombuffer(piece, f"<u{dtype.itemsize}").reshape(len(piece) // width, -1)
    return all_finite(bits.reshape(-1), rows.dtype) and not len(zero_rows(bits))


def _bytes_of(contiguous: NDArray[Any]) -> memoryview:
    return contiguous.reshape(-1).view(np.uint8).data
